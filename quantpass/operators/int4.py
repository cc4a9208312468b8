"""int4 packed in int32: element i of the last axis in bits 4i to 4i+3, two's complement.

Source: npu_convert_weight_to_int4pack.md; ``ConvertWeightToINT4PackKernelNpuOpApi.cpp:50-65``.
"""

from __future__ import annotations

import torch

from quantpass.operators.arguments import require

_SHIFTS = (0, 4, 8, 12, 16, 20, 24, 28)


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """``(..., C)`` integers in [-8, 7] to ``(..., C / 8)`` int32.

    Raises:
        ValueError: C is not a multiple of 8, or a code does not fit.
    """
    require(
        codes.shape[-1] % 8 == 0,
        f"pack_int4: the last dimension is {codes.shape[-1]}; it must be a multiple of 8",
        "int4pack.last",
    )
    if codes.numel():
        low, high = int(codes.min()), int(codes.max())
        require(low >= -8 and high <= 7, f"pack_int4: codes lie in [{low}, {high}]; int4 holds [-8, 7]")
    nibbles = (codes.to(torch.int64) & 0xF).reshape(*codes.shape[:-1], -1, 8)
    shifts = torch.tensor(_SHIFTS, dtype=torch.int64, device=codes.device)
    word = (nibbles << shifts).sum(dim=-1)
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """``(..., C / 8)`` int32 to ``(..., C)`` int8 in [-8, 7]."""
    shifts = torch.tensor(_SHIFTS, dtype=torch.int32, device=packed.device)
    nibbles = ((packed.unsqueeze(-1) >> shifts) & 0xF).to(torch.int8)
    return ((nibbles ^ 8) - 8).flatten(-2)
