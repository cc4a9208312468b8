"""Values in a message: taken out of its text, and put into legal calls to ask the rules about them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from quantpass.basics.tensor_spec import TensorSpec
from quantpass.basics.torch_types import dtype_name
from quantpass.chips import CHIPS, NPUS
from quantpass.chips.calls import OpCall
from quantpass.chips.checking import OPERATORS
from quantpass.chips.dtype_table import DtypeTable
from quantpass.chips.legality import Broken, broken_rules, judge
from quantpass.chips.requirements import (
    Absent,
    DtypeIn,
    Layout,
    Present,
    QmmBias,
    Rank,
    Requirement,
    SameDtype,
    SameShape,
    Shape,
)
from quantpass.chips.requirements import with_dtype as in_dtype
from quantpass.chips.rules import Chip, Rule
from quantpass.messages.examples import examples, spelled

_FOUND = re.compile(
    r"(?:\bactual(?:ly)?\b|\bbut\b|\bnow\b|\bwhich (?:is|are)\b)"
    r"(?:\s+(?:it|is|now|got|found|get|actual\w*|dtypes?|types?|the|are|they|should|formats?|\w+'s|[A-Za-z]\w*)){0,5}?"
    r"\s*[:=]?\s*(?P<value>\[?DT_\w+\]?|\[[^\[\]]*\]|\([^()]*\)|DT_\w+|-?\d+(?:\.\d+)?|torch\.\w+|float\d*\w*|bfloat16|u?int\d+|bool"
    r"|BF16|FLOAT\w*|U?INT\d+|ND|FRACTAL_NZ|None|nullptr)"
)
_DTYPES = {
    "FLOAT": "float32",
    "FP32": "float32",
    "FP16": "float16",
    "BF16": "bfloat16",
    "INT4": "int32",
    "UINT64": "int64",
}
_CHIPS = (
    (("310p", "300i"), r"ascend310p\w*|\b310p\d?\b|_310p\b|\b300i\b", "ascend310p"),
    (("910b", "a2"), r"ascend910b[\w-]*|\b910b\d?\b|\b800i a2\b|\ba2\b", "ascend910b"),
    (("910_93", "910c"), r"ascend910_93\w*|\b910c\b", "ascend910_93"),
    (("ascend950",), r"ascend950\w*", "ascend950"),
)
"""Chips' names in small letters: what a text has to have for one, and the name."""


def chips_in(text: str) -> tuple[str, ...]:
    """The chips that a text names."""
    small = text.lower()
    return tuple(
        name
        for literals, spelling, name in _CHIPS
        if any(literal in small for literal in literals) and re.search(spelling, small)
    )


def found_in(text: str) -> str:
    """The value that a message says it found: ``DT_FLOAT16``, ``[256]``, ``3``; "" where it says none."""
    match = _FOUND.search(text)
    return match["value"] if match else ""


def dtype_of(value: str) -> str | None:
    """A dtype in aclnn's spelling (``DT_FLOAT16``, ``BF16``) or torch's, by its name."""
    plain = value.strip("[]() ,.").removeprefix("torch.").removeprefix("DT_").removeprefix("DF_")
    name = _DTYPES.get(plain.upper(), plain.lower())
    return dtype_name(name)


def numbers_of(value: str) -> list[int]:
    return [int(n) for n in re.findall(r"-?\d+", value)] if not dtype_of(value) else []


@dataclass(frozen=True, slots=True)
class Checked:
    """A rule that what was found breaks, in a call that is legal but for it."""

    rule: str
    fact: str
    want: str
    hint: str
    doc: str
    chip: str
    line: str


def chips_for(named: Iterable[str]) -> tuple[Chip, ...]:
    """The chips to ask: those that are named, else every NPU, the older families first."""
    return tuple(CHIPS[n] for n in named) or tuple(
        CHIPS[n] for n in ("ascend910b", "ascend310p", "ascend950") if n in NPUS
    )


def check(operator: str, argument: str, answer: str, found: str, kind: str, chips: tuple[Chip, ...]) -> Checked | None:
    """Put what was found into legal calls until one breaks the rule that the message is about."""
    if operator not in OPERATORS or not found:
        return None
    for chip in chips:
        for mode in ("eager", "graph"):
            for call in sorted(examples(operator, chip, mode), key=lambda c: c.args.get(argument) is None):
                for edited in _edits(call, argument, found, kind):
                    before = {b.rule_id for b in broken_rules(call, chip)[0]}
                    for broken in broken_rules(edited, chip)[0]:
                        if broken.rule_id not in before and _answers(broken, answer, argument):
                            return _checked(edited, chip, broken, argument)
    return None


def _answers(broken: Broken, answer: str, argument: str) -> bool:
    """A broken rule is the one that the message is about; a table of dtypes stands under another name on each chip."""
    name, table, dtypes = broken.rule_id, *answer.partition(".dtypes")[:2]
    if dtypes:
        column = name.endswith(f".dtypes.{argument}")
        return isinstance(broken.rule.need, DtypeTable) and name.startswith(table.partition(".")[0] + ".") and column
    if not answer:
        return _is_about(broken.rule.need, argument, "dtype")
    return answer in (name, broken.rule.id) or name.startswith(answer + ".")


def _edits(call: OpCall, argument: str, found: str, kind: str) -> Iterator[OpCall]:
    """The call with the value that was found in place of its own."""
    spec, dtype, numbers = call.tensor(argument), dtype_of(found), numbers_of(found)
    flags = re.findall(r"true|false", found)
    op = call.op
    if argument in op.numbers:
        value: Any = numbers[0] if len(numbers) == 1 and not op.types[argument].startswith("int[") else None
        value = dtype if dtype and argument not in op.integers else value
        if value is not None:
            yield call.replaced(**{argument: value})
        return
    if len(flags) == 2 and "x1" in call.args:
        turned = {a: f == "true" for a, f in zip(("x1", "x2"), flags, strict=True)}
        yield call.replaced(**{a: _turned(call.tensor(a), t) for a, t in turned.items()})
        return
    if argument not in op.types or kind == "value":
        return
    if spec is None:
        spec = TensorSpec("float32", (128,))
    if dtype and kind in ("dtype", ""):
        yield call.replaced(**{argument: in_dtype(argument, spec, dtype)})
    elif kind == "dim" and len(numbers) == 1 and 0 < numbers[0] < 9:
        sizes = (1,) * max(0, numbers[0] - spec.rank) + spec.shape[-numbers[0] :]
        yield call.replaced(**{argument: TensorSpec(spec.dtype_name, sizes, spec.format)})
    elif kind == "shape" and numbers and all(n >= 0 for n in numbers):
        yield call.replaced(**{argument: TensorSpec(spec.dtype_name, numbers, spec.format)})


def _turned(spec: TensorSpec | None, transposed: bool) -> TensorSpec | None:
    return spec and TensorSpec(spec.dtype_name, spec.shape, spec.format, transposed)


def _checked(call: OpCall, chip: Chip, broken: Broken, argument: str) -> Checked:
    reject, verdict = broken.reject(), judge(call, chip)
    near = "nearest legal: " + ", ".join(f"{k}={v}" for k, v in verdict.nearest.items()) if verdict.nearest else ""
    line = f"quantpass check-op {call.op} -t {chip.name} --mode {call.mode} {spelled(call.args)}"
    rule = f"{broken.rule.id}.{argument}" if isinstance(broken.rule.need, DtypeTable) else reject.rule
    return Checked(
        rule, reject.fact, reject.want, "; ".join(filter(None, (reject.hint, near))), reject.doc, chip.name, line
    )


_KINDS: dict[str, tuple[type, ...]] = {
    "dtype": (DtypeIn, SameDtype),
    "dim": (Rank,),
    "shape": (Shape, SameShape, QmmBias),
    "format": (Layout,),
    "null": (Present,),
    "not null": (Absent,),
}


def rule_named(answer: str, argument: str, chips: tuple[Chip, ...]) -> tuple[Rule, str, Chip] | None:
    """The rule that an answer names, its whole id and a chip that has it, under that chip's name for it."""
    table, dtypes, part = answer.partition(".dtypes")
    for chip in chips:
        for rule in chip.rules:
            if dtypes:
                family, _, variant = table.rpartition(".")
                shared = rule.id.startswith(family + ".") and rule.id.endswith(".dtypes") and rule.id.count(".") == 2
                own = variant in ("group",) or "group" in rule.id
                if (rule.id == table + ".dtypes") or (shared and not own and isinstance(rule.need, DtypeTable)):
                    column = part.strip(".") or argument
                    return rule, f"{rule.id}.{column}" if column else rule.id, chip
            elif rule.id == answer:
                return rule, rule.id, chip
    return None


def want_of(rule: Rule, argument: str) -> str:
    """What a rule demands; of a table of dtypes, what its lines have for an argument."""
    if not isinstance(rule.need, DtypeTable) or argument not in rule.need.columns:
        return rule.need.want
    column = rule.need.columns.index(argument)
    accepted = dict.fromkeys(d for row in rule.need.rows if not row.contradicted for d in row.cells[column])
    words = [d or "none" for d in accepted]
    return f"{argument} {' or '.join(words)}, as the other dtypes have it in `quantpass chips`"


def accepted_dtypes(operator: str, argument: str) -> set[str]:
    """Every dtype that some chip takes for an argument."""
    found: set[str] = set()
    for rule in (r for name in NPUS for r in CHIPS[name].rules if r.op.name == operator):
        if isinstance(rule.need, DtypeTable) and argument in rule.need.columns:
            column = rule.need.columns.index(argument)
            found |= {d for row in rule.need.rows for d in row.cells[column] if d}
        elif isinstance(rule.need, DtypeIn) and rule.need.arg == argument:
            found |= set(rule.need.dtypes)
    return found


def rule_about(operator: str, argument: str, kind: str, chips: tuple[Chip, ...]) -> str:
    """The one rule, for every call, of an argument's dtype, rank, shape, format or presence; "" where it depends."""
    for chip in chips[:1] if argument else ():
        about = [r for r in chip.rules if r.op.name == operator]
        tables = [r for r in about if isinstance(r.need, DtypeTable) and argument in r.need.columns]
        if kind == "dtype" and tables:
            return f"{tables[0].id}.{argument}"
        found = [r.id for r in about if r.when is None and _is_about(r.need, argument, kind)]
        if len(found) == 1:
            return found[0]
    return ""


def _is_about(need: Requirement, argument: str, kind: str) -> bool:
    if isinstance(need, QmmBias):
        return argument == "bias" and kind in ("shape", "dim")
    if isinstance(need, DtypeTable):
        return kind == "dtype" and argument in need.columns
    if kind == "format" and not getattr(need, "format", None):
        return False
    return isinstance(need, _KINDS.get(kind, ())) and argument in (getattr(need, "arg", ""), getattr(need, "a", ""))
