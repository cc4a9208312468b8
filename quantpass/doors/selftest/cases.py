"""Which calls are tried: enough to show every two choices that are legal together, the edges of each rule's range, and
every rule about which documents and code disagree. All of it from the rules, so that a new rule is tried as well."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from quantpass.basics.tensor_spec import TensorSpec
from quantpass.chips import CHIPS
from quantpass.chips.calls import OpCall, VendorOp
from quantpass.chips.companions import LastMultiple
from quantpass.chips.dtype_table import DtypeTable
from quantpass.chips.legality import broken_rules
from quantpass.chips.requirements import Rank, Size, Value
from quantpass.chips.rules import Chip, Rule
from quantpass.doors.selftest.candidates import Candidate, candidates
from quantpass.doors.selftest.forms import FORMS

MODES = {"aclnn": "eager", "ge": "graph"}
"""The two ways to a device, and the rules that hold on each."""

_LARGEST = 1 << 25
"""Elements of a call's tensors together: an edge that takes more is not tried."""

_TRIALS = 8
"""Calls for each contradicted rule, of other dtypes each."""


@dataclass(frozen=True)
class Case:
    """One call to try.

    Attributes:
        id: ``chip/route/operator/number``.
        chip: its name.
        route: ``"aclnn"`` or ``"ge"``.
        call: the operator and descriptions of its arguments.
        edge: the rule at whose edge the call lies, and where; empty for calls of ordinary sizes.
        contradicted: the rule that forbids the call by default because documents and code disagree.
    """

    id: str
    chip: str
    route: str
    call: OpCall
    edge: str = ""
    contradicted: str = ""

    @property
    def words(self) -> str:
        """The call as ``quantpass check-op`` takes it."""
        return " ".join([self.call.op.name, *(f"{k}={_word(v)}" for k, v in self.call.args.items())])

    @property
    def rule(self) -> str:
        """The rule that the case is about, where it is about one."""
        return self.contradicted or self.edge.partition(":")[0]


def _word(value: Any) -> str:
    if isinstance(value, TensorSpec):
        marks = (":NZ" if value.format == "NZ" else "") + (":T" if value.transposed else "")
        return f"{value.dtype_name}[{','.join(map(str, value.shape))}]{marks}"
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def cases_of(chip: str, route: str, operator: str | None = None) -> list[Case]:
    """Every case of one chip and route, in a fixed order; of one ``operator`` where its name is given."""
    found = []
    for op in FORMS:
        if operator not in (None, op.name):
            continue
        of_op = list(_cases(CHIPS[chip], op, MODES[route]))
        width = len(str(len(of_op)))
        for number, (call, edge, contradicted) in enumerate(of_op):
            name = f"{chip}/{route}/{op.name}/{number:0{width}}"
            found.append(Case(name, chip, route, call, edge, contradicted))
    return found


def applying(case: Case) -> Iterator[Rule]:
    """The rules of the chip that speak of a case."""
    for rule in CHIPS[case.chip].rules_of(case.call.op):
        if case.call.mode in rule.modes and (rule.when is None or rule.when.test(case.call)):
            yield rule


_Found = tuple[OpCall, str, str]


def _cases(chip: Chip, op: VendorOp, mode: str) -> Iterator[_Found]:
    rules = chip.rules_of(op)
    if not rules:
        return
    legal: list[Candidate] = []
    disputed: dict[str, list[Candidate]] = {}
    seen: set[Any] = set()
    for candidate in candidates(op, mode, rules):
        broken = _broken(candidate, chip)
        if broken == ():
            fresh = candidate.pairs - seen
            seen |= fresh
            legal += [candidate] if fresh or not legal else []
        elif broken is not None and len(broken) == 1:
            of_rule = disputed.setdefault(broken[0], [])
            if all(candidate.dtypes != c.dtypes for c in of_rule):
                of_rule.append(candidate)
    yield from ((_call(c), "", "") for c in legal)
    for rule in rules:
        if mode in rule.modes and not isinstance(rule.need, DtypeTable) and not rule.contradicted:
            yield from _edges(rule, legal, chip)
        elif rule.contradicted and isinstance(rule.need, Rank):
            more = (c for base in legal for c in [_ranked(base, rule.need.arg, rule.need.high + 1)])
            disputed[rule.id] = [c for c in more if _broken(c, chip) == (rule.id,)]
    for name, of_rule in disputed.items():
        yield from ((_call(c), "", name) for c in of_rule[:_TRIALS])


def _call(candidate: Candidate) -> OpCall:
    call = candidate.call()
    assert call is not None
    return call


def _broken(candidate: Candidate, chip: Chip) -> tuple[str, ...] | None:
    """The contradicted rules that a candidate breaks, by id; None where it breaks others, or is no call."""
    call = candidate.call()
    if call is None:
        return None
    broken, _ = broken_rules(call, chip)
    return tuple(dict.fromkeys(b.rule_id for b in broken)) if all(b.contradicted for b in broken) else None


def _edges(rule: Rule, legal: Iterable[Candidate], chip: Chip) -> Iterator[_Found]:
    """The ends of what a rule accepts, each with the first legal call that it speaks of."""
    spoken_of = [c for c in legal if rule.when is None or rule.when.test(_call(c))]
    for words, edited in _edits(rule):
        for candidate in spoken_of:
            moved = edited(candidate)
            call = moved.call()
            if (
                call is not None
                and _elements(call) <= _LARGEST
                and _broken(moved, chip) == ()
                and call != _call(candidate)
            ):
                yield call, f"{rule.id}: {words}", ""
                break


def _edits(rule: Rule) -> Iterator[tuple[str, Any]]:
    need = rule.need
    if isinstance(need, Size):
        step = need.multiple
        low = math.ceil(max(need.low, 1) / step) * step
        ends = [low, low + step] + ([] if need.high is None else [need.high // step * step])
        for size in dict.fromkeys(ends):
            yield f"{need.symbol} is {size}", _sized(need.symbol, size)
    elif isinstance(need, LastMultiple):
        yield f"last is {need.of}", _sized("last", need.of)
    elif isinstance(need, Value):
        for value in FORMS[rule.op].edges.get(need.arg, ()):
            yield f"{need.arg} is {value}", _with_value(need.arg, value)
    elif isinstance(need, Rank) and need.high > 2:
        yield f"rank of {need.arg} is {need.high}", lambda c: _ranked(c, need.arg, need.high)


def _sized(symbol: str, size: int) -> Any:
    return lambda candidate: candidate.sized(**{symbol: size})


def _with_value(arg: str, value: Any) -> Any:
    return lambda candidate: replace(candidate, values={**candidate.values, arg: value})


def _ranked(candidate: Candidate, arg: str, rank: int) -> Candidate:
    """``arg`` with dimensions of 2 in front, and what has to have its shape with it."""
    shape = candidate.shapes[arg]
    alike = [n for n, s in candidate.shapes.items() if s == shape and len(s) > 1]
    return replace(candidate, leading={n: (2,) + (1,) * (rank - len(shape) - 1) for n in alike})


def _elements(call: OpCall) -> int:
    return sum(math.prod(v.shape) for v in call.args.values() if isinstance(v, TensorSpec))
