"""The vendor's own operators in a graph written by hand: quantize, dequantize, quantized matmul.

Semantics: ``op_plugin``'s documents of ``npu_anti_quant``: ``(x + offset) * scale`` with ``scale`` and ``offset`` for
the whole tensor or along its last dimension. The results of ``npu_quantize`` and ``npu_dynamic_quant`` are int8 codes.
``npu_quant_matmul``: docs/semantics.md, section 1; its int64 words: section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from quantpass.basics.symbolic import is_one
from quantpass.graph import expr as ex
from quantpass.graph.expr import Const, Expr
from quantpass.graph.scale_words import fp19, unpack_scale_word
from quantpass.graph.schema import bind, op_name
from quantpass.patterns.affine import Affine, AffineReader, NotAffine
from quantpass.patterns.contractions import Contraction, Own
from quantpass.patterns.dialect import Dialect
from quantpass.patterns.magnitudes import QuantizedRows
from quantpass.patterns.terms import Term

_WORDS = ("npu::npu_trans_quant_param", "quantpass::trans_quant_param")


def dialect() -> Dialect:
    return Dialect(
        "torch_npu",
        dequantizers={"npu::npu_anti_quant": _anti_quant},
        quantized_rows={"npu::npu_dynamic_quant": _dynamic_quant},
        contractions={"npu::npu_quant_matmul": _npu_quant_matmul, "quantpass::quant_matmul": _quant_matmul},
    )


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


def _dynamic_quant(
    node: Node,
    *,
    input_: Node,
    smooth_scales: Node | None,
    group_index: Any = None,
    dst_type: Any = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> QuantizedRows | None:
    """int8 codes with a scale for each row; not those of one for all, of int4, of experts."""
    del dst_type  # of the codes: in meta["val"]
    codes = node.meta["val"][0]
    if codes.dtype != torch.int8 or group_index is not None or quant_mode != "pertoken" or dst_type_max:
        return None
    return QuantizedRows(node, input_, 127, smooth_scales)


# -- the quantized matmul: a call of the model's own, not one that the pass has made ----------------------------------


def _npu_quant_matmul(
    node: Node,
    *,
    x1: Node,
    x2: Node,
    scale: Node,
    offset: Node | None,
    pertoken_scale: Node | None,
    bias: Node | None,
    output_dtype: Any,
    x1_dtype: Any = None,
    x2_dtype: Any = None,
    pertoken_scale_dtype: Any = None,
    scale_dtype: Any = None,
    group_sizes: Any = None,
    y_scale: Any = None,
) -> Contraction | None:
    del output_dtype  # in meta["val"]
    others = (x1_dtype, x2_dtype, pertoken_scale_dtype, scale_dtype, y_scale)
    if any(o is not None for o in others) or any(group_sizes or ()):
        return None
    return _int8_matmul(node, x1, x2, scale, offset, pertoken_scale, bias, rhs_transposed=False)


def _quant_matmul(
    node: Node,
    *,
    x1: Node,
    x2: Node,
    scale: Node,
    offset: Node | None,
    pertoken_scale: Node | None,
    bias: Node | None,
    output_dtype: Any,
    group_sizes: Any,
    transpose_x1: bool,
    transpose_x2: bool,
    saturate: bool,
) -> Contraction | None:
    del output_dtype
    if any(group_sizes or ()) or transpose_x1 or saturate:
        return None
    return _int8_matmul(node, x1, x2, scale, offset, pertoken_scale, bias, rhs_transposed=transpose_x2)


def _int8_matmul(
    node: Node,
    x1: Node,
    x2: Node,
    scale: Node,
    offset: Node | None,
    pertoken_scale: Node | None,
    bias: Node | None,
    *,
    rhs_transposed: bool,
) -> Contraction | None:
    """``cast((x1 @ x2 + integer bias) * scale * pertoken_scale + floating bias)``; None for other forms."""
    if "quantpass" in node.meta:
        return None
    out, scaled_by = node.meta["val"].dtype, scale.meta["val"].dtype
    added = None if bias is None else bias.meta["val"].dtype
    floating = added is not None and added.is_floating_point
    if {x1.meta["val"].dtype, x2.meta["val"].dtype} != {torch.int8} or (
        bias is not None and bias.meta["val"].dim() > 1
    ):
        return None
    plain = pertoken_scale is None and not floating
    through_word = scaled_by == torch.int64 or out == torch.int8 or (out == torch.float16 and plain)
    if (through_word and not plain) or (offset is not None and out != torch.int8):
        return None
    own = [] if bias is None or floating else [Own("add", bias, along="columns")]
    if out != torch.int32:
        own.append(Own("scale", scale, along="columns", read=_word if through_word else _columns))
    if pertoken_scale is not None:
        own.append(Own("scale", pertoken_scale, along="rows"))
    if floating:
        own.append(Own("add", bias, along="columns"))
    if out == torch.int8:
        # Beside a word the tensor is not read: docs/semantics.md, section 1.
        in_word = scaled_by == torch.int64
        own.append(Own("quantize", scale if in_word else offset, read=_offset_of_word if in_word else _columns))
    elif out != torch.int32:
        own.append(Own("cast"))
    form = op_name(node)
    return Contraction(node, form, x1, x2, rhs_transposed, tuple(own), whole=True, integer=True)


def _columns(reader: AffineReader, operand: Any, shape: tuple[Any, ...]) -> Term | None:
    """A parameter with an element for each column, or one for all."""
    if isinstance(operand, Node) and operand.meta["val"].dim() == 1 and is_one(operand.meta["val"].shape[0]):
        return reader.term(operand, shape)
    return reader.vector(operand, shape, rows=False)


def _word(reader: AffineReader, operand: Node, shape: tuple[Any, ...]) -> Term | None:
    """The scale that the hardware reads: the number of 19 bits in a word, or what becomes of a float32 scale there."""
    made = _packing(operand)
    source = operand if made is None else made["scale"]
    if made is not None and made["round_mode"] not in (None, 0):
        return None
    term = _columns(reader, source, shape)
    if term is None:
        return None
    if not isinstance(term.expr, Const):
        # What the run brings is packed once more, to the same word.
        return None if ex.dtype_of(term.expr) == torch.int64 else term
    return Term(Const(_scale_in(term.expr.tensor)), term.shape)


def _scale_in(scale: torch.Tensor) -> torch.Tensor:
    return unpack_scale_word(scale)[0] if scale.dtype == torch.int64 else fp19(scale)


def _offset_of_word(reader: AffineReader, operand: Node, shape: tuple[Any, ...]) -> Term | None:
    """The offset in a word."""
    made = _packing(operand)
    if made is not None:
        none: Expr = ex.reshape(ex.scalar(0.0), (1,))
        return Term(none, (1,) * len(shape)) if made["offset"] is None else _columns(reader, made["offset"], shape)
    term = _columns(reader, operand, shape)
    if term is None or term.constant is None or term.constant.dtype != torch.int64:
        return None
    return Term(Const(unpack_scale_word(term.constant)[1].double()), term.shape)


def _packing(word: Node) -> dict[str, Any] | None:
    """The arguments of the operator that packs a word in the graph; None where the word comes from elsewhere."""
    schema = getattr(word.target, "_schema", None)
    return bind(word) if schema is not None and schema.name in _WORDS else None
