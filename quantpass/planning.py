"""Choosing a fused operator for a site, with the fix-ups that make it legal on a chip.

Candidates are tried from the most to the least complete; each is described to :mod:`quantpass.legality`, and the first
legal one is the plan. Nothing here touches the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch.fx import Node

from quantpass import expr as ex
from quantpass.candidates import Candidate, aten
from quantpass.chips.calls import QMM
from quantpass.chips.rules import Chip
from quantpass.composition import Composition, compositions
from quantpass.expr import Const, Expr, Ref
from quantpass.legality import judge
from quantpass.options import Options
from quantpass.patterns.affine import Affine, NotAffine
from quantpass.plan_quant_matmul import quant_matmul_candidates
from quantpass.plan_weight_quant import weight_quant_candidates
from quantpass.records import Numerics, Plan, Reject, Weight
from quantpass.sites import Reading
from quantpass.writes import Writes, written_before


@dataclass(frozen=True, slots=True)
class Planned:
    """The outcome for a site: a plan with its numerics, or the reasons why there is none."""

    plan: Plan | None
    numerics: Numerics | None
    rejects: tuple[Reject, ...] = ()


def plan_site(reading: Reading, chip: Chip, options: Options, writes: Writes) -> Planned:
    """Find the best legal fused call for one site on one chip; ``writes`` is what the graph writes to in place."""
    if reading.rejects:
        return Planned(None, None, reading.rejects)
    assert reading.epilogue is not None and isinstance(reading.weight, Weight)
    assert reading.contraction is not None
    prefixes = compositions(reading.node, reading.contraction.product_dtype, reading.epilogue.steps)
    if reading.contraction.whole:
        prefixes = [p for p in prefixes if p.length >= len(reading.contraction.own)]
    rejects: list[Reject] = []
    not_nz: list[Reject] = []
    nearest: dict[str, tuple[Reject, ...]] = {}
    for candidate in _candidates(reading, prefixes, chip, options):
        if isinstance(candidate, Reject):
            rejects.append(candidate)
            continue
        verdict = judge(candidate.call, chip, options.allow)
        if verdict.legal:
            plan = _as_plan(candidate, reading, _why_not(rejects, nearest), verdict.assumptions)
            written = written_before(plan.value, plan.output, writes)
            if written is not None:
                rejects.append(_written(written))
                continue
            if plan.weight_format == "ND":
                plan = replace(plan, nd_reason=_nd_reason(plan, reading.weight, not_nz, chip, options))
            return Planned(plan, candidate.numerics)
        if candidate.weight_format == "NZ":
            not_nz.extend(verdict.rejects)
        family = _family(candidate)
        if family not in nearest or len(verdict.rejects) < len(nearest[family]):
            nearest[family] = verdict.rejects
    return Planned(None, None, _why_not(rejects, nearest) or (_nothing_fits(reading),))


def _why_not(rejects: list[Reject], nearest: dict[str, tuple[Reject, ...]]) -> tuple[Reject, ...]:
    """What stands against a site: reasons from planning, and what each operator's most nearly legal call breaks."""
    planned = [family for family in nearest if any(r.rule.startswith(family) for r in rejects)]
    broken = [r for family, found in nearest.items() if family not in planned for r in found]
    return tuple(dict.fromkeys((*rejects, *broken)))


def _nd_reason(plan: Plan, weight: Weight, not_nz: list[Reject], chip: Chip, options: Options) -> str:
    """Why a weight is not laid out in FRACTAL_NZ."""
    layouts = chip.layouts_of(plan.op, options.mode)
    if options.nz == "never":
        return "nz='never'"
    if all(x.format == "ND" for x in layouts):
        return f"{chip.name} takes this operator's weight in ND in {options.mode} mode ({layouts[0].reason})"
    if not isinstance(weight.codes, Const):
        return "its values are not known when compiling"
    return f"{not_nz[0].rule}: {not_nz[0].fact}" if not_nz else "it can't be packed in the layout that FRACTAL_NZ needs"


def _candidates(
    reading: Reading, prefixes: list[Composition], chip: Chip, options: Options
) -> Iterator[Candidate | Reject]:
    if isinstance(reading.activation, Affine):
        yield from quant_matmul_candidates(reading, prefixes, chip, options)
    elif reading.activation.quantized:
        yield _activation_reject(reading.activation)
    yield from weight_quant_candidates(reading, prefixes, chip, options)


def _family(candidate: Candidate) -> str:
    return "qmm." if candidate.call.op == QMM else "wqmm."


def _activation_reject(read: NotAffine) -> Reject:
    return Reject(
        "read.activation",
        f"the activation: {read.reason}",
        "an activation read as scale * (codes - zero_point)",
        read.hint,
    )


def _written(node: Node) -> Reject:
    return Reject(
        "read.mutated",
        f"the graph writes to {node.name} in place before it uses the matmul's result",
        "operands that keep their value: the fused operator runs where its operands are ready",
        "use the functional form (torch.export, torch.compile) or move the write behind the matmul",
    )


def _nothing_fits(reading: Reading) -> Reject:
    assert reading.x is not None
    return Reject(
        "plan.none",
        f"no fused operator takes a {ex.dtype_of(reading.x)} activation here",
        "a floating or int8 activation",
    )


def _as_plan(
    candidate: Candidate, reading: Reading, passed_over: tuple[Reject, ...], assumptions: tuple[str, ...]
) -> Plan:
    notes = [f"assumes {a}" for a in assumptions]
    if candidate.call.op != QMM and isinstance(reading.activation, Affine) and passed_over:
        notes.append(f"the activation's quantization stays in the graph: {passed_over[0].fact}")
    return Plan(
        op=candidate.call.op,
        output=candidate.composition.output,
        value=_with_leftover(candidate, reading),
        fixups=candidate.fixups,
        call=dict(candidate.call.args),
        weight_format=candidate.weight_format,
        notes=tuple(notes),
        int8_codes=candidate.int8_codes,
    )


def _with_leftover(candidate: Candidate, reading: Reading) -> Expr:
    """The fused value, with what the matmul operator adds or scales by itself and the plan did not take in."""
    c, value = reading.contraction, candidate.value
    assert c is not None
    dtype, shape = c.node.meta["val"].dtype, tuple(c.node.meta["val"].shape)
    for own in c.own[candidate.composition.length :]:
        operand = Ref(own.operand) if isinstance(own.operand, Node) else own.operand
        if own.kind == "scale":
            value = ex.apply(aten.mul.Tensor, value, operand, dtype=dtype, shape=shape)
        else:
            value = ex.apply(aten.add.Tensor, _times(operand, own.times), value, dtype=dtype, shape=shape)
    return value


def _times(operand: Expr, times: object) -> Expr:
    if isinstance(times, int | float) and times == 1:
        return operand
    return ex.apply(aten.mul.Tensor, operand, times, dtype=ex.dtype_of(operand), shape=ex.shape_of(operand))
