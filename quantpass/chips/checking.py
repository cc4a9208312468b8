"""Is this operator call legal on that chip? A question about descriptions of tensors: no device, no graph, no data."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quantpass.basics.suggestions import did_you_mean
from quantpass.basics.tensor_spec import TensorSpec
from quantpass.basics.torch_types import F16, F32, I8, I64, is_tensor
from quantpass.chips import chip_named
from quantpass.chips.calls import QMM, WQMM, OpCall
from quantpass.chips.companions import ANTI_QUANT, DYNAMIC_QUANT, FORMAT_CAST, INT4PACK, QUANTIZE, TQP
from quantpass.chips.legality import Verdict, checked_allow, judge

if TYPE_CHECKING:
    import torch

ARGUMENTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        QMM: ("x1", "x2", "scale", "offset", "pertoken_scale", "bias", "output_dtype", "group_sizes"),
        WQMM: (
            *("x", "weight", "antiquant_scale", "antiquant_offset", "quant_scale", "quant_offset", "bias"),
            *("antiquant_group_size", "inner_precise"),
        ),
        TQP: ("scale", "offset", "round_mode"),
        INT4PACK: ("weight", "inner_k_tiles"),
        FORMAT_CAST: ("input", "acl_format"),
        DYNAMIC_QUANT: ("input", "smooth_scales", "group_index", "dst_type", "quant_mode"),
        ANTI_QUANT: ("x", "scale", "offset", "dst_dtype"),
        QUANTIZE: ("input", "scales", "zero_points", "dtype", "axis", "div_mode"),
        "LinearQuant": ("x1", "input", "weight", "scale", "offset", "pertoken_scale", "bias", "output_dtype"),
        "LinearWeightQuant": (
            *("x", "weight", "antiquant_scale", "antiquant_offset", "quant_scale", "quant_offset", "bias"),
            *("antiquant_group_size", "inner_precise"),
        ),
    }
)
"""Operators and modules that can be asked about, with their arguments."""

_NUMBERS = frozenset(
    (
        *("output_dtype", "group_sizes", "antiquant_group_size", "inner_precise", "round_mode", "inner_k_tiles"),
        *("acl_format", "dst_type", "quant_mode", "dst_dtype", "dtype", "axis", "div_mode"),
    )
)
"""Arguments that are no tensors."""

_INTEGERS = frozenset(("antiquant_group_size", "inner_precise", "round_mode", "inner_k_tiles", "acl_format", "axis"))


def check_op(op: str, *, target: str, mode: str = "graph", allow: tuple[str, ...] = (), **arguments: Any) -> Verdict:
    """Judge one operator call on one chip.

    Args:
        op: ``"npu_quant_matmul"``, ``"npu_weight_quant_batchmatmul"``, one of the operators around them
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
    call = _as_operator(OpCall(name, mode, given))
    return judge(call, chip, checked_allow(allow))


def _operator(op: str) -> str:
    name = str(op).rpartition(".")[2] if str(op).startswith(("torch.ops.", "module:", "torch_npu.")) else str(op)
    name = name.removesuffix(".default")
    for candidate in (name, f"npu_{name}"):
        if candidate in ARGUMENTS:
            return candidate
    raise ValueError(f"unknown operator {op!r}. Accepted: {', '.join(ARGUMENTS)}.{did_you_mean(name, ARGUMENTS)}")


def _argument(op: str, name: str, value: Any) -> Any:
    if name not in ARGUMENTS[op]:
        meant = did_you_mean(name, ARGUMENTS[op])
        raise TypeError(f"{op} has no argument {name!r}. Accepted: {', '.join(ARGUMENTS[op])}.{meant}")
    if (isinstance(value, TensorSpec) or is_tensor(value)) and name in _NUMBERS:
        raise TypeError(f"{op}: {name} is a tensor; it takes a number, a dtype or a word")
    if value is None or isinstance(value, TensorSpec):
        return value
    if name in _INTEGERS and not isinstance(value, int):
        raise TypeError(f"{op}: {name} is {value!r}; it takes an integer")
    if is_tensor(value):
        return spec_of_tensor(value)
    if name not in _NUMBERS:
        raise TypeError(f"{op}: {name} is {value!r}; give a TensorSpec(dtype, shape) or a tensor")
    return value


def spec_of_tensor(t: torch.Tensor) -> TensorSpec:
    """The description of a tensor; a swapped view of dense storage is recognized by its strides, as the vendor does."""
    swapped = t.dim() >= 2 and not t.is_contiguous() and t.transpose(-2, -1).is_contiguous()
    return TensorSpec(t.dtype, tuple(t.shape), transposed=swapped)


def _as_operator(call: OpCall) -> OpCall:
    """A module's call as the operator call that its forward makes."""
    if call.op == "LinearQuant":
        args = dict(call.args)
        scale, output = args.get("scale"), call.value("output_dtype")
        packs = args.get("pertoken_scale") is None and output in (None, I8, F16)
        if isinstance(scale, TensorSpec) and scale.dtype_name == F32 and packs:
            args["scale"] = TensorSpec(I64, scale.shape)
        module_input = args.pop("input", None)  # the vendor's forward names it x, the document x1
        args["x1"] = module_input if args.get("x1") is None else args["x1"]
        args["x2"] = logical(args.pop("weight", None))
        return OpCall(QMM, call.mode, args)
    if call.op == "LinearWeightQuant":
        args = dict(call.args)
        args["weight"] = logical(args.get("weight"))
        for name in ("antiquant_scale", "antiquant_offset"):
            spec = args.get(name)
            if isinstance(spec, TensorSpec) and spec.rank == 2:
                args[name] = logical(spec)
        return OpCall(WQMM, call.mode, args)
    return call


def logical(spec: Any) -> Any:
    """A stored matrix's description as that of its transposed view; anything else as it is."""
    if not isinstance(spec, TensorSpec) or spec.rank < 2:
        return spec
    shape = (*spec.shape[:-2], spec.shape[-1], spec.shape[-2])
    return TensorSpec(spec.dtype_name, shape, spec.format, not spec.transposed)
