"""Operators that a finished graph may still hold and that torchair does not know, in terms of those that it does.

Most are what stays of a model's own quantization where nothing was fused: PyTorch's named quantize and dequantize
operators, spelled out as PyTorch defines them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from quantpass.lowering.expansion import expand


def expand_leftovers(gm: GraphModule, table: Mapping[Any, Callable[..., Any]] | None = None) -> None:
    """Replace the operators of ``table`` (by default :func:`leftover_table`) in place, by what they are made of.

    Args:
        gm: an ATen graph whose nodes carry ``meta["val"]``.
        table: for each operator a function of the same arguments that calls others.
    """
    known = leftover_table() if table is None else table
    for check in gm.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        gm.graph.erase_node(check)  # the trace has checked it; nothing reads it
    found = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in known]
    for node in found:
        _expand(gm, node, known[node.target])
    if found:
        gm.graph.lint()
        gm.recompile()


def leftover_table() -> dict[Any, Callable[..., Any]]:
    """Operator to function. Those of ``quantized_decomposed`` are there once something has defined them."""
    table = dict(_REDUNDANT)
    namespace = torch.ops.quantized_decomposed
    if not hasattr(namespace, "quantize_per_tensor"):
        return table
    source = importlib.import_module("torch.ao.quantization.fx._decomposed")
    for name in dir(namespace):
        packet = getattr(namespace, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            function = getattr(source, name if overload == "default" else f"{name}_{overload}", None)
            if function is not None:
                table[getattr(packet, overload)] = function
    return table


def _squeeze_dims(x: torch.Tensor, dims: list[int]) -> torch.Tensor:
    for dim in sorted((d % x.dim() for d in dims), reverse=True):
        x = torch.ops.aten.squeeze.dim(x, dim)
    return x


_REDUNDANT: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.sub.Scalar: lambda x, other, alpha=1: torch.ops.aten.sub.Tensor(x, other, alpha=alpha),
    torch.ops.aten.clamp_max.default: lambda x, largest: torch.ops.aten.clamp.default(x, None, largest),
    torch.ops.aten.squeeze.dims: _squeeze_dims,
}
"""ATen operators that say what another one says, which torchair converts."""


def _expand(gm: GraphModule, node: Node, function: Callable[..., Any]) -> None:
    tensors = list(dict.fromkeys(node.all_input_nodes))

    def call(*values: Any) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), dict(zip(tensors, values, strict=True)).__getitem__)
        return function(*args, **kwargs)

    expand(gm, node, call, tensors)
