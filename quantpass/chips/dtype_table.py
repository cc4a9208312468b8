"""Tables of dtypes that go together, as the vendor's documents print them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantpass.basics.tensor_spec import TensorSpec
from quantpass.chips.calls import OpCall
from quantpass.chips.requirements import Dtype, Finding, name_of, with_dtype

Cell = tuple[Dtype, ...]
"""The dtypes that a column accepts; None: the argument is left out."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a dtype table: a cell for each column."""

    cells: tuple[Cell, ...]
    modes: tuple[str, ...] = ("graph", "eager")
    contradicted: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class DtypeTable:
    """The dtypes of a call's arguments match a line of a table.

    Where none does, the nearest line is named, column by column; ``hints`` says what to do about one.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    hints: Mapping[str, str] = field(default_factory=dict)

    @property
    def want(self) -> str:
        return f"dtypes of {', '.join(self.columns)} as in a line of the table"

    def cell(self, call: OpCall, column: str) -> Dtype:
        value = call.value(column)
        if value is None:
            value = self.defaults.get(column)
        return value.dtype_name if isinstance(value, TensorSpec) else value

    def check(self, call: OpCall) -> list[Finding]:
        have = [self.cell(call, c) for c in self.columns]
        rows = [r for r in self.rows if call.mode in r.modes]
        wrong = [[i for i, cell in enumerate(r.cells) if have[i] not in cell] for r in rows]
        if not rows or any(not w and not r.contradicted for w, r in zip(wrong, rows, strict=True)):
            return []
        for w, r in zip(wrong, rows, strict=True):
            if not w:
                return [Finding(r.note, "documents and code that agree", part=f"!{r.contradicted}")]
        firm = [(w, r) for w, r in zip(wrong, rows, strict=True) if not r.contradicted]
        # The output dtype and the inputs are what the model needs; parameters are what can be changed.
        fixed = {self.columns.index(c) for c in ("x1", "x2", "x", "weight", "output_dtype") if c in self.columns}
        w, row = min(firm, key=lambda p: (sum(i in fixed for i in p[0]), len(p[0])))
        return [self._finding(call, i, have, row) for i in w]

    def _finding(self, call: OpCall, i: int, have: Sequence[Dtype], row: Row) -> Finding:
        column, cell = self.columns[i], row.cells[i]
        fitting = (
            f"{c} {name_of(h)}"
            for c, h, accepted in zip(self.columns, have, row.cells, strict=True)
            if h in accepted and h is not None
        )
        others = ", ".join(fitting)
        fact = f"{column} is {name_of(have[i])}" if have[i] is not None else f"{column} is missing"
        accepted = " or ".join("none" if d is None else name_of(d) for d in cell)
        want = f"{column} {accepted} with {others}"
        spec = call.tensor(column)
        fix: dict[str, Any] | None = None
        if cell[0] is None:
            fix = {column: None}
        elif spec is not None:
            fix = {column: with_dtype(column, spec, cell[0])}
        elif column == "output_dtype":
            fix = {column: cell[0]}
        return Finding(fact, want, fix, part=column, hint=self.hints.get(column, ""))
