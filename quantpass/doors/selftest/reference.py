"""What a call has to give: the reference kernels' results, and how far a device may be from them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantpass.chips import CHIPS
from quantpass.chips.calls import OpCall
from quantpass.chips.companions import ANTI_QUANT, DYNAMIC_QUANT, FORMAT_CAST, INT4PACK, QUANTIZE, TQP
from quantpass.chips.weight_quant_matmul import WQMM
from quantpass.doors.selftest.cases import Case
from quantpass.doors.selftest.tensors import Tensors, applied, positive
from quantpass.operators import EMULATED
from quantpass.operators.arguments import Arguments, bound, schema_of
from quantpass.operators.int4 import unpack_int4
from quantpass.operators.operator import Emulated, Operator
from quantpass.operators.weight_quant_matmul import TEMPLATES

BY_VENDOR: Mapping[Any, Emulated] = {op.vendor: op for op in EMULATED}

_RELATIVE = {torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5, torch.float32: 2.0**-14}
"""How much of a result may be lost: four units of the last place; for float32, what sums in another order lose."""


@dataclass(frozen=True, slots=True)
class Distance:
    """How far results are from the reference.

    Attributes:
        error: the largest absolute difference, in codes for integers.
        share: the largest difference as a share of what is allowed; right is 1 or less.
        rms: the root mean square of the differences over that of the reference, floats only.
        differing: the share of elements that are not equal.
    """

    error: float
    share: float
    rms: float
    differing: float

    @property
    def right(self) -> bool:
        """Within the bound; False for what is not a number."""
        return self.share <= 1


def expected(case: Case, stored: Tensors, template: str | None = None) -> tuple[torch.Tensor, ...]:
    """What the reference kernels give; ``template`` is one of weight_quant_matmul's."""
    op = BY_VENDOR[case.call.op]
    call = kernel_arguments(case)
    if call is None or not isinstance(op, Operator):
        return applied(torch.Tensor.contiguous, op.emulate(Arguments(**vendor_arguments(case.call, stored))))
    given = {k: stored[v] if isinstance(v, str) and v in stored else v for k, v in call.items()}
    if "saturate" in inspect.signature(op.kernel).parameters:
        given["saturate"] = CHIPS[case.chip].saturates
    if template is not None:
        given["template"] = template
    return applied(torch.Tensor.contiguous, op.kernel(**given))


def kernel_arguments(case: Case) -> dict[str, Any] | None:
    """The arguments of quantpass's own operator, a tensor by its vendor's name; None where it can't say the call."""
    op, call = BY_VENDOR[case.call.op], case.call
    weight = call.tensor("weight")
    if not isinstance(op, Operator) or (call.op is WQMM and weight is not None and weight.rank > 2):
        return None  # a weight for each batch is the vendor's alone
    parameters = list(inspect.signature(op.kernel).parameters)
    theirs = {p: op.renamed.get(p, p) for p in parameters}
    theirs[parameters[0]] = call.op.arguments[0]  # of operators of one tensor, which name it x
    left = {k: v for k, v in call.args.items() if k not in theirs.values()}
    if any(op.always.get(k, _default(call, k)) != v for k, v in left.items()):
        return None
    if any(call.args.get(k, _default(call, k)) != v for k, v in op.always.items()):
        return None
    made: dict[str, Any] = {}
    for ours, name in theirs.items():
        spec = call.tensor(name)
        if spec is not None:
            made[ours] = name
            if spec.transposed:
                made[f"transpose_{ours}"] = True
        elif name in call.args:
            value = call.value(name)
            made[ours] = getattr(torch, value) if name.endswith("dtype") else value
    return made if all(name in parameters for name in made) else None


def vendor_arguments(call: OpCall, stored: Tensors) -> dict[str, Any]:
    """Every argument of the vendor's schema: tensors as views of what is stored, dtypes as PyTorch's."""
    given: dict[str, Any] = {}
    for name, value in call.args.items():
        spec = call.tensor(name)
        if spec is not None:
            given[name] = stored[name].transpose(-2, -1) if spec.transposed else stored[name]
        else:
            given[name] = getattr(torch, value) if isinstance(value, str) and hasattr(torch, value) else value
    return vars(bound(schema_of(call.op), (), {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}))


def _default(call: OpCall, name: str) -> Any:
    arguments = schema_of(call.op).arguments
    return next((a.default_value for a in arguments if a.name == name and a.has_default_value()), None)


def distance(case: Case, stored: Tensors, found: tuple[Any, ...], wanted: tuple[Any, ...]) -> Distance:
    """How far ``found`` is from what is ``wanted``; results that the operator leaves open are not looked at.

    Raises:
        ValueError: results of another number, shape or dtype.
    """
    sums = expected(case, positive(case.call, stored))
    tensors = [(f, w, s) for f, w, s in zip(found, wanted, sums, strict=False) if isinstance(w, torch.Tensor)]
    if len(found) < len(wanted):
        raise ValueError(f"{len(found)} results in place of {len(wanted)}")
    of_each = [_of_one(case, f, w, s) for f, w, s in tensors if w.numel()]
    return max(of_each, key=lambda d: d.share if d.share == d.share else float("inf"))


def _of_one(case: Case, found: torch.Tensor, wanted: torch.Tensor, sums: torch.Tensor) -> Distance:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise ValueError(f"a result is {found.dtype}{list(found.shape)} in place of {wanted.dtype}{list(wanted.shape)}")
    if wanted.dtype == torch.int32 and case.call.op in (QUANTIZE, DYNAMIC_QUANT):
        found, wanted = _unpacked(case, found), _unpacked(case, wanted)
    a, b = found.double(), wanted.double()
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    error, differing = float(apart.max()), float((apart > 0).double().mean())
    if not wanted.dtype.is_floating_point:
        return Distance(error, _in_codes(case, wanted.dtype, error), 0.0, differing)
    relative = _RELATIVE[wanted.dtype]
    size = torch.maximum(sums.double().abs(), b.abs()).clamp(min=torch.finfo(wanted.dtype).tiny)
    share = float((apart / (relative * size)).max())
    rms = float(apart.square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-30))
    return Distance(error, max(share, rms / relative), rms, differing)


def _in_codes(case: Case, dtype: torch.dtype, error: float) -> float:
    exact = dtype in (torch.int64, torch.int32) and case.call.op is not QUANTIZE
    exact = exact or case.call.op in (TQP, FORMAT_CAST, INT4PACK, ANTI_QUANT)
    return error if not exact else float("inf") if error else 0.0


def _unpacked(case: Case, value: torch.Tensor) -> torch.Tensor:
    packed = "quint4x2" in (case.call.value("dtype"), case.call.value("dst_type"))
    return unpack_int4(value) if packed else value


def nearest_template(case: Case, stored: Tensors, found: tuple[Any, ...]) -> str:
    """Which of weight_quant_matmul's arithmetics is nearest to what was found; empty for other operators."""
    if case.call.op is not WQMM:
        return ""
    apart: dict[str, float] = {}
    for template in TEMPLATES:
        try:
            wanted = expected(case, stored, template)[0]
        except ValueError:  # the template does not take the call
            continue
        apart[template] = float((found[0].double() - wanted.double()).square().sum())
    return min(apart, key=lambda name: apart[name]) if apart else ""
