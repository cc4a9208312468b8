"""One way of one tool to quantize a Linear (or what stands for one)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

K, N = 64, 96


@dataclass(frozen=True)
class Scheme:
    """``build()`` returns a module and its inputs. ``maps`` is False where no fused operator can take it."""

    tool: str
    package: str
    name: str
    build: Callable[[], tuple[Any, tuple[torch.Tensor, ...]]]
    maps: bool = True

    @property
    def slug(self) -> str:
        return "".join(c if c.isalnum() else "_" for c in f"{self.tool}__{self.name}").lower()


class Mlp(nn.Module):
    """Two Linears with a ReLU between."""

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, N, dtype=dtype), nn.Linear(N, K, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def rows(dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Activations of shape ``(2, 5, K)``."""
    return torch.randn(2, 5, K, generator=torch.Generator().manual_seed(1)).to(dtype)
