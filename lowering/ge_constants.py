"""GE's constants as PyTorch's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantpass.operators.ge import dtype_named

if TYPE_CHECKING:
    from quantpass.lowering.ge_graph import GeConstant


def constant_tensor(value: GeConstant) -> torch.Tensor:
    """A constant's value."""
    dtype = dtype_named(value.dtype)
    if not value.data:
        return torch.empty(value.shape, dtype=dtype)
    flat = torch.frombuffer(bytearray(value.data), dtype=dtype)
    return flat.reshape(value.shape)
