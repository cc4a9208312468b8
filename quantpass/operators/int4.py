"""int4 packed in int32: element i of the last axis in bits 4i to 4i+3, two's complement.

Source: npu_convert_weight_to_int4pack.md; ``ConvertWeightToINT4PackKernelNpuOpApi.cpp:50-65``.
"""

from __future__ import annotations

import torch

from quantpass.operators.arguments import require

_ELEMENTS = 1 << 19
"""How many codes to pack at a time."""

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
    packed = codes.new_empty((*codes.shape[:-1], codes.shape[-1] // 8), dtype=torch.int32)
    if not codes.numel():
        return packed
    rows, words = codes.reshape(-1, codes.shape[-1]), packed.view(-1, packed.shape[-1])
    step = max(1, _ELEMENTS // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        words[part] = _packed(rows[part])
    return packed


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Eight int8 codes at once, as the bytes of an int64: nibbles move together in three steps."""
    eight = codes.to(torch.int8, copy=True, memory_format=torch.contiguous_format).view(torch.int64)
    eight &= 0x0F0F0F0F0F0F0F0F
    for shift, mask in ((4, 0x00FF00FF00FF00FF), (8, 0x0000FFFF0000FFFF), (16, 0x00000000FFFFFFFF)):
        eight |= eight >> shift
        eight &= mask
    return torch.where(eight >= 1 << 31, eight - (1 << 32), eight).to(torch.int32)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """``(..., C / 8)`` int32 to ``(..., C)`` int8 in [-8, 7]."""
    shifts = torch.tensor(_SHIFTS, dtype=torch.int32, device=packed.device)
    nibbles = ((packed.unsqueeze(-1) >> shifts) & 0xF).to(torch.int8)
    return ((nibbles ^ 8) - 8).flatten(-2)
