"""Where a value's codes end up, and that each element is a line over its own: by what the operators are.

A value that is made of integers by movements, casts, and sums and products with parameters is, element by element,
``a * code + b`` with the code of one place. Where that is so, a few codes in place of all
(:meth:`RowBlocks.with_codes`) tell what every element is: none needs to be computed, only moved to where it belongs.

That is so of numbers; of what computes with them:

* In integers a sum may wrap around, by multiples of the container's size. A line that has the value of two neighboring
  codes differs from what the sum would be by such multiples alone. Where it also has those of the smallest and of the
  largest code, at most 255 apart, it stays in the container between them: so nothing wraps there.
* In float64 a sum may lose what one code makes beside a large parameter. With one sum on the way, the parameter is as
  many codes as the line's zero point, which can be looked at; with more, nothing is said.
* Products may leave float64's normal numbers on the way. A few that are of float32 at most do not, nor does a single
  one whose result is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from quantpass.graph.grids import Grid
from quantpass.graph.instructions import Add, Cast, Multiply, Operand
from quantpass.graph.row_blocks import Key, RowBlocks, Step, shape_of
from quantpass.graph.row_rules import NotByRows
from quantpass.graph.schema import bind

aten = torch.ops.aten

_PRODUCTS = 4
"""How many products with numbers of float32 stay within float64, whatever these are: 1e-45 to the fourth."""

_MOVES = ("same", "reshape", "permute", "expand", "shuffle")
_JOINS = (aten.stack.default, aten.cat.default)
_PICKS = (
    aten.select.int,
    aten.slice.Tensor,
    aten.index.Tensor,
    aten.index_select.default,
    aten.repeat_interleave.self_int,
)


@dataclass(frozen=True, slots=True)
class _Arithmetic:
    """What codes went through: sums in floating numbers, products, and whether one of these may be with any float64."""

    sums: int = 0
    products: int = 0
    wide: bool = False

    def then(self, sums: int, products: int, wide: bool) -> _Arithmetic:
        return _Arithmetic(self.sums + sums, self.products + products, self.wide or wide)

    @property
    def is_harmless(self) -> bool:
        return self.sums <= 1 and self.products <= (1 if self.wide else _PRODUCTS)


class CarriedCodes:
    """The integers of a value's cuts, in the places of the elements that they make.

    Args:
        blocks: the value, computed in float64, with its cuts.

    Raises:
        NotByRows: by its operators alone it can't be told that each element is a line over its own code.
    """

    def __init__(self, blocks: RowBlocks) -> None:
        self._blocks = blocks
        self._source: dict[Key, Key] = {}  # of sums, products and casts: the operand whose codes they pass on
        self._follow()
        self._order = blocks.needed(self._inputs)

    @property
    def is_stored(self) -> bool:
        """True where they are a view of what is stored: nothing is computed on the way."""
        kinds = ((key, self._blocks.steps[key].kind) for key in self._order)
        return all(
            key in self._source or kind in ("leaf", "same", "permute", "expand", "reshape") for key, kind in kinds
        )

    def value(self, rows: slice) -> torch.Tensor:
        """The codes of the elements of ``rows``, in the integers of the graph."""

        def compute(key: Key, env: Mapping[Key, Grid]) -> Grid:
            if key not in self._source:
                return self._blocks.compute(key, rows, env)
            return env[self._source[key]].expanded(shape_of(self._blocks.steps[key], key[2], rows))

        return self._blocks.run(self._order, self._inputs, compute).dense()

    def _follow(self) -> None:
        """Find what carries codes, and what these went through."""
        found: dict[Key, _Arithmetic] = {}
        for key in self._blocks.order:
            step = self._blocks.steps[key]
            if self._blocks.is_cut(key):
                if not _is_integers(key[0]):
                    raise NotByRows(f"{key[0].name} holds no integers")
                found[key] = _Arithmetic()
                continue
            carrying = {i: found[k] for i, k in step.inputs.items() if k in found}
            if carrying:
                found[key] = self._passed_on(key, step, carrying)
        if self._blocks.result not in found:
            raise NotByRows("no codes reach it")

    def _passed_on(self, key: Key, step: Step, carrying: Mapping[Node, _Arithmetic]) -> _Arithmetic:
        before = _Arithmetic(
            max(c.sums for c in carrying.values()),
            max(c.products for c in carrying.values()),
            any(c.wide for c in carrying.values()),
        )
        if step.kind in _MOVES and [*step.inputs][:1] == [*carrying]:
            return before
        if step.kind == "call" and _moves(step.node, {*carrying}):
            return before
        over, after = None, before
        if step.kind == "formula" and step.formula is not None:
            over = step.formula.line_over
            after = before.then(1, 1, any(_is_double(i) for i in step.inputs if i is not over))
        elif step.kind == "pointwise":
            over, after = self._line_over(step.node, {*carrying}, before)
        if over is None or {*carrying} != {over} or not after.is_harmless:
            raise NotByRows(f"{step.node.name} is not known to keep to a line over codes")
        self._source[key] = step.inputs[over]
        return after

    def _line_over(self, node: Node, carrying: set[Node], before: _Arithmetic) -> tuple[Node | None, _Arithmetic]:
        """The one operand of an elementwise operator that carries codes, if the result is a line over it."""
        instruction = self._blocks.decode(node)
        if not isinstance(instruction, Add | Multiply | Cast) or not _is_number(node):
            return None, before
        operands = [instruction.source] if isinstance(instruction, Cast) else [instruction.source, instruction.other]
        own = [o for o in operands if isinstance(o, Node) and o in carrying]
        floating = node.meta["val"].dtype.is_floating_point
        # A number of Python's beside integers makes float32 of them.
        floats = [o for o in operands if isinstance(o, Node) and o.meta["val"].dtype.is_floating_point]
        if len(own) != 1:
            return None, before
        match instruction:
            case Cast():
                return (own[0] if floating or not floats else None), before
            case Add():
                return (own[0] if floats or not floating else None), before.then(int(floating), 0, wide=False)
            case Multiply(source, _, inverted):
                kept = floats and not (inverted and source is not own[0])
                wide = any(_is_double(o) for o in operands if o is not own[0])
                return (own[0] if kept else None), before.then(0, 1, wide)

    def _inputs(self, key: Key) -> Iterable[Key]:
        return (self._source[key],) if key in self._source else self._blocks.inputs(key)


def _moves(node: Node, carrying: set[Node]) -> bool:
    """True for what joins, picks or repeats elements of what carries codes."""
    if node.target in _JOINS:
        return carrying == set(node.all_input_nodes)
    return node.target in _PICKS and carrying == {bind(node)["self"]}


def _is_double(operand: Operand) -> bool:
    """True for what may be smaller or larger than numbers of float32."""
    if isinstance(operand, Node):
        return bool(operand.meta["val"].dtype.itemsize > 4)
    return not 1e-40 < abs(operand) < 1e40


def _is_integers(node: Node) -> bool:
    dtype = node.meta["val"].dtype
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


def _is_number(node: Node) -> bool:
    return node.meta["val"].dtype.is_floating_point or _is_integers(node)
