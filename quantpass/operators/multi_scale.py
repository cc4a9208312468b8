"""The multi-scale decomposition (MSD) templates of ``npu_weight_quant_batchmatmul``.

The weight stays integer; x is decomposed into integer planes relative to its largest element, so that the cube
multiplies integers: ``x / max = a1 / s1 + a2 / s2 (+ a3 / s3)``.
"""

from __future__ import annotations

import torch

from quantpass.operators.integer_matmul import int_matmul
from quantpass.operators.results import to_float

INT8_PLANES = (127.499, 2 * 127.499**2)
INT4_PLANES = (7.49, 7.49 * 14.98, 7.49 * 14.98**2)


def accumulated(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    group_size: int,
    planes: tuple[float, ...],
    fast: bool,
) -> torch.Tensor:
    """The accumulator of the multi-scale decomposition templates, ``(..., M, N)`` float32."""
    k = codes.shape[0]
    group = group_size or k
    total: torch.Tensor | None = None
    for start in range(0, k, group):
        rows = slice(start, min(start + group, k))
        part = _msd_group(x[..., rows].to(torch.float32), codes[rows], planes, fast and group_size > 0)
        if offset is not None:
            added = offset[start if offset.shape[0] > 1 else 0].to(torch.float32)
            part = part + x[..., rows].to(torch.float32).sum(-1, keepdim=True) * added
        part = part * scale[start if scale.shape[0] > 1 else 0].to(torch.float32)
        total = part if total is None else total + part
    assert total is not None
    return total


def _msd_group(x: torch.Tensor, codes: torch.Tensor, planes: tuple[float, ...], fast: bool) -> torch.Tensor:
    largest = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest == 0, 0.0, 1.0 / largest)
    # Short rows are divided, long ones multiplied by the reciprocal.
    u = x * inverse if x.shape[-1] >= 128 else torch.where(largest == 0, 0.0, x / largest)
    rest, result = u, torch.zeros((*x.shape[:-1], codes.shape[1]), dtype=torch.float16 if fast else torch.float32)
    for steps in planes:
        plane = _round_half_away(rest * steps)
        rest = rest - plane / steps
        product = int_matmul(plane.to(torch.int8), codes).to(torch.float32) / steps
        result = result + product.to(result.dtype)
    return result.to(torch.float32) * largest


def _round_half_away(t: torch.Tensor) -> torch.Tensor:
    return torch.sign(t) * torch.floor(t.abs() + 0.5)


def half_away(t: torch.Tensor, dtype: torch.dtype, saturate: bool) -> torch.Tensor:
    """Float32 to a 16-bit float with ties away from zero."""
    nearest = to_float(t, dtype, saturate)
    if dtype == torch.float32:
        return nearest
    tie = (nearest.to(torch.float64) - t.to(torch.float64)).abs() > 0
    away = torch.nextafter(nearest, torch.where(t >= 0, torch.inf, -torch.inf).to(dtype))
    middle = (nearest.to(torch.float64) + away.to(torch.float64)) / 2
    exactly = tie & (middle == t.to(torch.float64))
    return torch.where(exactly & torch.isfinite(away), away, nearest)
