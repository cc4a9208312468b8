"""AWQ: what AutoAWQ writes.

Layout: ``WQLinear_GEMM`` int32 ``qweight`` ``(K, N / 8)``, ``qzeros`` ``(groups, N / 8)``, ``scales`` ``(groups, N)``;
``WQLinear_GEMV`` ``qweight`` ``(N, K / 8)`` (``awq/modules/linear/`` of autoawq 0.2.7).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpass.checkpoints.folder import Checkpoint, Module
from quantpass.checkpoints.formats.parts import groups_of, has_zero_points, positive, tensor
from quantpass.checkpoints.headers import CheckpointError
from quantpass.checkpoints.scheme import Quantized, WeightScheme


def known(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Awq | None:
    """The reader for ``config``; None where another tool wrote it."""
    del checkpoint
    method = config.get("quant_method")
    own = method == "awq" or (
        method in ("auto-round", "intel/auto-round") and "awq" in str(config.get("packing_format"))
    )
    return Awq(config) if own or (method is None and "w_bit" in config) else None


class Awq:
    """Reads its modules."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        version = str(config.get("version", "gemm")).lower()
        if version not in ("gemm", "gemv", "wqlinear_gemm"):
            raise CheckpointError(f"AWQ: version is {version!r}; accepted: 'gemm', 'gemv'. Save it as one of these")
        self._along_k = version == "gemv"
        self._bits = positive(config.get("bits", config.get("w_bit")), "AWQ: bits", "4 or 8")
        if 32 % self._bits:
            raise CheckpointError(f"AWQ: bits is {self._bits}; accepted: 4 or 8")
        given = config.get("group_size", config.get("q_group_size", -1))
        self._group = positive(given, "AWQ: group_size", "a positive number, or -1", (-1,))
        self.title = f"AWQ, {self._bits} bits, {'groups of ' + str(self._group) if self._group > 0 else 'per channel'}"
        self.notes: tuple[str, ...] = ()

    def read(self, module: Module) -> Quantized | None:
        if "qweight" not in module.tensors:
            return None
        words, per = tensor(module, "qweight", (2,), ("int32",)), 32 // self._bits
        scales = tensor(module, "scales", (2,))
        k, n = words.shape[0], words.shape[1] * per
        stored = scales.shape[0]
        if self._along_k:  # scales are padded there
            n, k = words.shape[0], words.shape[1] * per
            stored = -(-k // self._group) if self._group > 0 else 1
        elif scales.shape[1] != n:
            raise CheckpointError(f"{module.name}: scales have shape {scales.shape}, and qweight has {n} columns")
        size = groups_of(module, k, stored, None if self._group == -1 else self._group)
        zero_point = has_zero_points(module.tensors.get("qzeros"), 2 ** (self._bits - 1), self._bits)
        weight = WeightScheme(self._bits, size, zero_point=zero_point)
        along_k, along_n = (per, 1) if self._along_k else (1, per)
        return Quantized(k, n, weight, bias="bias" in module.tensors, packed_k=along_k, packed_n=along_n)
