"""Is this operator call legal on that chip? A question about descriptions of tensors: no device, no graph, no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quantpass.basics.suggestions import did_you_mean
from quantpass.basics.symbolic import has_no_elements, is_one, same_size
from quantpass.basics.tensor_spec import TensorSpec
from quantpass.basics.torch_types import F16, F32, I8, I64, is_tensor
from quantpass.chips import CHIPS, chip_named
from quantpass.chips.calls import OpCall, VendorOp
from quantpass.chips.legality import Verdict, checked_allow, judge
from quantpass.chips.quant_matmul import QMM
from quantpass.chips.weight_quant_matmul import WQMM

if TYPE_CHECKING:
    import torch

OPERATORS: Mapping[str, VendorOp] = MappingProxyType(
    {rule.op.name: rule.op for chip in CHIPS.values() for rule in chip.rules}
)
"""Operators that can be asked about: those that some chip has rules for."""

_LINEAR_QUANT = ("x1", "input", "weight", *(a for a in QMM.arguments if a not in ("x1", "x2", "group_sizes")))

MODULES: Mapping[str, tuple[VendorOp, tuple[str, ...]]] = MappingProxyType(
    {"LinearQuant": (QMM, _LINEAR_QUANT), "LinearWeightQuant": (WQMM, WQMM.arguments)}
)
"""Modules that can be asked about: the operator that their forward calls, and what they are asked with."""


def check_op(op: str, *, target: str, mode: str = "graph", allow: tuple[str, ...] = (), **arguments: Any) -> Verdict:
    """Judge one operator call on one chip.

    Args:
        op: ``"npu_quant_matmul"``, ``"npu_weight_quant_batchmatmul"``, ``"npu_quant_matmul_dequant"``, one of the
            operators around them
            (``npu_trans_quant_param``, ``npu_quantize``, ``npu_dynamic_quant``, ``npu_anti_quant``,
            ``npu_convert_weight_to_int4pack``, ``npu_format_cast``), or one of the modules ``"LinearQuant"`` and
            ``"LinearWeightQuant"`` (weight then (N, K), scales as the module keeps them).
        target: chip or SoC name.
        mode: ``"graph"`` (GE, through torchair) or ``"eager"`` (aclnn).
        allow: contradicted rules to lift, by id.
        arguments: the operator's arguments; tensors as :class:`quantpass.TensorSpec` with their logical shape (x2 is
            ``(..., K, N)``; a transposed view says ``transposed=True``), or as real tensors.

    Returns:
        A verdict with *every* rule that is broken, what symbolic sizes must satisfy, and the nearest legal call.

    Raises:
        TypeError: an argument that the operator does not have, a tensor that is none, or an ``allow`` that is one text.
        ValueError: an unknown operator, target or mode, or a rule in ``allow`` that does not exist or can't be lifted.
    """
    name = _operator(op)
    if mode not in ("graph", "eager"):
        raise ValueError(f"mode is {mode!r}; accepted: 'graph' (GE), 'eager' (aclnn)")
    chip = chip_named(target)
    given = {k: _argument(name, k, v) for k, v in arguments.items()}
    call = OpCall(_asked(name)[0], mode, given)
    call = OpCall(call.op, mode, _FORWARD[name](call)) if name in _FORWARD else call
    return judge(call, chip, checked_allow(allow))


def _asked(name: str) -> tuple[VendorOp, tuple[str, ...]]:
    """The operator behind a name, and the arguments that it can be asked with."""
    op = OPERATORS.get(name)
    return (op, op.arguments) if op is not None else MODULES[name]


def _operator(op: str) -> str:
    name = str(op).rpartition(".")[2] if str(op).startswith(("torch.ops.", "module:", "torch_npu.")) else str(op)
    name = name.removesuffix(".default")
    accepted = (*OPERATORS, *MODULES)
    for candidate in (name, f"npu_{name}"):
        if candidate in accepted:
            return candidate
    raise ValueError(f"unknown operator {op!r}. Accepted: {', '.join(accepted)}.{did_you_mean(name, accepted)}")


def _argument(asked: str, name: str, value: Any) -> Any:
    op, arguments = _asked(asked)
    if name not in arguments:
        meant = did_you_mean(name, arguments)
        raise TypeError(f"{asked} has no argument {name!r}. Accepted: {', '.join(arguments)}.{meant}")
    if (isinstance(value, TensorSpec) or is_tensor(value)) and name in op.numbers:
        raise TypeError(f"{asked}: {name} is a tensor; it takes a number, a dtype or a word")
    if name in op.lists and isinstance(value, list | tuple):
        return _tensor_list(asked, name, [_argument(asked, name, v) for v in value])
    if value is None or isinstance(value, TensorSpec):
        return value
    if name in op.integers and not isinstance(value, int):
        raise TypeError(f"{asked}: {name} is {value!r}; it takes an integer")
    if op.types[name].startswith("int[") and not (
        isinstance(value, list | tuple) and all(isinstance(v, int) for v in value)
    ):
        raise TypeError(f"{asked}: {name} is {value!r}; it takes a list of integers, e.g. [0, 0, 256]")
    if is_tensor(value):
        return spec_of_tensor(value)
    if name not in op.numbers:
        raise TypeError(f"{asked}: {name} is {value!r}; give a TensorSpec(dtype, shape) or a tensor")
    return value


def _tensor_list(asked: str, name: str, specs: list[Any]) -> Any:
    """One description for a list of one, a tuple of equal ones for more, None for an empty list."""
    kinds = [spec for i, spec in enumerate(specs) if spec not in specs[:i]]
    if len(kinds) > 1:
        raise TypeError(
            f"{asked}: {name} holds tensors that differ: {', '.join(map(str, kinds))}. A list is judged where all of it is "
            "alike; ask once for each kind"
        )
    return tuple(specs) if len(specs) > 1 else (specs or [None])[0]


def spec_of_tensor(t: torch.Tensor) -> TensorSpec:
    """The description of a tensor; a swapped view of dense storage is recognized by its strides, as the vendor does."""
    shape, strides = tuple(t.shape), tuple(t.stride())
    turned = (*shape[:-2], *shape[:-3:-1]), (*strides[:-2], *strides[:-3:-1])
    swapped = len(shape) >= 2 and not _is_dense(shape, strides) and _is_dense(*turned)
    return TensorSpec(t.dtype, shape, transposed=swapped)


def _is_dense(shape: Sequence[Any], strides: Sequence[Any]) -> bool:
    """True where a tensor is known to be contiguous; nothing is asked of sizes that only the run knows."""
    step: Any = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if not is_one(size) and not same_size(stride, step):
            return has_no_elements(shape)
        step = step * size
    return True


def _linear_quant(call: OpCall) -> dict[str, Any]:
    """The arguments of the call that LinearQuant's forward makes."""
    args = dict(call.args)
    scale, output = args.get("scale"), call.value("output_dtype")
    packs = args.get("pertoken_scale") is None and output in (None, I8, F16)
    if isinstance(scale, TensorSpec) and scale.dtype_name == F32 and packs:
        args["scale"] = TensorSpec(I64, scale.shape)
    module_input = args.pop("input", None)  # the vendor's forward names it x, the document x1
    args["x1"] = module_input if args.get("x1") is None else args["x1"]
    args["x2"] = logical(args.pop("weight", None))
    return args


def _linear_weight_quant(call: OpCall) -> dict[str, Any]:
    """The arguments of the call that LinearWeightQuant's forward makes."""
    args = {**call.args, "weight": logical(call.args.get("weight"))}
    for name in ("antiquant_scale", "antiquant_offset"):
        spec = call.tensor(name)
        if spec is not None and spec.rank == 2:
            args[name] = logical(spec)
    return args


_FORWARD = {"LinearQuant": _linear_quant, "LinearWeightQuant": _linear_weight_quant}


def logical(spec: Any) -> Any:
    """A stored matrix's description as that of its transposed view; anything else as it is."""
    if not isinstance(spec, TensorSpec) or spec.rank < 2:
        return spec
    shape = (*spec.shape[:-2], spec.shape[-1], spec.shape[-2])
    return TensorSpec(spec.dtype_name, shape, spec.format, not spec.transposed)
