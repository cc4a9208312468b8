"""The weight that the custom template of ``npu_weight_quant_batchmatmul`` multiplies by.

Block by block: what lies between the codes and the result stays in the cache.
"""

from __future__ import annotations

import torch

_BLOCK = 1 << 17
"""Elements of one block."""


def dequantized_to(
    dtype: torch.dtype,
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    group_size: int,
    rounded_to: torch.dtype,
) -> torch.Tensor:
    """``(codes + offset) * scale`` in the arithmetic for an x of ``rounded_to``, held in ``dtype``; ``(K, N)``.

    For a float16 x each operation is in float16, else in float32 and rounded once.

    Args:
        dtype: of the result; ``rounded_to`` or a wider one.
        codes: ``(K, N)`` int8, of any strides, which the result has as well.
        scale: ``(1, 1)`` or ``(1, N)``; with groups ``(ceil(K / group_size), N)``.
        offset: the same shape, or None.
        group_size: rows of K that share a scale; 0 for all.
        rounded_to: the dtype of x.
    """
    k, n = codes.shape
    work = torch.float16 if rounded_to == torch.float16 else torch.float32
    result = torch.empty_like(codes, dtype=dtype)
    columns = codes.stride(0) <= codes.stride(1)  # stored (N, K): a block is some columns, else some rows
    step = max(_BLOCK // max(k if columns else n, 1), 1)
    if group_size and not columns:
        step = max(step // group_size, 1) * group_size
    for start in range(0, n if columns else k, step):
        cut = (slice(None), slice(start, start + step)) if columns else (slice(start, start + step), slice(None))
        block = codes[cut].to(work)
        if offset is not None:
            block += _part(offset, start, step, columns, group_size, block).to(work)
        block *= _part(scale, start, step, columns, group_size, block).to(work)
        result[cut] = block.to(rounded_to)
    return result


def _part(
    parameter: torch.Tensor, start: int, step: int, columns: bool, group_size: int, block: torch.Tensor
) -> torch.Tensor:
    """What broadcasts against the block that begins at ``start``."""
    if columns:
        parameter = parameter[:, start : start + step] if parameter.shape[1] > 1 else parameter
    elif group_size:
        parameter = parameter[start // group_size : (start + step) // group_size]
    return parameter.repeat_interleave(group_size, dim=0)[: block.shape[0]] if group_size else parameter
