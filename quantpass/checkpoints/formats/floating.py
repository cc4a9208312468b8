"""Checkpoints of floats: not quantized at all, or to 8- and 4-bit floats, which no fused operator takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpass.checkpoints.folder import Checkpoint, Module
from quantpass.checkpoints.formats.parts import no_integers
from quantpass.checkpoints.scheme import Quantized

_METHODS = ("fp8", "fbgemm_fp8", "mxfp4", "mxfp8", "nvfp4", "modelopt", "finegrained_fp8")


def known(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Floating | None:
    """The reader where no tool is named, or one of floats."""
    del checkpoint
    method = config.get("quant_method")
    return Floating(method) if not config or method in _METHODS else None


class Floating:
    """Finds 8- and 4-bit floats among the modules' weights."""

    def __init__(self, method: str | None) -> None:
        self.title = method or "not quantized"
        self.notes: tuple[str, ...] = ()

    def read(self, module: Module) -> Quantized | None:
        weight = module.tensors.get("weight")
        if weight is None or len(weight.shape) < 2 or not weight.dtype.startswith(("float8", "float6", "float4")):
            return None
        n, k = weight.shape[-2:]
        return no_integers(k, n, f"{weight.dtype} weight", f"the weight is {weight.dtype}, not integers times a scale")
