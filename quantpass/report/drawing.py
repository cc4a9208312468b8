"""A few nodes of a graph as a picture: a box for each, ranked by what it needs, as SVG."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

_LINE = re.compile(r"%(?P<name>\w+)(?:: (?P<value>[^=]*?))? = (?P<call>.*)$")
_CHAR, _LOW, _HIGH, _ACROSS, _DOWN = 7.3, 40, 8, 16, 26
"""Width of a character; height of a box, its padding; gaps between boxes of one rank and between ranks."""


@dataclass(frozen=True, slots=True)
class _Box:
    name: str
    title: str
    value: str
    needs: tuple[str, ...]
    given: bool

    @property
    def width(self) -> float:
        return _CHAR * max(len(self.title), len(self.value)) + 2 * _HIGH


def drawing(text: str, before: str = "") -> str:
    """SVG of the nodes in ``text``, a line each as :func:`quantpass.graph.dump.describe_node` writes them.

    Args:
        text: the lines.
        before: other lines; boxes that are not among these are marked as new.
    """
    boxes, known = _boxes(text), {*_boxes(before)} if before else None
    ranks = _ranks(boxes)
    places: dict[str, tuple[float, float]] = {}
    width = 0.0
    for rank, names in enumerate(ranks):
        x = 4.0
        for name in names:
            places[name] = (x, 4 + rank * (_LOW + _DOWN))
            x += boxes[name].width + _ACROSS
        width = max(width, x)
    height = 8 + len(ranks) * (_LOW + _DOWN) - _DOWN
    drawn = [_arrow(boxes, places, need, name) for name in places for need in boxes[name].needs if need in places]
    drawn += [
        _drawn(boxes[name], *place, new=known is not None and name not in known) for name, place in places.items()
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}"><defs><marker id="to" viewBox="0 0 8 8" refX="8" refY="4" '
        'markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>'
        f"{''.join(drawn)}</svg>"
    )


def _boxes(text: str) -> dict[str, _Box]:
    """The nodes of the lines, and those that they name and are not among them."""
    found: dict[str, _Box] = {}
    for line in text.splitlines():
        match = _LINE.match(line.strip().lstrip("+- "))
        if match is None:
            continue
        call = match["call"]
        needs = tuple(dict.fromkeys(re.findall(r"%(\w+)", call)))
        for need in needs:
            found.setdefault(need, _Box(need, need, "", (), True))
        title = call.partition("(")[0] if needs or "(" in call else match["name"]
        found[match["name"]] = _Box(match["name"], title, match["value"] or "", needs, not needs)
    return found


def _ranks(boxes: Mapping[str, _Box]) -> list[list[str]]:
    """Names by the longest way from a node that needs nothing; what is given stands right above its first reader."""
    rank: dict[str, int] = {}
    for name, box in sorted(boxes.items(), key=lambda item: not item[1].given):
        rank.setdefault(name, 0)
        rank[name] = max([0, *(rank.get(n, 0) + 1 for n in box.needs)])
    for name, box in boxes.items():
        readers = [rank[other] for other, b in boxes.items() if name in b.needs]
        if box.given and readers:
            rank[name] = min(readers) - 1
    return [[n for n in boxes if rank[n] == r] for r in sorted({*rank.values()})]


def _drawn(box: _Box, x: float, y: float, *, new: bool) -> str:
    kind = ' class="given"' if box.given else ' class="new"' if new else ""
    lines = [box.title, box.value] if box.value else [box.title]
    first = y + _LOW / 2 + 4 - 8 * (len(lines) - 1)
    texts = (
        f'<text x="{x + box.width / 2:.1f}" y="{first + 16 * i:.1f}" text-anchor="middle">{escape(line)}</text>'
        for i, line in enumerate(lines)
    )
    return f'<rect{kind} x="{x:.1f}" y="{y:.1f}" width="{box.width:.1f}" height="{_LOW}" rx="5"/>{"".join(texts)}'


def _arrow(boxes: Mapping[str, _Box], places: Mapping[str, tuple[float, float]], above: str, below: str) -> str:
    (x1, y1), (x2, y2) = places[above], places[below]
    x1, x2, y1 = x1 + boxes[above].width / 2, x2 + boxes[below].width / 2, y1 + _LOW
    bend = (y1 + y2) / 2
    curve = f"M{x1:.1f} {y1:.1f}C{x1:.1f} {bend:.1f} {x2:.1f} {bend:.1f} {x2:.1f} {y2:.1f}"
    return f'<path marker-end="url(#to)" d="{curve}"/>'
