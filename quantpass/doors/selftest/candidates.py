"""Calls that might be legal: dtypes and shapes from the rules, layouts and values from the operator's form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any

from quantpass.basics.tensor_spec import TensorSpec
from quantpass.basics.torch_types import I32
from quantpass.chips.calls import INT4_PER_INT32, OpCall, VendorOp, in_groups
from quantpass.chips.dtype_table import DtypeTable, Row
from quantpass.chips.requirements import DtypeIn, SameDtype, SameShape, Shape
from quantpass.chips.rules import Rule
from quantpass.doors.selftest.forms import FORMS, SIZES

Shaped = tuple[str | int, ...]
_LAYOUTS = (("ND", False), ("ND", True))
_WEIGHT_LAYOUTS = (*_LAYOUTS, ("NZ", True), ("NZ", False))

_EXPERTS = 4
"""Groups of rows, where an operator is told where each ends."""


@dataclass(frozen=True)
class Candidate:
    """A call before its sizes are filled in.

    Attributes:
        op: the operator.
        mode: ``"graph"`` or ``"eager"``.
        dtypes: of each tensor that is given, and ``output_dtype`` where a table has it.
        values: of the arguments that are no tensors.
        shapes: of tensors, in named sizes.
        layouts: storage format, and whether transposed, of tensors that may be either.
        sizes: the named sizes.
        leading: dimensions in front of a tensor's own.
    """

    op: VendorOp
    mode: str
    dtypes: Mapping[str, str]
    values: Mapping[str, Any]
    shapes: Mapping[str, Shaped]
    layouts: Mapping[str, tuple[str, bool]]
    sizes: Mapping[str, int] = field(default_factory=lambda: SIZES)
    leading: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def call(self) -> OpCall | None:
        """The call; None for groups where there are none, or an axis of packed int4 that is no multiple of eight."""
        group = self.values.get("antiquant_group_size") or (self.values.get("group_sizes") or (0,))[-1]
        sizes = in_groups({"groups": _EXPERTS, **self.sizes} if "group_index" in self.dtypes else {**self.sizes}, group)
        args: dict[str, Any] = {name: v for name, v in self.values.items() if v is not None}
        for name, dtype in self.dtypes.items():
            if name in self.op.numbers:
                args[name] = dtype
                continue
            spec = self._spec(name, dtype, sizes)
            if spec is None:
                return None
            args[name] = spec
        return OpCall(self.op, self.mode, args)

    def _spec(self, name: str, dtype: str, sizes: Mapping[str, int]) -> TensorSpec | None:
        if any(isinstance(s, str) and s not in sizes for s in self.shapes[name]):
            return None
        shape = [sizes[s] if isinstance(s, str) else s for s in self.shapes[name]]
        format_, transposed = self.layouts.get(name, ("ND", False))
        if dtype == I32 and name in FORMS[self.op].packed:
            axis = -2 if transposed else -1
            if shape[axis] % INT4_PER_INT32:
                return None
            shape[axis] //= INT4_PER_INT32
        return TensorSpec(dtype, (*self.leading.get(name, ()), *shape), format_, transposed)

    def sized(self, **sizes: int) -> Candidate:
        """The same with other sizes."""
        return replace(self, sizes={**self.sizes, **sizes})

    @property
    def pairs(self) -> frozenset[Any]:
        """Every two of its choices: what a set of calls has to show, so that no two choices first meet at a user's."""
        chosen = [
            ("dtypes", tuple(self.dtypes.items())),
            *self.values.items(),
            *((f"shape of {n}", s) for n, s in self.shapes.items()),
            *((f"layout of {n}", s) for n, s in self.layouts.items()),
        ]
        return frozenset(combinations(chosen, 2))


def candidates(op: VendorOp, mode: str, rules: tuple[Rule, ...]) -> Iterator[Candidate]:
    """Every combination of an operator's choices; most are not legal."""
    form = FORMS[op]
    values = [dict(zip(form.choices, v, strict=True)) for v in product(*form.choices.values())]
    for dtypes in _dtype_lines(op, mode, rules):
        given = [n for n in dtypes if n not in op.numbers]
        for shapes in _shapes(op, given, rules):
            turned = [n for n in given if n in form.turned or n == op.weight]
            layouts = product(*(_WEIGHT_LAYOUTS if n == op.weight else _LAYOUTS for n in turned))
            for layout, chosen in product(layouts, values):
                yield Candidate(op, mode, dtypes, chosen, shapes, dict(zip(turned, layout, strict=True)))


# -- dtypes --------------------------------------------------------------------------------------------------------


def _dtype_lines(op: VendorOp, mode: str, rules: tuple[Rule, ...]) -> list[dict[str, str]]:
    """Dtypes that go together: each line of a table, with every accepted dtype of each of its cells once."""
    tables = [r.need for r in rules if isinstance(r.need, DtypeTable) and mode in r.modes]
    if tables:
        lines = [line for t in tables for row in t.rows if mode in row.modes for line in _of_row(t, row)]
    else:
        lines = list(_without_table(op, rules))
    return [line for i, line in enumerate(lines) if line not in lines[:i]]


def _of_row(table: DtypeTable, row: Row) -> Iterator[dict[str, str]]:
    first = [cell[0] for cell in row.cells]
    for i, cell in enumerate(row.cells):
        for dtype in cell:
            chosen = zip(table.columns, (*first[:i], dtype, *first[i + 1 :]), strict=True)
            yield {name: str(d) for name, d in chosen if d is not None}


def _without_table(op: VendorOp, rules: tuple[Rule, ...]) -> Iterator[dict[str, str]]:
    """Dtypes from single rules; optional tensors given and left out."""
    form = FORMS[op]
    same = {r.need.a: r.need.b for r in rules if isinstance(r.need, SameDtype) and r.when is None}
    tensors = [n for n in op.arguments if n not in op.numbers]
    choices: list[list[str | None]] = []
    for name in tensors:
        asked = [d for r in rules if isinstance(r.need, DtypeIn) and r.need.arg == name for d in r.need.dtypes]
        dtypes: list[str | None] = (
            ["as another"] if name in same else [*dict.fromkeys(asked or form.dtypes.get(name, ()))]
        )
        choices.append([*dtypes, None] if f"Tensor? {name}" in op.schema else dtypes)
    for chosen in product(*choices):
        line = {n: d for n, d in zip(tensors, chosen, strict=True) if d is not None}
        yield {n: _followed(n, line, same) for n in line}


def _followed(name: str, line: Mapping[str, str], same: Mapping[str, str]) -> str:
    while line.get(name) == "as another":
        name = same[name]
    return line[name]


# -- shapes --------------------------------------------------------------------------------------------------------


def _shapes(op: VendorOp, given: list[str], rules: tuple[Rule, ...]) -> Iterator[dict[str, Shaped]]:
    """Shapes of the tensors that are given: the form's own, or each that a rule names."""
    own: Mapping[str, Shaped] = FORMS[op].shapes
    like = {r.need.a: r.need.b for r in rules if isinstance(r.need, SameShape)}
    forms: dict[str, list[Shaped]] = {}
    for r in rules:
        if isinstance(r.need, Shape):
            forms.setdefault(r.need.arg, []).extend(r.need.forms)
    free = [n for n in given if n not in own and n not in like]
    last: Shaped = ("last",) if "last" in own[given[0]] else ("n",)
    for chosen in product(*(dict.fromkeys(forms.get(n, [last])) for n in free)):
        shapes = {**{n: own[n] for n in given if n in own}, **dict(zip(free, chosen, strict=True))}
        yield shapes | {n: shapes[like[n]] for n in given if n in like and n not in own}
