"""The verdict on a linear, for one chip: the same choice as planning's, from the same rules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject
from quantpass.basics.tensor_spec import TensorSpec
from quantpass.checkpoints.calls import Call, Engine, calls_of, corrected_in_graph, refitted
from quantpass.checkpoints.grouped import grouped_calls
from quantpass.checkpoints.shards import Shard
from quantpass.chips import NPUS
from quantpass.chips.calls import OpCall
from quantpass.chips.expert_matmuls import QGMMD
from quantpass.chips.grouped_matmul import GMM
from quantpass.chips.legality import HALF_OPT_IN, REFIT_OPT_IN, judge, refit_limit
from quantpass.chips.quant_matmul import QMM
from quantpass.chips.quant_matmul_dequant import QMMD
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
        rejects: why not; of a fused one, what stands against better calls.
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
            rules = list(dict.fromkeys(r.rule for r in self.rejects))
            more = f" and {len(rules) - 2} more" if len(rules) > 3 else ""
            return f"not fused: {', '.join(rules[:2] if more else rules)}{more}"
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


def verdict_on_experts(shard: Shard, experts: int, chip: Chip, engine: Engine) -> Verdict:
    """The verdict on a rank's part of all ``experts`` of a layer, which a grouped matmul multiplies."""
    each = verdict_on(shard, chip, engine)
    by_itself = f"one of the experts by itself: {each}"
    q = shard.quantized
    if shard.problem is not None or q.rejects or q.weight is None:
        return each
    if not chip.rules_of(GMM):
        return Verdict(False, covered=False, rejects=(refuse("checkpoint.experts", by_itself),))
    found = _first_legal(grouped_calls(q, experts, chip, engine), [], chip, engine)
    notes = tuple(_weaker(shard, found)) if found.fused else (by_itself,)
    return replace(found, notes=notes, offers=())


def _chosen(shard: Shard, chip: Chip, engine: Engine) -> Verdict:
    q = shard.quantized
    found = _first_legal(() if q.rejects else calls_of(q, chip, engine), [*q.rejects], chip, engine)
    return replace(found, notes=tuple(_weaker(shard, found)))


def _first_legal(candidates: Iterable[Call | Reject], rejects: list[Reject], chip: Chip, engine: Engine) -> Verdict:
    """The first legal of several calls; where none is, what the most nearly legal one of each operator breaks."""
    broken: dict[str, tuple[Reject, ...]] = {}
    edits: dict[str, dict[str, Any] | None] = {}
    for candidate in candidates:
        if isinstance(candidate, Reject):
            rejects.append(candidate)
            continue
        call = candidate.call
        verdict = judge(call, chip, engine.allow)
        if verdict.legal:
            return Verdict(True, call=call, format=candidate.format, rejects=_why_not(rejects, broken))
        family = call.op.family
        if family not in broken or len(verdict.rejects) < len(broken[family]):
            broken[family], edits[family] = verdict.rejects, verdict.nearest
    nearest = next((edits[f] for f in (WQMM.family, QMM.family, *edits) if edits.get(f)), None)
    return Verdict(False, rejects=_why_not(rejects, broken), nearest=nearest)


def _why_not(rejects: list[Reject], broken: dict[str, tuple[Reject, ...]]) -> tuple[Reject, ...]:
    """Reasons against every call, and what each operator's most nearly legal call breaks."""
    told = [f for f in broken if any(r.rule.startswith(f"{f}.") for r in rejects)]
    return tuple(dict.fromkeys((*rejects, *(r for f, found in broken.items() if f not in told for r in found))))


def _weaker(shard: Shard, found: Verdict) -> list[str]:
    """What a fused call leaves in the graph."""
    x, call = shard.quantized.activation, found.call
    if call is None or x is None:
        return []
    if call.op in (QMMD, QGMMD):
        return ["the operator quantizes x itself" + (", and the graph adds the bias" if shard.quantized.bias else "")]
    if call.op is GMM:
        return []
    if call.op is QMM:
        return ["the graph takes x's zero points from the product, and adds the bias"] if corrected_in_graph(x) else []
    against = [r for r in found.rejects if not r.rule.startswith(f"{WQMM.family}.")]
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
