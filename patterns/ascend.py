"""The vendor's own quantize operators in a graph written by hand.

Semantics: ``op_plugin``'s documents of ``npu_anti_quant``: ``(x + offset) * scale`` with ``scale`` and ``offset`` for
the whole tensor or along its last dimension. The results of ``npu_quantize`` and ``npu_dynamic_quant`` are int8 codes.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from quantpass.patterns.affine import Affine, AffineReader, NotAffine
from quantpass.patterns.dialect import Dialect


def dialect() -> Dialect:
    return Dialect("torch_npu", dequantizers={"npu::npu_anti_quant": _anti_quant})


def _anti_quant(
    reader: AffineReader, node: Node, *, x: Any, scale: Any, offset: Any, dst_dtype: Any, src_dtype: Any
) -> Affine | NotAffine:
    del dst_dtype, src_dtype  # of the result and the codes: in their meta["val"]
    value = reader.read(x)
    shape = tuple(node.meta["val"].shape)
    for operand, combine in ((offset, Affine.plus), (scale, Affine.times)):
        if isinstance(value, NotAffine) or operand is None:
            continue
        term = reader.vector(operand, shape, rows=False) or reader.along(operand, shape, None)
        if term is None:
            return NotAffine("a parameter of npu_anti_quant has an unexpected shape", quantized=True)
        value = combine(value, term)
    return value
