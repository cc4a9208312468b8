"""Graphs as text, and the difference between two of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from quantpass.graph.schema import op_name

_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
}


def describe_value(value: Any) -> str:
    """``f16[18, 384]`` for a tensor."""
    if isinstance(value, torch.Tensor):
        return f"{_SHORT.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(describe_value(v) for v in value)})"
    return type(value).__name__


def describe_node(node: Node) -> str:
    """One line for one node."""
    value = f": {describe_value(node.meta['val'])}" if "val" in node.meta else ""
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    if node.op == "placeholder":
        return f"%{node.name}{value} = input"
    if node.op == "get_attr":
        return f"%{node.name}{value} = constant {node.target}"
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(a)}" for k, a in node.kwargs.items()]
    return f"%{node.name}{value} = {op_name(node)}({', '.join(arguments)})"


def _argument(a: Any) -> str:
    if isinstance(a, Node):
        return f"%{a.name}"
    if isinstance(a, list | tuple):
        return f"[{', '.join(_argument(x) for x in a)}]"
    if isinstance(a, torch.dtype):
        return str(a).removeprefix("torch.")
    if isinstance(a, OpOverload):
        return str(a)
    return repr(a)


def dump(graph: Graph | GraphModule) -> str:
    """A graph as text, one line a node; unused placeholders are left out."""
    nodes: Iterable[Node] = (graph.graph if isinstance(graph, GraphModule) else graph).nodes
    return "\n".join(describe_node(n) for n in nodes if n.op != "placeholder" or n.users)


def diff_text(before: str, after: str, context: int = 2) -> str:
    """Unified difference of two dumps, without file headers."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=context)
    return "\n".join(line for line in lines if not line.startswith(("---", "+++")))
