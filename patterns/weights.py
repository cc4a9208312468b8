"""Reading a static operand as ``scale * (codes - zero_point)``.

Plain spellings are read symbolically, which keeps the stored tensor. Any other spelling is read by value: find where
the graph goes from integers to floats, evaluate what follows with those integers set to 0, 1 and 2, and take the line
through the three. Either way the reading is compared with what the graph itself computes from the real tensors, so for
this weight it is proved, not inferred.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from quantpass.patterns.affine import Affine, AffineReader, NotAffine
from quantpass.patterns.terms import Term
from torch.fx import Node

from quantpass import expr as ex
from quantpass.expr import Call, Const, Expr, Recentred, Ref
from quantpass.records import Weight
from quantpass.static_values import StaticValues

aten = torch.ops.aten

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_TOLERANCE = 1e-3
"""How far from an integer a recovered code may be, in codes; float64 evaluation leaves about 1e-10."""


def read_weight(reader: AffineReader, node: Node, *, transposed: bool) -> Weight | NotAffine:
    """Read the right operand ``node`` of a matmul; it is ``(..., K, N)``, or ``(..., N, K)`` where ``transposed``."""
    matrix = _matrix_node(node)
    key = (matrix, transposed)
    if key not in reader.weights:
        reader.weights[key] = _read(reader, matrix, transposed)
    found: Weight | NotAffine = reader.weights[key]
    return found


def _read(reader: AffineReader, matrix: Node, transposed: bool) -> Weight | NotAffine:
    affine = reader.read(matrix)
    weight = affine if isinstance(affine, NotAffine) else _from_affine(reader.values, affine, transposed)
    if not reader.values.is_static(matrix):
        return weight
    if isinstance(weight, Weight) and _is_proved(reader.values, matrix, transposed, weight):
        low, high = _known_span(weight)
        return replace(weight, low=low, high=high, proved=True)
    by_value = _from_values(reader.values, matrix, transposed)
    return by_value if isinstance(weight, NotAffine) or isinstance(by_value, Weight) else _unproved(matrix)


def _unproved(node: Node) -> NotAffine:
    return NotAffine(f"the value of {node.name} is not scale * (codes - zero_point)", quantized=True)


def _matrix_node(node: Node) -> Node:
    """The 2-D tensor behind a weight that is repeated along leading dimensions."""
    while node.op == "call_function" and node.meta["val"].dim() > 2:
        source = node.args[0]
        repeats = node.target in (
            aten.expand.default,
            aten.unsqueeze.default,
            aten.view.default,
            aten._unsafe_view.default,
            aten.reshape.default,
        )
        if not repeats or not isinstance(source, Node):
            break
        before, after = source.meta["val"], node.meta["val"]
        same_matrix = before.dim() >= 2 and tuple(before.shape[-2:]) == tuple(after.shape[-2:])
        repeated = node.target is aten.expand.default or before.shape[:-2].numel() == after.shape[:-2].numel()
        if not same_matrix or not repeated or _lead(before) not in (1, _lead(after)):
            break
        node = source
    return node


def _lead(fake: torch.Tensor) -> int:
    return fake.shape[:-2].numel()


# -- symbolic ------------------------------------------------------------------------------------------------------


def _from_affine(values: StaticValues, value: Affine, transposed: bool) -> Weight | NotAffine:
    if len(value.shape) != 2:
        return NotAffine(
            f"a weight of rank {len(value.shape)}", quantized=True, hint="only 2-D weights have one scale a column"
        )
    if not all(isinstance(s, int) for s in value.shape):
        return NotAffine("a weight with symbolic sizes", quantized=True)
    n, k = value.shape if transposed else reversed(value.shape)
    scale = _along_n([*value.factors], transposed, one=True)
    zero = _along_n([value.zero_point] if value.zero_point else [], transposed, one=False)
    if scale is None or zero is None:
        return NotAffine(
            "its scale or zero point varies along K",
            quantized=True,
            hint="the operators take a scale for each column of N",
        )
    low, high = value.span
    codes, base_transposed = _storage(value.codes, transposed)
    stored = _evaluated(values, codes)
    if isinstance(codes, Ref):
        codes = values.expr(codes.node)
    elif stored is not None:
        codes = Const(stored)
    zero_point = None if ex.is_all(zero, 0) else _same_size_as(zero, scale)
    if zero_point is not None:
        scale = _same_size_as(scale, zero_point)
    return Weight(codes, base_transposed, k, n, scale, zero_point, 0, int(low), int(high), proved=False)


def _along_n(terms: list[Term], transposed: bool, *, one: bool) -> Expr | None:
    """The product of ``terms`` as a vector along N (or of one element); None where one varies along K."""
    along = ("scalar", "rows" if transposed else "columns")
    result: Expr = ex.reshape(ex.scalar(1.0 if one else 0.0), (1,))
    for term in terms:
        if term.kind not in along:
            return None
        result = ex.mul(result, term.flat()) if one else term.flat()
    return result


def _same_size_as(vector: Expr, other: Expr) -> Expr:
    size = ex.shape_of(other)
    if ex.shape_of(vector) == size or size == (1,):
        return vector
    return ex.apply(aten.expand.default, vector, list(size), dtype=ex.dtype_of(vector), shape=size)


def _storage(codes: Expr, transposed: bool) -> tuple[Expr, bool]:
    """Look through transposes of a stored matrix: the stored tensor, and whether it is ``(N, K)``."""
    while isinstance(codes, Call) and codes.target in (
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.numpy_T.default,
        aten.mT.default,
    ):
        inner = codes.args[0]
        if ex.shape_of(inner) != tuple(reversed(codes.shape)) or (
            codes.target is aten.permute.default and list(codes.args[1]) in ([0, 1], [-2, -1])
        ):
            break
        codes, transposed = inner, not transposed
    return codes, transposed


# -- by value ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Line:
    """``value = slope * codes + intercept``, elementwise, all ``(K, N)`` in float64."""

    codes: torch.Tensor
    slope: torch.Tensor
    intercept: torch.Tensor


def _from_values(values: StaticValues, node: Node, transposed: bool) -> Weight | NotAffine:
    if not _holds_codes(node):
        return NotAffine("it is a plain floating-point weight")
    full = values.widened(node)
    if full.dim() > 2:
        first = full.reshape(-1, *full.shape[-2:])
        if not bool((first == first[:1]).all()):
            return NotAffine(f"a weight of rank {full.dim()} whose matrices differ", quantized=True)
    actual = _as_kn(full, transposed)
    if not actual.numel() or not bool(torch.isfinite(actual).all()):
        return NotAffine("it is empty or holds values that are not finite", quantized=True)
    if not node.meta["val"].dtype.is_floating_point:
        return _from_line(values, node, _Line(actual, torch.ones_like(actual), torch.zeros_like(actual)))
    for cut in _integer_cuts(node, actual.numel()):
        line = _probe(values, node, cut, actual, transposed)
        if line is not None:
            return _from_line(values, cut, line)
    return NotAffine("its value is not a linear function of its codes", quantized=True)


def _as_kn(matrix: torch.Tensor, transposed: bool) -> torch.Tensor:
    matrix = matrix.reshape(-1, *matrix.shape[-2:])[0]
    return matrix.t() if transposed else matrix


def _backwards(node: Node, past: set[Node] | None = None) -> Iterator[tuple[Node, torch.Tensor]]:
    """Tensor nodes that ``node`` is computed from, nearest first; not past those that the caller adds to ``past``."""
    seen, todo = {node}, [node]
    for n in todo:
        if past is not None and n in past:
            continue
        for i in n.all_input_nodes:
            fake = i.meta.get("val")
            if i not in seen and isinstance(fake, torch.Tensor):
                seen.add(i)
                todo.append(i)
                yield i, fake


def _integer_cuts(node: Node, numel: int) -> Iterator[Node]:
    """Full-size integer tensors on the way back from ``node``; not past the first on each path."""
    past: set[Node] = set()
    for n, fake in _backwards(node, past):
        if fake.numel() == numel and (fake.dtype in _INTEGERS or _rounds(n)):
            past.add(n)
            yield n


def _rounds(n: Node) -> bool:
    return n.op == "call_function" and n.target in (aten.round.default, aten.floor.default)


def _holds_codes(node: Node) -> bool:
    """True where integers large enough to hold a weight's codes (at 2 bits each) flow into ``node``."""
    fake = node.meta["val"]
    if fake.dtype in _INTEGERS:
        return True
    least = fake.numel() if isinstance(fake.numel(), int) else 0
    return any((t.dtype in _INTEGERS and t.numel() * 16 >= least) or _rounds(n) for n, t in _backwards(node))


def _probe(values: StaticValues, node: Node, cut: Node, actual: torch.Tensor, transposed: bool) -> _Line | None:
    """The line through the values at codes 0, 1 and 2, if it explains every element of the actual value."""
    shape, dtype = cut.meta["val"].shape, cut.meta["val"].dtype
    dtype = torch.float64 if dtype.is_floating_point else dtype
    at = []
    for code in (0, 1, 2):
        try:
            at.append(_as_kn(values.widened(node, {cut: torch.full(shape, code, dtype=dtype)}), transposed))
        except (RuntimeError, IndexError):
            return None
    slope, intercept = at[1] - at[0], at[0]
    steepest = slope.abs().max()
    if not bool(torch.isfinite(at[2]).all()) or steepest == 0:
        return None
    if (at[2] - intercept - 2 * slope).abs().max() > 1e-9 * steepest:
        return None
    flat = slope == 0
    codes = torch.where(flat, 0.0, (actual - intercept) / torch.where(flat, 1.0, slope))
    whole = codes.round()
    if (codes - whole).abs().max() > _TOLERANCE or bool((actual != intercept)[flat].any()):
        return None
    return _Line(whole, slope, intercept)


def _from_line(values: StaticValues, cut: Node, line: _Line) -> Weight | NotAffine:
    k, n = line.codes.shape
    flat = line.slope == 0
    zero = torch.where(flat, 0.0, -line.intercept / torch.where(flat, 1.0, line.slope))
    if bool((line.intercept != 0)[flat].any()):
        return NotAffine("a column has the scale 0 but not the value 0", quantized=True)
    group = _group_size(line.slope, zero)
    if group is None:
        return NotAffine(
            "its scale or zero point varies along K without regular groups",
            quantized=True,
            hint="the operators take a scale for each column of N, or for each group of rows of K",
        )
    scale, zero = (_per_group(t, group) for t in (line.slope, zero))
    codes, zero = _into_int8(line.codes, zero)
    if codes is None:
        return NotAffine("its codes span more than 8 bits", quantized=True)
    low, high = int(codes.min()), int(codes.max())
    stored, stored_transposed = _stored_codes(values, cut, codes)
    zero_point = None if bool((zero == 0).all()) else Const(zero)
    if zero_point is not None and scale.shape != zero.shape:
        scale = scale.expand_as(zero)
    return Weight(
        stored, stored_transposed, k, n, Const(scale), zero_point, 0 if group == k else group, low, high, True
    )


def _group_size(*parameters: torch.Tensor) -> int | None:
    """The largest group of rows within which nothing changes; None where every row would be its own group."""
    k = parameters[0].shape[0]
    group = k
    for p in parameters:
        changes = ((p[1:] - p[:-1]).abs() > 1e-9 * p.abs().max()).any(dim=1).nonzero().flatten() + 1
        for change in changes.tolist():
            group = math.gcd(group, change)
    return group if group > 1 or k == 1 else None


def _per_group(parameter: torch.Tensor, group: int) -> torch.Tensor:
    """``(K, N)`` to ``(K / group, N)``, to ``(N,)`` where there is one group, to ``(1,)`` where all are equal."""
    rows = parameter[::group]
    if rows.shape[0] > 1:
        return rows.contiguous()
    row = rows[0]
    if bool(((row - row[0]).abs() <= 1e-12 * row.abs().max()).all()):
        return row[:1].clone()
    return row.contiguous()


def _into_int8(codes: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Shift codes and zero point together so that the codes fit int8."""
    low, high = float(codes.min()), float(codes.max())
    if low >= -128 and high <= 127:
        return codes.to(torch.int8), zero
    if low >= 0 and high <= 255:
        return (codes - 128).to(torch.int8), zero - 128
    return None, zero


def _stored_codes(values: StaticValues, cut: Node, codes: torch.Tensor) -> tuple[Expr, bool]:
    """The graph's own int8 tensor where it holds exactly these codes, else a new one stored ``(N, K)``."""
    leaf = cut
    while leaf.op == "call_function" and len(leaf.all_input_nodes) == 1:
        leaf = leaf.all_input_nodes[0]
    fake = leaf.meta.get("val")
    if leaf.op != "call_function" and isinstance(fake, torch.Tensor) and fake.dtype == torch.int8 and fake.dim() == 2:
        value = values.value(leaf)
        if value.shape == codes.t().shape and torch.equal(value, codes.t()):
            return Const(value, leaf, leaf.name), True
        if value.shape == codes.shape and torch.equal(value, codes):
            return Const(value, leaf, leaf.name), False
    return Const(codes.t().contiguous(), label=leaf.name), True


# -- proof ---------------------------------------------------------------------------------------------------------


def _is_proved(values: StaticValues, node: Node, transposed: bool, weight: Weight) -> bool:
    """True where the graph's value, computed in float64, equals ``scale * (codes - zero_point)``."""
    codes, scale, zero = (_evaluated(values, e) for e in (weight.codes, weight.scale, weight.zero_point))
    if codes is None or scale is None or (zero is None) != (weight.zero_point is None):
        return False
    claimed = (codes.t() if weight.transposed else codes).double()
    if zero is not None:
        claimed = claimed - zero
    claimed = claimed * scale
    actual = _as_kn(values.widened(node).double(), transposed)
    if claimed.shape != actual.shape or not bool(torch.isfinite(actual).all()):
        return False
    return bool(((actual - claimed).abs() <= _TOLERANCE * scale.abs()).all())


def _evaluated(values: StaticValues, e: Expr | None) -> torch.Tensor | None:
    if isinstance(e, Const):
        return e.tensor
    if isinstance(e, Ref) and values.is_static(e.node):
        value: torch.Tensor = values.value(e.node)
        return value
    if isinstance(e, Recentred):
        return _evaluated(values, e.otherwise)
    if isinstance(e, Call):
        arguments = [_evaluated(values, a) if isinstance(a, Expr) else a for a in e.args]
        if any(a is None and isinstance(o, Expr) for a, o in zip(arguments, e.args, strict=True)):
            return None
        result: torch.Tensor = e.target(*arguments, **e.kwargs)
        return result
    return None


def _known_span(weight: Weight) -> tuple[int, int]:
    if isinstance(weight.codes, Const):
        return int(weight.codes.tensor.min()), int(weight.codes.tensor.max())
    return weight.low, weight.high
