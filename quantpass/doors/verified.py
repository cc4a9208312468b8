"""What :func:`quantpass.verify` measured: for people, for programs, for tests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from quantpass.doors.bisect import Bisection
from quantpass.doors.differences import EDGES, Difference
from quantpass.report import Report
from quantpass.report.data import SCHEMA
from quantpass.report.text import as_text, table_of


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` measured.

    Attributes:
        report: the verdict on every quantized matmul.
        sites: each fused site, computed from the inputs that the unfused graph gives it; the largest difference where
            its graph ran several times.
        outputs: the results of the whole model, differences of all sites included.
        missed: fused sites that no run compared, by name.
        reference: how far the quantized model, unfused, is from the float model that was given: the values of sites, in
            order, then the results. What differs at a site comes from that site and from all before it.
        bisection: which site breaks the accuracy of the results, where that was asked for.
    """

    report: Report
    sites: tuple[Difference, ...]
    outputs: tuple[Difference, ...]
    missed: tuple[str, ...] = ()
    reference: tuple[Difference, ...] = ()
    bisection: Bisection | None = None

    def __repr__(self) -> str:
        worst = max((d.relative for d in self.sites), default=None)
        said = "nothing compared" if worst is None else f"worst {worst:.2g} of the largest value"
        return f"<quantpass.Verification: {len(self.sites)} sites, {len(self.missed)} missed, {said}>"

    def __str__(self) -> str:
        return as_text(Group(*self._parts()))

    def text(self, *, width: int | None = None, color: bool = False, histogram: bool = False) -> str:
        """What was measured, worst site first; arguments as for :meth:`quantpass.Report.text`.

        ``histogram``: also how many elements differ by how many units.
        """
        return as_text(Group(*self._parts(histogram)), width, color)

    def _parts(self, histogram: bool = False) -> Iterator[Any]:
        yield Text(
            f"{self.report.fused} of {self.report.total} quantized matmuls fused for {', '.join(self.report.targets)}"
        )
        yield Text("\nFused against the graph's own arithmetic, worst first (* the results of the whole model):")
        yield _table([*sorted(self.sites, key=lambda d: -d.relative), *self.outputs], self.outputs)
        if histogram:
            yield Text("\nElements by the units that they differ by:")
            yield _histograms([*sorted(self.sites, key=lambda d: -d.relative), *self.outputs])
        if self.bisection is not None:
            yield Text(f"\nBisection: {self.bisection}")
        if self.reference:
            yield Text("\nQuantized (unfused) against the float model, in order:")
            yield _table(self.reference, ())
        yield from (Text(f"not compared: {name}") for name in self.missed)
        refused = [s for s in self.report.sites if not s.fused]
        if refused:
            yield Text("\nNot fused, so not compared:")
        for site in refused:
            yield Text("\n".join([f"  {site.name} ({site.op})", *(f"    {reject}" for reject in site.rejects)]))
        yield from (Text(f"not seen: {sign}") for sign in self.report.hidden)
        yield from (Text(said) for said in self.report.unmatched)

    def as_dict(self) -> dict[str, Any]:
        """The measurements as plain data; ``schema`` as in :meth:`quantpass.Report.as_dict`."""
        return {
            "schema": SCHEMA,
            "report": self.report.as_dict(),
            "sites": [d.as_dict() for d in self.sites],
            "outputs": [d.as_dict() for d in self.outputs],
            "missed": list(self.missed),
            "reference": [d.as_dict() for d in self.reference],
            "bisection": None if self.bisection is None else self.bisection.as_dict(),
            "histogram_edges": list(EDGES),
        }

    def to_json(self) -> str:
        """The measurements as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def require(self, relative: float = 0.02) -> None:
        """Raise ``AssertionError`` unless every fused site was compared and is right.

        That is: where no site was compared at all (nothing is quantized, nothing was fused, or the fused operators are
        the model's own calls), where a fused site was not compared, and where a site's ``relative`` difference is
        larger than given, or not a number. Sites that are not fused run as they were: ``report.require()`` is about
        them.

        Results of the model are not looked at: in a deep model a change of one rounding may grow.
        """
        if not self.sites:
            raise AssertionError(f"no site was compared: {self._why_nothing()}\n{self}")
        if self.missed:
            fused = len(self.sites) + len(self.missed)
            raise AssertionError(
                f"{len(self.missed)} of {fused} fused sites were not compared: {', '.join(self.missed)}\n{self}"
            )
        bad = [d for d in self.sites if not d.relative <= relative]
        if bad:
            raise AssertionError(f"{len(bad)} of {len(self.sites)} sites differ by more than {relative:g}\n{self}")

    def _why_nothing(self) -> str:
        if not self.report.total:
            return "no quantized matmul was found"
        if not self.report.fused:
            return "none is fused"
        if not self.missed:
            return "the fused operators are the model's own calls"
        return f"{len(self.missed)} fused sites did not run"


def _table(rows: Sequence[Difference], results: Sequence[Difference]) -> Table:
    headers = (
        "value",
        "numerics",
        "largest difference",
        "relative",
        "units: mean",
        "max",
        "over 1",
        "SQNR dB",
        "saturated",
    )
    table = table_of(*headers)
    for d in rows:
        over = sum(d.histogram[EDGES.index(1.0) + 1 :]) / max(sum(d.histogram), 1)
        measured = (f"{d.largest:.3g}", f"{d.relative:.2g}", f"{d.mean_units:.2g}", f"{d.units:.3g}", f"{over:.1%}")
        name = f"{d.name} *" if d in results else d.name
        table.add_row(name, str(d.numerics or ""), *measured, f"{d.sqnr:.1f}", f"{d.saturated:.1%}")
    return table


def _histograms(rows: Sequence[Difference]) -> Table:
    table = table_of("value", "equal", *(f"to {edge:g}" for edge in EDGES[1:]), "more")
    for d in rows:
        table.add_row(d.name, *(f"{count / max(sum(d.histogram), 1):.1%}" for count in d.histogram))
    return table
