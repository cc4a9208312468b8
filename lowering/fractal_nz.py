"""FRACTAL_NZ (format 29): the tiled storage that the matrix units read.

A stored matrix ``(..., R, C)`` becomes ``(..., ceil(C / C0), ceil(R / 16), 16, C0)``: tiles of 16 rows and C0 (32
bytes' worth of) columns, column of tiles by column of tiles, padded with zeros. Transposition does not enter: the
transposed weight of a 310P is the ``(N, K)`` matrix tiled, and a transposed view of it.

Source: npu_format_cast.md; FormatHelper.cpp:280; npu_format_cast_via_cpu.cpp:62-92,120-195.
"""

from __future__ import annotations

import torch

from quantpass.operators.arguments import require

ROWS = 16
"""Rows of a tile."""


def tile_columns(dtype: torch.dtype, *, packed_int4: bool = False) -> int:
    """Columns of a tile (C0).

    32 for int8, 16 for 16-bit floats. int32 and float32 get 16 from the vendor's cast; int32 that carries int4 needs 8
    (64 int4), which only ``npu_convert_weight_to_int4pack`` (or ``customize_dtype``) gives.
    """
    if packed_int4:
        require(dtype == torch.int32, f"tile_columns: packed int4 is carried by int32, not {dtype}")
        return 8
    sizes = {torch.int8: 32, torch.uint8: 32, torch.float16: 16, torch.bfloat16: 16, torch.int32: 16, torch.float32: 16}
    require(dtype in sizes, f"tile_columns: {dtype} has no FRACTAL_NZ form; accepted: {', '.join(map(str, sizes))}")
    return sizes[dtype]


def to_fractal_nz(x: torch.Tensor, columns: int | None = None) -> torch.Tensor:
    """``(..., R, C)`` to ``(..., ceil(C / C0), ceil(R / 16), 16, C0)``, zero padded.

    Args:
        x: matrix or batch of matrices.
        columns: C0; by default what the dtype has.
    """
    require(
        x.dim() >= 2, f"to_fractal_nz: rank {x.dim()}; a matrix has two dimensions (the vendor's cast leaves it in ND)"
    )
    c0 = columns or tile_columns(x.dtype)
    rows, cols = x.shape[-2:]
    padded = torch.nn.functional.pad(x, (0, -cols % c0, 0, -rows % ROWS))
    tiled = padded.reshape(*x.shape[:-2], padded.shape[-2] // ROWS, ROWS, padded.shape[-1] // c0, c0)
    return tiled.movedim(-2, -4).contiguous()


def from_fractal_nz(tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The inverse of :func:`to_fractal_nz`: the ``(..., rows, columns)`` matrix without its padding."""
    require(tiles.dim() >= 4, f"from_fractal_nz: rank {tiles.dim()}; tiles have four dimensions or more")
    c1, r1, r0, c0 = tiles.shape[-4:]
    fits = r0 == ROWS and -(-rows // ROWS) == r1 and -(-columns // c0) == c1
    require(fits, f"from_fractal_nz: tiles of shape {tuple(tiles.shape)} do not hold a ({rows}, {columns}) matrix")
    matrix = tiles.movedim(-4, -2).reshape(*tiles.shape[:-4], r1 * r0, c1 * c0)
    return matrix[..., :rows, :columns].contiguous()


def nz_bytes(shape: tuple[int, ...], dtype: torch.dtype, *, packed_int4: bool = False) -> int:
    """How many bytes the tiled form of a matrix takes."""
    c0 = tile_columns(dtype, packed_int4=packed_int4)
    rows, cols = shape[-2:]
    elements = (-(-cols // c0) * c0) * (-(-rows // ROWS) * ROWS)
    for size in shape[:-2]:
        elements *= size
    return elements * torch.empty((), dtype=dtype).element_size()


def pack_int4_nz(codes: torch.Tensor) -> torch.Tensor:
    """What ``npu_convert_weight_to_int4pack`` makes of a FRACTAL_NZ weight: packed along the last axis, C0 = 8.

    Args:
        codes: ``(K, N)`` integers in [-8, 7], N a multiple of 8.

    Returns:
        ``(ceil(N / 64), ceil(K / 16), 16, 8)`` int32, zero padded.
    """
    from quantpass.operators.int4 import pack_int4

    return to_fractal_nz(pack_int4(codes), columns=8)
