"""Expressions over constants and graph nodes.

Planning builds these without touching the graph; :mod:`quantpass.rewrite` turns the chosen ones into nodes. An
expression whose inputs are all constants is computed on the spot, so the same planning code serves a weight whose
values are known (everything folds) and one that is only a placeholder (the arithmetic stays in the graph).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from quantpass.basics.symbolic import broadcast_shape, elements, same_shape
from quantpass.graph.decode import decode_call
from quantpass.graph.instructions import Move

aten = torch.ops.aten


@dataclass(frozen=True, eq=False, slots=True)
class Const:
    """A tensor known when compiling. ``origin`` is the placeholder or attribute whose value it is, if it is one."""

    tensor: torch.Tensor
    origin: Node | None = None
    label: str = ""


@dataclass(frozen=True, eq=False, slots=True)
class Ref:
    """The value of a graph node."""

    node: Node


@dataclass(frozen=True, eq=False, slots=True)
class Call:
    """An operator applied to expressions; ``dtype`` and ``shape`` describe its result."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    shape: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False, slots=True)
class Recentred:
    """The uint8 codes of ``node`` less 128, in int8.

    ``otherwise`` computes them; it is not needed where the rewrite made ``node`` from int8 codes in the first place.
    """

    node: Node
    otherwise: Call


Expr = Const | Ref | Call | Recentred


def dtype_of(e: Expr) -> torch.dtype:
    if isinstance(e, Const):
        return e.tensor.dtype
    if isinstance(e, Ref):
        dtype: torch.dtype = e.node.meta["val"].dtype
        return dtype
    return torch.int8 if isinstance(e, Recentred) else e.dtype


def shape_of(e: Expr) -> tuple[Any, ...]:
    if isinstance(e, Const):
        return tuple(e.tensor.shape)
    if isinstance(e, Ref | Recentred):
        return tuple(e.node.meta["val"].shape)
    return e.shape


def scalar(value: float | int) -> Const:
    """A number as a float64 (or int64) constant without dimensions."""
    return Const(torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64))


def parts_of(e: Any) -> Iterator[Any]:
    """An expression and all that it is made of, each once."""
    todo, seen = [e], set()
    while todo:
        e = todo.pop()
        if id(e) in seen:
            continue
        seen.add(id(e))
        yield e
        if isinstance(e, Call):
            todo.extend((*e.args, *e.kwargs.values()))
        elif isinstance(e, Recentred):
            todo.append(e.otherwise)
        elif isinstance(e, list | tuple):
            todo.extend(e)


def leaves_of(e: Any) -> Iterator[Any]:
    """What an expression is made of: its :class:`Const`, :class:`Ref`, :class:`Size` and bare nodes, each once."""
    for part in parts_of(e):
        if isinstance(part, Recentred):
            yield Ref(part.node)
        elif isinstance(part, Const | Ref | Size | Node):
            yield part


def known(*es: Expr | None) -> bool:
    """True where every expression given is a constant (or None)."""
    return all(e is None or isinstance(e, Const) for e in es)


def apply(target: Any, *args: Any, dtype: torch.dtype, shape: Sequence[Any], **kwargs: Any) -> Expr:
    """``target(*args, **kwargs)``: computed now if every expression among ``args`` is a constant."""
    if all(not isinstance(a, Ref | Call | Recentred) for a in (*args, *kwargs.values())):
        unwrap = {k: v.tensor if isinstance(v, Const) else v for k, v in kwargs.items()}
        return Const(target(*(a.tensor if isinstance(a, Const) else a for a in args), **unwrap))
    return Call(target, args, kwargs, dtype, tuple(shape))


def cast(e: Expr, dtype: torch.dtype) -> Expr:
    if dtype_of(e) == dtype:
        return e
    if isinstance(e, Const):
        return Const(e.tensor.to(dtype), label=e.label)
    if isinstance(e, Call) and e.target is aten._to_copy.default:
        source: Expr = e.args[0]
        if dtype_of(source) == dtype and torch.promote_types(dtype, e.dtype) == e.dtype:
            return source  # widened and narrowed again
    return Call(aten._to_copy.default, (e,), {"dtype": dtype}, dtype, shape_of(e))


def reshape(e: Expr, shape: Sequence[Any]) -> Expr:
    """``e`` in another shape, row-major order kept. ``shape`` may hold one -1, and expressions for symbolic sizes."""
    shape = tuple(shape)
    source = shape_of(e)
    if all(isinstance(s, int) for s in (*shape, *source)) and _resolved(shape, source) == source:
        return e
    if isinstance(e, Const):
        return Const(e.tensor.reshape(shape), label=e.label)
    if isinstance(e, Call) and e.target is aten.reshape.default:
        e = e.args[0]
    return Call(aten.reshape.default, (e, list(shape)), {}, dtype_of(e), _resolved(shape, shape_of(e)))


def _resolved(shape: tuple[Any, ...], source: tuple[Any, ...]) -> tuple[Any, ...]:
    """``shape`` with a -1 replaced by what the elements of ``source`` leave for it."""
    sizes = [s.size if isinstance(s, Size) else s.meta["val"] if isinstance(s, Node) else s for s in shape]
    for d, s in enumerate(sizes):
        if isinstance(s, int) and s == -1:
            sizes[d] = elements(source) // elements([*sizes[:d], *sizes[d + 1 :]])
            break
    return tuple(sizes)


@dataclass(frozen=True, eq=False, slots=True)
class Size:
    """A symbolic size: dimension ``dim`` of ``node``, whose value is ``size``."""

    node: Node
    dim: int
    size: Any


def sizes_of(node: Node) -> list[Any]:
    """The shape of ``node`` in a form that a rewritten graph can use: numbers, and :class:`Size` for symbolic ones."""
    return [s if isinstance(s, int) else Size(node, d, s) for d, s in enumerate(node.meta["val"].shape)]


def swap_last(e: Expr) -> Expr:
    """``e`` with its last two dimensions swapped."""
    if isinstance(e, Const):
        return Const(e.tensor.transpose(-2, -1), label=e.label)
    shape = shape_of(e)
    return Call(aten.transpose.int, (e, -2, -1), {}, dtype_of(e), (*shape[:-2], shape[-1], shape[-2]))


def permute(e: Expr, order: Sequence[int]) -> Expr:
    """``e`` with its dimensions in another order."""
    order = tuple(order)
    if order == tuple(range(len(order))):
        return e
    if isinstance(e, Const):
        return Const(e.tensor.permute(order), label=e.label)
    shape = tuple(shape_of(e)[d] for d in order)
    if isinstance(e, Ref):
        inner = movement_in(e.node, len(order))
        if inner is not None and inner.kind == "permute" and [inner.order[d] for d in order] == [*range(len(order))]:
            return Ref(inner.source)  # put back into its first order
    return Call(aten.permute.default, (e, list(order)), {}, dtype_of(e), shape)


def movement_in(call: Call | Node, rank: int) -> Move | None:
    """The movement that a call or node is, with a result of ``rank`` dimensions; None where it is none."""
    found = decode_call(call.target, call.args, call.kwargs, rank)
    return found if isinstance(found, Move) else None


def _binary(target: Any, a: Expr, b: Expr) -> Expr:
    if isinstance(a, Const) and isinstance(b, Const):
        return Const(target(a.tensor, b.tensor))
    dtype = _common_dtype(a, b)
    a, b = cast(a, dtype), cast(b, dtype)
    shape = broadcast_shape(shape_of(a), shape_of(b))
    if target in (aten.mul.Tensor, aten.add.Tensor) and isinstance(a, Const):
        a, b = b, a
    # One number goes into the graph as a number, not as a tensor of one element.
    number = isinstance(b, Const) and b.origin is None and b.tensor.numel() == 1 and same_shape(shape, shape_of(a))
    if number and isinstance(b, Const) and b.tensor.item() == 1 and target in (aten.mul.Tensor, aten.div.Tensor):
        return a
    return Call(target, (a, b.tensor.item() if number and isinstance(b, Const) else b), {}, dtype, shape)


def _common_dtype(a: Expr, b: Expr) -> torch.dtype:
    """The dtype in which ``a`` and ``b`` meet, at least one of them a node.

    A constant takes the node's precision (float32 at least), so that float64 never enters the graph, and a constant
    of whole numbers stays whole beside an integer node.
    """
    constant, node = (a, b) if isinstance(a, Const) else (b, a)
    dtype = dtype_of(node)
    if not isinstance(constant, Const):
        dtype = torch.promote_types(dtype, dtype_of(constant))
    elif not dtype.is_floating_point and constant.tensor.is_floating_point():
        return torch.promote_types(dtype, torch.int32) if is_whole(constant) else torch.float32
    # Floats at least in float32; integers at least in int32, where no sum or product of codes wraps around.
    return torch.promote_types(dtype, torch.float32 if dtype.is_floating_point else torch.int32)


def mul(a: Expr, b: Expr) -> Expr:
    return _binary(aten.mul.Tensor, a, b)


def add(a: Expr, b: Expr) -> Expr:
    return _binary(aten.add.Tensor, a, b)


def sub(a: Expr, b: Expr) -> Expr:
    return _binary(aten.sub.Tensor, a, b)


def div(a: Expr, b: Expr) -> Expr:
    return _binary(aten.div.Tensor, a, b)


def signed(a: Expr) -> Expr:
    """``a`` in a dtype that holds its negative: -(-128) is no int8, -1 no uint8."""
    return a if dtype_of(a).is_floating_point else cast(a, torch.promote_types(dtype_of(a), torch.int32))


def neg(a: Expr) -> Expr:
    a = signed(a)
    if isinstance(a, Call) and a.target is aten.neg.default:
        inner: Expr = a.args[0]
        return inner
    if isinstance(a, Call) and a.target is aten.reshape.default:
        return Call(a.target, (neg(a.args[0]), a.args[1]), {}, a.dtype, a.shape)
    if isinstance(a, Call) and a.target is aten.mul.Tensor and isinstance(a.args[1], int | float):
        factor, source = -a.args[1], a.args[0]
        return source if factor == 1 else Call(a.target, (source, factor), {}, a.dtype, a.shape)
    return apply(aten.neg.default, a, dtype=dtype_of(a), shape=shape_of(a))


def named(e: Expr, label: str) -> Expr:
    """A constant under a name of its own, contiguous in memory; one that is a tensor of the graph stays that tensor."""
    if not isinstance(e, Const) or (e.origin is not None and e.tensor.is_contiguous()):
        return e
    return Const(e.tensor.contiguous(), None, label)


def expanded(e: Expr, shape: Sequence[Any]) -> Expr:
    """``e`` repeated to ``shape``."""
    shape = tuple(shape)
    if same_shape(shape_of(e), shape):
        return e
    return apply(aten.expand.default, e, list(shape), dtype=dtype_of(e), shape=shape)


def wide(e: Expr) -> Expr:
    """A constant in float64, so that folding adds no rounding; a node stays as it is."""
    return cast(e, torch.float64) if isinstance(e, Const) else e


def is_whole(e: Expr) -> bool:
    """True where every element is surely an integer, whatever the dtype."""
    if isinstance(e, Const):
        return bool((e.tensor == e.tensor.round()).all())
    return not dtype_of(e).is_floating_point


def is_all(e: Expr | None, value: float) -> bool:
    """True where ``e`` is a constant and every element equals ``value`` (None counts as zero)."""
    if e is None:
        return value == 0
    return isinstance(e, Const) and bool((e.tensor == value).all())
