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

from quantpass.expr import Const, leaves_of
from quantpass.torch_internals import checks_guards


@dataclass(frozen=True, slots=True)
class Writes:
    """Attributes: ``mutated``, the nodes whose value changes at some place; ``writers``, in graph order."""

    mutated: frozenset[Node]
    writers: tuple[Node, ...]


def writes_of(graph: Graph, mutated: frozenset[Node]) -> Writes:
    """The nodes of ``graph`` that write to their arguments."""
    return Writes(mutated, tuple(n for n in graph.nodes if _writes(n)) if mutated else ())


def _writes(n: Node) -> bool:
    if n.op == "call_function":
        return isinstance(n.target, OpOverload) and n.target._schema.is_mutable
    return n.op in ("call_module", "call_method") and not checks_guards(n)


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
