"""What the GE operators compute, one function each: ``(inputs, attributes) -> output or outputs``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quantpass.operators import OPERATORS
from quantpass.operators.ge import Inputs, dtype_name, dtype_named, padded
from quantpass.operators.int4 import pack_int4, unpack_int4

Attributes = dict[str, Any]
Kernel = Callable[[Inputs, Attributes], Any]


def kernels(*, saturates: bool, exact_gelu: bool = False) -> dict[str, Kernel]:
    """Every operator that can be computed.

    Args:
        saturates: a float16 overflow gives the largest finite number (310P), not infinity.
        exact_gelu: compute ``Gelu`` with erf. GE's is the tanh form (ops-nn, ``activation/gelu``), and torchair emits
            it for PyTorch's exact one as well.
    """
    gelu = "none" if exact_gelu else "tanh"
    return {
        **{name: _on_chip(kernel, saturates) for op in OPERATORS for name, kernel in op.ge_kernels.items()},
        **_CASTS,
        **_ARITHMETIC,
        **_SHAPES,
        **_MATRICES,
        "Gelu": lambda x, a: torch.nn.functional.gelu(x[0], approximate=gelu),
    }


def _on_chip(kernel: Callable[[Inputs, Attributes, bool], Any], saturates: bool) -> Kernel:
    return lambda x, a: kernel(x, a, saturates)


# -- casts -------------------------------------------------------------------------------------------------------------


def _bitcast(x: Inputs, a: Attributes) -> torch.Tensor:
    """Between int4 and int32 a last dimension of eight comes or goes; int4 values are kept in int8 tensors."""
    if a.get("keep_dim", False):
        raise NotImplementedError("Bitcast with keep_dim")
    name, t = dtype_name(a["type"]), x[0]
    if name == "INT4" and t.dtype == torch.int32:
        return unpack_int4(t).unflatten(-1, (-1, 8))  # type: ignore[no-any-return]
    if name == "INT32" and t.dtype == torch.int8 and t.shape[-1] == 8:
        return pack_int4(t).squeeze(-1)
    if name in ("UINT64", "INT64") and t.dtype == torch.int64:
        return t  # type: ignore[no-any-return]
    return t.view(dtype_named(name))  # type: ignore[no-any-return]


def _cast(x: Inputs, a: Attributes) -> torch.Tensor:
    name, t = dtype_name(a["dst_type"]), x[0]
    if name == "INT4":
        return t.to(torch.int8)  # type: ignore[no-any-return]
    if name == "UINT64" and t.dtype == torch.int64:
        return t  # type: ignore[no-any-return]
    return t.to(dtype_named(name))  # type: ignore[no-any-return]


_CASTS: dict[str, Kernel] = {"Bitcast": _bitcast, "Cast": _cast}


# -- arithmetic --------------------------------------------------------------------------------------------------------


def _binary(f: Callable[..., Any]) -> Kernel:
    return lambda x, a: f(x[0], x[1])


def _unary(f: Callable[..., Any]) -> Kernel:
    return lambda x, a: f(x[0])


def _reduce(f: Callable[..., Any]) -> Kernel:
    def kernel(x: Inputs, a: Attributes) -> torch.Tensor:
        axes = _ints(x[1])
        if not axes and a.get("noop_with_empty_axes", False):
            return x[0]  # type: ignore[no-any-return]
        return f(x[0], axes or list(range(x[0].dim())), a["keep_dims"])  # type: ignore[no-any-return]

    return kernel


def _softmax(x: Inputs, a: Attributes) -> torch.Tensor:
    (axis,) = a["axes"]
    return torch.softmax(x[0], axis, torch.float32 if a["half_to_float"] else None)


def _layer_norm(x: Inputs, a: Attributes) -> tuple[torch.Tensor, ...]:
    t, shape, gamma, beta = padded(x, 4)
    out, mean, rstd = torch.native_layer_norm(t, _ints(shape), gamma, beta, a["epsilon"])
    return out, mean.float(), rstd.float()


def _swish(x: Inputs, a: Attributes) -> torch.Tensor:
    if a["scale"] != 1.0:
        raise NotImplementedError(f"Swish with scale {a['scale']}")
    return torch.nn.functional.silu(x[0])


def _cumsum(x: Inputs, a: Attributes) -> torch.Tensor:
    if a["exclusive"] or a["reverse"]:
        raise NotImplementedError("Cumsum with exclusive or reverse")
    (axis,) = _ints(x[1])
    return torch.cumsum(x[0], axis, dtype=x[0].dtype)


def _arg_max(x: Inputs, a: Attributes) -> tuple[torch.Tensor, torch.Tensor]:
    largest = torch.max(x[0], a["dimension"], a["keep_dims"])
    return largest.indices, largest.values


_ARITHMETIC: dict[str, Kernel] = {
    "Add": _binary(torch.add), "AddV2": _binary(torch.add), "Sub": _binary(torch.sub), "Mul": _binary(torch.mul),
    "RealDiv": _binary(torch.true_divide), "Div": _binary(torch.true_divide), "Pow": _binary(torch.pow),
    "FloorDiv": _binary(torch.floor_divide), "FloorMod": _binary(torch.remainder),
    "Minimum": _binary(torch.minimum), "Maximum": _binary(torch.maximum),
    "Equal": _binary(torch.eq), "NotEqual": _binary(torch.ne), "Less": _binary(torch.lt),
    "LessEqual": _binary(torch.le), "Greater": _binary(torch.gt), "GreaterEqual": _binary(torch.ge),
    "LogicalAnd": _binary(torch.logical_and), "LogicalOr": _binary(torch.logical_or),
    "Muls": lambda x, a: x[0] * a["value"], "Adds": lambda x, a: x[0] + a["value"],
    "Neg": _unary(torch.neg), "Abs": _unary(torch.abs), "Reciprocal": _unary(torch.reciprocal),
    "Round": _unary(torch.round), "Rsqrt": _unary(torch.rsqrt), "Sqrt": _unary(torch.sqrt), "Exp": _unary(torch.exp),
    "Cos": _unary(torch.cos), "Sin": _unary(torch.sin), "Tanh": _unary(torch.tanh), "Sigmoid": _unary(torch.sigmoid),
    "Relu": _unary(torch.relu), "Erf": _unary(torch.erf), "Floor": _unary(torch.floor), "Ceil": _unary(torch.ceil),
    "LogicalNot": _unary(torch.logical_not),
    "GeluV2": lambda x, a: torch.nn.functional.gelu(x[0], approximate=a["approximate"]),
    "Swish": _swish,
    "ClipByValueV2": lambda x, a: torch.clamp(x[0], x[1], x[2]),
    "SelectV2": lambda x, a: torch.where(x[0].bool(), x[1], x[2]),
    "ReduceMax": _reduce(torch.amax), "ReduceMin": _reduce(torch.amin),
    "ReduceMean": _reduce(lambda t, axes, keep: torch.mean(t, axes, keep)),
    "ReduceSum": _reduce(lambda t, axes, keep: torch.sum(t, axes, keep, dtype=t.dtype)),
    "ReduceAll": _reduce(lambda t, axes, keep: torch.all(t, axes, keep)),
    "ReduceAny": _reduce(lambda t, axes, keep: torch.any(t, axes, keep)),
    "ArgMaxWithValue": _arg_max,
    "SoftmaxV2": _softmax,
    "LayerNormV4": _layer_norm,
    "Cumsum": _cumsum,
}  # fmt: skip


# -- shapes and indices ------------------------------------------------------------------------------------------------


def _ints(t: torch.Tensor) -> list[int]:
    return [int(v) for v in t.flatten().tolist()]


def _pad(x: Inputs, a: Attributes) -> torch.Tensor:
    value = x[2].item() if len(x) > 2 and x[2] is not None else 0
    if a.get("mode", "constant") != "constant" or not a.get("paddings_contiguous", True):
        raise NotImplementedError("PadV3 in another mode than constant, or with all paddings in front first")
    pairs = x[1].reshape(-1, 2).flip(0)  # PyTorch's order: the last dimension first
    return torch.nn.functional.pad(x[0], pairs.flatten().tolist(), value=value)


def _strided_slice(x: Inputs, a: Attributes) -> torch.Tensor:
    for mask in ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask"):
        if a[mask]:
            raise NotImplementedError(f"StridedSliceV2 with {mask} {a[mask]}")
    t, begin, end = x[0], _ints(x[1]), _ints(x[2])
    axes = _ints(x[3]) if len(x) > 3 and x[3] is not None else list(range(len(begin)))
    steps = _ints(x[4]) if len(x) > 4 and x[4] is not None else [1] * len(begin)
    for axis, first, last, step in zip(axes, begin, end, steps, strict=True):
        picked = range(*slice(first, last, step).indices(t.shape[axis]))
        t = t.index_select(axis, torch.tensor(list(picked), dtype=torch.int64))
    return t  # type: ignore[no-any-return]


def _gather(x: Inputs, a: Attributes) -> torch.Tensor:
    if a.get("batch_dims", 0):
        raise NotImplementedError(f"GatherV2 with batch_dims {a['batch_dims']}")
    t, indices = x[0], x[1].long()
    (axis,) = _ints(x[2])
    axis %= t.dim()
    picked = t.index_select(axis, indices.flatten() % t.shape[axis])
    return picked.reshape(*t.shape[:axis], *indices.shape, *t.shape[axis + 1 :])  # type: ignore[no-any-return]


def _index_by_tensor(x: Inputs, a: Attributes) -> torch.Tensor:
    given = iter(x[1:])
    indices = [next(given) if used else slice(None) for used in a["indices_mask"]]
    return x[0][tuple(indices)]  # type: ignore[no-any-return]


def _range(x: Inputs, a: Attributes) -> torch.Tensor:
    start, limit, delta = (t.item() for t in x[:3])
    return torch.arange(start, limit, delta)


def _concat(x: Inputs, a: Attributes) -> torch.Tensor:
    (axis,) = _ints(x[a["N"]])
    return torch.cat(x[: a["N"]], axis)


def _split(x: Inputs, a: Attributes) -> tuple[torch.Tensor, ...]:
    (axis,) = _ints(x[2])
    return tuple(torch.split(x[0], _ints(x[1]), axis))


def _squeeze(x: Inputs, a: Attributes) -> torch.Tensor:
    return x[0].squeeze(tuple(a["axis"])) if a["axis"] else x[0].squeeze()  # type: ignore[no-any-return]


def _unsqueeze(x: Inputs, a: Attributes) -> torch.Tensor:
    t, rank = x[0], x[0].dim() + len(a["axes"])
    for axis in sorted(axis % rank for axis in a["axes"]):
        t = t.unsqueeze(axis)
    return t  # type: ignore[no-any-return]


def _reshape(x: Inputs, a: Attributes) -> torch.Tensor:
    if a.get("axis", 0) != 0 or a.get("num_axes", -1) != -1:
        raise NotImplementedError("Reshape of some of the axes")
    return x[0].reshape(_ints(x[1]))  # type: ignore[no-any-return]


_SHAPES: dict[str, Kernel] = {
    "Reshape": _reshape,
    "Transpose": lambda x, a: x[0].permute(_ints(x[1])).contiguous(),
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "BroadcastTo": lambda x, a: x[0].expand(_ints(x[1])),
    "Fill": lambda x, a: x[1].expand(_ints(x[0])),
    "ZerosLike": lambda x, a: torch.zeros_like(x[0]),
    "OnesLike": lambda x, a: torch.ones_like(x[0]),
    "Shape": lambda x, a: torch.tensor(x[0].shape, dtype=dtype_named(dtype_name(a["dtype"]))),
    "Identity": lambda x, a: x[0],
    "TensorMove": lambda x, a: x[0].clone(),
    "Range": _range,
    "ConcatV2": _concat,
    "ConcatD": lambda x, a: torch.cat(x, a["concat_dim"]),
    "Pack": lambda x, a: torch.stack(x, a["axis"]),
    "SplitV": _split,
    "StridedSliceV2": _strided_slice,
    "PadV3": _pad,
    "GatherV2": _gather,
    "GatherElements": lambda x, a: torch.gather(x[0], a["dim"], x[1]),
    "IndexByTensor": _index_by_tensor,
}


# -- matrices ----------------------------------------------------------------------------------------------------------


def _product(x1: torch.Tensor, x2: torch.Tensor, turn1: bool, turn2: bool) -> torch.Tensor:
    a = x1.transpose(-2, -1) if turn1 else x1
    b = x2.transpose(-2, -1) if turn2 else x2
    if a.dtype in (torch.int8, torch.uint8):
        return (a.to(torch.int32) @ b.to(torch.int32)).to(torch.int32)
    return a @ b


def _mat_mul(x: Inputs, a: Attributes) -> torch.Tensor:
    bias = x[2] if len(x) > 2 else None
    if (len(x) > 3 and x[3] is not None) or a.get("offset_x", 0):
        raise NotImplementedError("MatMul with offset_w or offset_x")
    if bias is not None and bias.is_floating_point() and x[0].dim() == 2:
        x1 = x[0].t() if a["transpose_x1"] else x[0]
        return torch.addmm(bias, x1, x[1].t() if a["transpose_x2"] else x[1])
    y = _product(x[0], x[1], a["transpose_x1"], a["transpose_x2"])
    return y if bias is None else y + bias


_MATRICES: dict[str, Kernel] = {
    "MatMul": _mat_mul,
    "MatMulV2": _mat_mul,
    "BatchMatMul": lambda x, a: _product(x[0], x[1], a["adj_x1"], a["adj_x2"]),
    "BatchMatMulV2": lambda x, a: _product(x[0], x[1], a["adj_x1"], a["adj_x2"]),
}
