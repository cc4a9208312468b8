"""GPTQ's modules: gptqmodel's TorchLinear and what holds the same.

Semantics: ``gptqmodel/nn_modules/qlinear/torch.py`` (7.7.0): ``qweight`` int32 ``(K * bits / 32, N)``, ``qzeros`` int32
``(groups, N * bits / 32)``, ``scales`` ``(groups, N)``, ``g_idx`` int32 ``(K,)``;
``w[k, n] = scales[g[k], n] * (code[k, n] - zero[g[k], n])``, ``y = x @ w``, then ``+ bias``. The zeros of
checkpoints in the older format are stored less one; the tool converts them when it loads (``qzero_format() == 2``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantpass.adoption.codes import unpacked
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

_NAMES = ("qweight", "qzeros", "scales", "g_idx", "bias")


def table(k: int, n: int, bits: int, group: int) -> dict[str, Row]:
    """The tensors of a module of these sizes."""
    groups = -(-k // group)
    return {
        "qweight": Row((torch.int32,), ((k * bits // 32, n),)),
        "qzeros": Row((torch.int32,), ((groups, n * bits // 32),)),
        "scales": Row(HALVES, ((groups, n),)),
        "g_idx": Row((torch.int32, torch.int64), ((k,),)),
        "bias": bias_row(n),
    }


def _read(module: nn.Module, allowed: Allowances) -> Found | None:
    del allowed
    if not all(isinstance(getattr(module, name, None), torch.Tensor) for name in _NAMES[:4]):
        return None
    if getattr(module, "bits", None) == 3:
        raise CannotAdopt("3 bits: the tool's own forward is captured as it is")
    bits = integer(module, "bits", (2, 4, 8))
    k, n, stated = (integer(module, name) for name in ("in_features", "out_features", "group_size"))
    group = k if stated == -1 else stated
    if group <= 0 or (k * bits) % 32 or (n * bits) % 32:
        raise CannotAdopt(f"{k} x {n} with groups of {stated} does not fill whole words of {bits} bits")
    check(module, table(k, n, bits, group))
    _plain_forward(module)
    g_idx: Any = module.g_idx
    groups = -(-k // group)
    if not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise CannotAdopt(f"its g_idx names groups from {int(g_idx.min())} to {int(g_idx.max())} of {groups}")
    ordered = k % group == 0 and torch.equal(g_idx.cpu().long(), torch.arange(k) // group)
    words = as_words(bits, group, k, False) + ("" if ordered else ", in order of activation size")
    own = copy_of(module)
    vars(own).pop("dequantize_weight", None)  # compiled: the copy unpacks as the class says
    plain = _Gptq(module, words, (k, n), bits, group, ordered)
    return Found(plain, plain.scales.dtype, own)


def _plain_forward(module: nn.Module) -> None:
    nothing_else(module)
    if getattr(module, "adapter", None) is not None:
        raise CannotAdopt("it has an adapter (LoRA), which the exchanged module would not add: merge it first")
    if getattr(module, "online_full_had", False) or getattr(module, "online_partial_had", False):
        raise CannotAdopt("it rotates its input (Hadamard)")
    stated = getattr(module, "qzero_format", None)
    if callable(stated) and stated() != 2 and not getattr(module, "REQUIRES_FORMAT_V2", False):
        raise CannotAdopt("its zero points are stored less one (format 1), which its own forward adds")


class _Gptq(PlainLinear):
    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor

    def __init__(
        self, module: nn.Module, scheme: str, sizes: tuple[int, int], bits: int, group: int, ordered: bool
    ) -> None:
        super().__init__(module, "GPTQ", scheme, _NAMES, sizes)
        self.bits, self.group, self.ordered = bits, group, ordered

    def dequantized(self, x: torch.Tensor) -> torch.Tensor:
        codes, zeros = unpacked(self.qweight, self.bits, 0), unpacked(self.qzeros, self.bits, 1)
        if self.ordered:
            shape = (-1, self.group, self.out_features)
            w = self.scales.unsqueeze(1) * (codes.reshape(shape) - zeros.unsqueeze(1))
        else:
            groups = self.g_idx.long()
            w = self.scales[groups] * (codes - zeros[groups])
        return w.reshape(self.in_features, self.out_features).to(x.dtype).t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.matmul(x, self.dequantized(x).t())
        return y if self.bias is None else y + self.bias.to(y.dtype)


TOOL = Tool("GPTQ", _read)
