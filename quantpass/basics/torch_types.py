"""Dtypes by their names, and PyTorch's types recognized without importing it: nothing is one where it is not loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

I8, I32, I64 = "int8", "int32", "int64"
F16, BF16, F32 = "float16", "bfloat16", "float32"

DTYPES = frozenset(
    (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
        *(f"{kind}{bits}" for kind in ("int", "uint") for bits in range(1, 8)),
        *("qint8", "quint8", "qint32", "quint4x2", "quint2x4", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
    )
)
"""The name of every ``torch.dtype``."""

_OTHER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "short": "int16",
        "int": "int32",
        "long": "int64",
        "half": "float16",
        "float": "float32",
        "double": "float64",
        "chalf": "complex32",
        "cfloat": "complex64",
        "cdouble": "complex128",
        "bit": "uint1",
    }
)


def dtype_name(value: Any) -> str | None:
    """``"int8"`` for ``torch.int8``, ``"int8"`` or ``"torch.int8"``; None for what is no dtype."""
    if is_dtype(value):
        return str(value).removeprefix("torch.")
    name = value.removeprefix("torch.") if isinstance(value, str) else None
    name = _OTHER_NAMES.get(name, name) if name is not None else None
    return name if name in DTYPES else None


def is_dtype(value: Any) -> bool:
    """True for a ``torch.dtype``."""
    return isinstance(value, _types("dtype"))


def is_tensor(value: Any) -> bool:
    """True for a ``torch.Tensor``."""
    return isinstance(value, _types("Tensor"))


def is_symint(value: Any) -> bool:
    """True for a ``torch.SymInt``."""
    return isinstance(value, _types("SymInt"))


def _types(name: str) -> tuple[type, ...]:
    loaded = sys.modules.get("torch")
    found = getattr(loaded, name, None)  # None as well while PyTorch is being imported
    return () if found is None else (found,)
