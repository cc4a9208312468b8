"""Quantized matmuls that PyTorch itself has as single operators.

Semantics: ``aten/src/ATen/native/native_functions.yaml`` and the operators' CPU kernels.
``_weight_int8pack_mm(x, w, s) = (x @ w^T) * s``. ``_weight_int4pack_mm_for_cpu(x, w, g, sz)`` keeps its codes in a
layout of its own and computes with ``(codes - 8) * scale + zero``; running the operator itself tells the codes.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from quantpass.graph.expr import Const
from quantpass.graph.records import Weight
from quantpass.graph.schema import op_name
from quantpass.patterns.affine import AffineReader, NotAffine
from quantpass.patterns.contractions import Contraction, NoContraction, Own
from quantpass.patterns.dialect import Dialect

aten = torch.ops.aten


def dialect() -> Dialect:
    return Dialect(
        "aten",
        contractions={
            "aten::_weight_int8pack_mm": _int8pack_mm,
            "aten::_weight_int4pack_mm_for_cpu": _int4pack_mm_for_cpu,
            "aten::_weight_int4pack_mm": _int4pack_mm,
            "aten::_dyn_quant_matmul_4bit": _dyn_quant_matmul_4bit,
        },
    )


def _int8pack_mm(node: Node, *, self: Node, mat2: Node, scales: Node) -> Contraction:
    own = (Own("scale", scales, along="columns"),)
    return Contraction(node, op_name(node), self, mat2, rhs_transposed=True, own=own, whole=True)


def _int4pack_mm_for_cpu(node: Node, *, self: Node, mat2: Node, qGroupSize: int, qScaleAndZeros: Node) -> Contraction:
    def weight(reader: AffineReader) -> Weight | NotAffine:
        return _unpacked(reader, node, mat2, qGroupSize, qScaleAndZeros)

    return Contraction(node, op_name(node), self, mat2, rhs_transposed=True, whole=True, weight=weight)


def _unpacked(reader: AffineReader, node: Node, packed: Node, group: int, scale_and_zero: Node) -> Weight | NotAffine:
    if not all(reader.values.is_static(n) for n in (packed, scale_and_zero)):
        return NotAffine("its packed weight is not known when compiling", quantized=True)
    tiles, parameters = reader.values.value(packed), reader.values.value(scale_and_zero)
    n, groups = parameters.shape[1], parameters.shape[0]
    k = groups * group
    plain = torch.stack([torch.ones(groups, n), torch.zeros(groups, n)], dim=-1).to(parameters.dtype)
    try:
        columns = aten._weight_int4pack_mm_for_cpu(torch.eye(k, dtype=parameters.dtype), tiles, group, plain)
    except RuntimeError as error:
        return NotAffine(f"its packed weight can't be unpacked ({error})", quantized=True)
    codes = columns.to(torch.int8)  # (K, N), in [-8, 7]
    scale, zero = (p.double() for p in parameters.unbind(-1))
    if not bool(torch.isfinite(scale).all()) or bool((scale == 0).any()):
        return NotAffine(f"a scale of {op_name(node)} is zero or not finite", quantized=True)
    zero_point = -zero / scale
    known = None if not bool(zero_point.any()) else Const(zero_point if groups > 1 else zero_point[0])
    stored = Const(codes.t().contiguous(), label=packed.name)
    one_scale = Const(scale if groups > 1 else scale[0])
    group_size = group if groups > 1 else 0
    return Weight(stored, True, k, n, one_scale, known, group_size, int(codes.min()), int(codes.max()), proved=True)


def _int4pack_mm(node: Node, *, self: Node, mat2: Node, qGroupSize: int, qScaleAndZeros: Node) -> NoContraction:
    del mat2, qGroupSize, qScaleAndZeros
    return _device_layout(node, self)


def _dyn_quant_matmul_4bit(
    node: Node, *, inp: Node, packed_weights: Node, block_size: int, in_features: int, out_features: int
) -> NoContraction:
    del packed_weights, block_size, in_features, out_features
    return _device_layout(node, inp)


def _device_layout(node: Node, x: Node) -> NoContraction:
    return NoContraction(
        f"{op_name(node)}: its weight is packed in a layout that only another device's kernel understands",
        (x,),
        "save the model before packing: plain int8 codes, or int4 codes in int8, can be fused",
        certain=True,
    )
