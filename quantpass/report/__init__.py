"""What the pass found and decided, for people, programs and tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from quantpass.basics.json_text import json_text
from quantpass.basics.suggestions import did_you_mean
from quantpass.graph.dump import diff_text
from quantpass.graph.records import Site, WeightFormat
from quantpass.planning.options import fits
from quantpass.report.data import SCHEMA, coverage_data, format_data, site_data
from quantpass.report.text import as_text, rendered
from quantpass.version import __version__


@dataclass(frozen=True, repr=False)
class Report:
    """Every quantized matmul of one or more graphs, with a verdict for each target.

    Attributes:
        sites: one :class:`~quantpass.graph.records.Site` for each matmul and target.
        targets: the targets asked for.
        mode: ``"graph"`` or ``"eager"``.
        graphs: text of each rewritten graph, before and after; empty for ``explain``.
        formats: how each weight is stored, one :class:`~quantpass.graph.records.WeightFormat` each; empty for
            ``explain``.
        notes: what else a user should know, in words.
        hidden: signs of quantized weights that no graph shows, in words; :meth:`require` does not pass over them.
        leave: the option ``leave`` that it was made with.
    """

    sites: tuple[Site, ...]
    targets: tuple[str, ...]
    mode: str = "graph"
    graphs: tuple[tuple[str, str], ...] = ()
    formats: tuple[WeightFormat, ...] = ()
    notes: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()

    @property
    def fused(self) -> int:
        """How many sites are fused (over all targets)."""
        return sum(s.fused for s in self.sites)

    @property
    def total(self) -> int:
        """How many sites there are (over all targets)."""
        return len(self.sites)

    @property
    def offers(self) -> tuple[str, ...]:
        """What ``allow`` could gain, in words: a line for each permission that helps; for a report of one target."""
        return tuple(_offers(self))

    @property
    def unmatched(self) -> tuple[str, ...]:
        """What is said of each name or pattern in ``leave`` that fits no site, where there are sites."""
        known = list(dict.fromkeys(s.name for s in self.sites))
        some = ", ".join(known[:5]) + (f" and {len(known) - 5} more" if len(known) > 5 else "")
        return tuple(
            f"leave: {p!r} fits no site seen here ({some}).{did_you_mean(p, known)}"
            for p in self.leave
            if known and not any(fits(p, name) for name in known)
        )

    def __getitem__(self, target: str) -> Report:
        """The part of the report for one target."""
        if target not in self.targets:
            raise KeyError(f"this report has no target {target!r}; it has {', '.join(self.targets)}")
        return replace(self, sites=tuple(s for s in self.sites if s.target == target), targets=(target,))

    def __add__(self, other: Report) -> Report:
        """Both reports in one. A matmul that was compiled in both is one site, fused where both have fused it."""
        targets = tuple(dict.fromkeys((*self.targets, *other.targets)))
        return Report(
            _counted_once((*self.sites, *other.sites), lambda s: s.target, _same_site),
            targets,
            self.mode,
            (*self.graphs, *other.graphs),
            _counted_once((*self.formats, *other.formats), lambda f: (f.shape, f.dtype, f.format), _same_weight),
            tuple(dict.fromkeys((*self.notes, *other.notes))),
            tuple(dict.fromkeys((*self.hidden, *other.hidden))),
            tuple(dict.fromkeys((*self.leave, *other.leave))),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Report:
        """The report itself: nothing in it changes, and plans name nodes of graphs whose tensors hold no data."""
        return self

    # -- for people ------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return as_text(rendered(self))

    def __repr__(self) -> str:
        said = ", ".join(f"{t} {self[t].fused} of {self[t].total}" for t in self.targets)
        return f"<quantpass.Report: {said} fused>"

    def text(self, *, sites: bool = False, width: int | None = None, color: bool = False) -> str:
        """The report as text.

        Args:
            sites: a row for each site; else those that are alike but for the number of their layer are one.
            width: columns; None for those of the terminal, or for as many as it takes where there is none.
            color: with the terminal's escape sequences.
        """
        return as_text(rendered(self, sites=sites), width, color)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return f"<pre>{escape(as_text(rendered(self), 120))}</pre>"

    def diff(self, site: str | None = None) -> str:
        """The difference between the graphs before and after the rewrite, one hunk list a graph.

        Args:
            site: the name of a site: what was taken out for it and what was put in, alone.

        Raises:
            ValueError: no site of that name was rewritten.
        """
        if site is None:
            return "\n".join(diff_text(before, after) for before, after in self.graphs)
        rewritten = [s for s in self.sites if s.after]
        of_name = [s for s in rewritten if s.name == site]
        if not of_name:
            known = list(dict.fromkeys(s.name for s in rewritten))
            meant = did_you_mean(site, known)
            some = ", ".join(known[:5]) or "none: explain rewrites nothing"
            raise ValueError(f"no rewritten site is named {site!r}. {len(known)} are rewritten ({some}).{meant}")
        return "\n".join(diff_text(s.before, s.after) for s in of_name)

    # -- for programs ----------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "schema": SCHEMA,
            "quantpass": __version__,
            "mode": self.mode,
            "targets": list(self.targets),
            "fused": self.fused,
            "total": self.total,
            "coverage": coverage_data(self.sites, self.targets),
            "sites": [site_data(s) for s in self.sites],
            "formats": [format_data(f) for f in self.formats],
            "notes": [*self.notes, *self.unmatched],
            "hidden": list(self.hidden),
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON; also written to ``path`` where one is given."""
        return json_text(self.as_dict(), path)

    def to_html(self, path: str | Path) -> None:
        """Write the report as one HTML page."""
        from quantpass.report.page import page

        Path(path).write_text(page(self), encoding="utf-8")

    def require(self, fused: int | float | None = None) -> None:
        """Raise ``AssertionError`` unless enough sites are fused; for tests and deployment scripts.

        Args:
            fused: a float up to 1.0 is the least share of the sites, ``1.0`` all of them; an integer is the least
                number of them, so ``1`` is one site. None, the default, is all of them and at least one.

        A share is one of all quantized matmuls. Where there is none (a float model) any share is met, and where a sign
        of one is ``hidden`` no share but 0.0 is (nor is the default), since nobody knows what it is a share of. A
        number is met by the sites that were found.

        Raises:
            AssertionError: fewer are fused, or quantized weights are hidden.
            ValueError: a share that is not between 0 and 1.
        """
        share = 1.0 if fused is None else fused if isinstance(fused, float) else None
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"fused is {share!r}; a share is between 0.0 and 1.0, a number of sites an integer")
        if share and self.hidden:
            raise AssertionError(f"quantized weights that no graph shows: {'; '.join(self.hidden)}\n{self}")
        least = max(self.total, 1) if fused is None else fused * self.total if isinstance(fused, float) else fused
        if self.fused < least:
            raise AssertionError(
                f"{self.fused} of {self.total} quantized matmuls are fused, {least:g} were required\n{self}"
            )


def _offers(report: Report) -> Iterator[str]:
    """Each set of permissions that some refused site asks for, and all of them together where that gains more."""
    refused = [s for s in report.sites if not s.fused and s.offers]
    asked = sorted(dict.fromkeys(o.allow for s in refused for o in s.offers), key=len)
    everything = tuple(dict.fromkeys(name for allow in asked for name in allow))
    for allow in dict.fromkeys((*asked, everything) if asked else ()):
        taken = [[o for o in s.offers if {*o.allow} <= {*allow}] for s in refused]
        worst = min((max(o.sqnr for o in offers) for offers in taken if offers), default=math.inf)
        how = "about" if any(o.sampled for offers in taken for o in offers) else "at least"
        cost = f", SQNR {how} {math.floor(worst * 10) / 10:g} dB" if worst < math.inf else ""
        yield f"{report.fused + sum(map(bool, taken))} of {report.total} with allow={allow!r}{cost}"


_T = TypeVar("_T", Site, WeightFormat)


def _counted_once(
    items: Iterable[_T], apart: Callable[[_T], Hashable], together: Callable[[_T, _T], _T]
) -> tuple[_T, ...]:
    """``items`` with those of one key (and equal in ``apart``) put ``together``, in the order of their first."""
    found: dict[Hashable, _T] = {}
    for item in items:
        key = (item.key, apart(item)) if item.key is not None else object()
        found[key] = together(found[key], item) if key in found else item
    return tuple(found.values())


def _same_site(a: Site, b: Site) -> Site:
    """One site of two compilations: the worse verdict stands."""
    verdicts = tuple(fused for s in (a, b) for fused in s.compilations or (s.fused,))
    if a.fused and b.fused:
        rounded = b.numerics is not None and b.numerics.kind != "exact"
        worse = b if rounded and (a.numerics is None or a.numerics.kind == "exact") else a
    else:
        worse = a if not a.fused else b
    rejects = tuple(dict.fromkeys((*a.rejects, *b.rejects))) if a.fused == b.fused else worse.rejects
    return replace(worse, rejects=rejects, compilations=verdicts)


def _same_weight(a: WeightFormat, b: WeightFormat) -> WeightFormat:
    """One weight of two compilations: the user's tensor is one, prepared tensors are as many as there are."""
    sites = tuple(dict.fromkeys((*a.sites, *b.sites)))
    aliases = tuple(dict.fromkeys((*a.aliases, *b.aliases)))
    return replace(a, sites=sites, aliases=aliases, copies=a.copies + b.copies if a.is_prepared else 1)


def merged(reports: Sequence[Report], targets: Sequence[str], mode: str) -> Report:
    """One report from several."""
    total = Report((), tuple(targets), mode)
    for r in reports:
        total = total + r
    return total
