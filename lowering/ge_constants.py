"""GE's dtypes and constants as PyTorch's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from quantpass.lowering.ge_graph import GeConstant

_BY_NAME = {
    "FLOAT": torch.float32, "FLOAT16": torch.float16, "BF16": torch.bfloat16, "DOUBLE": torch.float64,
    "INT8": torch.int8, "UINT8": torch.uint8, "INT16": torch.int16, "INT32": torch.int32, "INT64": torch.int64,
    "BOOL": torch.bool,
}  # fmt: skip
_BY_NUMBER = {
    0: "FLOAT", 1: "FLOAT16", 2: "INT8", 3: "INT32", 4: "UINT8", 6: "INT16", 9: "INT64", 10: "UINT64", 11: "DOUBLE",
    12: "BOOL", 27: "BF16", 29: "INT4",
}  # fmt: skip
"""GE's own numbers, as attributes such as ``dst_type`` hold them; the numbers in a protocol buffer are others."""


def dtype_named(name: str) -> torch.dtype:
    """The dtype that GE calls ``name`` (without ``DT_``)."""
    if name not in _BY_NAME:
        raise NotImplementedError(f"GE dtype {name!r} has no tensor in PyTorch; known: {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def dtype_name(number: int) -> str:
    """GE's name of the dtype number in an attribute."""
    if number not in _BY_NUMBER:
        raise NotImplementedError(f"GE dtype number {number} is not known; known: {_BY_NUMBER}")
    return _BY_NUMBER[number]


def constant_tensor(value: GeConstant) -> torch.Tensor:
    """A constant's value."""
    dtype = dtype_named(value.dtype)
    if not value.data:
        return torch.empty(value.shape, dtype=dtype)
    flat = torch.frombuffer(bytearray(value.data), dtype=dtype)
    return flat.reshape(value.shape)
