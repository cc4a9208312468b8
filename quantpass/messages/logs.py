"""Text as people paste it: colour codes, prefixes of workers and lines that a terminal wrapped are taken out."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from quantpass.messages.names import operator_named

_COLOURS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x7f]")
_PREFIX = re.compile(
    r"\s*(?:\([\w ]*\bpid=\d+[^)]*\)\s*)?"
    r"(?:(?:TRACE|DEBUG|INFO|WARNING|ERROR|CRITICAL)\s+[\d-]+\s+[\d:.,]+\s+\[[^\]]*\]\s?)?"
)
"""``(Worker_TP0 pid=465) ERROR 02-09 17:11:36 [multiproc_executor.py:751]``"""
WORD = re.compile(r"[A-Za-z0-9_]+")

_LINES, _OVERLAP = 4000, 80
_LONG = 10_000
"""Lines that are longer are never shown whole."""

_NARROW = 40
"""A line shorter than this was not cut by the edge of a terminal."""


class Mention(NamedTuple):
    """An operator that a text names; ``name`` is "" for one that is none of those known."""

    line: int
    start: int
    name: str


@dataclass(frozen=True, eq=False)
class Block:
    """Some lines of a log, joined by spaces."""

    lines: tuple[str, ...]
    glue: tuple[str, ...]
    """What stands behind each line: a space, or nothing where a terminal cut a word in two."""

    @cached_property
    def text(self) -> str:
        return "".join(line + glue for line, glue in zip(self.lines, self.glue, strict=True))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        position, starts = 0, []
        for line, glue in zip(self.lines, self.glue, strict=True):
            starts.append(position)
            position += len(line) + len(glue)
        return tuple(starts)

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Where each word begins and ends in ``text``."""
        return tuple(m.span() for m in WORD.finditer(self.text))

    @cached_property
    def words(self) -> tuple[str, ...]:
        return tuple(map(str.lower, WORD.findall(self.text)))

    @cached_property
    def mentions(self) -> tuple[Mention, ...]:
        """Where operators are named, in order."""
        names = {word: operator_named(word) for word in set(self.words)}
        foreign = "op[" in self.text
        found = []
        for (start, _), word in zip(self.spans, self.words, strict=True):
            name = names[word]
            if name is None and foreign and self.text.startswith("op[", max(0, start - 3)):
                name = ""
            if name is not None:
                found.append(Mention(self.line_of(start), start, name))
        return tuple(found)

    def line_of(self, position: int) -> int:
        return bisect_right(self.starts, position) - 1

    def excerpt(self, start: int, end: int) -> str:
        """The lines from one position to another, as one line of at most 400 characters."""
        first, last = self.line_of(start), self.line_of(max(start, end - 1))
        begins, ends = self.starts[first], self.starts[last] + len(self.lines[last])
        whole = " ".join(self.text[begins:ends].split()) if ends - begins <= _LONG else ""
        if 0 < len(whole) <= 400:
            return whole
        return " ".join(self.text[max(start - 40, self.starts[first]) : start + 340].split())


def blocks(text: str) -> Iterator[tuple[Block, ...]]:
    """The lines of ``text``, cleaned, in blocks that overlap, so that a long log is never held word by word.

    Each block as it is; and where a terminal may have cut words in two, once more with them put together.
    """
    lines = [_PREFIX.sub("", line, count=1) for line in _COLOURS.sub("", text).splitlines()]
    for at in range(0, max(len(lines), 1), _LINES):
        piece = tuple(lines[at : at + _LINES + _OVERLAP])
        plain, glue = (" ",) * len(piece), _unwrapped(piece)
        yield tuple(Block(piece, g) for g in dict.fromkeys((plain, glue)))


def _unwrapped(lines: tuple[str, ...]) -> tuple[str, ...]:
    """Nothing behind lines that end in a word at the edge of the terminal, where the next begins in a word."""
    edge = max(map(len, lines), default=0)
    glue = []
    for line, following in zip(lines, (*lines, "")[1:], strict=True):
        cut = len(line) == edge >= _NARROW and WORD.match(line[-1:]) and WORD.match(following[:1])
        glue.append("" if cut else " ")
    return tuple(glue)
