"""Finding messages in a log: those of the table, those that name their argument themselves, quantpass's own, codes."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

from quantpass.basics.reasons import REASONS
from quantpass.chips import CHIPS
from quantpass.chips.checking import OPERATORS
from quantpass.chips.rules import Rule
from quantpass.messages.facts import accepted_dtypes, dtype_of, found_in
from quantpass.messages.logs import Block
from quantpass.messages.names import argument_named, operator_named
from quantpass.messages.notes import code_note
from quantpass.messages.table import ANY, Hit, hits

_NEAR_BEFORE, _NEAR_AFTER = 60, 15
"""How many lines before and after a message the name of its operator may stand."""

_CELL = 1000
"""Characters of a block that are looked up together."""

_AT_MOST_LINES = 4
"""Lines that a message may be wrapped over, beside its first."""


@dataclass(frozen=True, slots=True)
class Place:
    """A message in a log.

    Attributes:
        start, end: its position in the block's text.
        operator: torch_npu's name; "" where the text names none that is known.
        argument: of the operator's schema, or "".
        answer: of the table's row, an id of quantpass's own, or "" where the message names its argument itself.
        kind: what such a message is about (``"dtype"``, ``"dim"``, ``"shape"``, ``"format"``, ``"value"``, ``"null"``,
            ``"not null"``); ``"own"`` or ``"code"`` for what is no message of the vendor's operators.
        found: what it says it found, or "".
        want: what it says it wants, where it is quantpass's own.
        source: where the vendor prints it, or "".
        guessed: the text names no operator; it is one of those that have the argument.
        text: the message.
        lines: the first and the last line of the block that it stands on.
    """

    start: int
    end: int
    operator: str
    argument: str
    answer: str
    kind: str
    found: str
    text: str
    want: str = ""
    source: str = ""
    guessed: bool = False
    lines: tuple[int, int] = (0, 0)


_PARAM, _WHAT = r"(?P<param>[\w\[\]./, ()-]{1,80}?)", r"(?P<kind>shape dim|shape size|shape|dtype|format|value)"
_FORMS = tuple(
    (literal, re.compile(pattern), kind)
    for literal, pattern, kind in (
        (
            "Parameter",
            rf"\bParameters? {_PARAM} of (?:operator )?(?P<op>\w+) ha(?:s|ve) (?:incorrect|invalid) {_WHAT}s? "
            r"(?P<found>.{1,160}?)[.,] (?:Reason:|[Ii]t should be)(?P<reason>.{0,200})",
            "",
        ),
        (
            "has incorrect",
            rf"\bOP (?P<op>\w+)'s parameter {_PARAM} has incorrect {_WHAT} (?P<found>.{{1,160}}?)[.,] (?:Reason:|it)",
            "",
        ),
        ("not implemented", r"\bTensor (?P<param>[\w.]+) not implemented for (?P<found>DT_\w+)", "dtype"),
        ("expected dtype", r"\bTensor (?P<param>[\w.]+) expected dtype is \w+ but found (?P<found>\w+)", "dtype"),
        ("Expected a", r"\bExpected a proper Tensor but got (?P<found>null) for argument (?P<param>[\w.]*\w)", "null"),
        (
            "dimensions",
            r"\bThe (?P<param>\w+) tensor (?:cannot be larger than|must have at least) \d+ dimensions",
            "dim",
        ),
        (
            "dimension input",
            r"\bExpected \d+ dimension input, but got (?P<param>\w+) with sizes (?P<found>\[[^\]]*\])",
            "shape",
        ),
        (
            "Expected tensor",
            r"\bExpected tensor for (?P<param>\w+) to have same size as (?:tensor for )?\S+?, but (?:got )?"
            r"(?P<found>\[[^\]]*\])",
            "shape",
        ),
    )
)
"""aclnn's messages that name their argument: what a text has to have for one, the message, what it is about."""

_KINDS = {"shape dim": "dim", "shape": "shape", "dtype": "dtype", "format": "format", "value": "value"}
_OWN = re.compile(r"\b(?P<rule>[a-z]\w*(?:\.\w+)+): (?P<fact>.+?); wanted (?P<want>.+?)(?=\. | \[|  |$)")
_CODE = re.compile(r"\b(?:161001|161002|361001|56\d{4}|5070\d\d|E[A-Z]\d{4}|E[6789]9999|ERR\d{5})\b")


def places(block: Block) -> list[Place]:
    """Every message of a block, in order; a code behind the messages of its place."""
    found = _Found()
    found.add(_own(block))
    for hit in _longest(hits(block)):
        found.add(filter(None, [_of_table(block, hit)]))
    for literal, form, kind in _FORMS:
        for match in form.finditer(block.text) if literal in block.text else ():
            found.add(_of_form(block, match, kind))
    codes = []
    for match in _CODE.finditer(block.text):
        if code_note(match[0]):
            line = block.line_of(match.start())
            operator, text = _operator_near(block, match.start(), line) or "", line_text(block, line)
            codes.append(Place(*match.span(), operator, "", f"code:{match[0]}", "code", match[0], text))
    made = [replace(f, lines=(block.line_of(f.start), block.line_of(f.end - 1))) for f in (*found.places, *codes)]
    return sorted(made, key=lambda f: (f.start, f.kind == "code"))


def operator_of_line(block: Block, line: int) -> str | None:
    """The operator that a line, or else the lines around it, name."""
    return _operator_near(block, block.starts[line], line)


class _Found:
    """Places of a block that don't overlap: the first ones stay."""

    def __init__(self) -> None:
        self.places: list[Place] = []
        self._at: dict[int, list[Place]] = {}

    def add(self, made: Iterable[Place]) -> None:
        """Keep readings of one message, unless something of it is kept already."""
        for group in _by_span(made):
            cells = range(group[0].start // _CELL, group[0].end // _CELL + 1)
            near = (other for cell in cells for other in self._at.get(cell, ()))
            if not any(other.start < group[0].end and group[0].start < other.end for other in near):
                self.places += group
                for cell in cells:
                    self._at.setdefault(cell, []).append(group[0])


def _by_span(made: Iterable[Place]) -> Iterator[list[Place]]:
    for _, group in groupby(made, key=lambda p: (p.start, p.end)):
        yield list(group)


def _operator_near(block: Block, position: int, line: int) -> str | None:
    """The operator that is named nearest: on the line, else before it, else behind it; None where none is."""
    named = block.mentions
    first = bisect_left(named, line, key=lambda m: m.line)
    behind = bisect_right(named, line, first, key=lambda m: m.line)
    if first < behind:
        at = bisect_right(named, position, first, behind, key=lambda m: m.start) - 1
        return named[max(at, first)].name
    if first and named[first - 1].line >= line - _NEAR_BEFORE:
        return named[first - 1].name
    return named[behind].name if behind < len(named) and named[behind].line <= line + _NEAR_AFTER else None


def _longest(found: Iterable[Hit]) -> list[Hit]:
    """Of hits that overlap, the one with most words."""
    kept: list[Hit] = []
    taken: set[tuple[str, int]] = set()
    for hit in sorted(found, key=lambda h: (h.first - h.end, h.first)):
        words = {(hit.pattern.operator, i) for i in range(hit.first, hit.end)}
        if not words & taken:
            kept.append(hit)
            taken |= words
    return kept


def _of_table(block: Block, hit: Hit) -> Place | None:
    """The message of a row; None where another operator is named beside it, or none where one has to be."""
    row, start, end = hit.pattern, block.spans[hit.first][0], block.spans[hit.end - 1][1]
    line = block.line_of(start)
    near = _operator_near(block, start, line)
    if block.line_of(end - 1) - line > _AT_MOST_LINES or (near is None and row.needs_operator):
        return None
    if row.operator == ANY:
        operator = near or ""
    elif near in (None, row.operator) or (row.operator == near == ""):
        operator = row.operator
    else:
        return None
    found, kind, argument = found_in(block.text[start : end + 200]), "", row.argument
    form = _FORMS[0][1].search(block.text, max(0, start - 300), end)
    if form and form.start("reason") <= start:
        found, kind = found or form["found"], _KINDS.get(form["kind"], "")
        argument = argument or argument_named(operator, re.split(r"[ ,/(]", form["param"])[0])
    text = block.excerpt(form.start() if form else start, end)
    return Place(start, end, operator, argument, row.answer, kind, found, text, source=row.source)


def _of_form(block: Block, match: re.Match[str], kind: str) -> Iterator[Place]:
    """The message of a form, of each operator that it may be of."""
    parts, line = match.groupdict(), block.line_of(match.start())
    found = (parts.get("found") or "").strip()
    kind = kind or _KINDS.get(parts["kind"], "")
    if kind == "value":
        kind = {"null": "null", "nullptr": "null", "not null": "not null"}.get(found, kind)
    near = operator_named(parts["op"]) if parts.get("op") else None
    near = _operator_near(block, match.start(), line) if near is None else near
    text = block.text[match.start() : match.end() + 200]
    for operator in [near] if near is not None else _operators_with(parts["param"], text):
        argument = argument_named(operator, parts["param"]) if operator else ""
        excerpt = block.excerpt(*match.span())
        yield Place(*match.span(), operator, argument, "", kind, found, excerpt, guessed=near is None)


def _operators_with(name: str, text: str) -> list[str]:
    """Operators that a message may be of, by its argument and the dtypes that it lists; at most three."""
    if name in ("out", "output", "y", "x", "self", "input"):
        return []
    having = [op for op in OPERATORS if argument_named(op, name)]
    listed = re.search(r"support list \[([\w, ]+)\]", text)
    dtypes = {dtype_of(d) for d in re.findall(r"DT_\w+", listed[1])} if listed else set()
    exact = [op for op in having if dtypes and accepted_dtypes(op, argument_named(op, name)) == dtypes]
    return (exact or having)[:3]


def _own(block: Block) -> Iterator[Place]:
    """What quantpass itself said."""
    for match in _OWN.finditer(block.text) if "; wanted " in block.text else ():
        rule, name = rule_of(match["rule"]), match["rule"]
        if rule is None and name not in REASONS:
            continue
        operator = rule.op.name if rule else ""
        argument = "" if rule is None else getattr(rule.need, "arg", "") or name.removeprefix(rule.id).strip(".")
        text = block.excerpt(*match.span())
        yield Place(*match.span(), operator, argument, name, "own", match["fact"], text, match["want"])


def rule_of(name: str) -> Rule | None:
    """The rule of some chip that an id in a verdict names; a table of dtypes adds the argument to its id."""
    return _rules().get(name) or _rules().get(name.rpartition(".")[0])


@lru_cache(maxsize=1)
def _rules() -> Mapping[str, Rule]:
    return {r.id: r for chip in CHIPS.values() for r in chip.rules}


def line_text(block: Block, line: int) -> str:
    """A line of a block, at most 400 characters of it."""
    return " ".join(block.lines[line][:4000].split())[:400]
