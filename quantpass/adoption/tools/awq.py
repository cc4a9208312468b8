"""AWQ's modules: AutoAWQ's WQLinear_GEMM, gptqmodel's AwqTorchLinear, and what holds the same.

Semantics: ``awq/modules/linear/gemm.py`` and ``awq/utils/packing_utils.py`` (0.2.7.post3),
``gptqmodel/nn_modules/qlinear/torch_awq.py`` (7.7.0): ``qweight`` int32 ``(K, N * bits / 32)``, ``qzeros`` int32
``(groups, N * bits / 32)``, ``scales`` ``(groups, N)``; at 4 bits the codes of a word belong to the columns 0, 2, 4,
6, 1, 3, 5, 7, at 8 bits to the next four; ``w[k, n] = (code[k, n] - zero[k / group, n]) * scales[k / group, n]``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn

from quantpass.adoption.codes import interleaved, unpacked
from quantpass.adoption.plain import PlainLinear
from quantpass.adoption.tables import (
    HALVES,
    Allowances,
    CannotAdopt,
    Found,
    Row,
    Tool,
    as_words,
    bias_row,
    check,
    copy_of,
    integer,
    nothing_else,
)

_NAMES = ("qweight", "qzeros", "scales", "bias")


def table(k: int, n: int, bits: int, group: int) -> dict[str, Row]:
    """The tensors of a module of these sizes."""
    return {
        "qweight": Row((torch.int32,), ((k, n * bits // 32),)),
        "qzeros": Row((torch.int32,), ((k // group, n * bits // 32),)),
        "scales": Row(HALVES, ((k // group, n),)),
        "bias": bias_row(n),
    }


def _read(module: nn.Module, allowed: Allowances) -> Found | None:
    del allowed
    if not all(isinstance(getattr(module, name, None), torch.Tensor) for name in _NAMES[:3]):
        return None
    if isinstance(getattr(module, "g_idx", None), torch.Tensor):
        return None
    own_name = "w_bit" if hasattr(module, "w_bit") else "bits"  # AutoAWQ's, gptqmodel's
    bits = integer(module, own_name, (4, 8))
    k, n, stated = (integer(module, name) for name in ("in_features", "out_features", "group_size"))
    group = k if stated == -1 else stated
    if group <= 0 or k % group or (n * bits) % 32:
        raise CannotAdopt(f"{k} x {n} with groups of {stated} does not fill whole words of {bits} bits")
    check(module, table(k, n, bits, group))
    nothing_else(module)
    if getattr(module, "adapter", None) is not None:
        raise CannotAdopt("it has an adapter (LoRA), which the exchanged module would not add: merge it first")
    half = own_name == "w_bit"
    if half and module.scales.dtype != torch.float16:
        raise CannotAdopt("its scales are bfloat16; the tool multiplies in float16")
    plain = _Awq(module, as_words(bits, group, k, False), (k, n), bits, group, half)
    return Found(plain, plain.scales.dtype, copy_of(module), _reference(module, bits, group))


def _reference(module: nn.Module, bits: int, group: int) -> Callable[[], torch.Tensor] | None:
    """The tool's own function, where the module's file has it."""
    own = getattr(sys.modules.get(type(module).__module__), "dequantize_gemm", None)
    if own is None:
        return None
    return lambda: own(module.qweight, module.qzeros, module.scales, bits, group).t()


class _Awq(PlainLinear):
    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor

    def __init__(
        self, module: nn.Module, scheme: str, sizes: tuple[int, int], bits: int, group: int, half: bool
    ) -> None:
        super().__init__(module, "AWQ", scheme, _NAMES, sizes)
        self.bits, self.group, self.half_only = bits, group, half

    def dequantized(self, x: torch.Tensor) -> torch.Tensor:
        codes, zeros = self._columns(self.qweight), self._columns(self.qzeros)
        shape = (-1, self.group, self.out_features)
        w = (codes.reshape(shape) - zeros.unsqueeze(1)) * self.scales.to(x.dtype).unsqueeze(1)
        return w.reshape(self.in_features, self.out_features).t()

    def _columns(self, words: torch.Tensor) -> torch.Tensor:
        return unpacked(words, 8, 1) if self.bits == 8 else interleaved(words)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = x.dtype
        if self.half_only or given not in HALVES:
            x = x.to(torch.float16)
        y = torch.matmul(x, self.dequantized(x).t())
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(given)


TOOL = Tool("AWQ", _read)
