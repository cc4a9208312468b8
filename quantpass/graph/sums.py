"""Sums of a matrix of integers along a dimension, without the wider copy that PyTorch makes of the whole."""

from __future__ import annotations

from typing import Any

import torch

_ELEMENTS = 1 << 17


def summed(matrix: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """``matrix.sum(dim, dtype=dtype)`` of integers ``(R, C)``, some of what lies together in memory at a time.

    Args:
        matrix: int8, int16, int32 or uint8.
        dim: 0 or 1.
        dtype: int32 or int64; what does not fit wraps around, as in PyTorch.
    """
    if matrix.stride(0) < matrix.stride(1):
        matrix, dim = matrix.t(), 1 - dim
    parts = matrix.split(max(1, _ELEMENTS // max(1, matrix.shape[1])))
    if dim == 0:
        total = torch.zeros(matrix.shape[1], dtype=dtype)
        for part in parts:
            total += part.sum(0, dtype=dtype)
        return total
    # Into memory that is there: small results between PyTorch's wider copies would keep these from being used again.
    found = torch.empty(matrix.shape[0], dtype=dtype)
    for part, own in zip(parts, found.split(max(1, len(parts[0]))), strict=True):
        torch.sum(part, 1, dtype=dtype, out=own)
    return found


def large_sum(bound: dict[str, Any]) -> torch.Tensor | None:
    """What ``aten.sum.dim_IntList`` makes of its arguments where that is such a sum; None where it is not."""
    matrix, dims, dtype = bound["self"], bound["dim"], bound["dtype"] or torch.int64
    if matrix.dim() != 2 or matrix.numel() <= _ELEMENTS or dims is None or len(dims) != 1:
        return None
    narrow = matrix.dtype in (torch.int8, torch.uint8, torch.int16, torch.int32)
    if not narrow or dtype not in (torch.int32, torch.int64):
        return None
    found = summed(matrix, dims[0] % 2, dtype)
    return found.unsqueeze(dims[0] % 2) if bound["keepdim"] else found
