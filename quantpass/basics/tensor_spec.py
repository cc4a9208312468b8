"""A tensor as an operator sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as an operator sees it, without its data.

    Args:
        dtype: element type.
        shape: logical shape; sizes may be ``int`` or ``torch.SymInt``.
        format: ``"ND"``, or ``"NZ"`` or ``"FRACTAL_NZ"`` (format 29).
        transposed: True where the last two dimensions are a swapped view of contiguous storage.
    """

    dtype: torch.dtype
    shape: tuple[Any, ...]
    format: str = "ND"
    transposed: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"TensorSpec: dtype is {self.dtype!r}; give a torch.dtype such as torch.int8")
        if self.format == "FRACTAL_NZ":
            object.__setattr__(self, "format", "NZ")
        if self.format not in ("ND", "NZ"):
            raise ValueError(f"TensorSpec: format is {self.format!r}; accepted: 'ND', 'NZ', 'FRACTAL_NZ'")
        try:
            shape = tuple(self.shape)
        except TypeError:
            raise TypeError(f"TensorSpec: shape is {self.shape!r}; give a tuple of sizes such as (16, 512)") from None
        for size in shape:
            if isinstance(size, bool) or not isinstance(size, int | torch.SymInt):
                raise TypeError(f"TensorSpec: shape {shape!r} holds {size!r}; every size is an int or a SymInt")
            if isinstance(size, int) and size < 0:
                raise ValueError(f"TensorSpec: shape {shape!r} holds the negative size {size}")
        if self.transposed and len(shape) < 2:
            raise ValueError(f"TensorSpec: transposed=True needs two dimensions or more; shape is {shape!r}")
        object.__setattr__(self, "shape", shape)

    @property
    def rank(self) -> int:
        return len(self.shape)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        marks = ("" if self.format == "ND" else f" {self.format}") + (" transposed" if self.transposed else "")
        return f"{name}({', '.join(map(str, self.shape))}){marks}"
