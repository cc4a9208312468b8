"""``explain_error``: what an error message of Ascend's software, or of quantpass, is about."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from quantpass.basics.reasons import REASONS
from quantpass.chips import chip_named
from quantpass.chips.companions import Unavailable
from quantpass.chips.rules import Chip
from quantpass.messages.facts import check, chips_for, chips_in, rule_about, rule_named, want_of
from quantpass.messages.logs import Block, blocks
from quantpass.messages.notes import Note, code_note, note_of
from quantpass.messages.places import Place, line_text, operator_of_line, places, rule_of
from quantpass.messages.table import ANY, Pattern, patterns

_SAYS = re.compile(
    r"\bAclNN_\w+\(E\w+\): (?P<vendor>.*)|\bE[A-Z0-9]\d{4}: (?P<coded>.*)|\b[A-Z]\w*(?:Error|Exception): (?P<python>.*)"
)
"""A line that says an error in words of its own."""
_CALLED = re.compile(r"\bcall \w+ failed|\berror code is \d+|\bInner Error!|\bInvalid_Argument\b")
"""What stands there instead where a line only passes an error on."""

_AT_MOST = 200
"""Distinct messages that are explained; a log that has more repeats itself."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """One error.

    Attributes:
        operator: torch_npu's name; None where the text names none that is known.
        argument: of the operator's schema; None where the error is about none.
        rule: id of the rule that is broken; None where no rule says it.
        found: what the message says it found; None where it says nothing.
        want: what is accepted; None where it is not known.
        hint: what to do, and where there is one, the nearest legal edit and the ``check-op`` line to try it with.
        doc: where that stands.
        text: the message in the log.
    """

    operator: str | None
    argument: str | None
    rule: str | None
    found: str | None
    want: str | None
    hint: str
    doc: str | None
    text: str

    @property
    def known(self) -> bool:
        """True where the message is in the table, or says itself what it is about."""
        return self.want is not None

    def __str__(self) -> str:
        head = " ".join(filter(None, (self.operator, self.argument))) or "no known operator"
        rows = (("rule", self.rule), ("found", self.found), ("wanted", self.want), ("source", self.doc))
        lines = [f"{head}: {self.rule or ('explained' if self.known else 'not known')}", f"  message: {self.text}"]
        lines += [f"  {name + ':':<8} {value}" for name, value in rows if value and name != "rule"]
        lines += [f"  hint:    {part}" for part in self.hint.split("\n") if part]
        return "\n".join(lines)


def explain_error(text: str, target: str | None = None) -> list[Explanation]:
    """Say what error messages are about: operator, argument, rule, what is legal.

    Args:
        text: what was printed: one line, or a whole log with several errors, colour codes and wrapped lines.
        target: chip or SoC name, where the text names none.

    Returns:
        One explanation for each distinct error, in the order of the text. A text that is not known has one too: its
        ``rule`` is None and its ``hint`` names the messages most like it.

    Raises:
        TypeError: ``text`` is no string.
        ValueError: an unknown target.
    """
    if not isinstance(text, str):
        raise TypeError(f"text is {type(text).__name__}; give what was printed, as a string")
    named = (chip_named(target).name,) if target else chips_in(text)
    seen: dict[object, Explanation] = {}
    passing: dict[object, Explanation] = {}
    unknown: dict[object, tuple[Explanation, bool]] = {}
    met: set[Place] = set()
    for variants in blocks(text):
        found = [place for block in variants for place in places(block)]
        for place in found:
            alike = replace(place, start=0, end=0, text="", lines=(0, 0))
            if alike in met:
                continue
            met.add(alike)
            made, passes_on = _explained(place, named)
            key = (made.operator, made.argument, made.rule, made.found, made.want)
            (passing if passes_on else seen).setdefault(key, made)
        for line, operator, vendors in _unmatched(variants[0], found):
            said_before = re.sub(r"[\d\W_]+", " ", line)
            if said_before not in unknown and len(unknown) <= _AT_MOST:
                unknown[said_before] = _not_known(line, operator), vendors
        if len(seen) + len(passing) + len(unknown) > _AT_MOST:
            break
    # An error of Python's behind a message that is explained is most often the program that it ended.
    said = [*seen.values(), *(e for e, vendors in unknown.values() if vendors or not seen)]
    failed = {e.operator for e in said}
    kept = [*said, *(e for e in passing.values() if not said or (e.operator and e.operator not in failed))]
    return kept or ([_not_known(" ".join(text.split())[:400])] if text.strip() else [])


def to_json(explanations: Iterable[Explanation]) -> str:
    """``{"version": 1, "errors": [...]}``."""
    return json.dumps({"version": 1, "errors": [asdict(e) for e in explanations]}, indent=2, ensure_ascii=False)


# -- saying what they are about ---------------------------------------------------------------------------------------


def _explained(place: Place, named: Sequence[str]) -> tuple[Explanation, bool]:
    """The explanation of a message, and whether it only passes another one on."""
    if place.kind == "own":
        return _explained_own(place), False
    if place.kind == "code":
        return _explained_code(place, named), True
    bare = Explanation(
        place.operator or None, place.argument or None, None, place.found or None, None, "", None, place.text
    )
    made = _by_rule(place, bare, chips_for(named))
    note = note_of(place.answer) if place.answer else _note_about(place)
    if made is None and note:
        return replace(bare, want=note.want, hint=note.hint, doc=place.source or None), note.passing
    made = made or replace(bare, hint=_named_only(place))
    if place.guessed:
        hint = f"the text names no operator; this is what it means of {made.operator}"
        made = replace(made, hint=f"{hint}\n{made.hint}")
    return made, False


def _by_rule(place: Place, bare: Explanation, chips: tuple[Chip, ...]) -> Explanation | None:
    """What a rule says of a message: of the value that it found where it has one, else in general."""
    if place.answer.startswith("note:"):
        return None
    answer = place.answer or rule_about(place.operator, place.argument, place.kind, chips)
    if answer or (place.argument and place.kind == "dtype"):
        checked = check(place.operator, place.argument, answer, place.found, place.kind, chips)
        if checked:
            hint = "\n".join(filter(None, (checked.hint, f"on {checked.chip}: {checked.line}")))
            return replace(bare, rule=checked.rule, want=checked.want, hint=hint, doc=checked.doc)
    stated = answer and (rule_named(answer, place.argument, chips) or rule_named(answer, place.argument, chips_for(())))
    if not stated:
        return None
    rule, name, chip = stated
    hint = "\n".join(filter(None, (rule.hint, f"all rules: quantpass chips {chip.name}")))
    return replace(bare, rule=name, want=want_of(rule, place.argument), hint=hint, doc=rule.source)


def _note_about(place: Place) -> Note | None:
    """What is known of a message that names its argument, where no one rule says it."""
    if place.argument in ("output_dtype", "dst_type") and place.kind in ("dim", "shape"):
        return note_of("note:out")
    return note_of("note:format") if place.kind == "format" and place.argument else None


def _named_only(place: Place) -> str:
    if not place.operator:
        return "the operator that the text names is none that quantpass knows"
    if place.argument:
        return f"`quantpass chips` lists what is known of {place.operator}'s {place.argument}"
    return f"{place.operator} has no argument of that name that quantpass knows"


def _explained_own(place: Place) -> Explanation:
    known = REASONS.get(place.answer) or rule_of(place.answer)
    hint, doc = (known.hint, known.source) if known else ("", "")
    return Explanation(
        place.operator or None, place.argument or None, place.answer, place.found, place.want, hint, doc, place.text
    )


def _explained_code(place: Place, named: Sequence[str]) -> Explanation:
    """A failed call of which the text says no more than its code."""
    note = code_note(place.found) or Note("the call to succeed", "")
    made = Explanation(
        place.operator or None, None, None, f"error code {place.found}", note.want, note.hint, None, place.text
    )
    for chip in chips_for(named) if named and place.operator else ():
        for rule in chip.rules:
            if rule.op.name == place.operator and isinstance(rule.need, Unavailable):
                hint = "\n".join(filter(None, (rule.hint, note.hint)))
                return replace(made, rule=rule.id, want=rule.need.want, hint=hint, doc=rule.source)
    return made


def _unmatched(block: Block, found: Sequence[Place]) -> Iterator[tuple[str, str | None, bool]]:
    """Lines that say an error of which nothing is known, their operator, and whether they are Ascend's."""
    known = {line for p in found if p.kind != "code" for line in range(p.lines[0] - 1, p.lines[1] + 2)}
    for number, line in enumerate(block.lines):
        match = _SAYS.search(line) if ": " in line and number not in known else None
        if match is None or _CALLED.search(line):
            continue
        if re.search(r"[a-z]{3}", match[match.lastindex or 0]):
            vendors = match.lastgroup != "python"
            yield line_text(block, number), operator_of_line(block, number) if vendors else None, vendors


def _not_known(line: str, operator: str | None = None) -> Explanation:
    near = _closest(line)
    listed = "; ".join(f"'{p.words}' ({p.operator.replace(ANY, 'any operator') or 'float matmul'})" for p in near)
    return Explanation(
        operator or None,
        None,
        None,
        None,
        None,
        f"not in the table of messages; the closest that are: {listed}",
        None,
        line,
    )


def _closest(line: str) -> list[Pattern]:
    message = re.sub(r"^.*\(E\w+\): |^.*?\b\w+Error: ", "", line)
    words = re.findall(r"\w+", message.lower())[:60]
    plain = " ".join(words)
    by_words = {p.words: p for p in patterns()}
    common = sorted(by_words, key=lambda w: -len(set(w.split()) & set(words)))[:60]
    return [by_words[w] for w in sorted(common, key=lambda w: -difflib.SequenceMatcher(None, w, plain).ratio())[:3]]
