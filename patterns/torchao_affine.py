"""``torchao``'s affine operators, where a graph keeps them whole.

Semantics: ``torchao/quantization/quant_primitives.py``: ``dequantize_affine = (codes - zero_point) * scale`` with one
scale for each block of ``block_size`` elements.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from quantpass.basics.symbolic import is_one, same_size
from quantpass.graph.schema import op_name
from quantpass.patterns.affine import Affine, AffineReader, NotAffine
from quantpass.patterns.dialect import Dialect
from quantpass.patterns.terms import Term


def dialect() -> Dialect:
    return Dialect("torchao", dequantizers={"torchao::dequantize_affine": _dequantize_affine})


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
