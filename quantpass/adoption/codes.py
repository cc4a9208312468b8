"""Unpacking of codes, in operators that the readers of static weights know."""

from __future__ import annotations

import torch


def unpacked(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The codes in int32 words, little-endian, in ``[0, 2^bits)``.

    Args:
        words: ``(a, b)`` int32; along ``dim`` each holds ``32 / bits`` codes.
        bits: 2, 4 or 8.
        dim: 0 or 1.

    Returns:
        int32, ``32 / bits`` times as long along ``dim``.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    shifts = shifts.view(1, -1, 1) if dim == 0 else shifts.view(1, 1, -1)
    codes: torch.Tensor = (words.unsqueeze(dim + 1) >> shifts) & (2**bits - 1)
    a, b = words.shape
    return codes.reshape((-1, b) if dim == 0 else (a, -1))


_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of interleaved 4-bit codes the code of each column is."""


def interleaved(words: torch.Tensor) -> torch.Tensor:
    """The 4-bit codes in words ``(a, b)`` whose codes belong to the columns 0, 2, 4, 6, 1, 3, 5, 7: ``(a, 8 * b)``."""
    codes = unpacked(words, 4, 1)
    return codes.view(words.shape[0], -1, 8)[:, :, _COLUMNS].reshape(words.shape[0], -1)
