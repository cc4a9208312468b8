"""NVIDIA modelopt's Linears: a float or compressed weight between quantizers that hold largest magnitudes.

Semantics (0.47): ``nn/modules/tensor_quantizer.py`` and ``tensor_quant.py``: with ``rate = high / amax`` in float32, a
value becomes ``clamp(round(x * rate), low, high) / rate``; ``amax`` has one element, one for each row of the weight, or
in blocks along K one for each. ``compress`` leaves int8 codes and ``_scale`` (``qtensor/int8_tensor.py``):
``codes * scale`` in the weight's former dtype. A quantizer's ``_pre_quant_scale`` multiplies the input first, also
where the quantizer is off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantpass.adoption.plain import PlainLinear, share
from quantpass.adoption.rounding import quantized_by_amax
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
    nothing_else,
)

_QUANTIZERS = ("input_quantizer", "output_quantizer", "weight_quantizer")
_LEAST = 2.0**-24
"""Magnitudes up to this one are taken for 0 by the tool."""


def _read(module: nn.Module, allowed: Allowances) -> Found | None:
    del allowed
    quantizers = [module._modules.get(name) for name in _QUANTIZERS]
    if not all(hasattr(q, "_num_bits") and hasattr(q, "_disabled") for q in quantizers):
        return None
    given, result, held = quantizers
    weight = module._parameters.get("weight")
    if _off(held) or weight is None:
        return None
    if not isinstance(module, nn.Linear):
        raise CannotAdopt("it is no Linear")
    nothing_else(module, children=_QUANTIZERS)
    if not _off(result) or _buffer(result, "_pre_quant_scale") is not None:
        raise CannotAdopt("its output is rounded too (output_quantizer)")
    n, k = module.out_features, module.in_features
    bits = _bits(held)
    if _buffer(held, "_pre_quant_scale") is not None:
        raise CannotAdopt("its weight is scaled before it is rounded (pre_quant_scale)")
    metadata = getattr(weight, "metadata", None)
    if metadata is None:
        check(module, {"weight": Row(FLOATS, ((n, k),)), "bias": bias_row(n)})
        group, dtype = _spread(held, n, k), weight.dtype
    else:
        group, dtype = _compressed(module, held, metadata, n, k)
    words = as_words(bits, group, k, True)
    low, high = _range(given)
    if not _off(given):
        if _bits(given) != 8:
            raise CannotAdopt(f"its activation has {_bits(given)} bits; read: 8")
        _magnitudes(given, ((), (1,), (1, 1), (1, 1, 1)))
        words += ", int8 activation, static"
    plain = _ModeloptLinear(module, words, (k, n), dtype, group, _range(held), None if _off(given) else (low, high))
    return Found(plain, dtype, module)


def _off(quantizer: Any) -> bool:
    return bool(quantizer._disabled) or not quantizer._if_quant


def _bits(quantizer: Any) -> int:
    """The width of the codes of a quantizer whose way of rounding is known."""
    bits = quantizer._num_bits
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise CannotAdopt(f"its quantizer has num_bits {bits}, which are no integers of 2 to 8 bits")
    odd = [k for k in ("_unsigned", "_dynamic", "_if_calib", "_rotate") if getattr(quantizer, k, False)]
    if odd or getattr(quantizer, "backend", None) is not None or _buffer(quantizer, "_bias_value") is not None:
        raise CannotAdopt(f"its quantizer is more than a scale: {', '.join(odd) or 'backend or bias'}")
    return bits


def _range(quantizer: Any) -> tuple[int, int]:
    high = int(2 ** (quantizer._num_bits - 1) - 1) if isinstance(quantizer._num_bits, int) else 0
    return (-high if quantizer._narrow_range else -high - 1), high


def _buffer(quantizer: Any, name: str) -> torch.Tensor | None:
    held = quantizer._buffers.get(name)
    return held if isinstance(held, torch.Tensor) else None


def _magnitudes(quantizer: Any, shapes: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    check(quantizer, {"_amax": Row(FLOATS, shapes)})
    amax: torch.Tensor = quantizer._amax
    if not bool((amax > _LEAST).all()):
        raise CannotAdopt("a largest magnitude is 0 (its _amax)")
    return amax


def _spread(held: Any, n: int, k: int) -> int:
    """How many columns share a scale: K, a block, or 0 for one scale in all."""
    if held._block_sizes is None:
        amax = _magnitudes(held, ((n, 1), (n,), (), (1,), (1, 1)))
        return k if amax.numel() == n and amax.dim() else 0
    block = held._block_sizes.get(-1)
    if held._block_sizes.get("type", "static") != "static" or set(held._block_sizes) - {-1, "type"} or not block:
        raise CannotAdopt(f"its weight's blocks are {held._block_sizes}; read: static ones along K")
    if k % block:
        raise CannotAdopt(f"its blocks of {block} do not divide {k} columns")
    _magnitudes(held, ((n * (k // block), 1),))
    return int(block)


def _compressed(module: nn.Module, held: Any, metadata: Any, n: int, k: int) -> tuple[int, torch.dtype]:
    check(module, {"weight": Row((torch.int8,), ((n, k),)), "bias": bias_row(n)})
    if tuple(metadata["shape"]) != (n, k) or held._block_sizes is not None:
        raise CannotAdopt(f"its compressed weight is {tuple(metadata['shape'])} in blocks {held._block_sizes}")
    check(held, {"_scale": Row(FLOATS, ((n, 1), (), (1,), (1, 1)))})
    return (0 if held._scale.numel() == 1 else k), metadata["dtype"]


class _ModeloptLinear(PlainLinear):
    weight: torch.Tensor
    input_quantizer: Any
    weight_quantizer: Any

    def __init__(
        self,
        module: nn.Linear,
        scheme: str,
        sizes: tuple[int, int],
        dtype: torch.dtype,
        group: int,
        codes: tuple[int, int],
        activation: tuple[int, int] | None,
    ) -> None:
        super().__init__(module, "modelopt", scheme, ("bias",), sizes)
        weight = module._parameters["weight"]
        assert weight is not None  # the table asked for it
        share(self, "weight", weight if type(weight) is nn.Parameter else weight.data.as_subclass(torch.Tensor))
        for name in ("input_quantizer", "weight_quantizer"):
            child = nn.Module()  # under its name, so that the state dict keeps its keys
            for key in ("_amax", "_scale", "_pre_quant_scale"):
                child.register_buffer(key, _buffer(module._modules[name], key))
            self.add_module(name, child)
        if not getattr(module.input_quantizer, "_enable_pre_quant_scale", True):
            self.input_quantizer._pre_quant_scale = None
        self.dtype, self.group, self.codes, self.activation = dtype, group, codes, activation

    def dequantized(self, x: torch.Tensor) -> torch.Tensor:
        del x  # the weight has its own dtype
        if not self.weight.is_floating_point():
            scale: torch.Tensor = self.weight_quantizer._scale
            return self.weight.to(self.dtype) * scale.to(self.dtype)
        amax, weight = self.weight_quantizer._amax, self.weight
        if 0 < self.group < self.in_features:
            weight = weight.reshape(-1, self.group)
        elif self.group:
            amax = amax.reshape(-1, 1)
        return quantized_by_amax(weight, amax, *self.codes).reshape(-1, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        smooth = self.input_quantizer._pre_quant_scale
        if smooth is not None:
            x = x * smooth
        if self.activation is not None:
            x = quantized_by_amax(x, self.input_quantizer._amax.reshape(()), *self.activation)
        return nn.functional.linear(x, self.dequantized(x), self.bias)


TOOL = Tool("modelopt", _read)
