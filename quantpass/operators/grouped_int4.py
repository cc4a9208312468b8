"""``npu_quant_matmul`` with ``group_sizes``: int4 weights whose scales change along K. Newer than LinearQuant.md."""

from __future__ import annotations

import torch

from quantpass.graph.scale_words import unpack_scale_word
from quantpass.operators.arguments import require


def int4_grouped(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    """A4W4 with a scale and a zero point for each group of K (newer than LinearQuant.md).

    ``y = pertoken_scale * sum_g scale_g * (a_g @ (b_g - offset_g))``; integer inside a group, float32 across groups.
    The offset is **subtracted** here, unlike everywhere else in the vendor's operators.

    Source: aclnnQuantMatmulV5.md:59-62; test_npu_quant_matmul.py, cpu_quant_matmul_a4w4_pergroup.
    """
    k, n = b.shape
    groups = _groups(k, group)
    _require_shape("scale", scale, (groups, n), "qmm.group.scale")
    _require_dtype("scale", scale, torch.float32)
    if offset is not None:
        _require_shape("offset", offset, (groups, n), "qmm.group.offset")
    y = torch.zeros((a.shape[0], n), dtype=torch.float32)
    for g in range(groups):
        rows = slice(g * group, (g + 1) * group)
        weight = b[rows].to(torch.int32)
        if offset is not None:
            weight = weight - offset[g].to(torch.int32)
        y = y + (a[:, rows].to(torch.float64) @ weight.to(torch.float64)).to(torch.float32) * scale[g]
    return y if pertoken_scale is None else y * _column(pertoken_scale, a.shape[0])


def int8_by_int4(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    """A8W4: int8 activation, int4 weight, int64 scale words for each group of K (newer than LinearQuant.md).

    The activation is split into int4 halves, ``hi = a // 16`` and ``lo = (a & 15) - 8``; each group's integer sums
    are scaled and accumulated in **float16**; ``y = (16 * hi_sum + lo_sum + offset) * pertoken_scale``. Since
    ``16 * hi + lo = a - 8``, the caller's ``offset`` has to hold ``8 * sum_k scale * b``.

    Source: test_npu_quant_matmul.py, a8w4_quant_golden.
    """
    k, n = b.shape
    groups = _groups(k, group)
    _require_shape("scale", scale, (groups, n), "qmm.group.scale")
    _require_dtype("scale", scale, torch.int64)
    factor, _ = unpack_scale_word(scale)
    high = torch.div(a.to(torch.int32), 16, rounding_mode="floor")
    low = (a.to(torch.int32) & 15) - 8
    sums = []
    for half in (high, low):
        total = torch.zeros((a.shape[0], n), dtype=torch.float16)
        for g in range(groups):
            rows = slice(g * group, (g + 1) * group)
            part = (half[:, rows].to(torch.float64) @ b[rows].to(torch.float64)).to(torch.float32) * factor[g]
            total = total + part.to(torch.float16)
        sums.append(total.to(torch.float32))
    y = sums[0] * 16 + sums[1]
    if offset is not None:
        _require_shape("offset", offset, (n,), "qmm.group.a8w4.offset")
        y = y + offset.to(torch.float32)
    return y if pertoken_scale is None else y * _column(pertoken_scale, a.shape[0])


def _groups(k: int, group: int) -> int:
    require(group > 0, f"quant_matmul: group_sizes[-1] is {group}; it must be positive")
    require(k % group == 0, f"quant_matmul: K = {k} is no multiple of the group size {group}")
    return k // group


def _require_shape(name: str, t: torch.Tensor, shape: tuple[int, ...], rule: str) -> None:
    require(tuple(t.shape) == shape, f"quant_matmul: {name} has shape {tuple(t.shape)}; it must be {shape}", rule)


def _require_dtype(name: str, t: torch.Tensor, dtype: torch.dtype) -> None:
    require(t.dtype == dtype, f"quant_matmul: {name} is {t.dtype}; it must be {dtype}")


def _column(pertoken_scale: torch.Tensor, m: int) -> torch.Tensor:
    shape = tuple(pertoken_scale.shape)
    require(shape in ((m,), (m, 1)), f"quant_matmul: pertoken_scale has shape {shape}; it must be ({m},) or ({m}, 1)")
    return pertoken_scale.to(torch.float32).reshape(m, 1)
