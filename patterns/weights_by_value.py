"""Reading a static operand by value: what an arbitrary subgraph of unpacks, shifts, views and products *does*.

Find where the graph goes from integers to floats, evaluate what follows with those integers set to 0, 1 and 2, and take
the line through the three. The line has to explain every element of the operand's actual value: that is the proof.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from quantpass.graph.expr import Const
from quantpass.graph.instructions import Round
from quantpass.graph.records import Weight
from quantpass.graph.row_rules import NotByRows, RowRules
from quantpass.graph.static_values import StaticValues
from quantpass.patterns.affine import NotAffine
from quantpass.patterns.code_lines import (
    Line,
    act_order,
    group_size,
    line_through,
    nonlinear,
    per_group,
    source_of,
    symmetric,
)
from quantpass.patterns.folded import looks_dequantized
from quantpass.patterns.operands import Operand, OperandBlocks
from quantpass.patterns.proof import FLOAT32, FLOAT64, is_rebuilt
from quantpass.patterns.weights_by_structure import read_by_structure
from quantpass.patterns.weights_in_blocks import read_in_blocks

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_SAME = (FLOAT64, FLOAT32)
"""What two scales may differ by and still be one, the strictest first."""


def weight_by_value(values: StaticValues, operand: Operand, rules: RowRules | None = None) -> Weight | NotAffine:
    """Read a static operand by evaluating it: in blocks where it is large, and its operators keep rows apart.

    Args:
        values: the graph's static values.
        operand: what to read.
        rules: what tools' operators do to rows.
    """
    node = operand.node
    if not _holds_codes(values, node):
        if looks_dequantized(operand.kn(values.value(node))):
            return NotAffine(
                "its values are floats on a grid of at most 256 steps: it was dequantized before the pass",
                quantized=True,
                rule="read.weight.folded",
            )
        return NotAffine("it is a plain floating-point weight")
    found = _in_blocks(values, operand, rules) if operand.is_structured else None
    return found or _whole(values, operand)


def _in_blocks(values: StaticValues, operand: Operand, rules: RowRules | None) -> Weight | NotAffine | None:
    """As :func:`_whole` would read it; None where it has to."""
    node = operand.node
    if not node.meta["val"].dtype.is_floating_point:
        return None
    problem, size = nonlinear(), node.meta["val"].shape
    shape = (size[1], size[0]) if operand.transposed else (size[0], size[1])
    blocks = None
    for same in _SAME:
        for cuts in integer_cuts(values, node, node.meta["val"].numel()):
            try:
                blocks = OperandBlocks(values, operand, rules, cuts)
            except NotByRows:
                return None
            told = read_by_structure(values, blocks, cuts, shape, same)
            if told is not None:
                return told
            if not operand.is_large:
                return None
            found = read_in_blocks(values, blocks, cuts, shape, same)
            if not isinstance(found, NotAffine):
                return found
            problem = found
    finite = blocks is not None and all(bool(torch.isfinite(blocks.value(columns)).all()) for columns in blocks)
    return problem if finite else None


def _whole(values: StaticValues, operand: Operand) -> Weight | NotAffine:
    node = operand.node
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
        plain = Line(actual, torch.ones_like(actual), torch.zeros_like(actual))
        return _from_line(values, [node], plain, actual, FLOAT64)
    problem = nonlinear()
    for same in _SAME:
        for cuts in integer_cuts(values, node, full.numel()):
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


def integer_cuts(values: StaticValues, node: Node, numel: int) -> Iterator[list[Node]]:
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


def _probe(values: StaticValues, operand: Operand, cuts: list[Node], actual: torch.Tensor, same: float) -> Line | None:
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
    return line_through(at, actual, same)


def _filled(cut: Node, code: int) -> torch.Tensor:
    fake = cut.meta["val"]
    return torch.full(fake.shape, code, dtype=torch.float64 if fake.dtype.is_floating_point else fake.dtype)


# -- from a line to a weight ---------------------------------------------------------------------------------------


def _from_line(
    values: StaticValues, cuts: list[Node], line: Line, actual: torch.Tensor, same: float
) -> Weight | NotAffine:
    """The weight that the operators take, put together again and compared with the operand: the last step."""
    k, n = line.codes.shape
    line = symmetric(line)
    flat = line.slope == 0
    zero = torch.where(flat, 0.0, -line.intercept / torch.where(flat, 1.0, line.slope))
    if bool((line.intercept != 0)[flat].any()):
        return NotAffine("a column has the scale 0 but not the value 0", quantized=True)
    codes, slope = line.codes, line.slope
    order = k_scale = None
    group = group_size(slope, zero, same)
    if group is None:
        order, group = act_order(slope, zero)
        if order is not None:
            codes, slope, zero = codes[order], slope[order], zero[order]
    if group is None:
        k_scale, slope = _split_off_k(slope)
        group = group_size(slope, zero, same) if k_scale is not None else None
    if group is None:
        return _varies_along_k()
    scale, zero = (per_group(t, group) for t in (slope, zero))
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


def _varies_along_k() -> NotAffine:
    return NotAffine(
        "its scale or zero point varies along K without regular groups",
        quantized=True,
        rule="read.weight.along_k",
    )


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
    blocks = codes.unflatten(0, (-1, group))
    # One code more or less does not fit int8.
    wider = torch.int16 if codes.dtype == torch.int8 else codes.dtype
    low, high = (bound.to(wider) for bound in (blocks.amin(dim=1), blocks.amax(dim=1)))
    if bool((high - low >= 2**bits).any()):
        return None
    shift = low + 2 ** (bits - 1)
    moved = torch.empty_like(codes, dtype=torch.int8)
    for own, block, less in zip(moved.unflatten(0, (-1, group)), blocks, shift, strict=True):
        own.copy_(block - less)
    return moved, (zero - shift).reshape(-1, n) if k // group > 1 else (zero - shift).reshape(n)


def _stored_codes(values: StaticValues, cuts: list[Node], codes: torch.Tensor) -> tuple[Const, bool]:
    """The graph's own int8 tensor where it holds exactly these codes, else a new one stored ``(N, K)``."""
    leaf = source_of(cuts)
    fake = leaf.meta.get("val")
    if leaf.op != "call_function" and isinstance(fake, torch.Tensor) and fake.dtype == torch.int8 and fake.dim() == 2:
        value = values.value(leaf)
        if value.shape == codes.t().shape and torch.equal(value, codes.t()):
            return Const(value, leaf, leaf.name), True
        if value.shape == codes.shape and torch.equal(value, codes):
            return Const(value, leaf, leaf.name), False
    return Const(codes.t().contiguous(), label=leaf.name), True
