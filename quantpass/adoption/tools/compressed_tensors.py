"""compressed-tensors: llm-compressor's checkpoints as transformers loads them.

Semantics (0.20.0): ``quantization/lifecycle/forward.py`` and ``forward_helpers.py``, ``compressors/pack_quantized`` and
``naive_quantized``. A Linear carries ``quantization_scheme`` and ``quantization_status`` and is in one of three states:

* compressed: ``weight`` int8 ``(N, K)``, or ``weight_packed`` int32 ``(N, ceil(K * bits / 32))`` of codes plus
  ``2^(bits - 1)``; ``weight_scale``, and where asymmetric ``weight_zero_point``, packed along N beside packed codes.
  The model's first forward would decompress it;
* frozen: ``weight`` is a float, rounded in each forward;
* decompressed: ``weight`` is a float and has been rounded.

``w = (codes - zero) * scale`` in the dtype of the scale; what activations are rounded to is in :mod:`rounding`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn

from quantpass.adoption.codes import unpacked
from quantpass.adoption.plain import PlainLinear, share
from quantpass.adoption.rounding import quantized_by_scale
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

_COMPRESSED, _FROZEN, _DECOMPRESSED = "compressed", "frozen", "decompressed"
_NAMES = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "bias")
_INPUT = ("input_scale", "input_zero_point")
_ZEROS = (torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32)


def table(n: int, k: int, bits: int, groups: int, packed: bool, compressed: bool) -> dict[str, Row]:
    """The tensors of a weight of these sizes; ``groups`` is 0 for one scale of the whole weight."""
    scales = ((n, groups),) if groups > 1 else ((n, 1), (n,)) if groups else ((1,), (), (1, 1))
    zeros = ((-(-n * bits // 32), groups),) if packed and groups else scales
    if packed:
        codes = {"weight_packed": Row((torch.int32,), ((n, -(-k * bits // 32)),))}
    else:
        codes = {"weight": Row((torch.int8,) if compressed else FLOATS, ((n, k),))}
    return {
        **codes,
        "weight_scale": Row(FLOATS, scales),
        "weight_zero_point": Row((torch.int32,) if packed and groups else _ZEROS, zeros, optional=True),
        "bias": bias_row(n),
    }


def _read(module: nn.Module, allowed: Allowances) -> Found | None:
    del allowed
    scheme, status = getattr(module, "quantization_scheme", None), getattr(module, "quantization_status", None)
    weights = getattr(scheme, "weights", None)
    if weights is None or status is None or not isinstance(getattr(module, "weight_scale", None), torch.Tensor):
        return None
    if not isinstance(module, nn.Linear):
        raise CannotAdopt("it is no Linear")
    state = _word(status)
    if state not in (_COMPRESSED, _FROZEN, _DECOMPRESSED):
        raise CannotAdopt(f"it is still {state}: its scales are not final")
    if getattr(module, "quantization_enabled", True) is not True:
        raise CannotAdopt("its quantization is switched off (quantization_enabled)")
    nothing_else(module)
    n, k = module.out_features, module.in_features
    bits, groups = _weight_scheme(weights, k)
    packed = isinstance(getattr(module, "weight_packed", None), torch.Tensor)
    if packed and state != _COMPRESSED:
        raise CannotAdopt(f"it holds weight_packed and is {state}")
    if packed and bits not in (2, 4, 8):
        raise CannotAdopt(f"{bits} bits, packed across words; read: 2, 4, 8")
    symmetric = bool(weights.symmetric)
    check(module, table(n, k, bits, groups, packed, state == _COMPRESSED))
    if not symmetric and getattr(module, "weight_zero_point", None) is None:
        raise CannotAdopt("its scheme is asymmetric and it has no weight_zero_point")
    words = as_words(bits, k // groups if groups else 0, k, symmetric)
    activation = _activation(module, scheme)
    if activation is not None:
        words += f", {activation.words}"
    plain = _CompressedLinear(module, words, bits, groups, state, symmetric, activation)
    if state == _DECOMPRESSED and not torch.equal(plain.dequantized(plain.weight_scale), module.weight):
        raise CannotAdopt(
            "it is decompressed, and its weight is no longer (codes - zero) * scale: adopt before it runs"
        )
    return Found(plain, plain.weight_scale.dtype, _Own(module))


def _weight_scheme(weights: Any, k: int) -> tuple[int, int]:
    """Bits, and how many scales there are along K; 0 for one scale in all."""
    kind, strategy, bits = _word(weights.type), _word(weights.strategy), weights.num_bits
    if kind != "int" or not 2 <= bits <= 8:
        raise CannotAdopt(f"its weight is {kind}{bits}; read: int2 to int8")
    if weights.dynamic:
        raise CannotAdopt("its weight's scales are found at run time")
    if strategy == "tensor":
        return bits, 0
    if strategy == "channel":
        return bits, 1
    if strategy == "group" and weights.group_size and weights.group_size > 0 and k % weights.group_size == 0:
        return bits, k // weights.group_size
    raise CannotAdopt(f"its weight's strategy is {strategy} (group_size {weights.group_size}) over {k} columns")


class _Activation:
    """How the input is rounded: ``strategy`` is ``"static"``, ``"tensor"`` or ``"token"``."""

    def __init__(self, strategy: str, bits: int, symmetric: bool) -> None:
        self.strategy, self.symmetric = strategy, symmetric
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        spread = {"static": "static", "tensor": "dynamic per tensor", "token": "dynamic per token"}[strategy]
        self.words = f"int{bits} activation, {spread}{'' if symmetric else ', asymmetric'}"


def _activation(module: nn.Module, scheme: Any) -> _Activation | None:
    if scheme.output_activations is not None:
        raise CannotAdopt("its output is rounded too (output_activations)")
    args = scheme.input_activations
    if args is None:
        return None
    kind, strategy, bits = _word(args.type), _word(args.strategy), args.num_bits
    if kind != "int" or not 2 <= bits <= 8:
        raise CannotAdopt(f"its activation is {kind}{bits}; read: int2 to int8")
    if args.dynamic is True and strategy in ("tensor", "token") and args.scale_dtype is None:
        return _Activation(strategy, bits, bool(args.symmetric))
    if args.dynamic is False and strategy == "tensor":
        one = ((1,), (), (1, 1))
        check(module, {"input_scale": Row(FLOATS, one), "input_zero_point": Row(_ZEROS, one, args.symmetric)})
        return _Activation("static", bits, bool(args.symmetric))
    raise CannotAdopt(
        f"its activation's strategy is {strategy}, dynamic={args.dynamic}, scale_dtype={args.scale_dtype}"
    )


class _CompressedLinear(PlainLinear):
    weight: torch.Tensor
    weight_packed: torch.Tensor | None
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor | None
    input_scale: torch.Tensor
    input_zero_point: torch.Tensor | None

    def __init__(
        self,
        module: nn.Linear,
        scheme: str,
        bits: int,
        groups: int,
        state: str,
        symmetric: bool,
        activation: _Activation | None,
    ) -> None:
        sizes = (module.in_features, module.out_features)
        super().__init__(module, "compressed-tensors", scheme, _NAMES, sizes)
        if activation is not None and activation.strategy == "static":
            for name in _INPUT:
                share(self, name, getattr(module, name, None))
        self.bits, self.groups, self.state, self.symmetric = bits, groups, state, symmetric
        self.activation = activation

    def dequantized(self, x: torch.Tensor) -> torch.Tensor:
        del x  # the scale's dtype is the weight's
        k, scale = self.in_features, self.weight_scale
        shape = (-1, self.groups, k // self.groups) if self.groups > 1 else (-1, k)
        scale = scale.unsqueeze(-1) if self.groups > 1 or (self.groups and scale.dim() == 1) else scale
        zero = None if self.symmetric else self._zeros()
        zero = zero.reshape(scale.shape) if zero is not None else None
        if self.state == "frozen":
            low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
            return quantized_by_scale(self.weight.reshape(shape), scale, zero, low, high).reshape(-1, k)
        codes = self._codes(shape, scale, zero).to(scale.dtype)
        if zero is not None:
            codes = codes - zero.to(scale.dtype)
        return (codes * scale).reshape(-1, k)

    def _codes(self, shape: tuple[int, ...], scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        half = 2 ** (self.bits - 1)
        if self.weight_packed is not None:
            codes: torch.Tensor = unpacked(self.weight_packed, self.bits, 1)[:, : self.in_features] - half
            return codes.reshape(shape)
        if self.state == "compressed":
            return self.weight.reshape(shape)
        # Decompressed: in float32 each product of a code and its scale lies closest to its own code.
        codes = self.weight.float().reshape(shape) / scale.float()
        if zero is not None:
            codes = codes + zero.float()
        return torch.clamp(torch.round(codes), -half, half - 1)

    def _zeros(self) -> torch.Tensor:
        zero = self.weight_zero_point
        assert zero is not None  # an asymmetric scheme has it
        if self.weight_packed is not None and self.groups:
            zero = unpacked(zero, self.bits, 0)[: self.out_features] - 2 ** (self.bits - 1)
        return zero

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        how = self.activation
        if how is None:
            return x
        if how.strategy == "static":
            zero = None if how.symmetric else self.input_zero_point
            return quantized_by_scale(x, self.input_scale, zero, how.low, how.high)
        whole = how.strategy == "tensor" or x.dim() < 3  # as the tool has it: tokens are told apart from rank 3 on
        dims = tuple(range(x.dim())) if whole else tuple(range(2, x.dim()))
        low, high = torch.amin(x, dims, keepdim=True), torch.amax(x, dims, keepdim=True)
        low, high = torch.clamp(low, max=0), torch.clamp(high, min=0)
        span = how.high - how.low
        if how.symmetric:
            scale, zero = torch.maximum(torch.abs(low), torch.abs(high)) / (span / 2), None
        else:
            scale = (high - low) / span
            zero = torch.round(torch.clamp(how.low - low / scale, how.low, how.high)).to(torch.int8)
        scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
        return quantized_by_scale(x, scale, zero, how.low, how.high)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self._rounded(x), self.dequantized(x), self.bias)


class _Own:
    """The tool's own output: decompressed as its first forward would, on a copy."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module: Any = copy_of(self._module)
        if _word(module.quantization_status) == _COMPRESSED:
            package = type(module.quantization_scheme).__module__.partition(".")[0]
            import_module(f"{package}.compressors.base").decompress_module(module)
        return module(x)  # type: ignore[no-any-return]


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))


def _without_decompression(model: nn.Module) -> Callable[[], None] | None:
    """Take away the hook that decompresses what is compressed at the first forward, where nothing is left to do.

    Such a hook is no part of a graph. Returns what puts it back.
    """
    if any(_still_compressed(m) for m in model.modules()):
        return None
    undone = []
    for module in model.modules():
        handle: Any = getattr(module, "ct_decompress_hook", None)
        hook = module._forward_pre_hooks.pop(handle.id, None) if handle is not None else None
        if hook is not None:
            undone.append((module, handle.id, hook))

    def put_back() -> None:
        for module, key, hook in undone:
            module._forward_pre_hooks[key] = hook

    return put_back if undone else None


def _still_compressed(module: nn.Module) -> bool:
    scheme = getattr(module, "quantization_scheme", None)
    return (
        getattr(scheme, "weights", None) is not None
        and _word(getattr(module, "quantization_status", "")) == _COMPRESSED
    )


TOOL = Tool("compressed-tensors", _read, _without_decompression)
