"""From a fused graph to one that runs: formats, then the lowering that was asked for."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace

from torch.fx import GraphModule, Node

from quantpass.graph.constants import Constants
from quantpass.graph.records import PREPARED, WeightFormat
from quantpass.graph.site_keys import Token
from quantpass.lowering.format_casts import aliases, carry_out_casts, ledger
from quantpass.pipeline import Outcome
from quantpass.planning.options import Options


def carry_out(
    gm: GraphModule, outcome: Outcome, options: Options, constants: Constants, *, casts: bool = True
) -> tuple[WeightFormat, ...]:
    """Cast the weights that were planned in FRACTAL_NZ and lower the fused operators, in place.

    Args:
        gm: a graph that :func:`quantpass.pipeline.fuse_graph` has rewritten.
        outcome: what that returned.
        options: says which lowering.
        constants: the tensors behind the graph's inputs and attributes.
        casts: carry the casts out; otherwise they stay in the graph as planned.

    Returns:
        The format ledger: a row for each weight that a fused operator reads.
    """
    reasons = {s.name: s.plan.nd_reason for s in outcome.sites if s.plan is not None}
    rows = ledger(gm, constants, reasons)
    if casts:
        for source, how in carry_out_casts(gm, constants).items():
            why = "the graph or another tensor reads it as well" if how == "copied" else ""
            rows[source] = replace(rows[source], how=how, why=why)
    options.lowerer.lower(gm, constants)
    keys = {s.name: s.key for s in reversed(outcome.sites)}
    return tuple(replace(row, key=_key(constants, source, row, keys)) for source, row in rows.items())


def _key(constants: Constants, source: Node, row: WeightFormat, sites: Mapping[str, Hashable]) -> Hashable:
    """The user's tensor itself, by whichever of its names; for any other, the site that reads it."""
    same, _ = aliases(source, constants.given)
    for node, tensor in constants.given.items():
        if node is source or node in same:
            return Token(tensor)
    site = sites.get(row.sites[0])
    return None if site is None else (PREPARED if constants.owns(source) else "computed", site)
