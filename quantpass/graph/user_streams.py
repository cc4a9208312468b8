"""Streams of a graph that torchair runs on several: nodes between ``air.scope_enter`` and ``air.scope_exit``.

A fused operator is placed right after the last of its inputs, which may be on another side of such a mark. So a site
that has anything to do with a stream of the user's own is left as it is.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject
from quantpass.graph.expr import Const, Expr, Ref, leaves_of
from quantpass.graph.records import Plan

_ENTER, _EXIT, _KEY = "air.scope_enter.default", "air.scope_exit.default", "_user_stream_label"


def stream_labels(graph: Graph) -> dict[Node, str]:
    """The label of each node that runs on a stream of the user's; nodes on the default stream are left out."""
    if not any(str(target) == _ENTER for target in {n.target for n in graph.nodes}):
        return {}
    labels: dict[Node, str] = {}
    outer: list[str | None] = []
    current: str | None = None
    for node in graph.nodes:
        name = str(node.target)
        if name == _ENTER:
            outer.append(current)
            keys, values = [*node.args, (), ()][:2]
            if _KEY in keys:
                current = str(values[list(keys).index(_KEY)])
        elif name == _EXIT:
            current = outer.pop() if outer else None
        elif current is not None:
            labels[node] = current
    return labels


def stream_reject(plan: Plan, labels: dict[Node, str]) -> Reject | None:
    """Why a site has to be left alone, where some of its nodes or inputs are on a stream of the user's."""
    inputs = _inputs(plan.value) if labels else set()
    found: set[str] = set()
    todo, seen = [plan.output] if labels else [], {plan.output}
    while todo:
        node = todo.pop()
        if node in labels:
            found.add(labels[node])
        if node in inputs:
            continue
        more = [i for i in node.all_input_nodes if i not in seen]
        seen.update(more)
        todo.extend(more)
    if not found:
        return None
    return refuse(
        "torchair.streams", f"the site or one of its inputs runs on the stream {', '.join(map(repr, sorted(found)))}"
    )


def _inputs(e: Expr | None) -> set[Node]:
    """The graph nodes whose values an expression reads; not those that it only asks for a size."""
    nodes = (
        leaf.node if isinstance(leaf, Ref) else leaf.origin for leaf in leaves_of(e) if isinstance(leaf, Ref | Const)
    )
    return {n for n in nodes if n is not None}
