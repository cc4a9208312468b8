"""The arguments of one call, and what kernels ask of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from quantpass.chips.calls import VendorOp

NZ = 29
"""The vendor's number of the FRACTAL_NZ format."""

ND = 2
"""The vendor's number of the ND format."""

DTYPE_NUMBERS = {torch.int8: 1, torch.int32: 3, torch.float16: 5, torch.bfloat16: 15}
"""PyTorch's numbers of the dtypes that the vendor's ``output_dtype`` can ask for."""

_DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128, torch.bool, torch.qint8, torch.quint8, torch.qint32),
    *(torch.bfloat16, torch.quint4x2),
)
"""PyTorch's numbering of dtypes, which the vendor's integer arguments follow."""


class Arguments(SimpleNamespace):
    """All arguments of one call by name: tensors (or the nodes and GE tensors that stand for them) and numbers."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the operator has no argument {name!r}")


@cache
def schema_of(op: VendorOp) -> torch.FunctionSchema:
    """What the vendor's operator takes, as the newest torch_npu that is known declares it."""
    return torch._C.parse_schema(f"npu::{op.schema}")  # noqa: SLF001


def bound(schema: torch.FunctionSchema, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
    """The arguments of a call of an operator with this schema, defaults filled in."""
    found = {a.name: a.default_value if a.has_default_value() else None for a in schema.arguments}
    found.update(zip((a.name for a in schema.arguments), args, strict=False))
    return Arguments(**(found | dict(kwargs)))


def require(condition: Any, message: str, rule: str = "") -> None:
    """Raise ``ValueError`` unless ``condition``; a symbolic condition becomes a guard.

    Args:
        condition: what must hold.
        message: the argument, its value, and what is accepted.
        rule: the legality rule that says so, added to the message.
    """
    if not condition:
        raise ValueError(f"{message} [{rule}]" if rule else message)


def refuse_given(op: str, a: Arguments, *names: str) -> None:
    """Refuse arguments of forms that are not emulated (4- and 8-bit floats, reinterpreted dtypes)."""
    for name in names:
        value = getattr(a, name)
        is_default = value is None or (isinstance(value, float) and value == 0)
        require(is_default, f"{op}: {name} is {value}; the emulation takes int8 and int4 operands only, leave it None")


def dtype_numbered(number: int | torch.dtype | None, default: torch.dtype | None = None) -> torch.dtype | None:
    """The dtype behind one of the vendor's integer arguments, a dtype in older ones; ``default`` for None."""
    if number is None or isinstance(number, torch.dtype):
        return default if number is None else number
    require(0 <= number < len(_DTYPES), f"dtype number {number}; PyTorch's go from 0 to {len(_DTYPES) - 1}")
    return _DTYPES[number]


def dtype_number(dtype: torch.dtype) -> int:
    """The number of a dtype, for the vendor's integer arguments."""
    return _DTYPES.index(dtype)


def matrix_shape(t: torch.Tensor, transposed: bool) -> tuple[Any, Any]:
    """Logical ``(rows, columns)`` of a stored matrix; int32 holds eight int4 along its last stored axis."""
    rows, columns = t.shape[-2], t.shape[-1] * (8 if t.dtype == torch.int32 else 1)
    return (columns, rows) if transposed else (rows, columns)


def packed_transposed(rows: int, k: int) -> bool:
    """Whether a packed int4 weight ``(K, N / 8)`` arrives as the transposed view ``(K / 8, N)`` of ``(N, K / 8)``."""
    return rows != k and rows * 8 == k
