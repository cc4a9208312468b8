"""``torch.ops.npu.*`` for CPU tensors: code written for an Ascend device runs on a laptop.

The schemas are those of torch_npu 2.13.0. Where torch_npu is not loaded the operators are defined here; where it is,
CPU kernels are added to its own, and the fake kernels that it lacks or gets wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch.library import Library

from quantpass.lowering.torchair_versions import install_line
from quantpass.operators import EMULATED
from quantpass.operators.arguments import Arguments, bound, schema_of
from quantpass.operators.operator import Emulated


def emulate_npu() -> None:
    """Give the vendor's quantized operators CPU kernels.

    ``torch.ops.npu.npu_quant_matmul``, ``npu_weight_quant_batchmatmul``, ``npu_trans_quant_param``, ``npu_quantize``,
    ``npu_dynamic_quant``, ``npu_anti_quant``, ``npu_convert_weight_to_int4pack``, ``npu_format_cast`` and
    ``npu_quant_matmul_dequant`` then take CPU tensors, with the schemas of torch_npu 2.13.0 and the arithmetic of
    ``docs/semantics.md`` (A2/A3's where chips differ), and can be traced by ``torch.compile``. Calling it again does
    nothing.

    Where torch_npu is loaded already, its own operators get these kernels, and ``npu_format_cast``,
    ``npu_convert_weight_to_int4pack`` (which have none) and ``npu_weight_quant_batchmatmul`` (wrong for x of rank above
    2) get fake kernels. Where it is not, the operators are defined here, and importing torch_npu **later** in the same
    process raises ImportError, since both would define them: import torch_npu first.
    """
    _install()


@cache
def _install() -> tuple[Library, ...]:
    missing = [op.vendor.name for op in EMULATED if not hasattr(torch.ops.npu, op.vendor.name)]
    if missing and len(missing) < len(EMULATED):
        raise RuntimeError(
            f"torch.ops.npu has some of the vendor's quantized operators but lacks {missing}: another library defined "
            f"them, or this torch_npu is too old. Call emulate_npu() before that library, or {install_line()}."
        )
    if not missing:
        return (_added_to_torch_npu(Library("npu", "IMPL")),)
    library = Library("npu", "FRAGMENT")
    for op in EMULATED:
        library.define(op.vendor.schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(op.vendor.name, _taking(op, op.emulate), "CPU")
        torch.library.register_fake(f"npu::{op.vendor.name}", _taking(op, op.emulate_fake or op.emulate), lib=library)
    sys.meta_path.insert(0, _LateImport())
    return (library,)


def _added_to_torch_npu(library: Library) -> Library:
    for op in EMULATED:
        library.impl(op.vendor.name, _taking(op, op.emulate), "CPU")
        if op.vendor_fake != "right":
            fake = _taking(op, op.emulate_fake or op.emulate)
            library.impl(op.vendor.name, fake, "Meta", allow_override=op.vendor_fake == "wrong")
    return library


def _taking(op: Emulated, function: Callable[[Arguments], Any]) -> Callable[..., Any]:
    """``function`` of a call's arguments by name, as a kernel. Older torch_npu lack some, or name them otherwise."""
    ours = schema_of(op.vendor)
    defaults = vars(bound(ours, (), {}))

    def kernel(*args: Any, **kwargs: Any) -> Any:
        theirs = getattr(torch.ops.npu, op.vendor.name).default._schema
        renamed = {t.name: o.name for t, o in zip(theirs.arguments, ours.arguments, strict=False)}
        given = vars(bound(theirs, args, kwargs)).items()
        return function(Arguments(**(defaults | {k if k in defaults else renamed[k]: v for k, v in given})))

    return kernel


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
