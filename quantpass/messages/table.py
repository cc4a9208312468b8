"""The table of messages: the words that tell one from all others, and what it speaks of."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files

from quantpass.messages.logs import Block

_GAP = 12
"""How many words a value in a message can have: a shape, a list of dtypes."""

ANY = "*"


@dataclass(frozen=True)
class Pattern:
    """One row.

    Attributes:
        words: lower-case words as they follow each other; ``*`` is a value.
        operator: torch_npu's name; ``*`` for messages that any operator's code has, "" for those of no operator here.
        argument: of the operator's schema; "" where the message is about none or names it itself.
        answer: id of a rule, or the beginning of one; or ``note:`` and the name of a note.
        needs_operator: its words are told from other operators' only by the operator that is named beside them.
        source: file and line of the vendor that prints it.
    """

    words: str
    operator: str
    argument: str
    answer: str
    needs_operator: bool
    source: str

    @cached_property
    def stretches(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(s.split()) for s in self.words.split(" * "))

    @cached_property
    def plain(self) -> frozenset[str]:
        """The words that a text has to have."""
        return frozenset(word for stretch in self.stretches for word in stretch)

    @cached_property
    def anchor(self) -> int:
        """The longest stretch, by which the pattern is looked for."""
        return max(range(len(self.stretches)), key=lambda i: len(self.stretches[i]))


@dataclass(frozen=True)
class Hit:
    """A pattern at some words of a block, from the first to behind the last."""

    pattern: Pattern
    first: int
    end: int


@lru_cache(maxsize=1)
def patterns() -> tuple[Pattern, ...]:
    """The rows of ``patterns.tsv``."""
    text = (files("quantpass.messages") / "patterns.tsv").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return tuple(
        Pattern(
            row["words"],
            row["operator"].strip("-"),
            row["argument"].strip("-"),
            row["answer"],
            row["needs"] == "op",
            row["source"],
        )
        for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    )


def hits(block: Block) -> Iterator[Hit]:
    """Every pattern in a block of text, looked for at its rarest word: most blocks lack one of any pattern's words."""
    counts = Counter(block.words)
    wanted: dict[str, list[tuple[Pattern, int]]] = {}
    for pattern in patterns():
        if pattern.plain <= counts.keys():
            anchor = pattern.stretches[pattern.anchor]
            rarest = min(range(len(anchor)), key=lambda i: counts[anchor[i]])
            wanted.setdefault(anchor[rarest], []).append((pattern, rarest))
    if not wanted:
        return
    for i, word in enumerate(block.words):
        for pattern, behind in wanted.get(word, ()):
            span = _span(pattern, block.words, i - behind) if i >= behind else None
            if span:
                yield Hit(pattern, *span)


def _span(pattern: Pattern, words: tuple[str, ...], at: int) -> tuple[int, int] | None:
    """Where a pattern lies whose anchor begins at a word; None where it does not."""
    stretches, anchor = pattern.stretches, pattern.anchor
    if words[at : at + len(stretches[anchor])] != stretches[anchor]:
        return None
    first, end = at, at + len(stretches[anchor])
    for stretch in reversed(stretches[:anchor]):
        before = (i for i in range(first - len(stretch), first - len(stretch) - _GAP - 1, -1) if i >= 0)
        found = next((i for i in before if words[i : i + len(stretch)] == stretch), None)
        if found is None:
            return None
        first = found
    for stretch in stretches[anchor + 1 :]:
        found = next((i for i in range(end, end + _GAP + 1) if words[i : i + len(stretch)] == stretch), None)
        if found is None:
            return None
        end = found + len(stretch)
    return first, end
