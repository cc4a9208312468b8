"""``LinearWeightQuant`` and ``LinearQuant`` of torch_npu.contrib.module, anywhere.

Signatures, defaults, variables, shapes and dtypes are those of the two module documents (LinearWeightQuant.md,
LinearQuant.md), including the arguments that the module in torch_npu 2.13.0 lacks. The forward emits quantpass's
fused operators: it runs eagerly on a CPU, under ``torch.compile``, and on an NPU. Every constraint of the documents is
checked and named by its rule (in eager mode; a compiler sees the operator alone).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from quantpass.basics.tensor_spec import TensorSpec
from quantpass.chips import chip_named
from quantpass.chips.calls import OpCall
from quantpass.chips.legality import Verdict, judge
from quantpass.chips.quant_matmul import QMM
from quantpass.chips.weight_quant_matmul import WQMM
from quantpass.operators.operator import vendor_call

ops = torch.ops.quantpass


__all__ = ["LinearQuant", "LinearWeightQuant"]


class _QuantizedLinear(nn.Module):
    """What the two modules share: parameters that are meant to be replaced, and constraints that are checked."""

    in_features: int
    out_features: int
    weight: nn.Parameter

    def _parameter(
        self, name: str, wanted: bool, *shape: int, dtype: torch.dtype | None = None, device: Any = None
    ) -> None:
        tensor = torch.empty(shape, dtype=dtype, device=device) if wanted else None
        self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # A quantized module's variables have the dtype and shape of what is assigned, not of what was made.
        for name, parameter in self._parameters.items():
            given = state_dict.get(prefix + name)
            if parameter is None or not isinstance(given, torch.Tensor):
                continue
            if (given.dtype, given.shape) != (parameter.dtype, parameter.shape):
                parameter.data = torch.empty_like(given, device=parameter.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """``in_features=..., out_features=...`` and the weight's dtype."""
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={self.weight.dtype}"


def _spec(value: Any) -> Any:
    return TensorSpec(value.dtype, tuple(value.shape)) if isinstance(value, torch.Tensor) else value


def _require(verdict: Verdict, module: str) -> None:
    if not verdict.legal:
        broken = "\n".join(f"  {r}" + (f" [{r.doc}]" if r.doc else "") for r in verdict.rejects)
        raise ValueError(f"{module}: this call breaks\n{broken}")


class LinearWeightQuant(_QuantizedLinear):
    """``y = x @ ((weight + antiquant_offset) * antiquant_scale).T + bias``, possibly quantized to int8.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias.
        device: where the parameters are made.
        dtype: dtype of the input x; kept for reference, as in the vendor's module.
        antiquant_offset: whether the weight has an offset (minus its zero point).
        quant_scale: whether the output is quantized.
        quant_offset: whether the output's quantization has an offset; needs ``quant_scale``.
        antiquant_group_size: 0, or a multiple of 32 in [32, K-1].
        inner_precise: 0 for precision, 1 for speed (int4 weight in FRACTAL_NZ, per group, M <= 16).
        weight_dtype: kept for the signature of torch_npu 2.13.0; must be None.

    Variables, to be assigned through ``.data``: weight (N, K) int8, or (N, K/8) int32 with eight int4 each;
    antiquant_scale and antiquant_offset (N,), (N, 1), (1,) or, with groups, (N, ceil(K / group)); quant_scale (1, N),
    (N,) or (1,) float32 or int64; quant_offset the same, float32; bias (N,) or (1, N), float16 for float16 x and
    float32 for bfloat16 x.

    Source: LinearWeightQuant.md.
    """

    weight: nn.Parameter
    antiquant_scale: nn.Parameter
    antiquant_offset: nn.Parameter | None
    quant_scale: nn.Parameter | None
    quant_offset: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        antiquant_offset: bool = False,
        quant_scale: bool = False,
        quant_offset: bool = False,
        antiquant_group_size: int = 0,
        inner_precise: int = 0,
        weight_dtype: None = None,
    ) -> None:
        super().__init__()
        if quant_offset and not quant_scale:
            raise ValueError(
                "LinearWeightQuant: quant_offset=True needs quant_scale=True (LinearWeightQuant.md, constraints)"
            )
        if weight_dtype is not None:
            raise ValueError(
                f"LinearWeightQuant: weight_dtype is {weight_dtype}; only None (int8, or int4 in int32) is known"
            )
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self._parameter("weight", True, out_features, in_features, device=device)
        self._parameter("antiquant_scale", True, out_features, device=device)
        self._parameter("antiquant_offset", antiquant_offset, out_features, device=device)
        self._parameter("quant_scale", quant_scale, out_features, device=device)
        self._parameter("quant_offset", quant_offset, out_features, device=device)
        self._parameter("bias", bias, out_features, device=device)
        self.antiquant_group_size, self.inner_precise = antiquant_group_size, inner_precise
        self.weight_dtype = weight_dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the module.

        Args:
            x: (M, K), float16 or bfloat16.

        Returns:
            (M, N) in the dtype of x, or int8 with a ``quant_scale``.

        Raises:
            ValueError: a constraint of the document is broken; the message names the rule.
        """
        if not torch.compiler.is_compiling():
            _require(judge(self.call(x), chip_named("ascend910b"), _DOCUMENTED), "LinearWeightQuant")
        return ops.weight_quant_matmul(**self._arguments(x))  # type: ignore[no-any-return]

    def _arguments(self, x: torch.Tensor) -> dict[str, Any]:
        return {
            "x": x,
            "weight": self.weight,
            "antiquant_scale": _column_major(self.antiquant_scale),
            "antiquant_offset": _column_major(self.antiquant_offset),
            "quant_scale": self.quant_scale,
            "quant_offset": self.quant_offset,
            "bias": self.bias,
            "antiquant_group_size": self.antiquant_group_size,
            "inner_precise": self.inner_precise,
            "transpose_weight": True,
        }

    def call(self, x: torch.Tensor, *, mode: str = "eager") -> OpCall:
        """The operator call that the forward makes, for :func:`quantpass.chips.legality.judge`."""
        return vendor_call(WQMM, self._arguments(x), mode, _spec)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        bits: int = 8,
        granularity: str = "channel",
        group_size: int = 0,
        symmetric: bool = True,
    ) -> LinearWeightQuant:
        """Quantize a float ``nn.Linear``.

        Args:
            linear: float16 or bfloat16.
            bits: 8 or 4; int4 is packed eight to an int32 along K.
            granularity: ``"tensor"``, ``"channel"`` or ``"group"``.
            group_size: rows of K that share a scale, with ``"group"``.
            symmetric: without an offset; otherwise with one, ``-zero_point``.
        """
        if linear.weight.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"from_linear: the weight is {linear.weight.dtype}; the operator takes float16 or bfloat16"
            )
        codes, scale, zero = quantize_weight(
            linear.weight.detach(), bits=bits, granularity=granularity, group_size=group_size, symmetric=symmetric
        )
        n, k = linear.weight.shape
        group = group_size if granularity == "group" else 0
        dtype = linear.weight.dtype
        module = cls(
            k, n, bias=linear.bias is not None, dtype=dtype, antiquant_offset=not symmetric, antiquant_group_size=group
        )
        module.weight.data = ops.pack_int4(codes) if bits == 4 else codes
        # (1,) for a whole tensor: repeated, since per channel is legal wherever per tensor is.
        shape = (n, -1) if group else (n,)
        module.antiquant_scale.data = scale.expand(n, -1).reshape(shape).to(dtype).contiguous()
        if zero is not None and module.antiquant_offset is not None:
            module.antiquant_offset.data = (-zero).expand(n, -1).reshape(shape).to(dtype).contiguous()
        if linear.bias is not None and module.bias is not None:
            module.bias.data = linear.bias.detach().to(torch.float16 if dtype == torch.float16 else torch.float32)
        return module


class LinearQuant(_QuantizedLinear):
    """int8 x int8 or int4 x int4, dequantized and possibly quantized again: ``npu_quant_matmul`` as a module.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias.
        offset: whether the output's quantization has an offset (int8 output only).
        pertoken_scale: whether x has a scale for each row.
        device: where the parameters are made (torch_npu 2.13.0's signature).
        dtype: kept for torch_npu 2.13.0's signature.
        output_dtype: int8 (also None), float16, bfloat16 or int32.
        x1_dtype: what x holds, to be checked: int8, or int32 or quint4x2 for packed int4; None takes x as it comes.
        x2_dtype: what the weight holds, likewise.
        group_size: ``[gm, gn, gk]``, the ``group_sizes`` of ``npu_quant_matmul``: ``gk`` rows of K share a scale (the
            scale is then ``(K / gk, N)``). LinearQuant.md names the argument and says nothing of it; the newer
            npu_quant_matmul.md does (docs/semantics.md, section 1).

    Variables, to be assigned through ``.data``: weight (..., N, K) int8, or (N, K/8) int32 with eight int4 each; scale
    (1,) or (N,) float32, bfloat16 or int64; offset (1,) or (N,) float32; pertoken_scale (M,) float32; bias (N,) or
    (batch, 1, N), int32 or floating.

    Source: LinearQuant.md.
    """

    weight: nn.Parameter
    scale: nn.Parameter
    offset: nn.Parameter | None
    pertoken_scale: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        offset: bool = False,
        pertoken_scale: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        output_dtype: torch.dtype | None = None,
        x1_dtype: torch.dtype | None = None,
        x2_dtype: torch.dtype | None = None,
        group_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("x1_dtype", x1_dtype), ("x2_dtype", x2_dtype)):
            if value is not None and value not in _CARRIERS:
                raise ValueError(f"LinearQuant: {name} is {value}; accepted: None, {', '.join(map(str, _CARRIERS))}")
        if group_size is not None and len(group_size) != 3:
            raise ValueError(f"LinearQuant: group_size is {group_size}; it must be None or [gm, gn, gk]")
        del dtype
        self.in_features, self.out_features, self.output_dtype = in_features, out_features, output_dtype
        self.x1_dtype, self.x2_dtype, self.group_size = x1_dtype, x2_dtype, group_size
        self._parameter("weight", True, out_features, in_features, device=device)
        self._parameter("scale", True, out_features, device=device)
        self._parameter("offset", offset, out_features, dtype=torch.float32, device=device)
        self._parameter("pertoken_scale", pertoken_scale, out_features, dtype=torch.float32, device=device)
        self._parameter("bias", bias, out_features, dtype=torch.int32, device=device)

    def forward(self, x1: torch.Tensor) -> torch.Tensor:
        """Apply the module.

        Args:
            x1: (..., M, K) int8, or (M, K/8) int32.

        Returns:
            (..., M, N) in ``output_dtype``.

        Raises:
            ValueError: a constraint of the document is broken; the message names the rule.
        """
        pair = (x1.dtype, self.weight.dtype)
        if pair not in ((torch.int8, torch.int8), (torch.int32, torch.int32)):
            raise ValueError(
                f"LinearQuant: input and weight are {pair[0]} and {pair[1]}; both int8 or both int32 (qmm.same_dtype)"
            )
        for name, said, is_ in (("x1_dtype", self.x1_dtype, pair[0]), ("x2_dtype", self.x2_dtype, pair[1])):
            if said is not None and _CARRIERS[said] != is_:
                raise ValueError(
                    f"LinearQuant: {name} is {said}, which comes as {_CARRIERS[said]}; the tensor is {is_}"
                )
        if not torch.compiler.is_compiling():
            _require(judge(self.call(x1), chip_named("ascend910b"), _DOCUMENTED), "LinearQuant")
        arguments = self._arguments(x1)
        if self._packs_scale():
            arguments |= {"scale": ops.trans_quant_param(self.scale, self.offset), "offset": None}
        return ops.quant_matmul(**arguments)  # type: ignore[no-any-return]

    def _arguments(self, x1: torch.Tensor) -> dict[str, Any]:
        return {
            "x1": x1,
            "x2": self.weight,
            "scale": self.scale,
            "offset": self.offset,
            "pertoken_scale": self.pertoken_scale,
            "bias": self.bias,
            "output_dtype": self.output_dtype or torch.int8,
            "group_sizes": self.group_size,
            "transpose_x2": True,
        }

    def _packs_scale(self) -> bool:
        word = self.output_dtype in (None, torch.int8, torch.float16)
        return self.scale.dtype == torch.float32 and self.pertoken_scale is None and word and not self.group_size

    def call(self, x1: torch.Tensor, *, mode: str = "eager") -> OpCall:
        """The operator call that the forward makes, for :func:`quantpass.chips.legality.judge`."""
        call = vendor_call(QMM, self._arguments(x1), mode, _spec)
        scale = call.tensor("scale")
        if scale is None or not self._packs_scale():
            return call
        return call.replaced(scale=TensorSpec(torch.int64, scale.shape))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        input_scale: float | None = None,
        bits: int = 8,
        granularity: str = "channel",
        output_dtype: torch.dtype = torch.float16,
    ) -> LinearQuant:
        """Quantize a float ``nn.Linear`` whose input will be quantized symmetrically.

        Args:
            linear: floating.
            input_scale: the static scale of the input's codes; None leaves a ``pertoken_scale`` to be assigned.
            bits: 8 or 4.
            granularity: ``"tensor"`` or ``"channel"``.
            output_dtype: float16 or bfloat16.
        """
        if output_dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"from_linear: output_dtype is {output_dtype}; it must be float16 or bfloat16")
        codes, scale, _ = quantize_weight(linear.weight.detach(), bits=bits, granularity=granularity)
        n, k = linear.weight.shape
        dynamic = input_scale is None
        module = cls(k, n, bias=linear.bias is not None, pertoken_scale=dynamic, output_dtype=output_dtype)
        module.weight.data = ops.pack_int4(codes) if bits == 4 else codes
        total = scale.reshape(-1).to(torch.float64) * (1.0 if input_scale is None else input_scale)
        module.scale.data = total.to(torch.float32)
        if linear.bias is not None and module.bias is not None:
            bias = linear.bias.detach()
            through_word = not dynamic and output_dtype == torch.float16
            module.bias.data = (
                (bias.double() / total).round().to(torch.int32) if through_word else bias.to(torch.float32)
            )
        return module


_DOCUMENTED = ("wqmm.nz.eager", "qmm.group")
"""A module does not know its mode, which is checked where a graph is compiled; ``group_size`` is asked for by name."""

_CARRIERS = {torch.int8: torch.int8, torch.int32: torch.int32, torch.quint4x2: torch.int32}
"""What a dtype of ``x1_dtype`` and ``x2_dtype`` comes in."""


def _column_major(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """(N, 1) or (N, groups) as (1, N) or (groups, N); a vector stays one."""
    return parameter.transpose(-1, -2) if parameter is not None and parameter.dim() == 2 else parameter


def quantize_weight(
    weight: torch.Tensor, *, bits: int = 8, granularity: str = "channel", group_size: int = 0, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Round a float weight (N, K) to ``real = (codes - zero_point) * scale``.

    Args:
        weight: floating, (N, K).
        bits: 8 or 4.
        granularity: ``"tensor"``, ``"channel"`` (one scale a row) or ``"group"``.
        group_size: columns that share a scale, with ``"group"``; must divide K.
        symmetric: zero_point is None, codes use [-127, 127] or [-7, 7]; otherwise all codes are used.

    Returns:
        codes int8 (N, K); scale float32 (1, 1), (N, 1) or (N, K / group); zero_point float32 of that shape, or None.
    """
    n, k = weight.shape
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}; accepted: 8, 4")
    if granularity not in ("tensor", "channel", "group"):
        raise ValueError(f"granularity is {granularity!r}; accepted: 'tensor', 'channel', 'group'")
    if granularity == "group" and (group_size <= 0 or k % group_size):
        raise ValueError(f"group_size is {group_size}; with granularity='group' it must divide K = {k}")
    rows = {"tensor": (1, n * k), "channel": (n, k), "group": (-1, group_size)}[granularity]
    blocks = weight.to(torch.float32).reshape(rows)
    high = 2 ** (bits - 1) - 1
    tiny = torch.finfo(torch.float16).tiny
    if symmetric:
        scale = (blocks.abs().amax(1, keepdim=True) / high).clamp(min=tiny)
        zero = None
        codes = (blocks / scale).round().clamp(-high, high)
    else:
        low_value, high_value = blocks.amin(1, keepdim=True).clamp(max=0), blocks.amax(1, keepdim=True).clamp(min=0)
        scale = ((high_value - low_value) / (2**bits - 1)).clamp(min=tiny)
        zero = (-high - 1 - low_value / scale).round()
        codes = (blocks / scale + zero).round().clamp(-high - 1, high)
    shape = {"tensor": (1, 1), "channel": (n, 1), "group": (n, -1)}[granularity]
    return codes.reshape(n, k).to(torch.int8), scale.reshape(shape), None if zero is None else zero.reshape(shape)
