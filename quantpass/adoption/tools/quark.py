"""AMD Quark's Linears with real codes: what its export and its import of a checkpoint put in (``QParamsLinear``).

Semantics (0.13): ``torch/export/nn/modules/qparamslinear.py`` and ``realquantizer.py``, ``torch/utils/pack.py``,
``torch/kernel/hw_emulation/hw_emulation_interface.py``. ``weight_quantizer`` holds ``scale`` and ``zero_point``; 8-bit
codes are bytes, 4-bit ones are in int32 words along the last dimension, interleaved where ``reorder``. Per tensor and
per channel the codes are ``(N, K)``; in groups they are ``(K, N)`` beside scales ``(groups, N)``.
``w = (codes - zero) * scale`` in float32, then in the input's dtype. A static activation is rounded by
``torch.fake_quantize_per_tensor_affine`` in float32; on other devices than the CPU, by the configured way of rounding.

A ``QuantLinear``, frozen or not, holds floats: no codes to take over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantpass.adoption.codes import interleaved, unpacked
from quantpass.adoption.plain import PlainLinear, share
from quantpass.adoption.tables import (
    FLOATS,
    Allowances,
    CannotAdopt,
    Found,
    Row,
    Tool,
    as_words,
    bias_row,
    check,
    copy_of,
    nothing_else,
)

_QUANTIZERS = ("weight_quantizer", "input_quantizer", "output_quantizer", "bias_quantizer")
_BYTES = {"int8": torch.int8, "uint8": torch.uint8}
_RANGES = {"int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7), "uint4": (0, 15)}
_ONE = ((), (1,))


@dataclass(frozen=True, slots=True)
class _Weight:
    """How the codes of a weight are held; ``group`` is K for whole channels, 0 for one scale in all."""

    kind: str
    group: int
    in_groups: bool
    reorder: bool
    symmetric: bool

    @property
    def bits(self) -> int:
        return int(self.kind.removeprefix("u").removeprefix("int"))


def table(n: int, k: int, kind: str, spread: str, group: int) -> tuple[dict[str, Row], dict[str, Row]]:
    """The tensors of a module of these sizes, and those of its weight's quantizer."""
    dtype, per_word = (_BYTES[kind], 1) if kind in _BYTES else (torch.int32, 8)
    codes = (k, n // per_word) if spread == "per_group" else (n, k // per_word)
    scales = {"per_tensor": _ONE, "per_channel": ((n,),), "per_group": ((k // group, n),)}[spread]
    packed = {"per_tensor": _ONE, "per_channel": ((n // per_word,),), "per_group": ((k // group, n // per_word),)}
    return (
        {"weight": Row((dtype,), (codes,)), "bias": bias_row(n)},
        {"scale": Row(FLOATS, scales), "zero_point": Row((dtype,), packed[spread])},
    )


def _read(module: nn.Module, allowed: Allowances) -> Found | None:
    del allowed
    if module._modules.get("_weight_quantizer") is not None and hasattr(module, "_weight_qspec"):
        if getattr(module, "_weight_quantizer_inv", None) is not None:
            raise CannotAdopt("its weight is dequantized and rounded again in each forward (_weight_quantizer_inv)")
        raise CannotAdopt(
            "its weight is a float, rounded or to be rounded, and holds no codes: freeze the model, then put "
            'QParamsLinear.from_module(module, "quark") in its place, as quark\'s own export does (real_quantized)'
        )
    held: Any = module._modules.get("weight_quantizer")
    if not hasattr(held, "real_quantized"):
        return None
    if not isinstance(module, nn.Linear):
        raise CannotAdopt("it is no Linear")
    nothing_else(module, children=_QUANTIZERS)
    if getattr(module, "_quant_dict", None) is not None:
        raise CannotAdopt("its quantizers were moved for tensor parallelism (_quant_dict)")
    for name, what in (("output_quantizer", "output"), ("bias_quantizer", "bias")):
        if module._modules.get(name) is not None:
            raise CannotAdopt(f"its {what} is rounded too ({name})")
    weight = _weight(module, held)
    words = as_words(weight.bits, weight.group, module.in_features, weight.symmetric)
    given = module._modules.get("input_quantizer")
    activation = None if given is None else _activation(given)
    if activation is not None:
        words += f", {_kind(given)} activation, static"
    plain = _QuarkLinear(module, words, weight, activation)
    dtype = held.scale.dtype if plain.bias is None else plain.bias.dtype
    return Found(plain, dtype, copy_of(module))


def _kind(quantizer: Any) -> str:
    """The dtype of the codes of a quantizer that is one scale and one zero point, found beforehand."""
    spec = getattr(quantizer, "qspec", None)
    if spec is None:
        raise CannotAdopt("a quantizer has several steps; read: one scale and one zero point")
    kind = str(spec.dtype.value)
    if kind not in _RANGES:
        raise CannotAdopt(f"a quantizer's dtype is {kind}; read: {', '.join(_RANGES)}")
    if spec.is_dynamic:
        raise CannotAdopt("a quantizer finds its scale at run time (is_dynamic); read: static ones")
    if spec.scale_format not in (None, "float32") or spec.is_scale_quant or spec.zero_point_type.value != "int32":
        raise CannotAdopt(f"its scale is {spec.scale_format} and its zero point {spec.zero_point_type.value}")
    return kind


def _weight(module: nn.Linear, held: Any) -> _Weight:
    kind, spread, n, k = _kind(held), str(held.qspec.qscheme.value), module.out_features, module.in_features
    if held.real_quantized is not True:
        raise CannotAdopt("its weight is a float, rounded in each forward")
    if spread not in ("per_tensor", "per_channel", "per_group"):
        raise CannotAdopt(f"its weight is rounded {spread}; read: per_tensor, per_channel, per_group")
    axis = held.qspec.ch_axis
    if (spread == "per_channel" and axis != 0) or (spread == "per_group" and axis not in (1, -1)):
        raise CannotAdopt(f"its weight is rounded {spread} along dimension {axis}")
    group = {"per_tensor": 0, "per_channel": k}.get(spread, held.qspec.group_size)
    if spread == "per_group" and (not isinstance(group, int) or group <= 0 or k % group):
        raise CannotAdopt(f"its groups of {group} do not divide {k} columns")
    if kind not in _BYTES and (n % 8 or k % 8):
        raise CannotAdopt(f"{k} x {n} does not fill whole words of 4 bits")
    own, scales = table(n, k, kind, spread, max(group, 1))
    check(module, own)
    check(held, scales)
    return _Weight(kind, group, spread == "per_group", bool(held.reorder), not bool(held.zero_point.any()))


def _activation(given: Any) -> tuple[int, int]:
    """The smallest and the largest code."""
    kind, spread, rounding = _kind(given), given.qspec.qscheme.value, given.qspec.round_method
    if kind not in _BYTES or spread != "per_tensor":
        raise CannotAdopt(f"its activation is rounded to {kind} {spread}; read: int8, uint8 per_tensor")
    if getattr(rounding, "name", None) != "half_even":
        raise CannotAdopt(f"its activation is rounded by {getattr(rounding, 'name', rounding)}; read: half_even")
    low, high = _RANGES[kind]
    if (given.quant_min, given.quant_max) != (low, high):
        raise CannotAdopt(f"its activation's codes go from {given.quant_min} to {given.quant_max}")
    check(given, {"scale": Row(FLOATS, _ONE), "zero_point": Row((_BYTES[kind],), _ONE)})
    return low, high


class _QuarkLinear(PlainLinear):
    weight: torch.Tensor
    weight_quantizer: Any
    input_quantizer: Any

    def __init__(self, module: nn.Linear, scheme: str, how: _Weight, activation: tuple[int, int] | None) -> None:
        sizes = (module.in_features, module.out_features)
        super().__init__(module, "quark", scheme, ("weight", "bias"), sizes)
        for name in ("weight_quantizer", "input_quantizer") if activation is not None else ("weight_quantizer",):
            child = nn.Module()  # under its name, so that the state dict keeps its keys
            for key in ("scale", "zero_point"):
                share(child, key, getattr(module._modules[name], key))
            self.add_module(name, child)
        self.how, self.activation = how, activation

    def dequantized(self, x: torch.Tensor) -> torch.Tensor:
        how, w = self.how, self._codes(self.weight)
        scale: torch.Tensor = self.weight_quantizer.scale.float()
        if how.in_groups:
            w, scale = w.reshape(-1, how.group, self.out_features), scale.unsqueeze(1)
        elif how.group:
            scale = scale.unsqueeze(1)
        if not how.symmetric:
            w = w.to(torch.int32) - self._zeros()
        w = w.float() * scale
        w = w.reshape(self.in_features, self.out_features).t().contiguous() if how.in_groups else w
        return w.to(x.dtype)

    def _zeros(self) -> torch.Tensor:
        zeros: torch.Tensor = self.weight_quantizer.zero_point
        if zeros.numel() == 1:
            return zeros.to(torch.int32)
        if self.how.in_groups:
            return self._codes(zeros).to(torch.int32).unsqueeze(1)
        return self._codes(zeros.unsqueeze(0)).to(torch.int32).reshape(-1, 1)

    def _codes(self, words: torch.Tensor) -> torch.Tensor:
        if self.how.bits == 8:
            return words
        codes = interleaved(words) if self.how.reorder else unpacked(words, 4, 1)
        return codes if self.how.kind == "uint4" else (codes ^ 8) - 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = x.dtype
        if self.activation is not None:
            low, high = self.activation
            zero = self.input_quantizer.zero_point.to(torch.int32).reshape(1)
            scale = self.input_quantizer.scale.float().reshape(1)
            x = torch.fake_quantize_per_tensor_affine(x.float(), scale, zero, low, high).to(given)
        bias = None if self.bias is None else self.bias.to(given)
        return nn.functional.linear(x, self.dequantized(x), bias)


TOOL = Tool("quark", _read)
