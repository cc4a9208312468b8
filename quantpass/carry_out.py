"""From a fused graph to one that runs: formats, then the lowering that was asked for."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule

from quantpass.constants import Constants
from quantpass.lowering.aclnn import lower_to_aclnn
from quantpass.lowering.format_casts import carry_out_casts, ledger
from quantpass.options import Options
from quantpass.pipeline import Outcome
from quantpass.records import WeightFormat


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
    if options.lowering == "aclnn":
        lower_to_aclnn(gm, constants)
    return tuple(rows.values())
