"""A report for a terminal: coverage, sites folded by layer, causes, what it is worth, weights, notes."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from quantpass.chips.checking import OPERATORS
from quantpass.graph.records import FLOATS, Site, WeightFormat
from quantpass.report.folding import Cause, cause_key, causes, fold, names, siblings
from quantpass.report.worth import Worth, human, worth
from quantpass.version import __version__

if TYPE_CHECKING:
    from quantpass.report import Report

_UNBOUNDED = 10_000
"""Columns of a text that goes to no terminal: no line is broken."""

_RULED = box.Box("    \n    \n -- \n" + "    \n" * 5, ascii=True)
"""A line below the headers; ASCII, for any terminal."""

_FOR_NAMES = 24
_FOR_READINGS = 24
"""Columns that are left to names, and to what sites are quantized as, before they are broken."""

_NOTHING = """No quantized matmul was found{targets}. The likely causes:
  - the weights were folded into floats before the pass (constant folding, freezing): run quantpass first
  - the quantize/dequantize operators were decomposed away, or the tool keeps its matmul opaque: docs/verdicts.md
  - the weight is dequantized in another graph than the matmul's (a graph break between the two): look for breaks with
    TORCH_LOGS=graph_breaks
  - the model is not quantized"""


def as_text(shown: Any, width: int | None = None, color: bool = False) -> str:
    """What rich shows, as text.

    Args:
        shown: anything that rich prints.
        width: columns; None for those of the terminal, or for as many as it takes where there is none.
        color: with the terminal's escape sequences.
    """
    console = Console(
        file=io.StringIO(),
        width=width or _columns(),
        color_system="standard" if color else None,
        force_terminal=color,
        highlight=False,
        legacy_windows=False,
    )
    with console.capture() as capture:
        console.print(shown)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _columns() -> int:
    known = os.environ.get("COLUMNS", "").isdigit() or (sys.stdout is not None and sys.stdout.isatty())
    return shutil.get_terminal_size().columns if known else _UNBOUNDED


def rendered(report: Report, *, sites: bool = False) -> Group:
    """The whole report; ``sites``: a row for each site, not one for those that are alike."""
    return Group(*_parts(report, sites))


def _parts(report: Report, sites: bool) -> Iterator[Any]:
    yield Text(f"quantpass {__version__}, {report.mode} mode", style="dim")
    if not report.sites:
        yield Text(_NOTHING.format(targets=f" for {', '.join(report.targets)}"))
        yield from _notes(report)
        return
    yield from _coverage(report)
    found = causes(report.sites)
    yield _site_table(report, sites, _numbers(report.sites, found))
    yield from _legend(report.sites)
    yield from _why_not(found, report.targets)
    yield from _worth(worth(report.sites, report.targets))
    yield from _formats(report.formats, sites)
    yield from _notes(report)


def _coverage(report: Report) -> Iterator[Text]:
    for target in report.targets:
        part = report[target]
        style = "green" if part.fused == part.total else "yellow" if part.fused else "red"
        said = f"{part.fused} of {part.total} quantized matmuls fused{times(part.sites)}"
        yield Text.assemble("  ", (target, "bold"), ": ", (said, style))
        yield from (Text(f"    {offer}") for offer in part.offers)
    yield Text()


def times(sites: Sequence[Site]) -> str:
    """``", in 3 compilations"`` where sites were compiled several times."""
    often = max((len(s.compilations) for s in sites), default=0)
    return f", in {often} compilations" if often > 1 else ""


def table_of(*headers: str) -> Table:
    """A table without lines but the one below its headers."""
    table = Table(box=_RULED, show_edge=False, pad_edge=False, header_style="bold", collapse_padding=True)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def _with_names(table: Table) -> Table:
    """``table`` with room for the names in its first column: nothing in them is a good place to break a line."""
    longest = max((len(str(cell)) for cell in table.columns[0].cells), default=0)
    table.columns[0].min_width = min(_FOR_NAMES, longest)
    return table


# -- sites ---------------------------------------------------------------------------------------------------------


def _numbers(sites: Iterable[Site], found: Sequence[Cause]) -> dict[Any, int]:
    order = {c.key: i for i, c in enumerate(found, 1)}
    return {cause_key(s): order[cause_key(s)] for s in sites if not s.fused}


def _site_table(report: Report, whole: bool, numbers: dict[Any, int]) -> _SiteTable:
    rows = matmuls(report.sites)
    told = {t: tuple(verdict(row.get(t), numbers) for row in rows) for t in report.targets}
    columns: dict[tuple[str, ...], list[str]] = {}  # chips that say the same share one
    for target, cells in told.items():
        columns.setdefault(cells, []).append(target)
    first = [next(iter(row.values())) for row in rows]
    alike = [(first[i].reading, *(cells[i] for cells in columns)) for i in range(len(rows))]
    groups = fold(
        range(len(rows)),
        lambda i: first[i].name,
        lambda i: (i if whole else None, first[i].op, shape_of(first[i]), *alike[i]),
    )
    found = []
    for piece in groups if whole else siblings(groups, lambda i: alike[i]):
        reading, *verdicts = alike[piece.members[0]]
        shapes = ", ".join(dict.fromkeys(filter(None, (shape_of(first[i]) for i in piece.members))))
        name = Text.assemble(piece.name, (piece.times, "bold"))
        found.append(_SiteRow(name, reading, shapes, tuple(map(_coloured, verdicts))))
    return _SiteTable([", ".join(targets) for targets in columns.values()], found)


class _SiteRow(NamedTuple):
    name: Text
    reading: str
    shapes: str
    verdicts: tuple[Text, ...]


@dataclass(frozen=True, slots=True)
class _SiteTable:
    """A row a site; where the names or verdicts do not fit beside each other, a paragraph a site."""

    targets: Sequence[str]
    rows: Sequence[_SiteRow]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._table() if self._needs <= options.max_width else Group(*self._paragraphs())

    @property
    def _needs(self) -> int:
        """Columns of the table where nothing but what a site is quantized as is broken."""
        cells = [(r.name, r.reading[:_FOR_READINGS], r.shapes, *r.verdicts) for r in self.rows]
        headers = ("", "", "", *(max(t.split(), key=len) for t in self.targets))
        widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
        return sum(widths) + 2 * (len(widths) - 1)

    def _table(self) -> Table:
        table = table_of("site", "quantized as", "K x N", *self.targets)
        for row in self.rows:
            table.add_row(row.name, row.reading, row.shapes, *row.verdicts)
        for column in table.columns:
            longest = max(map(len, column.cells))  # type: ignore[arg-type]
            column.min_width = min(_FOR_READINGS, longest) if column.header == "quantized as" else longest
        return table

    def _paragraphs(self) -> Iterator[Any]:
        for row in self.rows:
            yield row.name
            yield from _indented("  ", Text("; ".join(filter(None, (row.reading, row.shapes)))))
            for target, said in zip(self.targets, row.verdicts, strict=True):
                yield from _indented(f"  {target}: ", said)


def matmuls(sites: Iterable[Site]) -> list[dict[str, Site]]:
    """A row for each matmul: its verdicts, by target."""
    rows: dict[Any, list[dict[str, Site]]] = {}
    order: list[dict[str, Site]] = []
    for site in sites:
        of_name = rows.setdefault((site.name, site.op, site.reading), [])
        row = next((r for r in of_name if site.target not in r), None)
        if row is None:
            row = {}
            of_name.append(row)
            order.append(row)
        row[site.target] = site
    return order


def shape_of(site: Site) -> str:
    """``256 x 512``; ``?`` for a size that only the run knows."""
    if site.weight is None:
        return ""
    return f"{site.weight.k if site.weight.k >= 0 else '?'} x {site.weight.n if site.weight.n >= 0 else '?'}"


def verdict(site: Site | None, numbers: Mapping[Any, int] | None = None) -> str:
    """``WQMM NZ, exact``, or why not: as the number of a cause where there are ``numbers``, else by its rules."""
    if site is None:
        return ""
    if site.fused and site.plan is not None:
        op = OPERATORS[site.plan.op].family.upper()
        out = site.plan.call.get("output_dtype")
        result = f" -> {str(out).removeprefix('torch.')}" if out is not None else ""
        kind = f", {site.numerics.kind}" if site.numerics else ""
        return f"{op}{result} {site.plan.weight_format}{kind}"
    some = sum(site.compilations)
    mixed = f" (fused in {some} of {len(site.compilations)} compilations)" if some else ""
    why = f", see {numbers[cause_key(site)]}" if numbers else ": " + ", ".join(dict.fromkeys(rules(site)))
    return f"not fused{why}{mixed}"


def rules(site: Site) -> list[str]:
    """The ids of the rules that a site breaks."""
    return [r.rule for r in site.rejects]


def _coloured(said: str) -> Text:
    return Text(said, style="red" if said.startswith("not fused") else "green")


def _legend(sites: Iterable[Site]) -> Iterator[Text]:
    plans = [s.plan for s in sites if s.fused and s.plan is not None]
    if not plans:
        return
    ops = {OPERATORS[p.op].family.upper(): p.op for p in plans}
    words = [f"{short}: {op}" for short, op in ops.items()]
    words += ["NZ: weight in FRACTAL_NZ"] if any(p.weight_format == "NZ" for p in plans) else []
    kinds = {s.numerics.kind for s in sites if s.numerics is not None}
    words += ["bounded: a parameter is rounded on the way"] if "bounded" in kinds else []
    yield Text(f"({'; '.join(words)})", style="dim")


# -- causes --------------------------------------------------------------------------------------------------------


def _why_not(found: Sequence[Cause], targets: Sequence[str]) -> Iterator[Any]:
    if found:
        yield Text("\nWhy not, and what to change (most sites first):", style="bold")
    for number, cause in enumerate(found, 1):
        where = "" if len(targets) == 1 else f" on {', '.join(cause.targets)}"
        count = f"{cause.count} site{'s' if cause.count > 1 else ''}{where}"
        yield from _indented(f"  {number}. ", Text.assemble((count, "bold"), f": {names(cause.sites)}"))
        for r in cause.rejects:
            yield Text(f"     {r.rule}", style="red")
            yield from _labelled("found", r.fact)
            yield from _labelled("wanted", r.want)
            yield from _labelled("source", r.doc)
        for hint in cause.hints:
            yield from _labelled("change", hint, 5)


def _labelled(label: str, text: str, indent: int = 7) -> Iterator[Any]:
    if text:
        yield from _indented(f"{' ' * indent}{label + ':':<8}", Text(text))


def _indented(head: str, text: Text) -> Iterator[Any]:
    """``text`` behind ``head``; lines that do not fit go on below the text."""
    grid = Table.grid(padding=0)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(head, text)
    yield grid


# -- what it is worth ----------------------------------------------------------------------------------------------


def _worth(found: Sequence[Worth]) -> Iterator[Any]:
    if not found:
        return
    yield Text("\nSaved at each run, one token when decoding (counted, not measured):", style="bold")
    for w in found:
        where = "" if len(found) == 1 else f"{', '.join(w.targets)}: "
        for line in w.lines():
            yield from _bullet(f"{where}{line}")


def _bullet(text: str) -> Iterator[Any]:
    yield from _indented("  - ", Text(text))


# -- weights -------------------------------------------------------------------------------------------------------

FORMAT_HEADERS = ("read by", "stored", "format", "in ND", "now", "")


def format_row(f: WeightFormat) -> list[str]:
    """One weight of the format ledger."""
    sites = f.sites[0] if len(f.sites) == 1 else f"{f.sites[0]} and {len(f.sites) - 1} more" if f.sites else ""
    stored = f"{f.dtype}[{', '.join(map(str, f.shape))}]"
    tied = f"same tensor as {', '.join(f.aliases)}" if f.aliases else ""
    copies = f"{f.copies} copies, one for each compilation" if f.copies > 1 else ""
    remarks = "; ".join(text for text in (f.how, tied, f.why, copies) if text)
    return [sites, stored, f.format, human(f.bytes_before), human(f.bytes_after), remarks]


def _formats(formats: Sequence[WeightFormat], whole: bool) -> Iterator[Any]:
    if not formats:
        return
    yield Text("\nWeights:", style="bold")
    table = table_of(*FORMAT_HEADERS)
    rows = [format_row(f) for f in formats]
    for group in fold(range(len(rows)), lambda i: rows[i][0], lambda i: (i if whole else None, tuple(rows[i][1:]))):
        table.add_row(f"{group.name}{group.times}", *rows[group.members[0]][1:])
    before, after = (sum(bytes_) for bytes_ in zip(*bytes_once(formats), strict=True))
    table.add_row("total", "", "", human(before), human(after), "")
    yield _with_names(table)


def bytes_once(formats: Sequence[WeightFormat]) -> Iterator[tuple[int, int]]:
    """Before and after of each weight; of those that are one tensor (tied) only the first."""
    told: set[Any] = set()
    for f in formats:
        again = f.key is not None and f.key in told
        told.add(f.key)
        yield (0, 0) if again else (f.bytes_before * f.copies, f.bytes_after * f.copies)


# -- notes ---------------------------------------------------------------------------------------------------------


def _notes(report: Report) -> Iterator[Any]:
    if report.hidden:
        yield Text("\nQuantized weights that no graph shows:", style="bold")
    for sign in report.hidden:
        yield from _bullet(sign)
    floats = [note for note in report.notes if note.startswith(FLOATS)]
    told = [*(n for n in report.notes if not (report.sites and n in floats)), *report.unmatched]
    told += _of_plans(report.sites)
    told += [] if report.formats else _in_nd(report.sites)
    if told:
        yield Text("\nNotes:", style="bold")
    for note in told:
        yield from _bullet(note)


def _of_plans(sites: Iterable[Site]) -> Iterator[str]:
    """What the plans of fused sites say of themselves, each remark once."""
    return _once((note, s) for s in sites if s.plan is not None for note in s.plan.notes)


def _in_nd(sites: Iterable[Site]) -> Iterator[str]:
    """Why weights stay in ND on an NPU; where they were prepared, the table of weights says it."""
    named = ((s.plan.nd_reason, s) for s in sites if s.fused and s.plan is not None and s.target != "cpu")
    return _once((f"the weight stays in ND: {reason}", s) for reason, s in named if reason)


def _once(remarks: Iterable[tuple[str, Site]]) -> Iterator[str]:
    found: dict[str, list[Site]] = {}
    for remark, site in remarks:
        found.setdefault(remark, []).append(site)
    for remark, of in found.items():
        targets = ", ".join(dict.fromkeys(s.target for s in of))
        yield f"{names(list(dict.fromkeys(s.name for s in of)), 1)} on {targets}: {remark}"
