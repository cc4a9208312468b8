"""How tools round activations and float weights, in PyTorch's own operators and in the tools' order."""

from __future__ import annotations

import torch


def quantized_by_scale(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, low: int, high: int
) -> torch.Tensor:
    """``(round(clamp(x / scale + zero)) - zero) * scale``, as compressed-tensors rounds: in the inputs' own dtypes."""
    codes = x / scale
    if zero is not None:
        codes = codes + zero.to(x.dtype)
    codes = torch.round(torch.clamp(codes, low, high)).to(scale.dtype)
    if zero is not None:
        codes = codes - zero.to(scale.dtype)
    return codes * scale


def quantized_by_amax(x: torch.Tensor, amax: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """``clamp(round(x * high / amax)) / (high / amax)`` in float32, as modelopt rounds; ``amax`` is not 0."""
    rate = torch.full_like(amax, high, dtype=torch.float32) / amax.float()  # a number / tensor rounds twice
    return (torch.clamp(torch.round(x.float() * rate), low, high) / rate).to(x.dtype)
