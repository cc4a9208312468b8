"""A possible fused call for a site, and the pieces that both operators need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice
from typing import Any

import torch

from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject
from quantpass.basics.tensor_spec import TensorSpec
from quantpass.chips.calls import OpCall, VendorOp
from quantpass.chips.rules import Chip, WeightLayout
from quantpass.graph import expr as ex
from quantpass.graph.expr import Call, Const, Expr
from quantpass.graph.records import Numerics, Weight
from quantpass.operators.arguments import NZ
from quantpass.operators.operator import Operator, vendor_call
from quantpass.patterns.sites import Reading
from quantpass.planning.composition import Composition
from quantpass.planning.options import Options

aten = torch.ops.aten
ops = torch.ops.quantpass

_CAST = "weight in FRACTAL_NZ"
AT_EVERY_CALL = "weight cast to FRACTAL_NZ at every call: it is not known when compiling"

FLOAT32_STEPS = 2.0**-22
"""Relative rounding of the few float32 operations between an accumulator and the output."""


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A weight as an operator takes it."""

    expr: Expr
    transposed: bool
    format: str
    fixups: tuple[str, ...] = ()

    @property
    def stored(self) -> TensorSpec:
        return TensorSpec(ex.dtype_of(self.expr), ex.shape_of(self.expr), self.format)


class Layouts:
    """Ways to lay a weight out, each made when it is first asked for: the first is mostly the one that is taken."""

    def __init__(self, *ways: Iterator[LaidOut]) -> None:
        self._coming = chain(*ways)
        self._made: list[LaidOut] = []

    def __iter__(self) -> Iterator[LaidOut]:
        for i in count():
            if i == len(self._made):
                self._made.extend(islice(self._coming, 1))
            if i == len(self._made):
                return
            yield self._made[i]

    def __bool__(self) -> bool:
        return any(True for _ in self)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A fused call, fully described, not yet in the graph.

    Attributes:
        call: the vendor's call as legality sees it.
        composition: which part of the epilogue it takes in.
        value: the expression that replaces ``composition.output``.
        weight_format: ``"ND"`` or ``"NZ"``.
        numerics: its contract.
        fixups: what was changed to make it legal, in words.
        int8_codes: where ``value`` is a uint8 tensor made from int8 codes, those codes.
        int8_shift: how much greater than those the codes of ``value`` are.
        notes: what else a report says of it.
    """

    call: OpCall
    composition: Composition
    value: Expr
    weight_format: str
    numerics: Numerics
    fixups: tuple[str, ...] = ()
    int8_codes: Expr | None = None
    int8_shift: int = 0
    notes: tuple[str, ...] = ()


def weight_layouts(weight: Weight, chip: Chip, op: VendorOp, options: Options, *, int4: bool) -> Iterator[LaidOut]:
    """The ways to lay ``weight`` out, best first; packed as int4 where asked and possible."""
    layouts = chip.layouts_of(op, options.mode)
    if options.nz == "never":
        layouts = (*(x for x in layouts if x.format == "ND"), WeightLayout("ND", None, "FRACTAL_NZ was switched off"))
    # A weight that is not known when compiling would be re-tiled at every call: only where nothing else is legal.
    later = () if isinstance(weight.codes, Const) else tuple(x for x in layouts if x.format == "NZ")
    stored: dict[bool, LaidOut | None] = {}
    for layout in (*(x for x in layouts if x not in later), *later):
        transposed = weight.transposed if layout.transposed is None else layout.transposed
        if transposed not in stored:
            stored[transposed] = _stored(weight, transposed, int4)
        laid_out = _in_format(stored[transposed], layout.format, options)
        if laid_out is not None:
            yield laid_out


def no_layout(op: VendorOp, chip: Chip) -> Reject:
    """Why a weight can't be laid out at all."""
    return refuse(
        f"{op.family}.weight.runtime",
        "the right operand is computed when the graph runs",
        want=f"a weight that is known when compiling: {chip.title} takes it in FRACTAL_NZ",
    )


def saturated(op: VendorOp, chip: Chip) -> Reject:
    """Why a bias that may be infinite stays outside."""
    return refuse(
        f"{op.family}.bias.saturates",
        f"the bias is, or may be when the graph runs, infinite, and {chip.title} limits float16 results to 65504",
    )


def _stored(weight: Weight, transposed: bool, int4: bool) -> LaidOut | None:
    """``weight`` in ND, stored ``(N, K)`` where ``transposed``; None where it can't be packed."""
    codes, fixups = weight.codes, []
    turned = transposed != weight.transposed
    if turned:
        fixups.append(f"weight stored as {'(N, K)' if transposed else '(K, N)'}")
    if int4:
        if not isinstance(codes, Const) or codes.tensor.shape[0 if turned else 1] % 8:
            return None
        codes = Const(ops.pack_int4(codes.tensor.t() if turned else codes.tensor), label=codes.label)
        fixups.append("weight packed as int4")
    elif turned:
        codes = _turned(codes)
    return LaidOut(codes, transposed, "ND", tuple(fixups))


def _in_format(stored: LaidOut | None, name: str, options: Options) -> LaidOut | None:
    if stored is None or name != "NZ":
        return stored
    codes = stored.expr
    known = isinstance(codes, Const)
    if len(ex.shape_of(codes)) > 2 or (not known and (options.mode != "graph" or not options.lowerer.keeps_casts)):
        return None  # no batches; and the cast of a tensor that is computed can only be part of a GE graph
    cast = Call(ops.format_cast.default, (codes, NZ), {}, ex.dtype_of(codes), ex.shape_of(codes))
    return replace(stored, expr=cast, format="NZ", fixups=(*stored.fixups, _CAST if known else AT_EVERY_CALL))


def _turned(codes: Expr) -> Expr:
    if isinstance(codes, Const):
        return Const(codes.tensor.t().contiguous(), label=codes.label)
    return ex.swap_last(codes)


def rows_of(shape: tuple[Any, ...]) -> Any:
    """How many rows a tensor of this shape has when all leading dimensions are one."""
    rows: Any = 1
    for size in shape[:-1]:
        rows = rows * size
    return rows


def flattened(e: Expr) -> Expr:
    """``e`` as a matrix: leading dimensions made one."""
    shape = ex.shape_of(e)
    return e if len(shape) == 2 else ex.reshape(e, (-1, shape[-1]))


def in_output_form(value: Expr, reading: Reading, c: Composition) -> Expr:
    """``value``, ``(M, N)`` or with batch dimensions, in the shape of the node that it replaces."""
    contraction = reading.contraction
    assert contraction is not None
    if contraction.out_order is not None:
        sizes = _product_sizes(reading, tuple(contraction.product_shape))
        return ex.permute(ex.reshape(value, sizes), contraction.out_order)
    shape = tuple(c.output.meta["val"].shape)
    if len(shape) == len(ex.shape_of(value)) == len(contraction.product_shape) and c.last_view is None:
        return value
    symbolic = [s for s in shape if not isinstance(s, int)]
    if len(symbolic) < 2:
        return ex.reshape(value, [s if isinstance(s, int) else -1 for s in shape])
    if c.last_view is not None and len(c.last_view.args) == 2 and isinstance(c.last_view.args[1], list | tuple):
        return ex.reshape(value, list(c.last_view.args[1]))
    return ex.reshape(value, _product_sizes(reading, shape))


def _product_sizes(reading: Reading, shape: tuple[Any, ...]) -> list[Any]:
    """``shape``, ``(..., M, N)``, in a form that a rewritten graph can use."""
    assert reading.contraction is not None
    if all(isinstance(s, int) for s in shape):
        return list(shape)
    sizes = ex.sizes_of(reading.contraction.lhs)
    order = reading.contraction.lhs_order or range(len(sizes))
    return [*[sizes[d] for d in order][:-1], shape[-1]]


def planned_call(
    op: Operator, arguments: dict[str, Any], weight: LaidOut, options: Options, **shapes: tuple[Any, ...]
) -> OpCall:
    """The call of ``op`` as legality sees it; ``shapes`` of arguments that are to be described by another one."""

    def describe(name: str, value: Any) -> Any:
        is_tensor = isinstance(value, Expr)
        return TensorSpec(ex.dtype_of(value), shapes.get(name) or ex.shape_of(value)) if is_tensor else value

    described = {name: describe(name, value) for name, value in arguments.items()}
    return vendor_call(op.vendor, described | {op.vendor.weight: weight.stored}, options.mode)


def call_op(op: Operator, arguments: dict[str, Any], dtype: torch.dtype, shape: tuple[Any, ...]) -> Call:
    """A fused call; arguments at their schema's default are left out, so that graphs stay readable."""
    target = op.overload
    schema = target._schema
    positional, keywords = [], {}
    for a in schema.arguments:
        value = arguments.get(a.name, a.default_value if a.has_default_value() else None)
        is_default = a.has_default_value() and not isinstance(value, Const | ex.Ref | Call) and value == a.default_value
        if not a.has_default_value():
            positional.append(value)
        elif not is_default:
            keywords[a.name] = value
    return Call(target, tuple(positional), keywords, dtype, shape)


@dataclass(slots=True)
class Notes:
    """Collects what was done for one candidate."""

    fixups: list[str] = field(default_factory=list)

    def did(self, what: str) -> None:
        if what not in self.fixups:
            self.fixups.append(what)
