"""A report as one HTML page, which loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from quantpass.graph.records import Site
from quantpass.report.drawing import drawing
from quantpass.report.folding import Folded, cause_key, causes, fold, names
from quantpass.report.text import FORMAT_HEADERS, format_row, matmuls, shape_of, verdict
from quantpass.report.worth import worth
from quantpass.version import __version__

if TYPE_CHECKING:
    from quantpass.report import Report

_DRAWN = 300
"""Rows whose graphs are drawn; a page with more would be slow to load."""


def page(report: Report) -> str:
    """The whole page."""
    from jinja2 import Environment
    from markupsafe import Markup

    found = causes(report.sites)
    numbers = {c.key: i for i, c in enumerate(found, 1)}
    parts = [report[t] for t in report.targets]
    rows = list(_rows(report, numbers))
    for row in rows[:_DRAWN]:
        row.update(before=Markup(row["before"]), after=Markup(row["after"]))  # drawn here, every name escaped
    template = Environment(autoescape=True).from_string(
        files("quantpass.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    text: str = template.render(
        report=report,
        version=__version__,
        headline="; ".join(f"{p.targets[0]} {p.fused} of {p.total} fused" for p in parts),
        coverage=[_coverage(p) for p in parts],
        saved=worth(report.sites, report.targets),
        targets=list(report.targets),
        rows=rows,
        total=sum(row["count"] for row in rows),
        causes=[
            {"count": c.count, "targets": c.targets, "named": names(c.sites), "rejects": c.rejects, "hints": c.hints}
            for c in found
        ],
        format_headers=FORMAT_HEADERS,
        format_row=format_row,
    )
    return text


def _coverage(part: Report) -> dict[str, Any]:
    share = 100 * part.fused / part.total if part.total else 100
    return {
        "target": part.targets[0],
        "fused": part.fused,
        "total": part.total,
        "share": f"{share:.1f}",
        "offers": part.offers,
    }


def _rows(report: Report, numbers: Mapping[Any, int]) -> Iterator[dict[str, Any]]:
    """One for each matmul, layers that are alike in one."""
    found = matmuls(report.sites)

    def alike(row: dict[str, Site]) -> Any:
        first = next(iter(row.values()))
        return first.op, first.reading, shape_of(first), tuple(verdict(row.get(t), numbers) for t in report.targets)

    for number, piece in enumerate(fold(found, lambda row: next(iter(row.values())).name, alike)):
        yield _row(piece, report.targets, numbers, drawn=number < _DRAWN)


def _row(
    piece: Folded[dict[str, Site]], targets: Sequence[str], numbers: Mapping[Any, int], *, drawn: bool
) -> dict[str, Any]:
    by_target = piece.members[0]
    first = next(iter(by_target.values()))
    rewritten = next((s for s in by_target.values() if s.before and s.after), None) if drawn else None
    cells = [_cell(by_target.get(t), numbers) for t in targets]
    rules = [r.rule for s in by_target.values() for r in s.rejects]
    return {
        "name": piece.name,
        "count": len(piece.members),
        "members": [next(iter(row.values())).name for row in piece.members],
        "source": first.source,
        "op": first.op,
        "proved": first.proved,
        "reading": first.reading,
        "shape": shape_of(first),
        "cells": cells,
        "fused": all(c["fused"] for c in cells),
        "verdicts": list(_plans(by_target)),
        "words": " ".join([piece.name, first.op, first.reading, *(c["text"] for c in cells), *rules]).lower(),
        "before": drawing(rewritten.before) if rewritten else "",
        "after": drawing(rewritten.after, before=rewritten.before) if rewritten else "",
    }


def _cell(site: Site | None, numbers: Mapping[Any, int]) -> dict[str, Any]:
    refused = site is not None and not site.fused
    return {
        "text": verdict(site, numbers),
        "fused": not refused,
        "cause": numbers[cause_key(site)] if site is not None and refused else 0,
    }


def _plans(by_target: Mapping[str, Site]) -> Iterator[dict[str, Any]]:
    """The fused calls, those chips in one that have the same."""
    found: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for target, site in by_target.items():
        if site.fused and site.plan is not None:
            found.setdefault((str(site.plan), str(site.numerics), site.plan.fixups), []).append(target)
    for (plan, numerics, fixups), targets in found.items():
        yield {"targets": targets, "plan": plan, "numerics": numerics, "fixups": fixups}
