"""Weights that hold no data (on the meta device, fake): verdicts on them are conditional, and say so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from quantpass.basics.reasons import refuse
from quantpass.basics.symbolic import statically_true
from quantpass.graph.torch_internals import no_data_reason
from quantpass.patterns.sites import Reading
from quantpass.planning.choose import Planned

NOT_READ = "values not read"

UNREAD = refuse("read.weight.unread", "the weight is computed from integers that hold no data")
"""The verdict on a matmul whose weight could be anything."""


def fed_by_unread(graph: Graph, known: Collection[Node], unread: Collection[Node]) -> frozenset[Node]:
    """Nodes with an input that could be computed once, if only the tensors of ``unread`` held data."""
    fixed: set[Node] = {*known, *unread}
    hidden: set[Node] = {*unread}
    fed: set[Node] = set()
    for node in graph.nodes if unread else ():
        inputs = node.all_input_nodes
        if node.op != "call_function" or not any(i in hidden for i in inputs):
            if node.op == "call_function" and all(i in fixed for i in inputs) and not _is_random(node):
                fixed.add(node)
            continue
        fed.add(node)
        if all(i in fixed for i in inputs):
            fixed.add(node)
            hidden.add(node)
    return frozenset(fed)


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def made_of_integers(node: Node, fed: Collection[Node]) -> bool:
    """True for a float matrix computed from integers without data, at least a bit of them for each element."""
    fake = node.meta.get("val")
    if node not in fed or not isinstance(fake, torch.Tensor) or not fake.is_floating_point() or fake.dim() < 2:
        return False
    stack, seen = [node], {node}
    while stack:
        n = stack.pop()
        value = n.meta.get("val")
        if isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dtype != torch.bool:
            bits = 8 * value.element_size() * value.numel()
            if n.op in ("placeholder", "get_attr") and statically_true(bits >= fake.numel()):
                return True
        fresh = [i for i in n.all_input_nodes if i not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return False


def conditional(reading: Reading, planned: Planned) -> tuple[Reading, Planned]:
    """A verdict that rests on values nobody has seen, marked as such."""
    plan = planned.plan
    if plan is not None:
        plan = replace(plan, notes=(*plan.notes, f"{NOT_READ}: holds if the weight is as it looks"))
    hint = "its tensors hold no data, so it could not be read by value: load the weights and ask again"
    rejects = tuple(
        replace(r, hint=f"{r.hint}; {hint}" if r.hint else hint) if r.rule.startswith("read.") else r
        for r in planned.rejects
    )
    return replace(reading, text=f"{reading.text} ({NOT_READ})"), replace(planned, plan=plan, rejects=rejects)


def require_data(door: str, model: Any, args: Any, kwargs: Any) -> None:
    """Raise ``ValueError`` where a door that computes numbers is given a model or inputs without data."""
    weights: list[Any] = []
    if isinstance(model, ExportedProgram):
        weights = [*model.state_dict.values(), *model.constants.values()]
    elif isinstance(model, torch.nn.Module):
        weights = [*model.parameters(), *model.buffers()]
    tensors = (t for t in (*weights, *tree_leaves((args, kwargs))) if isinstance(t, torch.Tensor))
    without = [why for t in tensors if (why := no_data_reason(t)) in ("on the meta device", "a fake tensor")]
    if without:
        raise ValueError(
            f"{door} computes with the weights and inputs, and {len(without)} of them hold no data ({without[0]}): "
            "load the model and give real inputs, or ask quantpass.explain, which needs shapes only"
        )


def unread_note(unread: Mapping[Node, str]) -> str:
    """The report's words for weights without data."""
    reasons = ", ".join(f"{n} {why}" for why, n in Counter(unread.values()).items())
    return (
        f"weights not read: {len(unread)} parameters and buffers hold no data ({reasons}). Verdicts marked "
        f"'{NOT_READ}' are conditional: the values may allow a better form (int4 packing, FRACTAL_NZ, prepared scales) "
        "or forbid the fusion. Load the weights and ask again"
    )
