"""The bodies of higher-order operators: branches, loops, and regions that are graphs of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node

from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject
from quantpass.graph.schema import op_name
from quantpass.patterns.affine import Affine, AffineReader, NotAffine

_CHOOSE = "compute both branches and choose with torch.where, or choose in Python before the call"
_UNROLL = "unroll the loop in Python, so that its matmuls lie in the graph itself"
_HINTS = {
    "cond": _CHOOSE,
    "while_loop": _UNROLL,
    "scan": _UNROLL,
    "map_impl": "call it once on the whole batch instead of torch's map",
    "associative_scan": _UNROLL,
    "invoke_subgraph": "take torch.compiler.nested_compile_region away, so that the region lies in the graph itself",
}


@dataclass(frozen=True, slots=True)
class Body:
    """A graph that a higher-order operator calls.

    Attributes:
        name: caller and attribute, e.g. ``"cond.true_graph_0"``.
        graph: the body.
        operands: for each of its placeholders what it is in the outer graph. A node, or None where it changes from
            call to call.
        parts: for each placeholder, the outer node that it is a slice of, or None.
        operator: the higher-order operator's name.
    """

    name: str
    graph: Graph
    operands: tuple[Any, ...]
    parts: tuple[Any, ...]
    operator: str

    def leaves(self, reader: AffineReader) -> dict[Node, torch.Tensor]:
        """The body's placeholders whose tensors are known."""
        found: dict[Node, torch.Tensor] = {}
        for inner, outer in zip(self.graph.find_nodes(op="placeholder"), self.operands, strict=True):
            tensor = reader.values.leaf(outer) if isinstance(outer, Node) else None
            if tensor is not None:
                found[inner] = tensor
        return found

    def given(self, reader: AffineReader) -> dict[Node, NotAffine]:
        """The body's placeholders that the outer graph hands a dequantized value."""
        found: dict[Node, NotAffine] = {}
        placeholders = self.graph.find_nodes(op="placeholder")
        for inner, same, part in zip(placeholders, self.operands, self.parts, strict=True):
            outer = same if same is not None else part
            read = reader.read(outer) if isinstance(outer, Node) else None
            if (isinstance(read, Affine) and read.factors) or (isinstance(read, NotAffine) and read.quantized):
                found[inner] = NotAffine(
                    f"{outer.name} is dequantized outside of {self.name}",
                    quantized=True,
                    hint=self._hint(),
                    rule="read.subgraph",
                )
        return found

    def reject(self) -> Reject:
        """Why a matmul of the body that could be fused elsewhere is not."""
        return refuse("read.subgraph", f"it lies in {self.name}, a graph that {self.operator} calls", hint=self._hint())

    def _hint(self) -> str:
        return _HINTS.get(self.operator, f"write it without {self.operator}")


def bodies_of(node: Node) -> Iterator[Body]:
    """The graphs that ``node`` calls; none where it calls none, or where they carry no shapes."""
    if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
        return
    operator = op_name(node)
    for attribute in dict.fromkeys(a for a in node.all_input_nodes if a.op == "get_attr"):
        module = _attribute(node, attribute)
        if module is None:
            continue
        placeholders = list(module.graph.find_nodes(op="placeholder"))
        operands, parts = _operands(operator, node, len(placeholders))
        caller = node.name if node.name.startswith(operator) else operator
        yield Body(f"{caller}.{attribute.target}", module.graph, operands, parts, operator)


def _attribute(node: Node, attribute: Node) -> GraphModule | None:
    value: Any = node.graph.owning_module
    for part in str(attribute.target).split("."):
        value = getattr(value, part, None)
    if not isinstance(value, GraphModule):
        return None
    calls = [n for n in value.graph.nodes if n.op in ("placeholder", "call_function")]
    return value if all("val" in n.meta for n in calls) else None


def _operands(operator: str, node: Node, count: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What each of a body's ``count`` placeholders is in the outer graph, and what it is a slice of."""
    same, sliced = _layout(operator, node)
    if len(same) != count:
        return (None,) * count, (None,) * count
    return tuple(same), tuple(sliced)


def _layout(operator: str, node: Node) -> tuple[list[Any], list[Any]]:
    args = node.args
    if operator == "cond" and len(args) == 4:
        return _known(args[3])
    if operator == "while_loop" and len(args) == 4:
        return _joined(_changing(args[2]), _known(args[3]))
    if operator == "scan" and len(args) == 4:
        return _joined(_changing(args[1]), _sliced(args[2]), _known(args[3]))
    if operator == "map_impl" and len(args) == 3:
        return _joined(_sliced(args[1]), _known(args[2]))
    if operator == "associative_scan" and len(args) == 3:
        return _joined(_sliced(args[1]), _sliced(args[1]), _known(args[2]))
    # invoke_subgraph(graph, name, *operands), wrap_with_...(..., graph, *operands)
    position = max((i for i, a in enumerate(args) if isinstance(a, Node) and a.op == "get_attr"), default=0)
    rest = args[position + 1 :]
    return _known(rest[1:] if operator == "invoke_subgraph" else rest)


def _known(operands: Any) -> tuple[list[Any], list[Any]]:
    return list(operands), [None] * len(operands)


def _sliced(operands: Any) -> tuple[list[Any], list[Any]]:
    return [None] * len(operands), list(operands)


def _changing(operands: Any) -> tuple[list[Any], list[Any]]:
    return [None] * len(operands), [None] * len(operands)


def _joined(*groups: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any]]:
    return [a for g in groups for a in g[0]], [b for g in groups for b in g[1]]
