"""What the pass found and decided, for people, programs and tests."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from tabulate import tabulate

from quantpass.basics.reject import Reject
from quantpass.chips.checking import OPERATORS
from quantpass.graph.dump import diff_text
from quantpass.graph.records import Site, WeightFormat
from quantpass.version import __version__

_CAUSES = """No quantized matmul was found. The likely causes:
  - the weights were folded into floats before the pass (constant folding, freezing): run quantpass first
  - the quantize/dequantize operators were decomposed away or the tool keeps its matmul opaque: see docs
  - the weight is dequantized in another graph than the matmul's (a graph break between the two): look for breaks with
    TORCH_LOGS=graph_breaks
  - the model is not quantized"""


@dataclass(frozen=True)
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
    """

    sites: tuple[Site, ...]
    targets: tuple[str, ...]
    mode: str = "graph"
    graphs: tuple[tuple[str, str], ...] = ()
    formats: tuple[WeightFormat, ...] = ()
    notes: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()

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
        )

    # -- text ------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"quantpass {__version__}, {self.mode} mode"
        if not self.sites:
            yield _CAUSES
            yield from self._notes()
            return
        for target in self.targets:
            part = self[target] if len(self.targets) > 1 else self
            yield f"  {target}: {part.fused} of {part.total} quantized matmuls fused{_times(part)}"
            yield from (f"    {offer}" for offer in part.offers)
        yield ""
        yield from self._site_table()
        yield from self._reasons()
        yield from self._formats()
        yield from self._notes()

    def _site_table(self) -> Iterator[str]:
        by_site: dict[tuple[str, str, str], dict[str, list[Site]]] = {}
        for s in self.sites:
            by_site.setdefault((s.name, s.op, s.reading), {}).setdefault(s.target, []).append(s)
        rows: list[list[Any]] = []
        for (name, op, reading), verdicts in by_site.items():
            count = max(len(v) for v in verdicts.values())
            for i in range(count):
                cells = [_cell(v[i]) if i < len(v := verdicts.get(t, [])) else "" for t in self.targets]
                rows.append([len(rows) + 1, name, op, reading, *cells])
        headers = ["#", "site", "matmul", "read as", *self.targets]
        yield tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)

    def _reasons(self) -> Iterator[str]:
        counts: dict[tuple[str, Reject], int] = {}
        for s in self.sites:
            for r in s.rejects if not s.fused else ():
                counts[(s.target, r)] = counts.get((s.target, r), 0) + 1
        if counts:
            yield ""
            yield "Why not:"
        for (target, r), n in counts.items():
            yield f"  {r.rule} on {target} ({n} site{'s' if n > 1 else ''})"
            yield f"    found:  {r.fact}"
            yield f"    wanted: {r.want}"
            if r.hint:
                yield f"    hint:   {r.hint}"
            if r.doc:
                yield f"    source: {r.doc}"

    def _formats(self) -> Iterator[str]:
        if not self.formats:
            return
        yield ""
        yield "Weights:"
        rows = [_format_row(f) for f in self.formats]
        before, after = (sum(bytes_) for bytes_ in zip(*_bytes_once(self.formats), strict=True))
        rows.append(["total", "", "", f"{before / 1024:.1f}", f"{after / 1024:.1f}", ""])
        yield tabulate(rows, headers=list(_FORMAT_HEADERS), tablefmt="simple", disable_numparse=True)

    def _notes(self) -> Iterator[str]:
        if self.hidden:
            yield ""
            yield "Quantized weights that no graph shows:"
        for sign in self.hidden:
            yield f"  - {sign}"
        notes = [*self.notes, *self._of_plans()]
        if notes:
            yield ""
            yield "Notes:"
        for note in notes:
            yield f"  - {note}"

    def _of_plans(self) -> Iterator[str]:
        """What the plans of fused sites say of themselves, each remark once."""
        found: dict[tuple[str, str], list[str]] = {}
        for s in self.sites:
            for note in s.plan.notes if s.plan is not None else ():
                found.setdefault((s.target, note), []).append(s.name)
        for (target, note), names in found.items():
            yield f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} on {target}: {note}"

    def diff(self) -> str:
        """The difference between the graphs before and after the rewrite, one hunk list a graph."""
        return "\n".join(diff_text(before, after) for before, after in self.graphs)

    # -- for programs ----------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "quantpass": __version__,
            "mode": self.mode,
            "targets": list(self.targets),
            "fused": self.fused,
            "total": self.total,
            "sites": [_site_dict(s) for s in self.sites],
            "formats": [_format_dict(f) for f in self.formats],
            "notes": list(self.notes),
            "hidden": list(self.hidden),
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON; also written to ``path`` where one is given."""
        text = json.dumps(self.as_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def to_html(self, path: str | Path) -> None:
        """Write the report as one HTML page."""
        from jinja2 import Template

        page = Template(_PAGE, autoescape=True).render(
            report=self, cell=_cell, format_row=_format_row, format_headers=_FORMAT_HEADERS, version=__version__
        )
        Path(path).write_text(page, encoding="utf-8")

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
        cost = f", SQNR at least {math.floor(worst * 10) / 10:g} dB" if worst < math.inf else ""
        yield f"{report.fused + sum(map(bool, taken))} of {report.total} with allow={allow!r}{cost}"


_T = TypeVar("_T", Site, WeightFormat)


def _times(report: Report) -> str:
    often = max((len(s.compilations) for s in report.sites), default=0)
    return f", in {often} compilations" if often > 1 else ""


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


def _bytes_once(formats: Sequence[WeightFormat]) -> Iterator[tuple[int, int]]:
    """Before and after of each weight; of those that are one tensor (tied) only the first."""
    told: set[Hashable] = set()
    for f in formats:
        again = f.key is not None and f.key in told
        told.add(f.key)
        yield (0, 0) if again else (f.bytes_before * f.copies, f.bytes_after * f.copies)


def _cell(site: Site) -> str:
    if site.fused and site.plan is not None:
        op = OPERATORS[site.plan.op].family.upper()
        out = site.plan.call.get("output_dtype")
        result = f" -> {str(out).removeprefix('torch.')}" if out is not None else ""
        kind = site.numerics.kind if site.numerics else ""
        return f"{op}{result} {site.plan.weight_format}, {kind}"
    some = sum(site.compilations)
    mixed = f" (fused in {some} of {len(site.compilations)} compilations)" if some else ""
    return "not fused: " + ", ".join(dict.fromkeys(r.rule for r in site.rejects)) + mixed


_FORMAT_HEADERS = ("read by", "stored", "format", "ND KiB", "now KiB", "")


def _format_row(f: WeightFormat) -> list[str]:
    sites = ", ".join(f.sites) if len(f.sites) < 3 else f"{f.sites[0]} and {len(f.sites) - 1} more"
    stored = f"{f.dtype}[{', '.join(map(str, f.shape))}]"
    tied = f"same tensor as {', '.join(f.aliases)}" if f.aliases else ""
    copies = f"{f.copies} copies, one for each compilation" if f.copies > 1 else ""
    remarks = "; ".join(text for text in (f.how, tied, f.why, copies) if text)
    return [sites, stored, f.format, f"{f.bytes_before / 1024:.1f}", f"{f.bytes_after / 1024:.1f}", remarks]


def _format_dict(f: WeightFormat) -> dict[str, Any]:
    return {field.name: getattr(f, field.name) for field in fields(f) if field.name != "key"}


def _site_dict(s: Site) -> dict[str, Any]:
    return {
        "name": s.name,
        "source": s.source,
        "matmul": s.op,
        "target": s.target,
        "reading": s.reading,
        "proved": s.proved,
        "fused": s.fused,
        "compilations": list(s.compilations or (s.fused,)),
        "plan": None
        if s.plan is None
        else {
            "op": s.plan.op,
            "call": {k: str(v) for k, v in s.plan.call.items() if v is not None},
            "weight_format": s.plan.weight_format,
            "fixups": list(s.plan.fixups),
            "notes": list(s.plan.notes),
            "refit": None if s.plan.refit is None else asdict(s.plan.refit),
        },
        "numerics": None
        if s.numerics is None
        else {
            "kind": s.numerics.kind,
            "relative": s.numerics.relative,
            "absolute": s.numerics.absolute,
            "of_x": s.numerics.of_x,
            "why": list(s.numerics.why),
        },
        "offers": [{"allow": list(o.allow), "sqnr": o.sqnr if o.sqnr < math.inf else None} for o in s.offers],
        "rejects": [{"rule": r.rule, "fact": r.fact, "want": r.want, "hint": r.hint, "doc": r.doc} for r in s.rejects],
    }


def merged(reports: Sequence[Report], targets: Sequence[str], mode: str) -> Report:
    """One report from several."""
    total = Report((), tuple(targets), mode)
    for r in reports:
        total = total + r
    return total


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>quantpass report</title>
<style>
body { font: 14px/1.4 sans-serif; margin: 2em; } table { border-collapse: collapse; }
td, th { border: 1px solid #ccc; padding: .3em .6em; text-align: left; vertical-align: top; }
.yes { background: #e7f6e7; } .no { background: #fbeaea; } pre { background: #f6f6f6; padding: 1em; overflow-x: auto; }
</style></head><body>
<h1>quantpass {{ version }}</h1>
{% for t in report.targets %}
<p>{{ t }}: {{ report[t].fused }} of {{ report[t].total }} quantized matmuls fused</p>
{% if report[t].offers %}<ul>{% for o in report[t].offers %}<li>{{ o }}</li>{% endfor %}</ul>{% endif %}
{% endfor %}
<table><tr><th>site</th><th>matmul</th><th>read as</th><th>target</th><th>verdict</th><th>details</th></tr>
{% for s in report.sites %}
<tr class="{{ 'yes' if s.fused else 'no' }}"><td>{{ s.name }}<br><small>{{ s.source }}</small></td>
<td>{{ s.op }}</td><td>{{ s.reading }}{% if s.proved %} (compared with the graph's value){% endif %}</td>
<td>{{ s.target }}</td><td>{{ cell(s) }}</td><td>
{% if s.plan %}{{ s.plan }}<ul>{% for f in s.plan.fixups %}<li>{{ f }}</li>{% endfor %}</ul>{{ s.numerics }}{% endif %}
{% for r in s.rejects %}
<p><b>{{ r.rule }}</b>: {{ r.fact }}; wanted {{ r.want }}.{% if r.hint %} {{ r.hint }}.{% endif %}
{% if r.doc %}<small>{{ r.doc }}</small>{% endif %}</p>{% endfor %}</td></tr>
{% endfor %}</table>
{% if report.formats %}<h2>Weights</h2>
<table><tr>{% for h in format_headers %}<th>{{ h }}</th>{% endfor %}</tr>
{% for f in report.formats %}<tr>{% for c in format_row(f) %}<td>{{ c }}</td>{% endfor %}</tr>{% endfor %}
</table>{% endif %}
{% if report.hidden %}<h2>Quantized weights that no graph shows</h2><ul>
{% for n in report.hidden %}<li>{{ n }}</li>{% endfor %}</ul>{% endif %}
{% if report.notes %}<h2>Notes</h2><ul>{% for n in report.notes %}<li>{{ n }}</li>{% endfor %}</ul>{% endif %}
{% if report.graphs %}<h2>Graph</h2><pre>{{ report.diff() }}</pre>{% endif %}
</body></html>
"""
