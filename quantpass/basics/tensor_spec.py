"""A tensor as an operator sees it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantpass.basics.suggestions import did_you_mean
from quantpass.basics.torch_types import DTYPES, dtype_name, is_symint

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, init=False, repr=False)
class TensorSpec:
    """A tensor as an operator sees it, without its data.

    Args:
        dtype: element type, as a ``torch.dtype`` or by its name (``"int8"``).
        shape: logical shape; sizes may be ``int`` or ``torch.SymInt``.
        format: ``"ND"``, or ``"NZ"`` or ``"FRACTAL_NZ"`` (format 29).
        transposed: True where the last two dimensions are a swapped view of contiguous storage.

    Raises:
        TypeError: no dtype, or sizes that are none.
        ValueError: a negative size, an unknown format, a transposed vector.
    """

    dtype_name: str
    shape: tuple[Any, ...]
    format: str
    transposed: bool

    def __init__(
        self, dtype: torch.dtype | str, shape: Iterable[Any], format: str = "ND", transposed: bool = False
    ) -> None:
        name = dtype_name(dtype)
        if name is None:
            meant = did_you_mean(dtype, DTYPES)
            raise TypeError(
                f"TensorSpec: dtype is {dtype!r}; give a torch.dtype such as torch.int8, or its name, 'int8'.{meant}"
            )
        if format not in ("ND", "NZ", "FRACTAL_NZ"):
            raise ValueError(f"TensorSpec: format is {format!r}; accepted: 'ND', 'NZ', 'FRACTAL_NZ'")
        try:
            sizes = tuple(shape)
        except TypeError:
            raise TypeError(f"TensorSpec: shape is {shape!r}; give a tuple of sizes such as (16, 512)") from None
        for size in sizes:
            if isinstance(size, bool) or not (isinstance(size, int) or is_symint(size)):
                raise TypeError(f"TensorSpec: shape {sizes!r} holds {size!r}; every size is an int or a SymInt")
            if isinstance(size, int) and size < 0:
                raise ValueError(f"TensorSpec: shape {sizes!r} holds the negative size {size}")
        if transposed and len(sizes) < 2:
            raise ValueError(f"TensorSpec: transposed=True needs two dimensions or more; shape is {sizes!r}")
        object.__setattr__(self, "dtype_name", name)
        object.__setattr__(self, "shape", sizes)
        object.__setattr__(self, "format", "NZ" if format == "FRACTAL_NZ" else format)
        object.__setattr__(self, "transposed", transposed)

    @property
    def dtype(self) -> torch.dtype:
        """The element type as PyTorch's own object."""
        import torch

        found: torch.dtype = getattr(torch, self.dtype_name)
        return found

    @property
    def rank(self) -> int:
        return len(self.shape)

    def __repr__(self) -> str:
        return (
            f"TensorSpec(dtype={self.dtype_name!r}, shape={self.shape!r}, format={self.format!r}, "
            f"transposed={self.transposed!r})"
        )

    def __str__(self) -> str:
        marks = ("" if self.format == "ND" else f" {self.format}") + (" transposed" if self.transposed else "")
        return f"{self.dtype_name}({', '.join(map(str, self.shape))}){marks}"
