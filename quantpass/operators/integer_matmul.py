"""Exact matmul of int8 tensors with int32 accumulation."""

from __future__ import annotations

from functools import cache

import torch


def int_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` of int8 tensors as int32; leading dimensions broadcast.

    The cube's accumulator can't overflow: K <= 65535 keeps sums below 2^31.
    """
    # PyTorch 2.13's _int_mm leaves its result unwritten where K is 1 and b is a transposed view.
    if a.dim() == b.dim() == 2 and a.numel() and b.numel() and a.shape[1] > 1 and _int_mm_is_exact():
        return torch._int_mm(rows_apart(a), b)
    # Products are at most 2^14 in size: float64 holds any sum of 65535 of them exactly.
    return torch.matmul(a.to(torch.float64), b.to(torch.float64)).to(torch.int32)


def rows_apart(matrix: torch.Tensor) -> torch.Tensor:
    """``matrix``, contiguous, with the strides of a contiguous one.

    A single row may have any stride from row to row, and PyTorch 2.13's _int_mm multiplies something else where it is
    1, as in the view ``(K, 1).t()``.
    """
    dense = matrix.contiguous()
    return dense.view(-1).view(dense.shape)


@cache
def _int_mm_is_exact() -> bool:
    """Some CPUs add pairs of products in 16 bits and saturate; extreme operands show it."""
    signs = torch.where(torch.arange(64 * 64).reshape(64, 64) % 3 == 0, 127, -128).to(torch.int8)
    worst = torch.full((64, 64), -128, dtype=torch.int8)
    pairs = ((x, y) for x in (signs, worst) for y in (signs, worst))
    return all(torch.equal(torch._int_mm(x, y).double(), x.double() @ y.double()) for x, y in pairs)
