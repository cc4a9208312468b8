"""The operator of AMD Quark: integers kept as floats, quantized and dequantized in one.

Semantics: ``quark/torch/kernel/hw_emulation/hw_emulation_interface.py`` of amd-quark 0.13, ``fake_quantize_int``: what
``aten.fake_quantize_*`` computes in float32, rounded to the input's dtype; scales below the normal numbers are raised
to them. On a CPU it always rounds to the nearest even. Other formats (fp8, fp4, mx) have no integers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from quantpass.patterns.affine import Affine, AffineReader, NotAffine
from quantpass.patterns.dialect import Dialect
from quantpass.patterns.fake_quantize import fake_quantized

_INTEGERS = frozenset({"int2", "uint2", "int3", "int4", "uint4", "int8", "uint8"})
_HALF_EVEN = 8


def dialect() -> Dialect:
    return Dialect("amd-quark", dequantizers={"quark::scaled_fake_quantize": _scaled_fake_quantize})


def _scaled_fake_quantize(
    reader: AffineReader,
    node: Node,
    *,
    quant_dtype: str,
    inputs: Any,
    scale: Any,
    zero_point: Any,
    axis: Any,
    group_size: Any,
    quant_min: float,
    quant_max: float,
    round_mode: Any,
    qscheme: str,
    mx_element_dtype: str,
) -> Affine | NotAffine:
    del group_size  # of the scheme per_group, which is refused
    if quant_dtype not in _INTEGERS or mx_element_dtype != "None":
        return _refused(f"{quant_dtype} (elements {mx_element_dtype})", "quantize to int8 or int4")
    if qscheme not in ("per_tensor", "per_channel"):
        return _refused(f"{qscheme} {quant_dtype}", "quantize per channel, or export the model with packed weights")
    if round_mode != _HALF_EVEN:
        return _refused(f"the round mode {round_mode}", "use half_even")
    shape = tuple(node.meta["val"].shape)
    along = None if qscheme == "per_tensor" else axis
    if along is not None and not (isinstance(along, int) and 0 <= along < len(shape)):
        return _refused(f"channels along dimension {along}", "count the dimension from the first")
    low, high = float(quant_min), float(quant_max)
    if not (low.is_integer() and high.is_integer() and low < high):
        return _refused(f"codes in [{quant_min}, {quant_max}]", "use whole numbers")
    scales, zeros = reader.along(scale, shape, along), reader.along(zero_point, shape, along)
    known = None if scales is None else scales.constant
    if known is not None and not bool((known >= torch.finfo(torch.float32).tiny).all()):
        return _refused("a scale that is negative or below the normal numbers", "use positive scales")
    return fake_quantized(reader, node, inputs, scales, zeros, int(low), int(high))


def _refused(what: str, hint: str) -> NotAffine:
    return NotAffine(f"quark.scaled_fake_quantize with {what}", quantized=True, hint=hint)
