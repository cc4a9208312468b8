"""A matmul's epilogue folded into one formula.

``y = acc * columns * rows + addend`` with ``columns`` a vector along N (or one number), ``rows`` vectors along M, and
``acc`` the integer or float accumulator plus an addend of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from quantpass.graph import expr as ex
from quantpass.graph.expr import Expr
from quantpass.patterns.epilogues import Step
from quantpass.patterns.terms import Term


@dataclass(frozen=True, slots=True)
class Requantize:
    """``clamp(round(y) + zero_point, low, high)`` at the end, in ``dtype``; the scale is in the columns already."""

    zero_point: float = 0
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True, slots=True)
class Composition:
    """The effect of the first ``length`` steps of an epilogue.

    Attributes:
        length: how many steps.
        output: the node whose value this is.
        dtype: its dtype.
        columns: product of the factors that are one number or vary along N.
        rows: the factors that vary along M, each ``(M,)``.
        acc_addend: integers added to the accumulator before any factor, ``(1,)`` or ``(N,)``; None for none.
        addend: what is added after the factors, ``(1,)`` or ``(N,)``; None for none.
        relu: negative values became zero after all this.
        requantize: the value is quantized at the end.
        complete: False in the middle of a quantize, where no fused operator can stop.
        last_view: the last node that changed the shape, or None.
        rounded: the graph has cast the value to fewer bits than float32.
        faithful: the matmul is an integer one, and ``cast(float32(acc) * columns * rows + addend)`` rounds exactly
            where and how the graph rounds, so that the result is the graph's bit for bit.
    """

    length: int
    output: Node
    dtype: torch.dtype
    columns: Expr
    rows: tuple[Expr, ...] = ()
    acc_addend: Expr | None = None
    addend: Expr | None = None
    relu: bool = False
    requantize: Requantize | None = None
    complete: bool = True
    last_view: Node | None = None
    rounded: bool = False
    faithful: bool = True

    @property
    def unscaled(self) -> bool:
        return not self.rows and ex.is_all(self.columns, 1.0)


def compositions(matmul: Node, dtype: torch.dtype, steps: Sequence[Step]) -> list[Composition]:
    """Every prefix of the epilogue that can be written as one formula, shortest first.

    ``dtype`` is that of the product.
    """
    return list(_grow(matmul, dtype, steps))


def _grow(matmul: Node, dtype: torch.dtype, steps: Sequence[Step]) -> Iterator[Composition]:
    one = ex.reshape(ex.scalar(1.0), (1,))
    c: Composition | None = Composition(0, matmul, dtype, one, faithful=dtype == torch.int32)
    assert c is not None
    yield c
    for length, step in enumerate(steps, 1):
        if c.requantize is not None and not c.dtype.is_floating_point:
            return  # the codes: whoever reads them next must find them
        c = _FOLDS[step.kind](replace(c, length=length, output=step.node, dtype=step.dtype), step, c.dtype)
        if c is None:
            return
        yield c


def _vector(term: Term) -> Expr | None:
    """A term as ``(1,)`` or ``(N,)``; None where it varies along M."""
    return ex.wide(term.flat()) if term.kind in ("scalar", "columns") else None


def _fold_scale(c: Composition, step: Step, before: torch.dtype) -> Composition | None:
    del before
    term = step.term
    if term is None or c.requantize is not None:
        return None
    # The operator multiplies by columns, then rows, then adds, each once and in float32.
    in_place = c.faithful and not c.rounded and not c.rows and c.addend is None and c.dtype == torch.float32
    c = replace(c, faithful=in_place and not step.inverted)
    if c.relu and not (term.kind == "scalar" and term.constant is not None and float(term.constant) > 0):
        return None
    vector = _vector(term)
    if vector is None:
        rows = term.per_row(c.output.meta["val"].shape)
        if rows is None or c.addend is not None:
            return None
        return replace(c, rows=(*c.rows, rows))
    if term.kind == "scalar" and term.constant is None:
        # One number that is known only at run time acts as a scale of every row.
        if c.addend is not None:
            return None
        return replace(c, rows=(*c.rows, term.flat()))
    addend = c.addend
    if addend is not None and ex.is_all(addend, 0):
        addend = None
    if addend is not None:
        if not ex.known(vector):
            return None  # an infinite one: (acc + addend) * inf is infinite, acc * inf + addend * inf may be NaN
        addend = ex.mul(addend, vector)
    c = replace(c, faithful=c.faithful and ex.is_all(c.columns, 1.0))
    return replace(c, columns=ex.mul(c.columns, vector), addend=addend)


def _fold_add(c: Composition, step: Step, before: torch.dtype) -> Composition | None:
    term = step.term
    if term is None or c.relu:
        return None
    if c.requantize is not None:
        return _shift_codes(c, term)
    vector = _vector(term)
    if vector is None:
        return None
    if not c.dtype.is_floating_point:
        if not ex.is_whole(term.expr) or before != torch.int32:
            return None
        if c.dtype != torch.int32 and not ex.known(term.expr):
            return None  # a sum in int64, of which only the run can say whether it fits the accumulator
        return replace(c, acc_addend=vector if c.acc_addend is None else ex.add(c.acc_addend, vector))
    in_place = c.faithful and not c.rounded and c.addend is None and c.dtype == torch.float32
    c = replace(c, faithful=in_place and c.acc_addend is None)
    if c.addend is None:
        # A bias that is a stored tensor stays that tensor; arithmetic on it widens.
        own = term.flat()
        return replace(c, addend=own if term.kind == "columns" else vector)
    return replace(c, addend=ex.add(ex.wide(c.addend), vector))


def _shift_codes(c: Composition, term: Term) -> Composition | None:
    """A zero point added after rounding."""
    q = c.requantize
    if q is None or term.kind != "scalar" or term.constant is None or not c.dtype.is_floating_point:
        return None
    z = float(term.constant)
    if not z.is_integer():
        return None
    return replace(c, requantize=Requantize(q.zero_point + z, q.low + z, q.high + z), complete=False)


def _fold_cast(c: Composition, step: Step, before: torch.dtype) -> Composition | None:
    del step
    if c.dtype.is_floating_point:
        if c.requantize is not None:
            return None
        narrower = c.dtype != torch.float32
        direct = before == torch.int32 and narrower  # rounded once in the graph, twice through float32
        widened = c.rounded and not narrower
        return replace(c, rounded=c.rounded or narrower, faithful=c.faithful and not direct and not widened)
    q = c.requantize
    if q is not None and before.is_floating_point and c.dtype in (torch.int8, torch.uint8):
        info = torch.iinfo(c.dtype)
        # A cast does not saturate: only codes that were clamped into range are safe.
        return replace(c, complete=True) if info.min <= q.low and q.high <= info.max else None
    return None


def _fold_view(c: Composition, step: Step, before: torch.dtype) -> Composition | None:
    del before
    return None if c.requantize is not None else replace(c, last_view=step.node)


def _fold_relu(c: Composition, step: Step, before: torch.dtype) -> Composition | None:
    del step, before
    return None if c.requantize is not None else replace(c, relu=True, complete=False)


def _fold_round(c: Composition, step: Step, before: torch.dtype) -> Composition | None:
    del step
    if c.requantize is not None or not before.is_floating_point:
        return None
    return replace(c, requantize=Requantize(), complete=False)


def _fold_clamp(c: Composition, step: Step, before: torch.dtype) -> Composition | None:
    del before
    q = c.requantize
    if q is None or step.bounds is None or not all(math.isinf(b) or float(b).is_integer() for b in step.bounds):
        return None
    low, high = max(q.low, step.bounds[0]), min(q.high, step.bounds[1])
    if low > high:
        return None
    # Codes may stay in a float tensor; once they are bounded, that is a place to stop as well.
    bounded = math.isfinite(low) and math.isfinite(high)
    return replace(c, requantize=Requantize(q.zero_point, low, high), complete=bounded)


def _fold_quantize(c: Composition, step: Step, before: torch.dtype) -> Composition | None:
    if c.requantize is not None or step.term is None or step.bounds is None or not before.is_floating_point:
        return None
    inverse = replace(step.term, expr=ex.div(ex.scalar(1.0), ex.wide(step.term.expr)))
    scaled = _fold_scale(c, replace(step, term=inverse), before)
    if scaled is None:
        return None
    return replace(scaled, requantize=Requantize(step.zero_point, *step.bounds), complete=True)


_FOLDS: Any = {
    "scale": _fold_scale,
    "add": _fold_add,
    "cast": _fold_cast,
    "view": _fold_view,
    "relu": _fold_relu,
    "round": _fold_round,
    "clamp": _fold_clamp,
    "quantize": _fold_quantize,
}
