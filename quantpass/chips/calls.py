"""An operator call as legality sees it: descriptions of tensors, numbers, and the sizes that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quantpass.basics.tensor_spec import TensorSpec
from quantpass.basics.torch_types import I32, dtype_name, is_dtype

QMM = "npu_quant_matmul"
WQMM = "npu_weight_quant_batchmatmul"

INT4_PER_INT32 = 8


@dataclass(frozen=True)
class OpCall:
    """A call of one of the vendor's operators.

    Attributes:
        op: operator name without namespace, e.g. ``"npu_quant_matmul"``.
        mode: ``"graph"`` (GE, through torchair) or ``"eager"`` (aclnn).
        args: argument name to :class:`TensorSpec`, number, dtype or None; those not given are None.
    """

    op: str
    mode: str
    args: Mapping[str, Any]

    def tensor(self, name: str) -> TensorSpec | None:
        value = self.args.get(name)
        return value if isinstance(value, TensorSpec) else None

    def value(self, name: str) -> Any:
        """An argument as rules compare it: a dtype by its name."""
        value = self.args.get(name)
        return dtype_name(value) if is_dtype(value) else value

    def replaced(self, **changes: Any) -> OpCall:
        return OpCall(self.op, self.mode, {**self.args, **changes})

    @cached_property
    def sizes(self) -> dict[str, Any]:
        """The named sizes of the call (``m``, ``k``, ``n`` ...); a size that the arguments do not determine is absent."""
        if self.op == QMM:
            return _qmm_sizes(self)
        if self.op == WQMM:
            return _wqmm_sizes(self)
        return _last_size(self)


def packed_int4(spec: TensorSpec | None) -> bool:
    return spec is not None and spec.dtype_name == I32


def _matrix_sizes(spec: TensorSpec, rows: str, columns: str) -> dict[str, Any]:
    """Sizes of a matrix by name; int32 carries eight int4 along the stored last axis."""
    if spec.rank < 2:
        return {}
    r, c = spec.shape[-2:]
    if packed_int4(spec):
        r, c = (r * INT4_PER_INT32, c) if spec.transposed else (r, c * INT4_PER_INT32)
    return {rows: r, columns: c}


def _last_size(call: OpCall) -> dict[str, Any]:
    """The last dimension of the tensor that an elementwise operator works on, unpacked."""
    spec = call.tensor("input") or call.tensor("x")
    if spec is None or not spec.shape:
        return {}
    return {"last": spec.shape[-1] * (INT4_PER_INT32 if packed_int4(spec) else 1)}


def _qmm_sizes(call: OpCall) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    x1, x2 = call.tensor("x1"), call.tensor("x2")
    if x1 is not None and x1.rank >= 2:
        r, c = x1.shape[-2:]
        sizes |= {"m": r, "k": c * INT4_PER_INT32 if packed_int4(x1) else c}
    if x2 is not None:
        sizes |= _matrix_sizes(x2, "k_of_x2", "n")
    group = (call.args.get("group_sizes") or (0,))[-1]
    if group > 0 and isinstance(sizes.get("k"), int):
        sizes["groups"] = -(-sizes["k"] // group)
    return sizes


def _wqmm_sizes(call: OpCall) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    x, weight = call.tensor("x"), call.tensor("weight")
    if x is not None and x.rank >= 2:
        sizes |= {"m": x.shape[-2], "k": x.shape[-1]}
    if weight is not None:
        sizes |= _matrix_sizes(weight, "k_of_weight", "n")
    group = call.args.get("antiquant_group_size") or 0
    if group > 0 and isinstance(sizes.get("k"), int):
        sizes["groups"] = -(-sizes["k"] // group)
    return sizes
