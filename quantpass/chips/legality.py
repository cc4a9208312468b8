"""Is a call legal on a chip, and if not, why and what would be."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable
from dataclasses import asdict, dataclass, replace
from typing import Any

from quantpass.basics.reject import Reject
from quantpass.basics.suggestions import did_you_mean
from quantpass.basics.tensor_spec import TensorSpec
from quantpass.chips import CHIPS, liftable_rules
from quantpass.chips.calls import OpCall
from quantpass.chips.requirements import Finding
from quantpass.chips.rules import Chip, Rule

HALF_OPT_IN = "numerics.float16"
"""What a user names in ``allow`` to have bfloat16 and float32 sites computed in float16."""

REFIT_OPT_IN = "weights.refit"
"""What a user names in ``allow`` to have weights re-fitted that a chip has no form for; ``weights.refit:35`` asks for
an SQNR of at least 35 dB."""

REFIT_SQNR = 30.0
"""The least SQNR of a re-fit in dB, where the user names none."""


def refit_limit(allow: Collection[str]) -> float | None:
    """The least SQNR, in dB, that ``allow`` asks of re-fitted weights; None where they are not allowed."""
    asked = [name.partition(":")[2] for name in allow if name.partition(":")[0] == REFIT_OPT_IN]
    return max((float(limit) if limit else REFIT_SQNR for limit in asked), default=None)


def checked_allow(allow: Any) -> tuple[str, ...]:
    """``allow`` as a tuple of rules that exist and can be lifted, on whichever chip.

    Raises:
        TypeError: it is one text, or holds something that is none.
        ValueError: a rule that does not exist, or one that can't be lifted; the message names the nearest that can.
    """
    if not isinstance(allow, tuple | list | set | frozenset) or not all(isinstance(a, str) for a in allow):
        raise TypeError(f"allow is {allow!r}; give a tuple of rule ids, e.g. allow=('qmm.310p.pertoken',)")
    given = tuple(sorted(allow)) if isinstance(allow, set | frozenset) else tuple(allow)
    if all(name in (HALF_OPT_IN, REFIT_OPT_IN) or _is_refit_with_limit(name) for name in given):
        return given  # planning asks so for each refused site: no table is searched
    liftable = (*liftable_rules(), HALF_OPT_IN, REFIT_OPT_IN)
    firm = {r.id for c in CHIPS.values() for r in c.rules}
    for name in given:
        if name in liftable or _is_refit_with_limit(name):
            continue
        if name in firm or name.rpartition(".")[0] in firm:
            what = "is a rule about which documents and code agree, and can't be lifted"
        else:
            what = "is no rule that can be lifted"
        raise ValueError(
            f"allow: {name!r} {what}. Those that can: {', '.join(liftable)}.{did_you_mean(name, liftable)}"
        )
    return given


def _is_refit_with_limit(name: str) -> bool:
    base, colon, limit = name.partition(":")
    if base != REFIT_OPT_IN or not colon:
        return False
    try:
        sqnr = float(limit)
    except ValueError:
        sqnr = math.nan
    if not 0 <= sqnr <= 200:
        raise ValueError(
            f"allow: {name!r}: what follows the colon is {limit!r}; give the least SQNR in dB, from 0 to 200, e.g. "
            f"'{REFIT_OPT_IN}:35' ('{REFIT_OPT_IN}' alone asks for {REFIT_SQNR:g})"
        )
    return True


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to "is this call legal?".

    Attributes:
        legal: True where no rule forbids it.
        contradicted: True where only rules forbid it about which documents and code disagree. Naming those rules in
            ``allow`` makes it legal.
        rejects: every rule that is broken.
        assumptions: what must hold of symbolic sizes for the call to be legal.
        nearest: the arguments of the nearest legal call, where one was found.
        costs: what a legal call makes the vendor's library do beside the operator, each time that it runs.
    """

    legal: bool
    contradicted: bool
    rejects: tuple[Reject, ...]
    assumptions: tuple[str, ...] = ()
    nearest: dict[str, Any] | None = None
    costs: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.legal

    def as_dict(self) -> dict[str, Any]:
        """The answer as plain data; tensors of the nearest call as text."""
        nearest = self.nearest and {
            k: v if isinstance(v, bool | int | float) else str(v) for k, v in self.nearest.items()
        }
        return {**asdict(replace(self, nearest=None)), "nearest": nearest or None}

    def __str__(self) -> str:
        if self.legal:
            given = f", assuming {'; '.join(self.assumptions)}" if self.assumptions else ""
            return "\n  ".join((f"legal{given}", *self.costs))
        head = "contradicted (documents and code disagree)" if self.contradicted else "illegal"
        lines = [head, *(f"  {r}" + (f" [{r.doc}]" if r.doc else "") for r in self.rejects)]
        if self.nearest:
            lines.append("  nearest legal: " + ", ".join(f"{k}={v}" for k, v in self.nearest.items()))
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Broken:
    """A rule and how a call breaks it."""

    rule: Rule
    finding: Finding

    @property
    def rule_id(self) -> str:
        part = self.finding.part
        if part.startswith("!"):
            return part[1:]
        return f"{self.rule.id}.{part}" if part else self.rule.id

    @property
    def contradicted(self) -> bool:
        return self.rule.contradicted or self.finding.part.startswith("!")

    def reject(self) -> Reject:
        f = self.finding
        hint = f.hint or self.rule.hint
        if self.contradicted:
            allow = f"documents and code disagree here: allow=({self.rule_id!r},) permits it"
            hint = f"{hint}; {allow}" if hint else allow
        return Reject(self.rule_id, f.fact, f.want, hint, self.rule.source)


def broken_rules(call: OpCall, chip: Chip, allow: Collection[str] = ()) -> tuple[list[Broken], list[str]]:
    """Every rule of ``chip`` that ``call`` breaks, and what symbolic sizes are assumed to satisfy."""
    broken: list[Broken] = []
    assumptions: list[str] = []
    for rule in chip.rules:
        if rule.op is not call.op or call.mode not in rule.modes or (rule.when and not rule.when.test(call)):
            continue
        for finding in rule.need.check(call):
            if finding.undecided:
                assumptions.append(finding.fact)
                continue
            found = Broken(rule, finding)
            if not (found.contradicted and found.rule_id in allow):
                broken.append(found)
    return broken, list(dict.fromkeys(assumptions))


class Judge:
    """:func:`judge`, each call once: of a model's layers many are the same but for their values."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Verdict] = {}

    def __call__(self, call: OpCall, chip: Chip, allow: Collection[str] = ()) -> Verdict:
        # 1, 1.0 and True are equal, and are not the same in what is said of them.
        given = tuple((name, type(value), value) for name, value in call.args.items())
        key = (chip.name, tuple(allow), call.op, call.mode, given)
        try:
            known = self._known.get(key)
        except TypeError:  # symbolic sizes, lists
            return judge(call, chip, allow)
        if known is None:
            known = self._known[key] = judge(call, chip, allow)
        return known


def judge(call: OpCall, chip: Chip, allow: Collection[str] = ()) -> Verdict:
    """Evaluate every rule of ``chip`` on ``call``; all broken ones are returned, not the first."""
    broken, assumptions = broken_rules(call, chip, allow)
    if not broken:
        costs = tuple(str(cost) for cost in chip.costs if cost.is_of(call))
        return Verdict(True, False, (), tuple(assumptions), costs=costs)
    rejects = tuple(dict.fromkeys(b.reject() for b in broken))
    nearest = _nearest(call, chip, allow, broken)
    return Verdict(False, all(b.contradicted for b in broken), rejects, tuple(assumptions), nearest)


def _nearest(call: OpCall, chip: Chip, allow: Collection[str], broken: list[Broken]) -> dict[str, Any] | None:
    """Apply the rules' own fixes, one after another, until nothing is broken; None if that leads nowhere."""
    changes: dict[str, Any] = {}
    for _ in range(8):
        fix = next((b.finding.fix for b in broken if b.finding.fix), None) or _in_nd(call.replaced(**changes))
        if not fix:
            return None
        changes |= fix
        broken, _ = broken_rules(call.replaced(**changes), chip, allow)
        if not broken:
            return changes
    return None


def _in_nd(call: OpCall) -> dict[str, Any]:
    """What rules of FRACTAL_NZ ask for when nothing else helps."""
    specs = {name: value for name, value in call.args.items() if isinstance(value, TensorSpec) and value.format == "NZ"}
    return {name: TensorSpec(s.dtype_name, s.shape, transposed=s.transposed) for name, s in specs.items()}
