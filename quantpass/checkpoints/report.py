"""What was found of a checkpoint, for people and programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from quantpass.basics.folding import ranges
from quantpass.basics.json_text import json_text
from quantpass.basics.reject import Reject
from quantpass.basics.tensor_spec import TensorSpec
from quantpass.basics.torch_types import I32
from quantpass.checkpoints.page import PAGE
from quantpass.checkpoints.verdicts import Verdict
from quantpass.version import __version__

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Line:
    """Linears of one scheme, size and verdict.

    Attributes:
        name: of the modules, folded.
        count: how many modules it stands for.
        experts: how many a layer has, which one grouped matmul multiplies; 0 for plain linears.
        scheme: how they are quantized, in words.
        k: rows of the weight that a rank holds.
        n: its columns.
        place: how it is split among the ranks.
        bytes_float: of one on one rank, in the dtype of the activations.
        bytes_stored: of one on one rank, as the checkpoint has it.
        verdicts: by target.
        notes: what else is to be said.
    """

    name: str
    count: int
    experts: int
    scheme: str
    k: int
    n: int
    place: str
    bytes_float: int
    bytes_stored: int
    verdicts: Mapping[str, Verdict]
    notes: tuple[str, ...] = ()

    def bytes_on(self, target: str) -> int | None:
        """Of one on one rank, as the chip's operator takes it, padding included; None where there is none."""
        weight = self.verdicts[target].weight
        return None if weight is None else weight_bytes(weight)


def weight_bytes(weight: TensorSpec) -> int:
    """Bytes of one matrix as an operator takes it: FRACTAL_NZ has tiles of 16 rows and 32 bytes.

    Source: quantpass/lowering/fractal_nz.py.
    """
    rows, row = weight.shape[-2:]
    if weight.transposed:
        rows, row = row, rows
    row *= 4 if weight.dtype_name == I32 else 1
    if weight.format == "NZ":
        rows, row = -(-rows // 16) * 16, -(-row // 32) * 32
    return int(rows * row)


@dataclass(frozen=True)
class CheckpointReport:
    """The verdict on every quantized linear of a checkpoint, for each target.

    Attributes:
        path: the folder.
        format: the tool and its scheme.
        targets: the targets asked for.
        mode: ``"graph"`` or ``"eager"``.
        ranks: of the tensor-parallel group.
        dtype: of the activations.
        lines: the linears, folded.
        floats: linears that are kept as floats, folded, with their sizes.
        assumed: what is not in a checkpoint, and was taken to be so.
        gains: for each target what another setting would gain, in words.
        notes: what else a user should know.
    """

    path: str
    format: str
    targets: tuple[str, ...]
    mode: str
    ranks: int
    dtype: str
    lines: tuple[Line, ...]
    floats: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    gains: Mapping[str, tuple[str, ...]] | None = None
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """How many quantized linears there are, each expert one."""
        return sum(line.count for line in self.lines)

    def fused(self, target: str) -> int:
        """How many of them have a fused operator on a target."""
        return sum(line.count for line in self.lines if line.verdicts[target].fused)

    def uncovered(self, target: str) -> int:
        """How many no rule speaks of."""
        return sum(line.count for line in self.lines if not line.verdicts[target].covered)

    @property
    def all_fused(self) -> bool:
        """True where there are quantized linears, and each has a fused operator on every target."""
        return self.total > 0 and all(self.fused(t) == self.total for t in self.targets)

    # -- text ------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return "\n".join(self._text())

    def _text(self) -> Iterator[str]:
        parallel = f", tensor parallel over {self.ranks} ranks" if self.ranks > 1 else ""
        yield f"quantpass {__version__}, {self.mode} mode{parallel}"
        yield f"{self.path}: {self.format}"
        for target in self.targets:
            yield f"  {target}: {self.summary(target)}"
            yield from (f"    {gain}" for gain in (self.gains or {}).get(target, ()))
        if not self.total:
            yield "No quantized linear was found."
        else:
            yield ""
            yield _table([_row(i, x, self.targets) for i, x in enumerate(self.lines, 1)], self.headers)
            yield from self._reasons()
            yield ""
            yield f"Weights, MiB on {'each rank' if self.ranks > 1 else 'the chip'}:"
            yield _table(list(self.byte_rows()), self.byte_headers)
        yield from _section("Assumed:", self.assumed)
        yield from _section("Kept as floats:", self.floats)
        yield from _section("Notes:", (*self.notes, *self.of_lines()))

    def summary(self, target: str) -> str:
        """The counts for one target, in words."""
        uncovered = self.uncovered(target)
        more = f", {uncovered} not covered" if uncovered else ""
        return f"{self.fused(target)} of {self.total} quantized linears fused{more}"

    @property
    def headers(self) -> list[str]:
        """Of the table of linears."""
        return ["#", "modules", "scheme", "K x N of a rank", "split", *self.targets]

    @property
    def byte_headers(self) -> list[str]:
        """Of the table of weights."""
        return ["#", self.dtype, "stored", *self.targets]

    def byte_rows(self) -> Iterator[list[str]]:
        """A row for each line, and the total; - where there is no operator."""
        total: list[Any] = [0] * (2 + len(self.targets))
        for i, line in enumerate(self.lines, 1):
            sizes: list[Any] = [line.bytes_float, line.bytes_stored, *(line.bytes_on(t) for t in self.targets)]
            total = [None if None in (t, s) else t + line.count * s for t, s in zip(total, sizes, strict=True)]
            yield [str(i), *("-" if s is None else f"{line.count * s / _MIB:.1f}" for s in sizes)]
        yield ["total", *("-" if t is None else f"{t / _MIB:.1f}" for t in total)]

    def reasons(self) -> Iterator[tuple[str, Reject, list[int], str]]:
        """Every reason with its target, the lines that it stands against, and the nearest legal call."""
        found: dict[tuple[str, Reject], list[int]] = {}
        nearest: dict[tuple[str, Reject], str] = {}
        for i, line in enumerate(self.lines, 1):
            for target, verdict in line.verdicts.items():
                for r in () if verdict.fused else verdict.rejects:
                    found.setdefault((target, r), []).append(i)
                    edit = ", ".join(f"{k}={v}" for k, v in (verdict.nearest or {}).items())
                    nearest.setdefault((target, r), edit)
        for (target, r), lines in found.items():
            yield target, r, lines, nearest[target, r]

    def _reasons(self) -> Iterator[str]:
        for number, (target, r, lines, nearest) in enumerate(self.reasons()):
            if not number:
                yield ""
                yield "Why not:"
            yield f"  {r.rule} on {target} ({_numbers(lines)})"
            for what, text in (("found: ", r.fact), ("wanted:", r.want), ("hint:  ", r.hint), ("source:", r.doc)):
                if text:
                    yield f"    {what} {text}"
            if nearest:
                yield f"    legal:  {nearest}"

    def of_lines(self) -> Iterator[str]:
        """What the lines and their verdicts say beside, each remark once."""
        found: dict[str, list[int]] = {}
        for i, line in enumerate(self.lines, 1):
            said = [*line.notes, *(f"{t}: {note}" for t, v in line.verdicts.items() for note in v.notes)]
            for note in said:
                found.setdefault(note, []).append(i)
        for note, lines in found.items():
            yield f"{_numbers(lines)}: {note}"

    # -- for programs ----------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "version": 1,
            "quantpass": __version__,
            "path": self.path,
            "format": self.format,
            "mode": self.mode,
            "ranks": self.ranks,
            "dtype": self.dtype,
            "total": self.total,
            "targets": {t: {"fused": self.fused(t), "uncovered": self.uncovered(t)} for t in self.targets},
            "gains": {t: list(gains) for t, gains in (self.gains or {}).items()},
            "linears": [_line_dict(line) for line in self.lines],
            "floats": list(self.floats),
            "assumed": list(self.assumed),
            "notes": list(self.notes),
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON; also written to ``path`` where one is given."""
        return json_text(self.as_dict(), path)

    def to_html(self, path: str | Path) -> None:
        """Write the report as one HTML page."""
        from jinja2 import Template

        page = Template(PAGE, autoescape=True).render(report=self, version=__version__, numbers=_numbers)
        Path(path).write_text(page, encoding="utf-8")


def _row(number: int, line: Line, targets: tuple[str, ...]) -> list[str]:
    name = f"{line.name} x{line.count}" if line.count > 1 else line.name
    sizes = f"{line.k} x {line.n}" if line.k else "unknown"
    return [str(number), name, line.scheme, sizes, line.place, *(str(line.verdicts[t]) for t in targets)]


def _table(rows: list[list[str]], headers: list[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)


def _numbers(lines: list[int]) -> str:
    return f"#{lines[0]}" if len(lines) == 1 else f"#{ranges(tuple(lines))}"


def _section(title: str, texts: tuple[str, ...]) -> Iterator[str]:
    if texts:
        yield ""
        yield title
    for text in texts:
        yield f"  - {text}"


def _line_dict(line: Line) -> dict[str, Any]:
    return {
        "name": line.name,
        "count": line.count,
        "experts": line.experts,
        "scheme": line.scheme,
        "k": line.k,
        "n": line.n,
        "split": line.place,
        "bytes": {"float": line.bytes_float, "stored": line.bytes_stored},
        "notes": list(line.notes),
        "verdicts": {t: _verdict_dict(line, t) for t in line.verdicts},
    }


def _verdict_dict(line: Line, target: str) -> dict[str, Any]:
    v = line.verdicts[target]
    return {
        "fused": v.fused,
        "covered": v.covered,
        "op": v.op or None,
        "call": {} if v.call is None else {k: str(a) for k, a in v.call.args.items() if a is not None},
        "weight_format": v.format or None,
        "bytes": line.bytes_on(target),
        "rejects": [asdict(r) for r in v.rejects if not v.fused],
        "nearest": {k: str(a) for k, a in (v.nearest or {}).items()},
        "offers": [list(allow) for allow in v.offers],
        "notes": list(v.notes),
    }
