"""The operators of bitsandbytes.

Semantics: ``bitsandbytes/_ops.py`` and ``backends/default/ops.py``: codes are ``round(127 * x / absmax)``, so
``int8_scaled_mm(A, B, row_stats, col_stats) = (A @ B^T) * row_stats * col_stats / 127^2 + bias``.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from quantpass.graph.schema import op_name
from quantpass.patterns.affine import Affine, AffineReader, NotAffine
from quantpass.patterns.contractions import Contraction, NoContraction, Own
from quantpass.patterns.dialect import Dialect


def dialect() -> Dialect:
    return Dialect(
        "bitsandbytes",
        dequantizers={"bitsandbytes::int8_vectorwise_dequant": _vectorwise_dequant},
        contractions={
            "bitsandbytes::int8_scaled_mm": _scaled_mm,
            "bitsandbytes::int8_linear_matmul": _linear_matmul,
            "bitsandbytes::gemv_4bit": _gemv_4bit,
        },
    )


def _scaled_mm(
    node: Node, *, A: Node, B: Node, row_stats: Node, col_stats: Node, bias: Node | None, dtype: Any
) -> Contraction:
    del dtype  # of the result: in meta["val"]
    own = [Own("scale", row_stats, along="rows"), Own("scale", col_stats, times=1 / 127**2, along="columns")]
    own += [Own("add", bias, along="columns")] if bias is not None else []
    return Contraction(
        node, op_name(node), A, B, rhs_transposed=True, own=(*own, Own("cast")), whole=True, integer=True
    )


def _linear_matmul(node: Node, *, A: Node, B: Node) -> Contraction:
    return Contraction(node, op_name(node), A, B, rhs_transposed=True)


def _vectorwise_dequant(reader: AffineReader, node: Node, *, A: Any, stats: Any) -> Affine | NotAffine:
    codes = reader.dequantized(node, A, stats, None, axis=0)
    scale = reader.term(1 / 127, tuple(node.meta["val"].shape))
    return codes.times(scale) if isinstance(codes, Affine) and scale is not None else codes


def _gemv_4bit(node: Node, *, A: Node, B: Node, shapeB: Any, absmax: Node, code: Node, blocksize: int) -> NoContraction:
    del B, shapeB, absmax, code, blocksize
    return NoContraction(
        f"{op_name(node)}: its NF4 or FP4 codes stand for values in a table, not for integers times a scale",
        (A,),
        "quantize to int4 or int8 instead, e.g. load_in_8bit=True",
        certain=True,
    )
