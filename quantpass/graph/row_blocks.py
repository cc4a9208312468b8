"""Static values a block of rows at a time.

Most operators that a weight is computed by keep its rows apart: row i of the result is made of row i of the operand,
or of a fixed number of its rows. Where every operator between the stored tensors and a value is known to, the value
is computed in blocks that stay in the processor's cache, and nothing of its size is ever in memory. Along a row,
parameters stay as small as they are (:mod:`quantpass.graph.grids`).

What an operator does to rows is told by :mod:`quantpass.graph.row_rules`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch._ops import OpOverload
from torch.fx import Node

from quantpass.graph.grids import Grid, constant, dense, pointwise
from quantpass.graph.instructions import Cast, Move
from quantpass.graph.row_rules import (
    Formula,
    NotByRows,
    RowRules,
    is_pointwise,
    needs_by_rule,
    of_elements,
    source_dim,
)
from quantpass.graph.schema import bind
from quantpass.graph.static_values import PARAMETER_SHARE, SMALL, StaticValues, call

aten = torch.ops.aten

_WIDE = torch.float64

ELEMENTS = 1 << 17
"""How many elements a block has: one megabyte in float64."""

_MOST_BLOCKS = 64

_SIDE_BY_SIDE = 16
"""How many rows a block has at least where rows are columns of what is stored: as many as come with a cache line."""

_REPEATING = (aten.index.Tensor, aten.index_select.default, aten.repeat_interleave.self_int)

_MOST = 1 << 21
"""A block whose rows can't be told apart any finer is computed up to this size."""

Key: TypeAlias = tuple[Node, bool, int | None]
"""A node, whether it is computed in float64, and along which dimension its rows lie (None: it is needed whole)."""

_Inputs: TypeAlias = Callable[[Key], Iterable[Key]]


@dataclass(frozen=True, slots=True)
class Step:
    """How one node is computed: from which, and how its size along the rows' dimension relates to the rows."""

    node: Node
    kind: str
    ratio: Fraction
    inputs: dict[Node, Key]
    formula: Formula | None = None


class RowBlocks:
    """The widened value of a static node (:meth:`StaticValues.widened`), some rows at a time.

    Args:
        values: the graph's static values.
        node: what to compute.
        dim: the dimension of which a block is a part.
        rules: what tools' operators do to rows.
        cuts: nodes that can be given another value (:meth:`with_codes`).

    Raises:
        NotByRows: some operator is not known to keep rows apart.
    """

    def __init__(
        self,
        values: StaticValues,
        node: Node,
        dim: int,
        rules: RowRules | None = None,
        cuts: Sequence[Node] = (),
        *,
        wide: bool = True,
    ) -> None:
        fake = node.meta["val"]
        if not all(isinstance(s, int) and s for s in fake.shape):
            raise NotByRows(f"{node.name} is of unknown size")
        self._values, self._rules = values, rules
        self.decode = values.decode
        self._taken_as_it_is = values.taken_as_it_is(node)
        self.rows: int = fake.shape[dim]
        self._width = fake.numel() // self.rows
        self._unit, self._strided = 1, False
        self.cuts = frozenset(cuts)
        self.result: Key = (node, wide, dim)
        self.steps: dict[Key, Step] = {}
        self.order = self._planned(self.result)
        self._whole: dict[Key, Grid] = {}
        self._held: float | None = None
        self._runs: dict[Node, int] = {}
        self._probed = self.needed(self._probed_inputs)

    def __iter__(self) -> Iterator[slice]:
        """The blocks, in order."""
        for start in range(0, self.rows, self._step_size):
            yield slice(start, min(start + self._step_size, self.rows))

    @property
    def _step_size(self) -> int:
        least = min(_SIDE_BY_SIDE, _MOST // self._width) if self._strided and self.rows * self._width > ELEMENTS else 1
        size: int = max(self._unit, max(least, ELEMENTS // self._width) // self._unit * self._unit)
        return size

    def ahead(self, rows: slice) -> slice:
        """``rows`` and as many blocks behind them as :meth:`with_codes` can give at once: it may be far smaller.

        Of a small value all that is left: finding out how much smaller would take longer.
        """
        if self.rows * self._width <= _MOST:
            return slice(rows.start, self.rows)
        if self._held is None:
            found = self.with_codes(rows, 0)
            self._held = found.tensor.numel() / ((rows.stop - rows.start) * self._width)
        blocks = max(1, min(_MOST_BLOCKS, int(1 / self._held)))
        return slice(rows.start, min(rows.start + blocks * self._step_size, self.rows))

    def value(self, rows: slice) -> torch.Tensor:
        """The value's part ``rows``."""
        return self.run(self.order, self.inputs, lambda key, env: self.compute(key, rows, env)).dense()

    def with_codes(self, rows: slice, code: int) -> Grid:
        """The same with ``code`` in place of every element of the cuts."""

        def compute(key: Key, env: Mapping[Key, Grid]) -> Grid:
            if self.is_cut(key):
                step = self.steps[key]
                return _filled(step.node, shape_of(step, key[2], rows), code)
            return self.compute(key, rows, env)

        return self.run(self._probed, self._probed_inputs, compute)

    def _probed_inputs(self, key: Key) -> Iterable[Key]:
        return () if self.is_cut(key) else self.inputs(key)

    # -- planning ------------------------------------------------------------------------------------------------------

    def _planned(self, result: Key) -> list[Key]:
        order: list[Key] = []
        stack = [(result, False)]
        while stack:
            key, ready = stack.pop()
            if ready:
                order.append(key)
            elif key not in self.steps:
                self.steps[key] = step = self._step(key)
                stack.append((key, True))
                stack.extend((i, False) for i in step.inputs.values())
        return order

    def inputs(self, key: Key) -> Iterable[Key]:
        """What ``key`` is computed from."""
        return self.steps[key].inputs.values()

    def is_cut(self, key: Key) -> bool:
        """True for a cut, where it is part of the value in float64."""
        return key[1] and key[0] in self.cuts

    def needed(self, inputs: _Inputs) -> list[Key]:
        """What the result needs, in the order of computing, where a key needs ``inputs``."""
        seen, todo = {self.result}, [self.result]
        while todo:
            for i in inputs(todo.pop()):
                if i not in seen:
                    seen.add(i)
                    todo.append(i)
        return [key for key in self.order if key in seen]

    def _step(self, key: Key) -> Step:
        node, wide, dim = key
        fake = node.meta.get("val")
        if not isinstance(fake, torch.Tensor) or fake.layout != torch.strided:
            raise NotByRows(f"{node.name} is no dense tensor")
        if dim is None:
            if fake.numel() > max(SMALL, self.rows * self._width // PARAMETER_SHARE):
                raise NotByRows(f"{node.name} is needed whole")
            return Step(node, "whole", Fraction(0), {})
        ratio = Fraction(fake.shape[dim], self.rows)
        self._align(ratio.denominator)
        if wide and self._taken_as_it_is(node):
            return Step(node, "cast", ratio, {node: (node, False, dim)})
        if node.op in ("placeholder", "get_attr"):
            self._strided |= dim == fake.dim() - 1 and dim > 0
            return Step(node, "leaf", ratio, {})
        move = self._values.decode(node)
        if isinstance(move, Move):
            source = source_dim(move, fake.shape, dim)
            return Step(node, move.kind, ratio, {move.source: (move.source, wide, source)})
        if not isinstance(node.target, OpOverload):
            raise NotByRows(f"{node.name} is no operator")
        shuffled = self._shuffled(node, dim)
        if shuffled is not None:
            given, index, unit = shuffled
            self._align((ratio / unit).denominator)
            return Step(node, "shuffle", ratio, {given: (given, wide, dim), index: (index, False, 0)})
        by_element = isinstance(move, Cast) or is_pointwise(node.target)
        known = of_elements(node, dim) if by_element else needs_by_rule(node, dim, self._rules)
        formula = known if isinstance(known, Formula) else None
        needs = known.needs if isinstance(known, Formula) else known
        if wide and any(d is None and self._is_widened(i) for i, d in needs.items()):
            raise NotByRows(f"{node.name} needs a part of the weight whole")
        inputs = {i: (i, wide and d is not None, d) for i, d in needs.items()}
        if formula is not None and wide:
            return Step(node, "formula", ratio, inputs, formula)
        return Step(node, "pointwise" if by_element else "call", ratio, inputs)

    def _is_widened(self, node: Node) -> bool:
        fake = node.meta["val"]
        return bool(fake.is_floating_point()) and not self._taken_as_it_is(node)

    def _shuffled(self, node: Node, dim: int) -> tuple[Node, Node, int] | None:
        """Operand and index of rows put into another order, and the least number of rows that stay together."""
        if node.target is not aten.index.Tensor:
            return None
        bound = bind(node)
        source, indices = bound["self"], bound["indices"]
        if [d for d, i in enumerate(indices) if i is not None] != [dim]:
            return None
        index, rows = indices[dim], source.meta["val"].shape[dim]
        fake = index.meta["val"]
        if fake.dtype not in (torch.int32, torch.int64) or fake.dim() != 1 or len(fake) != rows or len(fake) > _MOST:
            return None
        order = self._values.value(index)
        own = torch.arange(rows)
        units = (2**i for i in range(1, 11) if rows % 2**i == 0)
        return next(((source, index, u) for u in units if bool((order // u == own // u).all())), None)

    def _align(self, unit: int) -> None:
        self._unit = math.lcm(self._unit, unit)
        if self._unit * self._width > _MOST:
            raise NotByRows("blocks would be too large")

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self, order: list[Key], inputs: _Inputs, compute: Callable[[Key, Mapping[Key, Grid]], Grid]) -> Grid:
        """The result, each key of ``order`` computed from its ``inputs``, which are kept no longer than needed."""
        env: dict[Key, Grid] = {}
        last = {i: key for key in order for i in inputs(key)}
        for key in order:
            env[key] = compute(key, env)
            for i in inputs(key):
                if last[i] == key:
                    env.pop(i, None)
        return env[self.result]

    def compute(self, key: Key, rows: slice, env: Mapping[Key, Grid]) -> Grid:
        """``rows`` of one key, from its inputs."""
        step = self.steps[key]
        node, wide, dim = key
        if step.kind == "whole":
            if key not in self._whole:
                self._whole[key] = dense(self._values.value(node))
            return self._whole[key]
        assert dim is not None
        if step.kind == "leaf":
            at = _scaled(step.ratio, rows)
            part = self._values.leaf_value(node).narrow(dim, at.start, at.stop - at.start)
            return dense(part.double() if wide and part.is_floating_point() else part)
        given = {i: env[k] for i, k in step.inputs.items()}
        if step.kind == "cast":
            (found,) = given.values()
            floating = found.tensor.is_floating_point()
            return Grid(found.tensor.double(), found.parts) if floating else found
        if step.kind in ("same", "reshape", "permute", "expand"):
            (found,) = given.values()
            return self._moved(step, found, shape_of(step, dim, rows))
        if step.formula is not None:
            return step.formula.compute(given)
        if step.kind == "shuffle":
            (source, index) = given
            whole = {source: given[source].dense(), index: given[index].dense() - _scaled(step.ratio, rows).start}
            return dense(call(node, whole, _WIDE if wide else None))
        if step.kind == "call" and node.target in _REPEATING:
            repeated = self._repeated(node, given)
            if repeated is not None:
                return repeated
        if step.kind == "pointwise":
            names = [*given]

            def compute(tensors: list[torch.Tensor]) -> torch.Tensor:
                found: torch.Tensor = call(node, dict(zip(names, tensors, strict=True)), _WIDE if wide else None)
                return found

            return pointwise(compute, [*given.values()])
        return dense(call(node, {i: g.dense() for i, g in given.items()}, _WIDE if wide else None))

    def _repeated(self, node: Node, given: Mapping[Node, Grid]) -> Grid | None:
        """What takes each element several times in a row, with one of each; None where it does not."""
        bound = bind(node)
        source = given[bound["self"]].dense()
        if node.target is aten.repeat_interleave.self_int:
            if bound["dim"] is None:
                return None
            return _with_run(source, bound["dim"] % source.dim(), bound["repeats"])
        dim, index = _looked_up(bound)
        if index is None or given[index].dense().dim() != 1 or index is bound["self"]:
            return None
        which = given[index].dense()
        if len(which) != index.meta["val"].shape[0]:
            return None  # rows themselves are looked up
        if index not in self._runs:
            self._runs[index] = _run_of(which)
        run = self._runs[index]
        return None if run == 1 else _with_run(source.index_select(dim, which[::run].long()), dim, run)

    def _moved(self, step: Step, found: Grid, shape: Sequence[int]) -> Grid:
        if step.kind == "same":
            return found
        if step.kind == "permute":
            move = self._values.decode(step.node)
            assert isinstance(move, Move)
            return found.permuted(move.order)
        return found.expanded(shape) if step.kind == "expand" else found.reshaped(shape)


def _looked_up(bound: Mapping[str, Any]) -> tuple[int, Node | None]:
    """The dimension that ``index`` or ``index_select`` looks up, and the index; None where there are several."""
    if "dim" in bound:
        return bound["dim"] % bound["self"].meta["val"].dim(), bound["index"]
    there = [(d, i) for d, i in enumerate(bound["indices"]) if i is not None]
    return there[0] if len(there) == 1 else (0, None)


def _run_of(index: torch.Tensor) -> int:
    """How often each element comes in a row, at least."""
    if bool((index < 0).any()):
        return 1
    changes = (index[1:] != index[:-1]).nonzero().flatten() + 1
    return math.gcd(len(index), *changes.tolist())


def _with_run(tensor: torch.Tensor, dim: int, run: int) -> Grid:
    """``tensor`` with every element along ``dim`` ``run`` times in a row."""
    parts = tuple((size, run) if d == dim else (size,) for d, size in enumerate(tensor.shape))
    return Grid(tensor.unsqueeze(dim + 1), parts)


def _scaled(ratio: Fraction, rows: slice) -> slice:
    n, d = ratio.numerator, ratio.denominator
    return slice(rows.start * n // d, rows.stop * n // d)


def shape_of(step: Step, dim: int | None, rows: slice) -> list[int]:
    at = _scaled(step.ratio, rows)
    shape = [*step.node.meta["val"].shape]
    assert dim is not None
    shape[dim] = at.stop - at.start
    return shape


def _filled(node: Node, shape: Sequence[int], code: int) -> Grid:
    dtype = node.meta["val"].dtype
    return constant(torch.tensor(code, dtype=torch.float64 if dtype.is_floating_point else dtype), shape)
