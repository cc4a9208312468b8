"""Reading a static operand by value: what an arbitrary subgraph of unpacks, shifts, views and products *does*.

Find where the graph goes from integers to floats, evaluate what follows with those integers set to 0, 1 and 2, and take
the line through the three. The line has to explain every element of the operand's actual value: that is the proof.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from quantpass.graph.expr import Const
from quantpass.graph.instructions import Round
from quantpass.graph.records import Weight
from quantpass.graph.static_values import StaticValues
from quantpass.patterns.affine import NotAffine
from quantpass.patterns.folded import looks_dequantized
from quantpass.patterns.proof import FLOAT32, FLOAT64, TOLERANCE, is_rebuilt, rows_at_a_time

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_SAME = (FLOAT64, FLOAT32)
"""What two scales may differ by and still be one, the strictest first."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A right operand and how it lies: ``(..., N, K)`` where ``transposed``; seen as ``matrix`` where that is given."""

    node: Node
    transposed: bool
    matrix: tuple[int, int] | None = None

    def kn(self, value: torch.Tensor) -> torch.Tensor:
        """The operand's value as ``(K, N)``; the first of equal matrices."""
        value = value.reshape(self.matrix) if self.matrix else value.reshape(-1, *value.shape[-2:])[0]
        return value.t() if self.transposed else value


@dataclass(frozen=True, slots=True)
class _Line:
    """``value = slope * codes + intercept``, elementwise, all ``(K, N)`` in float64."""

    codes: torch.Tensor
    slope: torch.Tensor
    intercept: torch.Tensor


def weight_by_value(values: StaticValues, operand: Operand) -> Weight | NotAffine:
    """Read a static operand by evaluating it."""
    node = operand.node
    if not _holds_codes(values, node):
        if looks_dequantized(operand.kn(values.value(node))):
            return NotAffine(
                "its values are floats on a grid of at most 256 steps: it was dequantized before the pass",
                quantized=True,
                rule="read.weight.folded",
            )
        return NotAffine("it is a plain floating-point weight")
    full = values.widened(node)
    if full.dim() > 2 and operand.matrix is None:
        matrices = full.reshape(-1, *full.shape[-2:])
        if not bool((matrices == matrices[:1]).all()):
            return NotAffine(
                f"a weight of rank {full.dim()} whose matrices differ",
                quantized=True,
                rule="read.weight.batched",
            )
    actual = operand.kn(full)
    if not actual.numel() or not bool(torch.isfinite(actual).all()):
        return NotAffine("it is empty or holds values that are not finite", quantized=True)
    if not node.meta["val"].dtype.is_floating_point:
        plain = _Line(actual, torch.ones_like(actual), torch.zeros_like(actual))
        return _from_line(values, [node], plain, actual, FLOAT64)
    problem = NotAffine("its value is not a linear function of its codes", quantized=True, rule="read.weight.nonlinear")
    for same in _SAME:
        for cuts in _integer_cuts(values, node, full.numel()):
            line = _probe(values, operand, cuts, actual, same)
            found = problem if line is None else _from_line(values, cuts, line, actual, same)
            if isinstance(found, Weight):
                return found
            problem = found
    return problem


# -- where integers become floats ----------------------------------------------------------------------------------


def _backwards(node: Node, past: set[Node] | None = None) -> Iterator[tuple[Node, torch.Tensor]]:
    """Tensor nodes that ``node`` is computed from, nearest first; not past those that the caller adds to ``past``."""
    seen, todo = {node}, [node]
    for n in todo:
        if past is not None and n in past:
            continue
        for i in n.all_input_nodes:
            if i in seen:
                continue
            seen.add(i)
            todo.append(i)
            fake = i.meta.get("val")
            if isinstance(fake, torch.Tensor):
                yield i, fake


def _integer_cuts(values: StaticValues, node: Node, numel: int) -> Iterator[list[Node]]:
    """Sets of integer tensors to probe: each of full size by itself, then all that are large enough, together.

    Several together are the parts of a weight that is put together from pieces (concatenated, sliced, unpacked into a
    float buffer).
    """
    past: set[Node] = set()
    for n, fake in _backwards(node, past):
        if fake.numel() == numel and _is_whole(values, n, fake):
            past.add(n)
            yield [n]
    done = [{n} for n in past]
    for n, fake in _backwards(node):
        if fake.dtype == torch.bool and fake.numel() == numel:
            yield [n]
    past.clear()
    for n, fake in _backwards(node, past):
        if fake.numel() * 16 >= numel and _is_whole(values, n, fake):
            past.add(n)
    if past and past not in done:
        yield sorted(past)


def _is_whole(values: StaticValues, n: Node, fake: torch.Tensor) -> bool:
    return fake.dtype in _INTEGERS or isinstance(values.decode(n), Round)


def _holds_codes(values: StaticValues, node: Node) -> bool:
    """True where integers large enough to hold a weight's codes (at 2 bits each) flow into ``node``."""
    fake = node.meta["val"]
    if fake.dtype in _INTEGERS:
        return True
    least = fake.numel() if isinstance(fake.numel(), int) else 0
    whole = (*_INTEGERS, torch.bool)
    return any(
        (t.dtype in whole and t.numel() * 16 >= least) or isinstance(values.decode(n), Round)
        for n, t in _backwards(node)
    )


def _probe(values: StaticValues, operand: Operand, cuts: list[Node], actual: torch.Tensor, same: float) -> _Line | None:
    """The line through the values at codes 0, 1 and 2, if it explains every element of the actual value."""
    at, two_levels = [], any(cut.meta["val"].dtype == torch.bool for cut in cuts)
    for code in (0, 1) if two_levels else (0, 1, 2):
        replaced = {cut: _filled(cut, code) for cut in cuts}
        try:
            at.append(operand.kn(values.widened(operand.node, replaced)))
        except (RuntimeError, IndexError):
            return None
    if two_levels:
        at.append(2 * at[1] - at[0])
    intercept = at[0]
    slope, codes = torch.empty_like(actual), torch.empty_like(actual)
    for rows in rows_at_a_time(*actual.shape):
        start, step = intercept[rows], at[1][rows] - intercept[rows]
        flat = step == 0
        straight = (at[2][rows] - start - 2 * step).abs() <= same * (step.abs() + start.abs())
        exact = torch.where(flat, 0.0, (actual[rows] - start) / torch.where(flat, 1.0, step))
        whole = exact.round()
        near = ((exact - whole).abs() <= TOLERANCE) & (~flat | (actual[rows] == start))
        if not bool((straight & near).all()):
            return None
        slope[rows], codes[rows] = step, whole
    return None if not bool(slope.any()) else _Line(codes, slope, intercept)


def _filled(cut: Node, code: int) -> torch.Tensor:
    fake = cut.meta["val"]
    return torch.full(fake.shape, code, dtype=torch.float64 if fake.dtype.is_floating_point else fake.dtype)


# -- from a line to a weight ---------------------------------------------------------------------------------------


def _from_line(
    values: StaticValues, cuts: list[Node], line: _Line, actual: torch.Tensor, same: float
) -> Weight | NotAffine:
    """The weight that the operators take, put together again and compared with the operand: the last step."""
    k, n = line.codes.shape
    line = _symmetric(line)
    flat = line.slope == 0
    zero = torch.where(flat, 0.0, -line.intercept / torch.where(flat, 1.0, line.slope))
    if bool((line.intercept != 0)[flat].any()):
        return NotAffine("a column has the scale 0 but not the value 0", quantized=True)
    codes, slope = line.codes, line.slope
    order = k_scale = None
    group = _group_size(slope, zero, same)
    if group is None:
        order, group = _act_order(slope, zero)
        if order is not None:
            codes, slope, zero = codes[order], slope[order], zero[order]
    if group is None:
        k_scale, slope = _split_off_k(slope)
        group = _group_size(slope, zero, same) if k_scale is not None else None
    if group is None:
        return _varies_along_k()
    scale, zero = (_per_group(t, group) for t in (slope, zero))
    shifted = _into_int8(codes, zero, group)
    if shifted is None:
        return NotAffine("its codes span more than 8 bits", quantized=True, rule="read.weight.bits")
    codes, zero = shifted
    low, high = int(codes.min()), int(codes.max())
    stored, stored_transposed = _stored_codes(values, cuts, codes)
    zero_point = None if bool((zero == 0).all()) else Const(zero)
    if zero_point is not None and scale.shape != zero.shape:
        scale, zero = (t.contiguous() for t in torch.broadcast_tensors(scale, zero))
        zero_point = Const(zero)
    weight = Weight(
        stored, stored_transposed, k, n, Const(scale), zero_point, 0 if group == k else group, low, high, True,
        k_order=order, k_scale=k_scale,
    )  # fmt: skip
    offsets = None if zero_point is None else zero_point.tensor
    proved = is_rebuilt(weight, stored.tensor, scale, offsets, actual, same=same, slope=line.slope)
    return weight if proved else _varies_along_k()


def _symmetric(line: _Line) -> _Line:
    """Binary weights ``-s, s`` with the codes -1 and 1: as 0 and 1 they would need the zero point one half."""
    binary = bool((2 * line.intercept[:1] == -line.slope[:1]).all()) and bool((2 * line.intercept == -line.slope).all())
    binary = binary and bool(((line.codes == 0) | (line.codes == 1)).all())
    return _Line(2 * line.codes - 1, line.slope / 2, torch.zeros_like(line.slope)) if binary else line


def _varies_along_k() -> NotAffine:
    return NotAffine(
        "its scale or zero point varies along K without regular groups",
        quantized=True,
        rule="read.weight.along_k",
    )


def _group_size(slope: torch.Tensor, zero: torch.Tensor, same: float) -> int | None:
    """The largest group of rows within which nothing changes; None where every row would be its own group."""
    k, n = slope.shape
    changed = torch.zeros(k, dtype=torch.bool)
    for rows in rows_at_a_time(k - 1, n):
        after = slice(rows.start + 1, rows.stop + 1)
        offsets = torch.maximum(zero[after].abs(), zero[rows].abs()) + 1
        steps = torch.maximum(slope[after].abs(), slope[rows].abs())
        # A step is the difference of two values that hold the offset as well.
        kept = (slope[after] - slope[rows]).abs() <= same * steps * offsets
        kept &= (zero[after] - zero[rows]).abs() <= same * offsets
        changed[rows] = ~kept.all(dim=1)
    group = math.gcd(k, *(changed.nonzero().flatten() + 1).tolist())
    return group if group > 1 or k == 1 else None


def _act_order(slope: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor | None, int | None]:
    """The order of rows that makes groups regular, and their size: quantization in order of activation size."""
    k = slope.shape[0]
    rows = torch.cat([slope, zero], dim=1)
    _, which, counts = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)
    group = math.gcd(*counts.tolist())
    if group <= 1 or group == k:
        return None, None
    # Groups in the order of their first rows, so that the order stays as close to the graph's as it can.
    first = torch.full((len(counts),), k, dtype=torch.int64).scatter_reduce(0, which, torch.arange(k), "amin")
    return torch.argsort(first[which], stable=True), group


def _split_off_k(slope: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """``slope[k, n] = of_k[k] * of_n[n]``: the part along K, at most 1 in magnitude, and the rest; or None."""
    largest = slope.abs().amax(dim=1)
    pivot = int(largest.argmax())
    if not bool((largest > 0).all()):
        return None, slope
    column = int(slope[pivot].abs().argmax())
    of_k = slope[:, column] / slope[pivot, column]
    rest = slope[pivot].expand_as(slope)
    return of_k, rest


def _per_group(parameter: torch.Tensor, group: int) -> torch.Tensor:
    """``(K, N)`` to ``(K / group, N)``, to ``(N,)`` where there is one group, to ``(1,)`` where all are equal."""
    rows = parameter[::group]
    if rows.shape[0] > 1:
        return rows.contiguous()
    row = rows[0]
    if bool(((row - row[0]).abs() <= 1e-12 * row[0].abs()).all()):
        return row[:1].clone()
    return row.contiguous()


def _into_int8(codes: torch.Tensor, zero: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Shift codes and zero point together so that the codes fit int8; None where they are too many."""
    low, high = float(codes.min()), float(codes.max())
    if low >= -128 and high <= 127:
        return codes.to(torch.int8), zero
    if low >= 0 and high <= 255:
        return (codes - 128).to(torch.int8), zero - 128
    return shifted_by_group(codes, zero, group, bits=8)


def shifted_by_group(
    codes: torch.Tensor, zero: torch.Tensor, group: int, *, bits: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes ``(K, N)`` moved, group by group and column by column, to start at the least signed ``bits``-bit integer.

    Returns:
        int8 codes and the zero point that goes with them, ``(K / group, N)`` or ``(N,)``; None where a group spans
        more than ``bits`` bits or groups do not divide K.
    """
    k, n = codes.shape
    if k % group:
        return None
    blocks = codes.reshape(k // group, group, n)
    low, high = blocks.amin(dim=1), blocks.amax(dim=1)
    if bool((high - low >= 2**bits).any()):
        return None
    shift = low + 2 ** (bits - 1)
    moved = (blocks - shift[:, None]).reshape(k, n).to(torch.int8)
    return moved, (zero - shift).reshape(-1, n) if k // group > 1 else (zero - shift).reshape(n)


def _stored_codes(values: StaticValues, cuts: list[Node], codes: torch.Tensor) -> tuple[Const, bool]:
    """The graph's own int8 tensor where it holds exactly these codes, else a new one stored ``(N, K)``."""
    leaf = cuts[0]
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
