"""The ``quantized_decomposed`` operators, which PT2E and FX quantization emit.

Semantics: ``torch/ao/quantization/fx/_decomposed.py`` of PyTorch: ``quantize = clamp(round(x * (1 / scale)) +
zero_point, quant_min, quant_max)`` and ``dequantize = (codes - zero_point) * scale``.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from quantpass.graph.expr import Call, Recentred
from quantpass.graph.grids import Grid, pointwise
from quantpass.graph.row_rules import Formula, of_elements
from quantpass.patterns.activations import Quantizer
from quantpass.patterns.affine import Affine, AffineReader, NotAffine
from quantpass.patterns.dialect import Dialect
from quantpass.patterns.epilogues import Step
from quantpass.patterns.integers import Bounds, IntegerReader
from quantpass.patterns.magnitudes import ChosenScale


def dialect() -> Dialect:
    return Dialect(
        "quantized_decomposed",
        dequantizers={
            "quantized_decomposed::dequantize_per_tensor": _dequantize_per_tensor,
            "quantized_decomposed::dequantize_per_tensor.tensor": _dequantize_per_tensor,
            "quantized_decomposed::dequantize_per_tensor.tensor2": _dequantize_per_tensor,
            "quantized_decomposed::dequantize_per_channel": _dequantize_per_channel,
            "quantized_decomposed::dequantize_per_token": _dequantize_per_token,
        },
        integers={
            "quantized_decomposed::choose_qparams.tensor": _chosen_zero_point,
            "quantized_decomposed::choose_qparams_symmetric.tensor": _chosen_zero_point,
        },
        # Bounds and zero point moved by 128 give int8 codes.
        recentre={"quantized_decomposed::quantize_per_tensor": _recentred},
        steps={
            "quantized_decomposed::quantize_per_tensor": _quantize_per_tensor,
            "quantized_decomposed::quantize_per_tensor.tensor": _quantize_per_tensor,
        },
        quantizers={
            "quantized_decomposed::quantize_per_tensor": _quantizer,
            "quantized_decomposed::quantize_per_tensor.tensor": _quantizer,
            "quantized_decomposed::quantize_per_token": _quantizer_of_rows,
        },
        scales={
            "quantized_decomposed::choose_qparams_symmetric.tensor": _chosen_for_all,
            "quantized_decomposed::choose_qparams_per_token": _chosen_for_rows,
        },
        rows={
            "quantized_decomposed::dequantize_per_tensor": _rows_per_tensor,
            "quantized_decomposed::dequantize_per_tensor.tensor": _rows_per_tensor,
            "quantized_decomposed::dequantize_per_tensor.tensor2": _rows_per_tensor,
            "quantized_decomposed::dequantize_per_channel": _rows_per_channel,
            "quantized_decomposed::dequantize_per_token": _rows_per_token,
            "quantized_decomposed::dequantize_per_channel_group": _rows_per_group,
        },
    )


def _chosen_zero_point(
    reader: IntegerReader, node: Node, *, input_: Any, quant_min: Any, quant_max: Any, eps: Any, dtype: torch.dtype
) -> Bounds | None:
    """The second result, whatever the input holds: clamped to the codes' range, or 0, or 128 (symmetric uint8)."""
    del reader, input_, eps, dtype
    taken = node.args[1] if node.target is operator.getitem else None
    if taken != 1 or not isinstance(quant_min, int) or not isinstance(quant_max, int):
        return None
    return Bounds(min(quant_min, 0), max(quant_max, 128), whole=True)


def _recentred(
    node: Node, *, input_: Any, scale: Any, zero_point: Any, quant_min: Any, quant_max: Any, dtype: torch.dtype
) -> Recentred | None:
    if dtype != torch.uint8 or not all(isinstance(v, int) for v in (zero_point, quant_min, quant_max)):
        return None
    arguments = (input_, scale, zero_point - 128, quant_min - 128, quant_max - 128, torch.int8)
    return Recentred(node, Call(node.target, arguments, {}, torch.int8, tuple(node.meta["val"].shape)))


def _dequantize_per_tensor(
    reader: AffineReader,
    node: Node,
    *,
    input_: Any,
    scale: Any,
    zero_point: Any,
    quant_min: Any,
    quant_max: Any,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> Affine | NotAffine:
    del quant_min, quant_max, dtype  # checked by the operator, not used in its arithmetic
    del out_dtype  # of the result: in meta["val"]
    return reader.dequantized(node, input_, scale, zero_point, axis=None)


def _dequantize_per_channel(
    reader: AffineReader,
    node: Node,
    *,
    input_: Any,
    scales: Any,
    zero_points: Any,
    axis: int,
    quant_min: Any,
    quant_max: Any,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> Affine | NotAffine:
    del quant_min, quant_max, dtype, out_dtype
    return reader.dequantized(node, input_, scales, zero_points, axis=axis)


def _dequantize_per_token(
    reader: AffineReader,
    node: Node,
    *,
    input_: Any,
    scales: Any,
    zero_points: Any,
    quant_min: Any,
    quant_max: Any,
    dtype: torch.dtype,
    output_dtype: torch.dtype,
) -> Affine | NotAffine:
    del quant_min, quant_max, dtype, output_dtype
    value = reader.read(input_)
    shape = tuple(node.meta["val"].shape)
    for operand, combine in ((zero_points, Affine.minus), (scales, Affine.times)):
        term = reader.vector(operand, shape, rows=True)
        if isinstance(value, NotAffine) or term is None:
            return value if isinstance(value, NotAffine) else NotAffine("per-token scales of another shape", True)
        value = combine(value, term)
    return value


def _quantize_per_tensor(
    reader: AffineReader,
    value: Node,
    node: Node,
    *,
    input_: Any,
    scale: Any,
    zero_point: Any,
    quant_min: Any,
    quant_max: Any,
    dtype: torch.dtype,
) -> Step | None:
    shape = tuple(value.meta["val"].shape)
    term = reader.term(scale, shape)
    zero = reader.values.uniform(zero_point)
    if input_ is not value or term is None or term.kind != "scalar" or term.constant is None or zero is None:
        return None
    if dtype not in (torch.int8, torch.uint8) or not all(isinstance(q, int) for q in (quant_min, quant_max)):
        return None
    return Step("quantize", node, term=term, zero_point=int(zero), bounds=(quant_min, quant_max))


def _quantizer(
    *, input_: Any, scale: Any, zero_point: Any, quant_min: Any, quant_max: Any, dtype: torch.dtype
) -> Quantizer | None:
    if dtype not in (torch.int8, torch.uint8) or not isinstance(quant_min, int) or not isinstance(quant_max, int):
        return None
    return Quantizer(input_, scale, zero_point, quant_min, quant_max, torch.float32)


def _quantizer_of_rows(
    *, input_: Any, scales: Any, zero_points: Any, quant_min: Any, quant_max: Any, dtype: torch.dtype
) -> Quantizer | None:
    computed = input_.meta["val"].dtype  # where the scales are wider, it computes better than that
    quantizer = _quantizer(
        input_=input_, scale=scales, zero_point=zero_points, quant_min=quant_min, quant_max=quant_max, dtype=dtype
    )
    return None if quantizer is None else replace(quantizer, dtype=computed)


def _chosen_for_all(*, input_: Any, quant_min: Any, quant_max: Any, eps: Any, dtype: torch.dtype) -> ChosenScale | None:
    if not isinstance(quant_min, int) or not isinstance(quant_max, int) or not isinstance(eps, int | float):
        return None
    divisor, zero_point = (quant_max - quant_min) / 2, 128 if dtype == torch.uint8 else 0
    return ChosenScale(input_, True, divisor, eps * divisor, zero_point, input_.meta["val"].dtype)


def _chosen_for_rows(*, input_: Any, dtype: torch.dtype) -> ChosenScale | None:
    return ChosenScale(input_, False, 127.0, 1e-5, 0, input_.meta["val"].dtype) if dtype == torch.int8 else None


# -- by rows -----------------------------------------------------------------------------------------------------------


def _rows_per_tensor(
    node: Node,
    dim: int,
    *,
    input_: Node,
    scale: Any,
    zero_point: Any,
    quant_min: Any,
    quant_max: Any,
    dtype: Any,
    out_dtype: Any,
) -> Formula | None:
    del node, quant_min, quant_max, dtype, out_dtype
    given = [p for p in (scale, zero_point) if isinstance(p, Node)]
    if any(p.meta["val"].numel() != 1 for p in given):
        return None

    def compute(values: Mapping[Node, Grid]) -> Grid:
        scale_, zero_ = (
            values[p].dense().double().reshape(()) if isinstance(p, Node) else p for p in (scale, zero_point)
        )
        return pointwise(lambda t: (t[0].double() - zero_) * scale_, [values[input_]])

    return Formula({input_: dim, **dict.fromkeys(given)}, compute, input_)


def _rows_per_channel(
    node: Node,
    dim: int,
    *,
    input_: Node,
    scales: Node,
    zero_points: Any,
    axis: int,
    quant_min: Any,
    quant_max: Any,
    dtype: Any,
    out_dtype: Any,
) -> Formula | None:
    del quant_min, quant_max, dtype, out_dtype
    rank = node.meta["val"].dim()
    given = [p for p in (scales, zero_points) if isinstance(p, Node)]
    if any(p.meta["val"].dim() != 1 for p in given):
        return None

    def compute(values: Mapping[Node, Grid]) -> Grid:
        shape = [values[scales].shape[0] if d == axis % rank else 1 for d in range(rank)]
        return pointwise(_rebuilt, [values[input_], *(values[p].reshaped(shape) for p in given)])

    return Formula({input_: dim, **dict.fromkeys(given, 0 if dim == axis % rank else None)}, compute, input_)


def _rows_per_token(
    node: Node,
    dim: int,
    *,
    input_: Node,
    scales: Node,
    zero_points: Node,
    quant_min: Any,
    quant_max: Any,
    dtype: Any,
    output_dtype: Any,
) -> Formula:
    del quant_min, quant_max, dtype, output_dtype

    def compute(values: Mapping[Node, Grid]) -> Grid:
        return pointwise(_rebuilt, [values[i] for i in (input_, scales, zero_points)])

    return Formula(of_elements(node, dim), compute, input_)


def _rows_per_group(
    node: Node,
    dim: int,
    *,
    input_: Node,
    scales: Node,
    zero_points: Any,
    quant_min: Any,
    quant_max: Any,
    dtype: Any,
    group_size: int,
    output_dtype: Any,
) -> Formula | None:
    del quant_min, quant_max, dtype, output_dtype
    n, k = node.meta["val"].shape
    group = k if group_size > k else group_size
    given = [p for p in (scales, zero_points) if isinstance(p, Node)]
    if dim or any(p.meta["val"].numel() != n * k // group for p in given):
        return None

    def compute(values: Mapping[Node, Grid]) -> Grid:
        codes = values[input_]
        blocks = codes.shape[0] * k // group
        grouped = [codes.reshaped((blocks, group)), *(values[p].reshaped((blocks, 1)) for p in given)]
        return pointwise(_rebuilt, grouped).reshaped(codes.shape)

    return Formula(dict.fromkeys((input_, *given), 0), compute, input_)


def _rebuilt(given: Sequence[torch.Tensor]) -> torch.Tensor:
    """``(codes - zero_point) * scale`` of codes, scale and maybe zero point; integers are subtracted as integers."""
    codes, scale, *zero = (t.double() if t.is_floating_point() else t for t in given)
    return (codes - zero[0] if zero else codes) * scale
