"""``aten.fake_quantize_*``: quantize and dequantize in one operator.

Semantics: ``aten/src/ATen/native/quantized/FakeQuantPerTensorAffine.cpp``: ``codes = clamp(nearbyint(x * (1 / scale)) +
zero_point, quant_min, quant_max)``, value ``(codes - zero_point) * scale``. The codes are in no node of the graph, so
they are computed anew: for a weight when compiling, for an activation as int8 in the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from quantpass.graph import expr as ex
from quantpass.graph.expr import Expr
from quantpass.patterns.affine import Affine, AffineReader, NotAffine
from quantpass.patterns.dialect import Dialect
from quantpass.patterns.terms import Term

aten = torch.ops.aten


def dialect() -> Dialect:
    return Dialect(
        "fake_quantize",
        dequantizers={
            "aten::fake_quantize_per_tensor_affine": _per_tensor,
            "aten::fake_quantize_per_tensor_affine.tensor_qparams": _per_tensor,
            "aten::fake_quantize_per_tensor_affine_cachemask": _per_tensor,
            "aten::_fake_quantize_per_tensor_affine_cachemask_tensor_qparams": _per_tensor_if_enabled,
            "aten::fake_quantize_per_channel_affine": _per_channel,
            "aten::fake_quantize_per_channel_affine_cachemask": _per_channel,
        },
    )


def _per_tensor(
    reader: AffineReader, node: Node, *, self: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int
) -> Affine | NotAffine:
    shape = tuple(node.meta["val"].shape)
    terms = (reader.along(scale, shape, None), reader.along(zero_point, shape, None))
    return fake_quantized(reader, node, self, *terms, quant_min, quant_max)


def _per_tensor_if_enabled(
    reader: AffineReader,
    node: Node,
    *,
    self: Any,
    scale: Any,
    zero_point: Any,
    fake_quant_enabled: Any,
    quant_min: int,
    quant_max: int,
) -> Affine | NotAffine:
    if reader.values.uniform(fake_quant_enabled) != 1:
        return NotAffine("a fake quantization that is switched off, or could be")
    return _per_tensor(
        reader, node, self=self, scale=scale, zero_point=zero_point, quant_min=quant_min, quant_max=quant_max
    )


def _per_channel(
    reader: AffineReader,
    node: Node,
    *,
    self: Any,
    scale: Any,
    zero_point: Any,
    axis: int,
    quant_min: int,
    quant_max: int,
) -> Affine | NotAffine:
    shape = tuple(node.meta["val"].shape)
    terms = (reader.along(scale, shape, axis), reader.along(zero_point, shape, axis))
    return fake_quantized(reader, node, self, *terms, quant_min, quant_max)


def fake_quantized(
    reader: AffineReader, node: Node, x: Any, scale: Term | None, zero: Term | None, low: int, high: int
) -> Affine | NotAffine:
    """``x`` quantized to ``[low, high]`` in float32 and dequantized; its codes are computed anew.

    Args:
        reader: what the graph is read with.
        node: the operator that does both.
        x: its input.
        scale: along a dimension of the value, or for all of it; None where it could not be read.
        zero: likewise.
        low: smallest code.
        high: largest code.
    """
    if not isinstance(x, Node) or scale is None or zero is None or scale.constant is None or zero.constant is None:
        return NotAffine("a fake quantization whose scale or zero point is not known when compiling", quantized=True)
    shape = tuple(node.meta["val"].shape)
    zeros = zero.constant.to(torch.float64)
    if bool((zeros != zeros.round()).any()) or high - low > 255:
        return NotAffine(f"a fake quantization to [{low}, {high}] around {zeros.reshape(-1)[0]:g}", quantized=True)
    down = 0 if low >= -128 and high <= 127 else low + 128
    inverse = _aligned(ex.div(ex.scalar(1.0), ex.wide(ex.cast(scale.expr, torch.float32))), scale.shape)
    own = ex.cast(reader.values.expr(x), torch.float32)

    def then(target: Any, value: Expr, *others: Any) -> Expr:
        return ex.apply(target, value, *others, dtype=torch.float32, shape=shape)

    rounded = then(aten.round.default, then(aten.mul.Tensor, own, ex.cast(inverse, torch.float32)))
    shifted = then(aten.add.Tensor, rounded, ex.cast(_aligned(ex.wide(zero.expr), zero.shape), torch.float32))
    clamped = then(aten.clamp.default, shifted, low, high)
    moved = then(aten.sub.Scalar, clamped, down) if down else clamped
    value = Affine(ex.cast(moved, torch.int8), (low - down, high - down), (), None, shape)
    shift = Term(ex.sub(ex.wide(zero.expr), ex.scalar(float(down))), zero.shape)
    centred = value.minus(shift)
    return centred if isinstance(centred, NotAffine) else centred.times(scale)


def _aligned(e: Expr, shape: tuple[Any, ...]) -> Expr:
    return ex.reshape(e, shape)
