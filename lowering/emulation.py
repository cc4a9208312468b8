"""``torch.ops.npu.*`` for CPU tensors: code written for an Ascend device runs on a laptop.

The schemas are those of torch_npu 2.13.0. Where torch_npu is not loaded the operators are defined here; where it is,
CPU kernels are added to its own, and the fake kernels that it lacks or gets wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch.library import Library

from quantpass.lowering import quantizers
from quantpass.operators.ir import require

ops = torch.ops.quantpass

SCHEMAS = (
    "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? pertoken_scale=None, "
    "Tensor? bias=None, int? output_dtype=None, int? x1_dtype=None, int? x2_dtype=None, "
    "int? pertoken_scale_dtype=None, int? scale_dtype=None, int[]? group_sizes=None, Tensor? y_scale=None) -> Tensor",
    "npu_weight_quant_batchmatmul(Tensor x, Tensor weight, Tensor antiquant_scale, Tensor? antiquant_offset=None, "
    "Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? bias=None, int antiquant_group_size=0, "
    "int inner_precise=0, int? weight_dtype=None) -> Tensor",
    "npu_trans_quant_param(Tensor scale, Tensor? offset=None, int? round_mode=0) -> Tensor",
    "npu_quantize(Tensor input, Tensor scales, Tensor? zero_points, int dtype, int axis=1, bool div_mode=True) "
    "-> Tensor",
    "npu_dynamic_quant(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, int? dst_type=None, "
    'str quant_mode="pertoken", float dst_type_max=0.) -> (Tensor, Tensor)',
    "npu_anti_quant(Tensor x, Tensor scale, *, Tensor? offset=None, int? dst_dtype=None, int? src_dtype=None) "
    "-> Tensor",
    "npu_convert_weight_to_int4pack(Tensor weight, int inner_k_tiles=0) -> Tensor",
    "npu_format_cast(Tensor input, int acl_format, *, int? customize_dtype=None, int? input_dtype=None) -> Tensor",
)

_DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128, torch.bool, torch.qint8, torch.quint8, torch.qint32),
    *(torch.bfloat16, torch.quint4x2),
)
"""PyTorch's numbering of dtypes, which the vendor's integer arguments follow."""


def emulate_npu() -> None:
    """Give the vendor's quantized operators CPU kernels.

    ``torch.ops.npu.npu_quant_matmul``, ``npu_weight_quant_batchmatmul``, ``npu_trans_quant_param``, ``npu_quantize``,
    ``npu_dynamic_quant``, ``npu_anti_quant``, ``npu_convert_weight_to_int4pack`` and ``npu_format_cast`` then take CPU
    tensors, with the schemas of torch_npu 2.13.0 and the arithmetic of ``docs/semantics.md`` (A2/A3's where chips
    differ), and can be traced by ``torch.compile``. Calling it again does nothing.

    Where torch_npu is loaded already, its own operators get these kernels, and ``npu_format_cast``,
    ``npu_convert_weight_to_int4pack`` (which have none) and ``npu_weight_quant_batchmatmul`` (wrong for x of rank above
    2) get fake kernels. Where it is not, the operators are defined here, and importing torch_npu **later** in the same
    process raises ImportError, since both would define them: import torch_npu first.
    """
    _install()


@cache
def _install() -> tuple[Library, ...]:
    present = [schema for schema in SCHEMAS if _exists(_name(schema))]
    if present and len(present) < len(SCHEMAS):
        missing = [_name(s) for s in SCHEMAS if s not in present]
        raise RuntimeError(
            f"torch.ops.npu has some of the vendor's quantized operators but lacks {missing}: another library defined "
            "them, or this torch_npu is not 2.13. Call emulate_npu() before that library, or use torch_npu 2.13."
        )
    if present:
        return (_add_kernels(Library("npu", "IMPL"), missing_fakes_only=True),)
    defined = Library("npu", "FRAGMENT")
    for schema in SCHEMAS:
        defined.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    sys.meta_path.insert(0, _LateImport())
    return (_add_kernels(defined, missing_fakes_only=False),)


def _name(schema: str) -> str:
    return schema.partition("(")[0]


def _exists(name: str) -> bool:
    return hasattr(torch.ops.npu, name)


def _add_kernels(library: Library, *, missing_fakes_only: bool) -> Library:
    for name, kernel in _KERNELS.items():
        library.impl(name, kernel, "CPU")
    for name, fake in _FAKES.items():
        if not missing_fakes_only:
            torch.library.register_fake(f"npu::{name}", fake, lib=library)
        elif name in _VENDOR_FAKE_MISSING or name in _VENDOR_FAKE_WRONG:
            library.impl(name, fake, "Meta", allow_override=name in _VENDOR_FAKE_WRONG)
    return library


class _LateImport:
    """Explains why torch_npu can't be imported any more, instead of a registration error from C++."""

    @staticmethod
    def find_spec(name: str, *_: object) -> ModuleSpec | None:
        if name != "torch_npu" or PathFinder.find_spec(name) is None:
            return None
        return ModuleSpec(name, _Refusing())  # type: ignore[arg-type]


class _Refusing:
    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType | None:
        del spec
        raise ImportError(
            "quantpass.emulate_npu() has defined torch.ops.npu.* in this process, which torch_npu also defines. "
            "Import torch_npu before calling emulate_npu()."
        )

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        del module


def _dtype(number: int | None, default: torch.dtype | None = None) -> torch.dtype | None:
    if number is None:
        return default
    require(0 <= number < len(_DTYPES), f"dtype number {number}; PyTorch's go from 0 to {len(_DTYPES) - 1}")
    return _DTYPES[number]


def _no(op: str, **arguments: Any) -> None:
    """Arguments of forms that are not emulated (4- and 8-bit floats, reinterpreted dtypes)."""
    for name, value in arguments.items():
        require(
            value is None, f"{op}: {name} is {value}; the emulation takes int8 and int4 operands only, leave it None"
        )


def _packed_transposed(rows: int, k: int) -> bool:
    """Whether a packed int4 weight ``(K, N / 8)`` arrives as the transposed view ``(K / 8, N)`` of ``(N, K / 8)``."""
    return rows != k and rows * 8 == k


def _quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: Sequence[int] | None = None,
    y_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    _no("npu_quant_matmul", x1_dtype=x1_dtype, x2_dtype=x2_dtype, pertoken_scale_dtype=pertoken_scale_dtype)
    _no("npu_quant_matmul", scale_dtype=scale_dtype, y_scale=y_scale)
    transposed = False
    if x2.dtype == torch.int32:
        k = x1.shape[-1] * (8 if x1.dtype == torch.int32 else 1)
        transposed = _packed_transposed(x2.shape[-2], k)
        x2 = x2.transpose(-2, -1) if transposed else x2
    return ops.quant_matmul(  # type: ignore[no-any-return]
        x1, x2, scale, offset=offset, pertoken_scale=pertoken_scale, bias=bias, group_sizes=group_sizes,
        output_dtype=_dtype(output_dtype, torch.int8), transpose_x2=transposed,
    )  # fmt: skip


def _weight_quant_batchmatmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> torch.Tensor:
    _no("npu_weight_quant_batchmatmul", weight_dtype=weight_dtype)
    transposed = weight.dtype == torch.int32 and _packed_transposed(weight.shape[-2], x.shape[-1])
    weight = weight.transpose(-2, -1) if transposed else weight
    return ops.weight_quant_matmul(  # type: ignore[no-any-return]
        x, weight, antiquant_scale, antiquant_offset, quant_scale, quant_offset, bias, antiquant_group_size,
        inner_precise, transpose_weight=transposed,
    )  # fmt: skip


def _trans_quant_param(
    scale: torch.Tensor, offset: torch.Tensor | None = None, round_mode: int | None = 0
) -> torch.Tensor:
    return ops.trans_quant_param(scale, offset, round_mode or 0)  # type: ignore[no-any-return]


def _quantize(
    input: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: int,
    axis: int = 1,
    div_mode: bool = True,
) -> torch.Tensor:
    target = _dtype(dtype)
    assert target is not None
    return quantizers.npu_quantize(input, scales, zero_points, target, axis, div_mode)


def _dynamic_quant(
    input: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    _no("npu_dynamic_quant", group_index=group_index, dst_type_max=dst_type_max or None)
    target = _dtype(dst_type, torch.int8)
    assert target is not None
    return quantizers.npu_dynamic_quant(input, smooth_scales=smooth_scales, dst_type=target, quant_mode=quant_mode)


def _anti_quant(
    x: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    dst_dtype: int | None = None,
    src_dtype: int | None = None,
) -> torch.Tensor:
    require(
        _dtype(src_dtype) in (None, torch.int8, torch.quint4x2),
        f"npu_anti_quant: src_dtype is {_dtype(src_dtype)}; it must be int8, quint4x2 or None",
    )
    target = _dtype(dst_dtype, torch.float16)
    assert target is not None
    return quantizers.npu_anti_quant(x, scale, offset=offset, dst_dtype=target)


def _convert_weight_to_int4pack(weight: torch.Tensor, inner_k_tiles: int = 0) -> torch.Tensor:
    del inner_k_tiles  # unused by the vendor as well
    require(
        weight.dtype == torch.int32,
        f"npu_convert_weight_to_int4pack: weight is {weight.dtype}; it must be int32, one value an element",
    )
    return ops.pack_int4(weight)  # type: ignore[no-any-return]


def _format_cast(
    input: torch.Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> torch.Tensor:
    del customize_dtype, input_dtype  # they choose the tiles, which a CPU tensor does not have
    return ops.format_cast(input, acl_format)  # type: ignore[no-any-return]


def _quantize_fake(
    input: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: int,
    axis: int = 1,
    div_mode: bool = True,
) -> torch.Tensor:
    del scales, zero_points, axis, div_mode
    target = _dtype(dtype)
    if target == torch.quint4x2:
        return input.new_empty((*input.shape[:-1], input.shape[-1] // 8), dtype=torch.int32)
    containers = {torch.qint8: torch.int8, torch.quint8: torch.uint8, torch.qint32: torch.int32}
    require(target in containers, f"npu_quantize: dtype is {target}; it must be qint8, quint8, qint32 or quint4x2")
    return torch.empty_like(input, dtype=containers[target])  # type: ignore[index]


def _dynamic_quant_fake(
    input: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    del smooth_scales, group_index, dst_type_max
    rows = input.shape[:-1] if quant_mode == "pertoken" else (1,)
    scale = input.new_empty(rows, dtype=torch.float32)
    if _dtype(dst_type) == torch.quint4x2:
        return input.new_empty((*input.shape[:-1], input.shape[-1] // 8), dtype=torch.int32), scale
    return torch.empty_like(input, dtype=torch.int8, memory_format=torch.contiguous_format), scale


def _anti_quant_fake(
    x: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    dst_dtype: int | None = None,
    src_dtype: int | None = None,
) -> torch.Tensor:
    del scale, offset, src_dtype
    last = x.shape[-1] * (8 if x.dtype == torch.int32 else 1)
    return x.new_empty((*x.shape[:-1], last), dtype=_dtype(dst_dtype, torch.float16))


_KERNELS: dict[str, Callable[..., Any]] = {
    "npu_quant_matmul": _quant_matmul,
    "npu_weight_quant_batchmatmul": _weight_quant_batchmatmul,
    "npu_trans_quant_param": _trans_quant_param,
    "npu_quantize": _quantize,
    "npu_dynamic_quant": _dynamic_quant,
    "npu_anti_quant": _anti_quant,
    "npu_convert_weight_to_int4pack": _convert_weight_to_int4pack,
    "npu_format_cast": _format_cast,
}

# The fused operators have fake kernels of their own; calling them on fake tensors is enough.
_FAKES: dict[str, Callable[..., Any]] = {
    **_KERNELS,
    "npu_quantize": _quantize_fake,
    "npu_dynamic_quant": _dynamic_quant_fake,
    "npu_anti_quant": _anti_quant_fake,
}

_VENDOR_FAKE_MISSING = ("npu_format_cast", "npu_convert_weight_to_int4pack")
_VENDOR_FAKE_WRONG = ("npu_weight_quant_batchmatmul",)
