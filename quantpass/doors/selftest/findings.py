"""What a self-test found: for a terminal, and as the one file to send back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.console import Group
from rich.text import Text

from quantpass.chips import CHIPS, liftable_rules
from quantpass.doors.selftest.cases import MODES, Case, applying
from quantpass.doors.selftest.forms import FORMS
from quantpass.doors.selftest.run import ENDED, NOT_RUN, RAISED, RIGHT, WRONG, Outcome
from quantpass.doors.selftest.speed import Time
from quantpass.report.text import as_text, table_of
from quantpass.version import __version__

SCHEMA = 1
_SHOWN = 20
"""Failed cases that are shown; the file has all."""

NO_DEVICE = (
    "EMULATION: there is no NPU here. What ran is quantpass's own emulation of the operators: this says that quantpass "
    "agrees with itself, and nothing about a device."
)
_NOT_DECIDED = "not decided, no device"


@dataclass(frozen=True)
class SelfTest:
    """What :func:`quantpass.selftest` found.

    Attributes:
        device: the NPU's name; empty where there is none and the emulation ran.
        chips: the chips whose rules were tried.
        cases: what was tried.
        outcomes: what became of it, in the same order.
        times: a quantized linear before and after fusing.
        environment: what ``quantpass doctor`` says, as plain data.
        only: what was asked for, where it was a part.
    """

    device: str
    chips: tuple[str, ...]
    cases: tuple[Case, ...]
    outcomes: tuple[Outcome, ...]
    times: tuple[Time, ...]
    environment: dict[str, Any]
    only: tuple[str, ...] = ()

    @cached_property
    def failed(self) -> tuple[tuple[Case, Outcome], ...]:
        """Cases that should be right and are not: on a device those that its rules allow, in the emulation all."""
        failed = ((c, o) for c, o in self._pairs if o.outcome not in (RIGHT, NOT_RUN))
        return tuple((c, o) for c, o in failed if not (c.contradicted and self.device))

    @property
    def passed(self) -> bool:
        """Something ran, and nothing that should be right is not."""
        return not self.failed and any(o.outcome != NOT_RUN for o in self.outcomes)

    @property
    def _pairs(self) -> list[tuple[Case, Outcome]]:
        return list(zip(self.cases, self.outcomes, strict=True))

    # -- rules -----------------------------------------------------------------------------------------------------

    def contradicted(self) -> dict[str, dict[str, Any]]:
        """For each rule about which documents and code disagree: what was tried, and which side was right."""
        found: dict[str, dict[str, Any]] = {}
        tried: dict[str, list[tuple[Case, Outcome]]] = {}
        for case, outcome in self._pairs:
            if case.contradicted:
                tried.setdefault(case.contradicted, []).append((case, outcome))
        for rule, pairs in tried.items():
            results = [{"case": c.id, "call": c.words, "outcome": o.outcome, "said": o.said} for c, o in pairs]
            found[rule] = {"verdict": _verdict([o.outcome for _, o in pairs], self.device), "tried": results}
        return found

    def rules(self) -> dict[str, dict[str, Any]]:
        """For each rule of the chips: how many cases it speaks of, and which lie at an edge of what it accepts."""
        ids = {(chip, r.id): r for chip in self.chips for r in CHIPS[chip].rules if r.op in FORMS}
        found: dict[tuple[str, str], dict[str, Any]] = {key: {"cases": 0, "edges": []} for key in ids}
        for case in self.cases:
            for rule in applying(case):
                found[case.chip, rule.id]["cases"] += 1
            edge, _, _ = case.edge.partition(":")
            if edge:
                found[case.chip, edge]["edges"].append(case.id)
        return {f"{chip} {rule}": counts for (chip, rule), counts in found.items()}

    def untried(self) -> list[str]:
        """Rules that no case speaks of, and contradicted ones of which no call breaks just that one."""
        silent = [name for name, counts in self.rules().items() if not counts["cases"]]
        lifted = {c.contradicted for c in self.cases}
        ops = {op.name for op in FORMS}
        known = {b for b, chips in liftable_rules().items() if set(chips) & set(self.chips) and _op_of(b) in ops}
        return [*silent, *sorted(f"contradicted: {name}" for name in known - lifted)]

    # -- for programs ----------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        cases = [
            {
                "chip": c.chip,
                "route": c.route,
                "operator": c.call.op.name,
                "call": c.words,
                "edge": c.edge,
                "contradicted": c.contradicted,
                **o.as_dict(),
            }
            for c, o in self._pairs
        ]
        return {
            "schema": SCHEMA,
            "quantpass": __version__,
            "device": self.device or None,
            "what ran": f"the NPU {self.device}" if self.device else NO_DEVICE,
            "chips": list(self.chips),
            "only": list(self.only),
            "passed": self.passed,
            "contradicted": self.contradicted(),
            "rules": self.rules(),
            "untried": self.untried(),
            "times": [t.as_dict() for t in self.times],
            "environment": self.environment,
            "cases": cases,
        }

    def to_json(self) -> str:
        """The file to send back."""
        return json.dumps(self.as_dict(), indent=1)

    # -- for people ------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"<quantpass.SelfTest: {len(self.cases)} cases, {len(self.failed)} failed, {self._where()}>"

    def _where(self) -> str:
        return f"on {self.device}" if self.device else "on the emulation, no device"

    def __str__(self) -> str:
        return self.text()

    def text(self, *, width: int | None = None, color: bool = False) -> str:
        """What was found; arguments as for :meth:`quantpass.Report.text`."""
        return as_text(Group(*self._parts()), width, color)

    def _parts(self) -> Iterator[Any]:
        yield Text(f"NPU: {self.device}" if self.device else NO_DEVICE, style="bold")
        yield Text(f"\n{len(self.cases)} cases for {', '.join(self.chips)}: {_counted(self.outcomes)}")
        table = table_of("operator", "chip", "route", "cases", "right", "worst, of what is allowed")
        for key, group in self._by_operator().items():
            shares = [o.share for o in group if o.share is not None]
            worst = f"{max(shares):.2g}" if shares else ""
            table.add_row(*key, str(len(group)), str(sum(o.outcome == RIGHT for o in group)), worst)
        yield table
        yield from self._failures()
        yield from self._disputes()
        yield from self._speeds()
        for why in dict.fromkeys(o.said for o in self.outcomes if o.outcome == NOT_RUN):
            yield Text(f"\nNot run: {why}")
        if not self.only and (untried := self.untried()):
            yield Text(f"\nRules that no case is about ({len(untried)}; what a rule forbids is not run):")
            yield Text(f"  {', '.join(untried)}")

    def _by_operator(self) -> dict[tuple[str, str, str], list[Outcome]]:
        found: dict[tuple[str, str, str], list[Outcome]] = {}
        for case, outcome in self._pairs:
            if not case.contradicted:
                found.setdefault((case.call.op.name, case.chip, case.route), []).append(outcome)
        return found

    def _failures(self) -> Iterator[Any]:
        failed = self.failed
        if failed:
            yield Text(f"\nFailed ({len(failed)}):", style="bold")
        for case, outcome in failed[:_SHOWN]:
            apart = "" if outcome.error is None else f", off by {outcome.error:.3g}"
            yield Text(f"  {case.id}: {outcome.outcome}{apart}{_first_line(outcome.said)}", style="red")
            yield Text(f"    {case.words} -t {case.chip} --mode {MODES[case.route]}")
        if len(failed) > _SHOWN:
            yield Text(f"  and {len(failed) - _SHOWN} more, which the file has")

    def _disputes(self) -> Iterator[Any]:
        found = self.contradicted()
        if not found:
            return
        yield Text("\nRules about which documents and code disagree:", style="bold")
        table = table_of("rule", "tried", "which side was right")
        for rule, told in found.items():
            table.add_row(rule, _counted([o for c, o in self._pairs if c.contradicted == rule]), told["verdict"])
        yield table

    def _speeds(self) -> Iterator[Any]:
        if not self.times:
            return
        yield Text(
            f"\nMilliseconds of one linear{'' if self.device else ' (CPU: says nothing about an NPU)'}:", style="bold"
        )
        table = table_of("model", "m x k x n", "before", "fused", "")
        for t in self.times:
            numbers = ["" if v is None else f"{v:.3g}" for v in (t.before, t.after)]
            table.add_row(t.model, f"{t.m} x {t.k} x {t.n}", *numbers, t.said)
        yield table


def _op_of(rule: str) -> str:
    """The operator of a contradicted rule, or of the line of a table that is."""
    found = {r.id: r.op.name for c in CHIPS.values() for r in c.rules}
    family = {r.op.family: r.op.name for c in CHIPS.values() for r in c.rules if r.op.family}
    return found.get(rule) or family.get(rule.partition(".")[0], "")


def _verdict(outcomes: Sequence[str], device: str) -> str:
    if not device:
        return _NOT_DECIDED
    kinds = set(outcomes)
    if kinds == {RIGHT}:
        return "the code's: it runs and is right"
    if WRONG in kinds:
        return "the document's: it runs, and is wrong"
    if kinds <= {RAISED, ENDED}:
        return "the document's: it is refused"
    return "not decided: some calls are right, others refused" if RIGHT in kinds else "not decided: not run"


def _counted(outcomes: Sequence[Outcome]) -> str:
    kinds = [o.outcome for o in outcomes]
    return ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds)) or "none"


def _first_line(said: str) -> str:
    return f": {said.splitlines()[0][:200]}" if said else ""
