"""Which nodes compute the same thing a second time.

Tools quantize an activation once for every Linear that reads it. The float parts of a graph are none of this
module's business: it looks at what leads up to a fused operator, as far as that is elementwise, a reduction or a view.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from quantpass.graph.decode import decode
from quantpass.graph.instructions import Cast, Move, Part
from quantpass.graph.torch_versions import is_reduction

_MAKES = frozenset(
    f"aten::{name}" for name in ["full_like", "zeros_like", "ones_like", "full", "amax", "constant_pad_nd"]
)


_QUANTIZE = ("quantpass::dynamic_quant", "quantpass::quantize")


def duplicates(
    roots: Iterable[Node], written_to: Collection[Node], results: Collection[Node]
) -> Iterator[tuple[Node, Node]]:
    """Pairs ``(later, earlier)`` of nodes with equal values, inputs before users.

    Args:
        roots: fused nodes.
        written_to: nodes that the graph writes to in place: what reads one may find another value each time.
        results: results of the graph, which stay tensors of their own.
    """
    first: dict[Any, Node] = {}
    same: dict[Node, Node] = {}
    for node in _leading_up_to(roots):
        if node in results or any(n in written_to for n in (node, *node.all_input_nodes)):
            continue
        earlier = first.setdefault(_key(node, same), node)
        if earlier is not node:
            same[node] = earlier
            yield node, earlier


def _leading_up_to(roots: Iterable[Node]) -> list[Node]:
    todo = [i for root in roots for i in root.all_input_nodes]
    found: set[Node] = set()
    plain: dict[Any, bool | None] = {}
    while todo:
        node = todo.pop()
        if node.op != "call_function" or node in found:
            continue
        if node.target not in plain:
            plain[node.target] = _is_plain(node.target)
        known = plain[node.target]
        if known or (known is None and isinstance(decode(node), Move | Part | Cast)):
            found.add(node)
            todo.extend(node.all_input_nodes)
    return sorted(found)


def _is_plain(target: Any) -> bool | None:
    """True for an operator that always is; None where its arguments have to be looked at."""
    if not isinstance(target, OpOverload):
        return target is operator.getitem
    schema, tags = target._schema, target.tags
    if schema.name in _QUANTIZE:
        return True
    if schema.is_mutable or torch.Tag.nondeterministic_seeded in tags or target.namespace == "quantpass":
        return False
    if torch.Tag.pointwise in tags or is_reduction(target) or target.is_view:
        return True
    return schema.name in _MAKES or target.namespace == "quantized_decomposed" or None


def _key(node: Node, same: dict[Node, Node]) -> Any:
    def frozen(a: Any) -> Any:
        if isinstance(a, Node):
            return same.get(a, a)
        if isinstance(a, list | tuple):
            return tuple(frozen(x) for x in a)
        return (type(a), repr(a))

    return node.target, frozen(node.args), tuple(sorted((k, frozen(v)) for k, v in node.kwargs.items()))
