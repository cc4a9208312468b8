"""From captured graphs to the table in ``docs/coverage.md``: ``python -m tests.coverage.table`` writes it."""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from tabulate import tabulate

import quantpass as qp
from quantpass.chips import DOCUMENTED
from quantpass.doors.compiled import copied
from tests.coverage import elsewhere, here
from tests.coverage.captured import Captured, capture, load, run
from tests.coverage.scheme import Scheme
from tests.coverage.store import CAPTURES
from tests.coverage.unread import section

PERMITTED = """## The 310P with permission

The 310P takes weights of int8 with one scale for each column, and float16. Of these {sites} sites it fuses {alone} as
they are, {refit} with `allow=("weights.refit",)`, {half} with `allow=("numerics.float16",)` and {both} with both
([what they do](semantics.md)). *SQNR* is that of the worst column of the re-fitted weights, *error* the largest
difference of the fused graph's results from the tool's, in units of their mean magnitude, with both permissions. Rows
where neither gains anything are left out.
"""

TARGETS = ("cpu", *DOCUMENTED)
PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"

HEAD = """# What is read of each tool

`make coverage` writes this page; a test keeps it true. Each row is one way of one tool to quantize a Linear or a small
MLP. The tool's own graph is captured through `torch.compile`, judged for each target, fused for `cpu` and run: the
result has to agree with the tool's. NPUs are asked with `numerics="vendor"`, the default of their doors, the `cpu` with
`"strict"`, which keeps the tool's own codes. *sites* is the number of quantized matmuls; the columns after it say how many of
them are fused. Rows whose tool the tests do not install are read from graphs stored in `tests/coverage/captures`
(`python -m tests.coverage.store` makes them anew). *version* is the tool's that made the graph, with PyTorch 2.13; another
version of some of them: [versions.md](versions.md).

A site that no column counts is refused by the rules named in the last column; a rule there beside a full count says
why another, better fused operator was not taken on some target, or why a chip refuses what another takes.
"""


REFIT, HALF = "weights.refit", "numerics.float16"
PERMISSIONS = ((REFIT,), (HALF,), (REFIT, HALF))


@dataclass
class Allowed:
    """The 310P with permissions: the sites that are fused with each of :data:`PERMISSIONS`, and at what cost with all.

    ``offered``: the same counts as the report without any permission foretells them. ``sqnr``: the least of a re-fitted
    weight, infinite where there is none. ``error``: as for :class:`Row`.
    """

    fused: Counter[tuple[str, ...]] = field(default_factory=Counter)
    offered: Counter[tuple[str, ...]] = field(default_factory=Counter)
    sqnr: float = float("inf")
    error: float = 0.0

    def add(self, c: Captured) -> None:
        """Count the sites of one more graph."""
        plain = qp.explain(copied(c.graph), target="ascend310p", numerics="vendor")
        for allow in PERMISSIONS:
            offers = [any({*o.allow} <= {*allow} for o in s.offers) for s in plain.sites]
            self.offered[allow] += plain.fused + sum(offers)
            graph = copied(c.graph)
            report = qp.fuse(graph, target="ascend310p", allow=allow, numerics="vendor")
            self.fused[allow] += report.fused
        costs = [s.plan.refit.sqnr for s in report.sites if s.plan is not None and s.plan.refit is not None]
        self.sqnr = min([self.sqnr, *costs])
        if report.fused:
            self.error = worse(self.error, error_of(c, graph))


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ``error`` is how far the fused graph's results are from the tool's; NaN where the graph can't run without the tool.
    """

    scheme: Scheme
    version: str
    sites: int
    fused: dict[str, int]
    refused_by: tuple[str, ...]
    error: float
    allowed: Allowed

    @property
    def cells(self) -> list[str | int]:
        counts = [self.fused[t] for t in TARGETS]
        rules = ", ".join(f"`{r}`" for r in self.refused_by)
        return [self.scheme.tool, self.version, self.scheme.name, self.sites, *counts, rules]


def rows(stored: bool = True) -> Iterator[Row]:
    """Every row; without ``stored`` only those of the tools that are installed here."""
    for scheme in here.schemes():
        torch._dynamo.reset()
        torch.manual_seed(0)
        yield row(scheme, capture(*scheme.build()), version(scheme.package).partition("+")[0])
    for scheme in elsewhere.schemes() if stored else ():
        graphs, about = load(CAPTURES / f"{scheme.slug}.pt")
        yield row(scheme, graphs, about["version"])


def row(scheme: Scheme, graphs: list[Captured], tool_version: str) -> Row:
    """The verdicts on one scheme."""
    fused, rules, sites, error = dict.fromkeys(TARGETS, 0), Counter[str](), 0, 0.0
    allowed = Allowed()
    for c in graphs:
        here = qp.explain(copied(c.graph), target="cpu")
        there = qp.explain(copied(c.graph), target=DOCUMENTED, numerics="vendor")
        sites += here.total
        for t in TARGETS:
            fused[t] += here.fused if t == "cpu" else there[t].fused
        rules.update({r.rule for s in (*here.sites, *there.sites) if not s.fused for r in s.rejects})
        if here.fused == here.total > 0:
            graph = copied(c.graph)
            qp.fuse(graph, target="cpu")
            error = worse(error, error_of(c, graph))
        allowed.add(c)
    return Row(scheme, tool_version, sites, fused, tuple(sorted(rules)), error, allowed)


def worse(error: float, found: float) -> float:
    """The larger of two; NaN where one is."""
    return max(error, found) if not math.isnan(error + found) else math.nan


def error_of(c: Captured, graph: torch.fx.GraphModule) -> float:
    """How far a fused graph's results are from the tool's; NaN where it can't run without the tool."""
    try:
        return max(map(_difference, run(c, graph), c.outputs))
    except NotImplementedError:
        return float("nan")  # an operator of the tool that is left in the graph has no kernel here


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference in units of the mean magnitude."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().mean())


def page(found: list[Row]) -> str:
    """The text of ``docs/coverage.md``."""
    headers = ["tool", "version", "scheme", "sites", *TARGETS, "refused by"]
    table = tabulate([r.cells for r in found], headers, tablefmt="github")
    return f"{HEAD}\n{table}\n\n{_with_permissions(found)}\n{section()}"


def _with_permissions(found: list[Row]) -> str:
    """The part of the page about the 310P."""
    alone, sites = sum(r.fused["ascend310p"] for r in found), sum(r.sites for r in found)
    totals = [sum(r.allowed.fused[allow] for r in found) for allow in PERMISSIONS]
    lines = []
    for r in found:
        counts = [r.allowed.fused[allow] for allow in PERMISSIONS]
        if max(counts) > r.fused["ascend310p"]:
            sqnr = f"{math.floor(r.allowed.sqnr * 10) / 10:g} dB" if r.allowed.sqnr < math.inf else ""
            error = "" if math.isnan(r.allowed.error) else f"{r.allowed.error:.1e}"
            lines.append([r.scheme.tool, r.scheme.name, r.sites, r.fused["ascend310p"], *counts, sqnr, error])
    headers = ["tool", "scheme", "sites", "as it is", *(" + ".join(allow) for allow in PERMISSIONS), "SQNR", "error"]
    head = PERMITTED.format(alone=alone, sites=sites, refit=totals[0], half=totals[1], both=totals[2])
    return f"{head}\n{tabulate(lines, headers, tablefmt='github')}\n"


def main() -> int:
    """Write the page; fails where something that can be mapped is fused nowhere."""
    logging.getLogger("quantpass").setLevel(logging.ERROR)
    found = list(rows())
    PAGE.write_text(page(found), encoding="utf-8")
    lost = [r for r in found if r.scheme.maps and max(r.fused.values()) < r.sites]
    for r in lost:
        print(f"not fused anywhere: {r.scheme.tool}, {r.scheme.name}: {', '.join(r.refused_by)}")
    print(f"{len(found)} schemes, {sum(r.sites for r in found)} sites; wrote {PAGE.relative_to(Path.cwd())}")
    return len(lost)


if __name__ == "__main__":
    sys.exit(main())
