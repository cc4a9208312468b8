"""Numbers for a call's tensors: drawn anew for each case, always the same, of sizes that keep results in range."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from quantpass.basics.tensor_spec import TensorSpec
from quantpass.basics.torch_types import I64
from quantpass.chips.calls import OpCall
from quantpass.chips.companions import INT4PACK, QUANTIZE
from quantpass.chips.quant_matmul import QMM
from quantpass.chips.quant_matmul_dequant import QMMD
from quantpass.chips.weight_quant_matmul import WQMM
from quantpass.doors.selftest.cases import Case
from quantpass.doors.selftest.forms import FORMS, SIZES
from quantpass.graph.scale_words import pack_scale_word
from quantpass.operators.int4 import pack_int4, unpack_int4

Tensors = Mapping[str, torch.Tensor]

_INT8, _INT4 = 73.0, 4.6
"""Standard deviations of codes that are drawn evenly."""

_CODES = 40.0
"""About how large results are, in codes."""


def drawn(case: Case) -> dict[str, torch.Tensor]:
    """The case's tensors as they are stored: a transposed view's by its ``(..., N, K)``, int4 packed in int32."""
    call = case.call
    random = torch.Generator().manual_seed(zlib.crc32(case.words.encode()))
    specs = {name: spec for name, spec in call.args.items() if isinstance(spec, TensorSpec)}
    found = {name: _drawn(call, name, spec, random) for name, spec in specs.items() if spec.dtype_name != I64}
    words = {name: _word(call, name, spec, found, random) for name, spec in specs.items() if spec.dtype_name == I64}
    return {name: (found | words)[name] for name in specs}


def _drawn(call: OpCall, name: str, spec: TensorSpec, random: torch.Generator) -> torch.Tensor:
    shape = stored_shape(spec)
    dtype = spec.dtype
    if dtype == torch.int32 and name in FORMS[call.op].packed:
        return pack_int4(torch.randint(-8, 8, (*shape[:-1], shape[-1] * 8), dtype=torch.int8, generator=random))
    if dtype == torch.int8 and name != "zero_points":
        return torch.randint(-127, 128, shape, dtype=torch.int8, generator=random)
    if name == "group_index":
        return torch.arange(1, shape[0] + 1, dtype=dtype) * SIZES["m"] // shape[0]
    if not dtype.is_floating_point:
        high = 8 if call.op is INT4PACK else 20 if name != "bias" else 1000
        return torch.randint(-high, high, shape, generator=random).to(dtype)
    if "offset" in name or "zero_point" in name:
        return torch.randint(-8, 9, shape, generator=random).to(dtype)
    if "scale" not in name and name != "gamma":
        return torch.randn(shape, generator=random).to(dtype)
    return _scales(call, name, shape, random).to(dtype)


def _word(call: OpCall, name: str, spec: TensorSpec, others: Tensors, random: torch.Generator) -> torch.Tensor:
    """A scale word, in which the offset travels where the operator has one for it."""
    offset = others.get(name.replace("scale", "offset"))
    takes = offset is not None and offset.dtype == torch.float32 and not any(call.args.get("group_sizes") or ())
    return pack_scale_word(_scales(call, name, spec.shape, random), offset if takes else None)


def _scales(call: OpCall, name: str, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    return (torch.rand(shape, generator=random) + 0.5) * _size_of_scale(call, name)


def _size_of_scale(call: OpCall, name: str) -> float:
    root = math.sqrt(call.sizes.get("k", 1))
    int4 = any(spec.dtype_name == "int32" for n in FORMS[call.op].packed if (spec := call.tensor(n)) is not None)
    codes = _INT4 if int4 else _INT8
    if call.op is QMM:
        return _CODES / (codes**2 * root) if name == "scale" else 1.0
    if call.op is WQMM:
        return _CODES if name == "quant_scale" else 1 / (codes * root)
    if call.op is QMMD:
        return {"weight_scale": 1 / (codes * root), "x_scale": 1 / _CODES}.get(name, 1.0)
    if call.op is QUANTIZE:
        return 1 / _CODES if call.args.get("div_mode") in (None, True) else _CODES / 10
    return 1.0


def stored_shape(spec: TensorSpec) -> tuple[int, ...]:
    """The sizes of the storage behind a description."""
    return (*spec.shape[:-2], spec.shape[-1], spec.shape[-2]) if spec.transposed else spec.shape


def positive(call: OpCall, stored: Tensors) -> dict[str, torch.Tensor]:
    """The same tensors without signs: what a call makes of them is how large the terms of its sums are together."""
    return {name: _absolute(call, name, t) for name, t in stored.items()}


def _absolute(call: OpCall, name: str, t: torch.Tensor) -> torch.Tensor:
    if t.dtype == torch.int32 and name in FORMS[call.op].packed:
        return pack_int4(unpack_int4(t).abs().clamp(max=7))
    if call.op is INT4PACK:
        return t.abs().clamp(max=7)
    return t if t.dtype == torch.int64 else t.abs()


def applied(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> tuple[Any, ...]:
    """``function`` of each tensor that an operator returns."""
    values = value if isinstance(value, tuple | list) else (value,)
    return tuple(function(v) if isinstance(v, torch.Tensor) else v for v in values)
