"""What a call of each vendor operator is made of: sizes and choices. What is legal among them, the rules say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from quantpass.basics.torch_types import BF16, F16, F32, I8, I32
from quantpass.chips.calls import VendorOp
from quantpass.chips.companions import ANTI_QUANT, DYNAMIC_QUANT, FORMAT_CAST, INT4PACK, QUANTIZE, TQP
from quantpass.chips.norms import ADD_RMS_NORM, ADD_RMS_NORM_DYNAMIC_QUANT, RMS_NORM
from quantpass.chips.quant_matmul import QMM
from quantpass.chips.quant_matmul_dequant import QMMD
from quantpass.chips.weight_quant_matmul import WQMM

SIZES: Mapping[str, int] = MappingProxyType({"m": 16, "k": 512, "n": 128, "last": 512})
"""Sizes of a call that is not about sizes: legal for every operator; no two of a matmul's are equal."""


@dataclass(frozen=True, slots=True)
class Form:
    """One operator's calls.

    Attributes:
        shapes: the shape of each tensor that no rule gives one, in named sizes.
        choices: values of the arguments that are no tensors.
        turned: tensors that may be transposed views.
        packed: tensors in which int32 holds eight int4.
        dtypes: dtypes of the tensors of which no rule names any.
        edges: more values of such arguments, which are tried with one call each.
    """

    shapes: Mapping[str, tuple[str, ...]]
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    turned: tuple[str, ...] = ()
    packed: tuple[str, ...] = ()
    dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    edges: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_ROWS = ("m", "last")
_EPSILON = {"epsilon": (1e-6,)}

FORMS: Mapping[VendorOp, Form] = MappingProxyType(
    {
        QMM: Form(
            {"x1": ("m", "k"), "x2": ("k", "n"), "bias": ("n",)},
            {"group_sizes": (None, (0, 0, 256))},
            turned=("x1", "x2"),
            packed=("x1", "x2"),
        ),
        WQMM: Form(
            {"x": ("m", "k"), "weight": ("k", "n")},
            {"antiquant_group_size": (0, 64, 128), "inner_precise": (0,)},
            turned=("x", "weight"),
            packed=("weight",),
            edges={"antiquant_group_size": (32, 480), "inner_precise": (1,)},
        ),
        QMMD: Form(
            {"x": ("m", "k"), "quantized_weight": ("n", "k")},
            {"quant_mode": ("pertoken", "pertensor")},
        ),
        TQP: Form({"scale": ("n",), "offset": ("n",)}, {"round_mode": (0, 1)}),
        FORMAT_CAST: Form(
            {"input": ("n", "k")},
            {"acl_format": (29, 2), "customize_dtype": (None, F16)},
            dtypes={"input": (I8, F16)},
        ),
        INT4PACK: Form({"weight": ("k", "n")}),
        ANTI_QUANT: Form({"x": _ROWS, "offset": ("last",)}, {"dst_dtype": (F16, BF16)}, packed=("x",)),
        QUANTIZE: Form(
            {"input": _ROWS, "scales": ("last",), "zero_points": ("last",)},
            {"dtype": ("qint8", "quint8", "qint32", "quint4x2"), "axis": (-1,), "div_mode": (True, False)},
            dtypes={"scales": (F32, BF16, F16), "zero_points": (F32, BF16, F16, I32, I8)},
        ),
        DYNAMIC_QUANT: Form(
            {"input": _ROWS, "group_index": ("groups",)},
            {"dst_type": (None, I8, "quint4x2"), "quant_mode": ("pertoken", "pertensor")},
            dtypes={"input": (F16,)},
        ),
        RMS_NORM: Form({"input": _ROWS}, _EPSILON, dtypes={"input": (F16, F32)}),
        ADD_RMS_NORM: Form({"x1": _ROWS}, _EPSILON, dtypes={"x1": (F16, F32)}),
        ADD_RMS_NORM_DYNAMIC_QUANT: Form({"x1": _ROWS}, _EPSILON),
    }
)
"""The operators that are tried: those with a kernel of quantpass."""
