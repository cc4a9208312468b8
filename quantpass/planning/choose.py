"""Choosing a fused operator for a site, with the fix-ups that make it legal on a chip.

Candidates are tried from the most to the least complete; each is described to :mod:`quantpass.chips.legality`, and the
first legal one is the plan. Nothing here touches the graph.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch.fx import Node

from quantpass.basics.boundary import guarded
from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject
from quantpass.chips.calls import VendorOp
from quantpass.chips.legality import Judge, Verdict
from quantpass.chips.quant_matmul import QMM
from quantpass.chips.quant_matmul_dequant import QMMD
from quantpass.chips.rules import Chip
from quantpass.graph import expr as ex
from quantpass.graph.expr import Const, Expr, Ref
from quantpass.graph.records import Numerics, Offer, Plan, Weight
from quantpass.graph.writes import Writes, written_before
from quantpass.patterns.affine import UNBOUNDED, Affine, NotAffine
from quantpass.patterns.sites import Reading
from quantpass.planning.candidates import Candidate, aten
from quantpass.planning.composition import Composition, compositions
from quantpass.planning.half_product import half_product_candidates
from quantpass.planning.options import Options
from quantpass.planning.quant_matmul import quant_matmul_candidates
from quantpass.planning.quant_matmul_dequant import has_it, quant_matmul_dequant_candidates
from quantpass.planning.requantize import Requantized, requantized
from quantpass.planning.weight_quant_matmul import weight_quant_candidates

_LOOK_AHEAD = 4
"""How many nodes behind an epilogue to look for a quantize, for a note."""


@dataclass(slots=True)
class Others:
    """What the sites of a graph have to do with each other.

    Attributes:
        needed: tensors that sites have an operator quantize.
        int8: nodes whose codes a plan makes as int8.
        judge: judges the calls of all of them, for one set of chips.
    """

    needed: set[Node] = field(default_factory=set)
    int8: set[Node] = field(default_factory=set)
    judge: Judge = field(default_factory=Judge)


@dataclass(frozen=True, slots=True)
class Planned:
    """The outcome for a site: a plan with its numerics, or the reasons why there is none and what would help."""

    plan: Plan | None
    numerics: Numerics | None
    rejects: tuple[Reject, ...] = ()
    offers: tuple[Offer, ...] = ()


def others_of(readings: Sequence[Reading], options: Options) -> Others:
    """What ``readings``, of one graph, need of each other."""
    if options.numerics != "vendor":
        return Others()
    made = (
        guarded(partial(requantized, r, options.chip, options, ()), _nothing, "") for r in readings if not r.rejects
    )
    dequant = has_it(options.chip)
    return Others({m.how.x for m in made if isinstance(m, Requantized) and (m.refused is None or dequant)})


def _nothing(reject: Reject) -> None:
    del reject


def plan_site(reading: Reading, chip: Chip, options: Options, writes: Writes, others: Others | None = None) -> Planned:
    """Find the best legal fused call for one site on one chip.

    Args:
        reading: the site.
        chip: for which chip.
        options: settings.
        writes: what the graph writes to in place.
        others: what other sites of the graph make and need; None for no other sites.
    """
    others = others or Others()
    if reading.rejects:
        return Planned(None, None, reading.rejects)
    assert reading.epilogue is not None
    assert isinstance(reading.weight, Weight)
    assert reading.contraction is not None
    prefixes = compositions(reading.node, reading.contraction.product_dtype, reading.epilogue.steps)
    if reading.contraction.whole:
        prefixes = [p for p in prefixes if p.length >= len(reading.contraction.own)]
    rejects: list[Reject] = []
    not_nz: list[Reject] = []
    nearest: dict[str, tuple[Reject, ...]] = {}
    made = requantized(reading, chip, options, others.int8)
    for candidate in _candidates(reading, prefixes, chip, options, made):
        if isinstance(candidate, Reject):
            rejects.append(candidate)
            continue
        if _takes_in(candidate, reading, others.needed):
            continue
        if _splits_alpha(candidate, reading):
            rejects.append(_split())
            continue
        numerics = _with_refit(_with_leftover_roundings(candidate, reading), candidate, reading)
        if not math.isfinite(numerics.relative + numerics.absolute + numerics.of_x + numerics.of_w):
            rejects.append(_unbounded())
            continue
        verdict = others.judge(candidate.call, chip, options.allow)
        if verdict.legal:
            plan = _as_plan(candidate, reading, _why_not(rejects, nearest), verdict)
            written = written_before(plan.value, plan.output, writes)
            if written is not None:
                rejects.append(_written(written))
                continue
            known = isinstance(reading.weight.codes, Const)
            if plan.weight_format == "ND":
                why = _nd_reason(candidate.call.op, reading.weight, not_nz, chip, options)
                plan = replace(plan, nd_reason=why or _UNKNOWN, awaits_values=not why)
            elif not known:
                plan = replace(plan, awaits_values=True)
            return Planned(plan, numerics)
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


_UNKNOWN = "its values are not known when compiling"


def _nd_reason(op: VendorOp, weight: Weight, not_nz: list[Reject], chip: Chip, options: Options) -> str:
    """Why a weight is not laid out in FRACTAL_NZ; empty where only its values are missing."""
    layouts = chip.layouts_of(op, options.mode)
    if options.nz == "never":
        return "nz='never'"
    if all(x.format == "ND" for x in layouts):
        return f"{chip.name} takes this operator's weight in ND in {options.mode} mode ({layouts[0].reason})"
    if not isinstance(weight.codes, Const):
        return ""
    return f"{not_nz[0].rule}: {not_nz[0].fact}" if not_nz else "it can't be packed in the layout that FRACTAL_NZ needs"


def _takes_in(candidate: Candidate, reading: Reading, needed: Collection[Node]) -> bool:
    """True where a tensor that another site quantizes would be gone, and its codes are not what is made instead."""
    assert reading.epilogue is not None
    c = candidate.composition
    passed = (reading.node, *(step.node for step in reading.epilogue.steps[: c.length]))
    return c.requantize is None and any(node in needed for node in passed if node is not c.output)


def _candidates(
    reading: Reading,
    prefixes: list[Composition],
    chip: Chip,
    options: Options,
    made: Requantized | Reject | None,
) -> Iterator[Candidate | Reject]:
    if isinstance(reading.activation, Affine):
        yield from quant_matmul_candidates(reading, prefixes, chip, options, made)
        yield from quant_matmul_dequant_candidates(reading, prefixes, chip, options, made)
    elif reading.activation.quantized:
        yield _activation_reject(reading.activation)
    yield from weight_quant_candidates(reading, prefixes, chip, options)
    yield from half_product_candidates(reading, prefixes, chip, options)


def _family(candidate: Candidate) -> str:
    return f"{candidate.call.op.family}."


def _activation_reject(read: NotAffine) -> Reject:
    return refuse("read.activation", f"the activation: {read.reason}", hint=read.hint)


def _written(node: Node) -> Reject:
    return refuse("read.mutated", f"the graph writes to {node.name} in place before it uses the matmul's result")


def _unbounded() -> Reject:
    return refuse("plan.bound", "how far the fused result may be off rests on a value that only the run knows")


def _nothing_fits(reading: Reading) -> Reject:
    assert reading.x is not None
    return refuse("plan.none", f"no fused operator takes a {ex.dtype_of(reading.x)} activation here")


def _as_plan(candidate: Candidate, reading: Reading, passed_over: tuple[Reject, ...], verdict: Verdict) -> Plan:
    notes = [*candidate.notes, *(f"assumes {a}" for a in verdict.assumptions), *verdict.costs]
    fixups = candidate.fixups
    refit = reading.weight.refit if isinstance(reading.weight, Weight) else None
    if refit is not None:
        notes.append(f"its weight was re-fitted, as allow permits: {refit}")
        fixups = ("weight re-fitted as symmetric int8 per channel", *fixups)
    if any(f.endswith("computed in float16") for f in fixups):
        notes.append("computed in float16, as allow permits: nothing is above 65504 there")
    notes.extend(_weaker(candidate, reading, passed_over))
    notes.extend(_left_behind(candidate, reading, passed_over))
    return Plan(
        op=candidate.call.op.name,
        output=candidate.composition.output,
        value=_with_leftover(candidate, reading),
        fixups=fixups,
        call=dict(candidate.call.args),
        weight_format=candidate.weight_format,
        notes=tuple(notes),
        int8_codes=candidate.int8_codes,
        int8_shift=candidate.int8_shift,
        refit=refit,
    )


def _weaker(candidate: Candidate, reading: Reading, passed_over: tuple[Reject, ...]) -> Iterator[str]:
    """Why a quantized activation is dequantized in the graph and the matmul is not an integer one."""
    if candidate.call.op is QMM:
        return
    if candidate.call.op is QMMD:
        yield from (f"{QMM} is not taken: {r.rule}: {r.fact}" for r in passed_over if r.rule.startswith("qmm."))
        return
    activation = reading.activation
    if isinstance(activation, Affine) or activation.quantized:
        why = [r for r in passed_over if not r.rule.startswith("wqmm.")]
        if why:
            yield f"the activation's quantization stays in the graph: {why[0].rule}: {why[0].fact}"
    elif activation.rule == UNBOUNDED:
        yield f"the activation's quantization stays in the graph: {activation.rule}: {activation.reason}"


def _left_behind(candidate: Candidate, reading: Reading, passed_over: tuple[Reject, ...]) -> Iterator[str]:
    """Why steps after the matmul were not taken in: what was refused, or why the reading of them ended."""
    assert reading.epilogue is not None
    steps = reading.epilogue.steps
    if candidate.composition.length < len(steps):
        family = _family(candidate)
        for r in passed_over:
            if r.rule.startswith(family):
                yield f"what comes next stays in the graph: {r.rule}: {r.fact}"
                return
    behind = steps[candidate.composition.length :]
    if any(step.kind in ("round", "quantize") for step in behind) or _is_quantized_later(reading):
        what = (
            f"{candidate.call.op} has no form for the next step ({behind[0].kind})"
            if behind
            else reading.epilogue.ended
        )
        yield f"the quantize that follows is not part of the matmul: {what}"


def _is_quantized_later(reading: Reading) -> bool:
    """True where a few steps behind the last one that was read the value is rounded to codes."""
    assert reading.epilogue is not None
    steps = reading.epilogue.steps
    if any(step.kind in ("round", "quantize") for step in steps):
        return False  # it was read
    return is_quantized_behind(steps[-1].node if steps else reading.node)


def is_quantized_behind(node: Node) -> bool:
    """True where a few steps behind ``node`` its value is rounded to codes."""
    seen = [node]
    for _ in range(_LOOK_AHEAD):
        seen = [u for n in seen for u in n.users if u.op == "call_function"]
        if any("round" in str(u.target) or "quantize_per" in str(u.target) for u in seen):
            return True
    return False


def _splits_alpha(candidate: Candidate, reading: Reading) -> bool:
    """True where a factor of the matmul operator itself would follow a float16 product that the graph never forms."""
    c = candidate.composition
    assert reading.contraction is not None
    return c.dtype == torch.float16 and any(own.kind == "scale" for own in reading.contraction.own[c.length :])


def _split() -> Reject:
    return refuse("read.matmul.alpha", "the matmul operator scales its product, and the scale can't be folded")


def _with_leftover_roundings(candidate: Candidate, reading: Reading) -> Numerics:
    """A candidate's contract, with the roundings of what the matmul operator does by itself and the plan left out."""
    numerics = candidate.numerics
    assert reading.contraction is not None
    left = len(reading.contraction.own) - candidate.composition.length
    dtype = candidate.composition.dtype
    if left <= 0 or not dtype.is_floating_point:
        return numerics
    rounding = left * torch.finfo(dtype).eps / 2
    return replace(numerics, relative=numerics.relative + rounding)


def _with_refit(numerics: Numerics, candidate: Candidate, reading: Reading) -> Numerics:
    """A candidate's contract, with what re-fitting the weight changed: at most the largest error for each ``|x_k|``."""
    refit = reading.weight.refit if isinstance(reading.weight, Weight) else None
    if refit is None:
        return numerics
    c, contraction = candidate.composition, reading.contraction
    assert contraction is not None
    scaled_later = any(own.kind == "scale" for own in contraction.own[c.length :])
    known = isinstance(c.columns, Const) and not c.rows and not scaled_later
    gain = float(c.columns.tensor.abs().max()) if known and isinstance(c.columns, Const) else math.inf
    more = refit.largest_error * gain * (1 + numerics.relative) if refit.largest_error else 0.0
    why = f"weight re-fitted as int8 per channel: {refit}"
    numerics = replace(numerics, of_step=numerics.of_step * refit.growth, of_w=numerics.of_w * refit.growth)
    return replace(numerics, kind="bounded", of_x=numerics.of_x + more, why=(*numerics.why, why))


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
