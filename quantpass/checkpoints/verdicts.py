"""The verdict on a linear, for one chip: the same choice as planning's, from the same rules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject
from quantpass.basics.tensor_spec import TensorSpec
from quantpass.checkpoints.calls import Engine, calls_of, corrected_in_graph, refitted
from quantpass.checkpoints.shards import Shard
from quantpass.chips import NPUS
from quantpass.chips.calls import OpCall
from quantpass.chips.legality import HALF_OPT_IN, REFIT_OPT_IN, judge, refit_limit
from quantpass.chips.quant_matmul import QMM
from quantpass.chips.rules import Chip
from quantpass.chips.weight_quant_matmul import WQMM


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a linear on a chip.

    Attributes:
        fused: there is a legal call.
        covered: False for experts whose operator no rule speaks of.
        call: the call, described.
        format: of its weight, ``"NZ"`` or ``"ND"``.
        rejects: why not.
        nearest: the arguments of the nearest legal call.
        offers: what could be named in ``allow`` to have it fused.
        notes: what else is to be said.
    """

    fused: bool
    covered: bool = True
    call: OpCall | None = None
    format: str = ""
    rejects: tuple[Reject, ...] = ()
    nearest: dict[str, Any] | None = None
    offers: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def op(self) -> str:
        """The operator's name; empty where there is none."""
        return self.call.op.name if self.call is not None else ""

    @property
    def weight(self) -> TensorSpec | None:
        """The weight as the operator takes it."""
        return self.call.tensor(self.call.op.weight) if self.call is not None else None

    def __str__(self) -> str:
        if not self.covered:
            return "not covered"
        if self.call is None:
            return "not fused: " + ", ".join(dict.fromkeys(r.rule for r in self.rejects))
        result = self.call.value("output_dtype")
        return f"{self.call.op.family.upper()}{f' -> {result}' if result else ''} {self.format}"


def verdict_on(shard: Shard, chip: Chip, engine: Engine) -> Verdict:
    """The verdict on a rank's part of a linear."""
    q = shard.quantized
    if shard.problem is not None:
        return Verdict(False, rejects=(shard.problem, *q.rejects))
    own = _chosen(shard, chip, engine)
    if own.fused or chip.name not in NPUS:
        return own
    if refit_limit(engine.allow) is not None:
        fitted = refitted(q)
        found = own if fitted is None else _chosen(replace(shard, quantized=fitted), chip, engine)
        if found.fused:
            said = "its weight is re-fitted, if that keeps the SQNR that allow asks for: known where its values are"
            return replace(found, notes=(*found.notes, said))
    return replace(own, offers=tuple(_offers(shard, chip, engine)))


def on_experts(each: Verdict) -> Verdict:
    """The verdict on a stack of experts of which one by itself has the verdict ``each``."""
    said = refuse("checkpoint.experts", f"experts; a matmul for one of them by itself: {each}")
    return Verdict(False, covered=False, rejects=(said,))


def _chosen(shard: Shard, chip: Chip, engine: Engine) -> Verdict:
    rejects = [*shard.quantized.rejects]
    broken: dict[str, tuple[Reject, ...]] = {}
    edits: dict[str, dict[str, Any] | None] = {}
    for candidate in () if rejects else calls_of(shard.quantized, chip, engine):
        if isinstance(candidate, Reject):
            rejects.append(candidate)
            continue
        call = candidate.call
        verdict = judge(call, chip, engine.allow)
        if verdict.legal:
            why = _why_not(rejects, broken)
            return Verdict(True, call=call, format=candidate.format, notes=tuple(_weaker(shard, call, why)))
        family = call.op.family
        if family not in broken or len(verdict.rejects) < len(broken[family]):
            broken[family], edits[family] = verdict.rejects, verdict.nearest
    nearest = next((edits[f] for f in (WQMM.family, QMM.family, *edits) if edits.get(f)), None)
    return Verdict(False, rejects=_why_not(rejects, broken), nearest=nearest)


def _why_not(rejects: list[Reject], broken: dict[str, tuple[Reject, ...]]) -> tuple[Reject, ...]:
    """Reasons against every call, and what each operator's most nearly legal call breaks."""
    told = [f for f in broken if any(r.rule.startswith(f"{f}.") for r in rejects)]
    return tuple(dict.fromkeys((*rejects, *(r for f, found in broken.items() if f not in told for r in found))))


def _weaker(shard: Shard, call: OpCall, why: tuple[Reject, ...]) -> list[str]:
    x = shard.quantized.activation
    if x is not None and call.op is QMM and corrected_in_graph(x):
        return ["the graph takes x's zero points from the product, and adds the bias"]
    if call.op is QMM or x is None:
        return []
    against = [r for r in why if not r.rule.startswith(f"{WQMM.family}.")]
    return [f"x's quantization stays in the graph: {r.rule}: {r.fact}" for r in against[:1]]


def _offers(shard: Shard, chip: Chip, engine: Engine) -> list[tuple[str, ...]]:
    """The fewest permissions, beyond those given, with which it is legal."""
    given = engine.allow
    missing = [HALF_OPT_IN] if HALF_OPT_IN not in given else []
    missing += [REFIT_OPT_IN] if refit_limit(given) is None else []
    found: list[tuple[str, ...]] = []
    for more in [*((m,) for m in missing), *([tuple(missing)] if len(missing) > 1 else [])]:
        if any(set(less) <= set(more) for less in found):
            continue
        allowed = replace(engine, allow=(*given, *more))
        fitted = refitted(shard.quantized) if REFIT_OPT_IN in more else None
        forms = [shard, *([replace(shard, quantized=fitted)] if fitted else [])]
        if any(_chosen(form, chip, allowed).fused for form in forms):
            found.append(more)
    return [(*given, *more) for more in found]
