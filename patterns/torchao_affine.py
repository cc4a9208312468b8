"""``torchao``'s affine operators, where a graph keeps them whole.

Semantics: ``torchao/quantization/quant_primitives.py``: ``dequantize_affine = (codes - zero_point) * scale`` with one
scale for each block of ``block_size`` elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from quantpass.basics.symbolic import is_one, same_size
from quantpass.graph.grids import Grid, pointwise
from quantpass.graph.row_rules import Formula
from quantpass.graph.schema import op_name
from quantpass.graph.torch_internals import real_tensors
from quantpass.patterns.activations import Quantizer
from quantpass.patterns.affine import Affine, AffineReader, NotAffine
from quantpass.patterns.dialect import Dialect
from quantpass.patterns.magnitudes import ChosenScale
from quantpass.patterns.terms import Term


def dialect() -> Dialect:
    return Dialect(
        "torchao",
        dequantizers={"torchao::dequantize_affine": _dequantize_affine},
        quantizers={"torchao::quantize_affine": _quantize_affine},
        scales={"torchao::choose_qparams_affine": _choose_qparams_affine},
        rows={"torchao::dequantize_affine": _rows},
    )


def _dequantize_affine(
    reader: AffineReader,
    node: Node,
    *,
    input_: Any,
    block_size: Any,
    scale: Any,
    zero_point: Any,
    input_dtype: Any,
    quant_min: Any,
    quant_max: Any,
    output_dtype: Any,
) -> Affine | NotAffine:
    del input_dtype, quant_min, quant_max  # checked by the operator, not used in its arithmetic
    del output_dtype  # of the result: in meta["val"]
    shape = tuple(node.meta["val"].shape)
    aligned = _aligned(shape, block_size)
    if aligned is None:
        return NotAffine(f"{op_name(node)} with blocks {list(block_size)} of a value {shape}", quantized=True)
    value = reader.read(input_)
    for operand, combine in ((zero_point, Affine.minus), (scale, Affine.times)):
        if isinstance(value, NotAffine):
            return value
        if operand is None:
            continue
        value = combine(value, Term(reader.values.expr(operand), aligned))
    return value


def _rows(
    node: Node,
    dim: int,
    *,
    input_: Node,
    block_size: Any,
    scale: Node,
    zero_point: Any,
    input_dtype: Any,
    quant_min: Any,
    quant_max: Any,
    output_dtype: Any,
) -> Formula | None:
    """Rows stay apart where a block lies within one: the parameters then have a row for each."""
    del input_dtype, quant_min, quant_max, output_dtype
    shape = node.meta["val"].shape
    given = [p for p in (scale, zero_point) if p is not None]
    aligned = all(isinstance(p, Node) and _has_rows(p, shape, dim) for p in given)
    if not is_one(block_size[dim]) or not aligned:
        return None

    def compute(values: Mapping[Node, Grid]) -> Grid:
        codes = values[input_]
        whole, one_each = _blocks(codes.shape, block_size)
        found = pointwise(_rebuilt, [codes.reshaped(whole), *(values[p].reshaped(one_each) for p in given)])
        return found.reshaped(codes.shape)

    return Formula(dict.fromkeys((input_, *given), dim), compute, input_)


def _rebuilt(given: Sequence[torch.Tensor]) -> torch.Tensor:
    """``(codes - zero_point) * scale`` of codes, scale and maybe zero point; all are cast before."""
    codes, scale, *zero = (t.double() for t in given)
    return (codes - zero[0] if zero else codes) * scale


def _blocks(shape: Sequence[int], block_size: Sequence[int]) -> tuple[list[int], list[int]]:
    """``shape`` with blocks as dimensions of their own, and the same of their parameters."""
    pairs = [(size, 1) if block == 1 else (size // block, block) for size, block in zip(shape, block_size, strict=True)]
    return [size for pair in pairs for size in pair], [size for count, _ in pairs for size in (count, 1)]


def _has_rows(parameter: Node, shape: Any, dim: int) -> bool:
    fake = parameter.meta["val"]
    return fake.dim() == len(shape) and same_size(fake.shape[dim], shape[dim])


def _quantize_affine(
    *,
    input_: Any,
    block_size: Any,
    scale: Any,
    zero_point: Any,
    output_dtype: torch.dtype,
    quant_min: Any,
    quant_max: Any,
) -> Quantizer | None:
    bounds = _bounds(output_dtype, quant_min, quant_max)
    if bounds is None or _granularity(input_, block_size) is None or not isinstance(scale, Node):
        return None
    if isinstance(zero_point, Node) and same_size(zero_point.meta["val"].numel(), 0):
        zero_point = None  # the operator takes no elements for none
    dtype = torch.promote_types(input_.meta["val"].dtype, scale.meta["val"].dtype)
    return Quantizer(input_, scale, zero_point, *bounds, dtype)


def _choose_qparams_affine(
    *,
    input_: Any,
    mapping_type: str,
    block_size: Any,
    target_dtype: torch.dtype,
    quant_min: Any,
    quant_max: Any,
    eps: Any,
    scale_dtype: Any,
    zero_point_dtype: Any,
    keepdim: bool = False,  # since torchao 0.15
) -> ChosenScale | None:
    del zero_point_dtype, keepdim  # of the results: in meta["val"]
    if mapping_type != "SYMMETRIC" or not isinstance(input_, Node):
        return None
    bounds, whole = _bounds(target_dtype, quant_min, quant_max), _granularity(input_, block_size)
    if bounds is None or whole is None:
        return None
    low, high = bounds
    own = input_.meta["val"].dtype
    floor = _least_scale(own) if eps is None else eps
    divisor = (high - low) / 2
    narrower = own if scale_dtype is None or torch.promote_types(own, scale_dtype) == scale_dtype else scale_dtype
    return ChosenScale(input_, whole, divisor, floor * divisor, int((high + low + 1) / 2), narrower)


def _least_scale(dtype: torch.dtype) -> float:
    """What the operator takes for ``eps=None``: the dtype's ``eps``, and since torchao 0.18 its ``smallest_normal``."""
    with real_tensors():
        nothing = torch.zeros(1, dtype=dtype, device="cpu")
        scale, _ = torch.ops.torchao.choose_qparams_affine.default(nothing, "SYMMETRIC", [1], torch.int8)
    return float(scale)


def _bounds(dtype: torch.dtype, low: Any, high: Any) -> tuple[int, int] | None:
    """The operator's bounds: those of the dtype where none are given."""
    if dtype not in (torch.int8, torch.uint8):
        return None
    info = torch.iinfo(dtype)
    low, high = info.min if low is None else low, info.max if high is None else high
    return (int(low), int(high)) if info.min <= low < high <= info.max else None


def _granularity(x: Any, block_size: Any) -> bool | None:
    """True for one block, False for one of each row, None for others."""
    *leading, last = zip(x.meta["val"].shape, block_size, strict=True)
    if not same_size(*last):
        return None
    if all(same_size(size, block) for size, block in leading):
        return not all(is_one(size) for size, _ in leading)
    return False if all(is_one(block) for _, block in leading) else None


def _aligned(shape: tuple[Any, ...], block_size: Any) -> tuple[Any, ...] | None:
    """What dimensions the parameters vary along; None where blocks are neither single elements nor whole dimensions."""
    aligned: list[Any] = []
    for size, block in zip(shape, block_size, strict=True):
        if same_size(size, block):
            aligned.append(1)
        elif is_one(block):
            aligned.append(size)
        else:
            return None
    return tuple(aligned)
