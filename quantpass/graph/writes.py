"""In-place writes of a graph, and what may not be moved across them.

A fused operator runs as soon as its operands are ready, which is earlier than the matmul and the epilogue it replaces.
A tensor that it reads must not be written to in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch._ops import OpOverload
from torch.fx import Graph, Node

from quantpass.graph.expr import Const, leaves_of
from quantpass.graph.schema import bind
from quantpass.graph.torch_internals import checks_guards


@dataclass(frozen=True, slots=True)
class Writes:
    """Attributes: ``mutated``, the nodes whose value changes at some place; ``writers``, in graph order."""

    mutated: frozenset[Node]
    writers: tuple[Node, ...]


def writes_of(graph: Graph, mutated: frozenset[Node]) -> Writes:
    """The nodes of ``graph`` that write to their arguments."""
    return Writes(mutated, tuple(n for n in graph.nodes if written_arguments(n)) if mutated else ())


def written_arguments(n: Node) -> tuple[Node, ...]:
    """The nodes that ``n`` writes to, lists of tensors and keyword arguments among them; none for most nodes."""
    if n.op in ("call_module", "call_method"):
        return () if checks_guards(n) else tuple(n.all_input_nodes)  # nothing is known of what these do
    if n.op != "call_function":
        return ()
    if not isinstance(n.target, OpOverload):
        return tuple(n.all_input_nodes) if _writes_by_name(n.target) else ()
    if not n.target._schema.is_mutable:
        return ()
    bound, found = bind(n), list[Node]()
    for argument in n.target._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = bound[argument.name]
            found.extend(a for a in (given if isinstance(given, list | tuple) else [given]) if isinstance(a, Node))
    return tuple(found)


def _writes_by_name(target: Any) -> bool:
    """Higher-order operators that say so, and Python's in-place operators."""
    name = str(getattr(target, "__name__", target))
    if getattr(target, "__module__", "") == "_operator":
        return name in _IN_PLACE
    return "mutation" in name


_IN_PLACE = frozenset(
    ["setitem", "delitem"]
    + [f"i{name}" for name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow")]
    + ["iand", "ior", "ixor", "ilshift", "irshift", "iconcat"]
)


def written_before(value: Any, output: Node, writes: Writes) -> Node | None:
    """A node that ``value`` reads and that may be written to between where it is made and ``output``; None for none."""
    if not writes.writers:
        return None
    for node in _nodes_of(value):
        if node in writes.mutated and any(node < w < output for w in writes.writers):
            return node
    return None


def _nodes_of(e: Any) -> Iterator[Node]:
    for leaf in leaves_of(e):
        if isinstance(leaf, Const):
            if leaf.origin is not None:
                yield leaf.origin
        else:
            yield leaf if isinstance(leaf, Node) else leaf.node
