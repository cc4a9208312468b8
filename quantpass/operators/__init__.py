"""The fused operators, a record each, and ``torch.ops.quantpass.*``, which are defined from them.

A rewritten graph holds these operators, whatever it will be lowered to, so one graph means one thing everywhere. Their
arguments are the vendor's plus what the vendor leaves to strides or to the chip: ``transpose_*``, ``template``,
``saturate``. Their CPU kernels define what they compute: every rounding step of the hardware is one there, and where
the vendor leaves a choice open (which kernel template runs, what a float16 overflow gives) it is an argument. Formulas
and sources: ``docs/semantics.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.library import Library, register_fake

from quantpass.operators.anti_quant import ANTI_QUANT
from quantpass.operators.arguments import bound
from quantpass.operators.dynamic_quant import DYNAMIC_QUANT
from quantpass.operators.operator import Emulated, Operator
from quantpass.operators.preparation import FORMAT_CAST, PACK_INT4, TRANS_QUANT_PARAM
from quantpass.operators.quant_matmul import QUANT_MATMUL
from quantpass.operators.quant_matmul_dequant import QUANT_MATMUL_DEQUANT
from quantpass.operators.quantize import QUANTIZE
from quantpass.operators.rms_norm import ADD_RMS_NORM, ADD_RMS_NORM_DYNAMIC_QUANT, RMS_NORM
from quantpass.operators.weight_quant_matmul import WEIGHT_QUANT_MATMUL

OPERATORS: tuple[Operator, ...] = (
    QUANT_MATMUL,
    WEIGHT_QUANT_MATMUL,
    QUANT_MATMUL_DEQUANT,
    DYNAMIC_QUANT,
    QUANTIZE,
    RMS_NORM,
    ADD_RMS_NORM,
    ADD_RMS_NORM_DYNAMIC_QUANT,
    TRANS_QUANT_PARAM,
    FORMAT_CAST,
    PACK_INT4,
)
"""``torch.ops.quantpass.*``."""

EMULATED: tuple[Emulated, ...] = (*OPERATORS, ANTI_QUANT)
"""The vendor's operators that CPU tensors can have."""


def _defined(operators: Sequence[Operator]) -> Library:
    library = Library("quantpass", "DEF")
    for op in operators:
        library.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(op.name, op.kernel, "CPU")
        register_fake(f"quantpass::{op.name}", _fake(op), lib=library)
    return library


def _fake(op: Operator) -> Any:
    return lambda *args, **kwargs: op.fake(bound(op.overload._schema, args, kwargs))


LIBRARY = _defined(OPERATORS)
