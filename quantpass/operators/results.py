"""How a matmul's accumulator becomes its result."""

from __future__ import annotations

import torch

from quantpass.graph.scale_words import pack_scale_word, unpack_scale_word

_FLOAT16_MAX = 65504.0


def scale_and_offset(scale: torch.Tensor, offset: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What the hardware reads: the FP19 scale and the 9-bit offset, packed first where the scale is a float."""
    return unpack_scale_word(scale if scale.dtype == torch.int64 else pack_scale_word(scale, offset))


def requantize(t: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The fixpipe's float32 to int8: round half to even, clip to 9 bits, add the offset, clip to 8."""
    return (t.round().clamp(-256, 255) + offset).clamp(-128, 127).to(torch.int8)


def to_float(t: torch.Tensor, dtype: torch.dtype, saturate: bool) -> torch.Tensor:
    """Float32 to the output's dtype, half to even."""
    if saturate and dtype == torch.float16:
        t = t.clamp(-_FLOAT16_MAX, _FLOAT16_MAX)
    return t.to(dtype)
