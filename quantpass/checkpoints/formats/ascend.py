"""Ascend's own: ``quant_model_description.json`` of msModelSlim (AscendV1), a type for each tensor.

Layout: msModelSlim's description of its weights, and the parameters that vllm-ascend's methods make for each type
(``vllm_ascend/quantization/methods/``): int8 ``weight`` ``(N, K)``; static W8A8 has ``input_scale``, ``input_offset``,
``deq_scale`` and an int32 ``quant_bias``; 4-bit codes may lie two in a byte along N.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpass.checkpoints.folder import Checkpoint, Module
from quantpass.checkpoints.formats.parts import all_zero, groups_of, no_integers, tensor
from quantpass.checkpoints.headers import CheckpointError, StoredTensor
from quantpass.checkpoints.scheme import ActivationScheme, Quantized, WeightScheme

_DYNAMIC = ActivationScheme(codes=True)
_STATIC = ActivationScheme(dynamic=False, per="tensor", codes=True)

_INTEGERS: Mapping[str, tuple[int, ActivationScheme | None]] = {
    "W8A8": (8, _STATIC),
    "W8A8_DYNAMIC": (8, _DYNAMIC),
    "W8A8_MIX": (8, _DYNAMIC),
    "W8A8_PDMIX": (8, _DYNAMIC),
    "W8A16": (8, None),
    "W4A16": (4, None),
    "W4A8": (4, _DYNAMIC),
    "W4A8_DYNAMIC": (4, _DYNAMIC),
    "W4A4": (4, ActivationScheme(4, codes=True)),
    "W4A4_DYNAMIC": (4, ActivationScheme(4, codes=True)),
    "W4A4_FLATQUANT_DYNAMIC": (4, ActivationScheme(4, codes=True)),
    "W4A4_LAOS_DYNAMIC": (4, ActivationScheme(4, codes=True)),
}
_OTHERS: Mapping[str, str] = {
    "W8A8S": "sparse codes, which npu_matmul_compress_dequant takes: no rules of it are known here",
    "W8A8SC": "compressed codes, which npu_matmul_compress_dequant takes: no rules of it are known here",
    "W16A16S": "sparse floats",
    "W16A16SC": "compressed floats",
}
_NOTES: Mapping[str, str] = {
    "W8A8_MIX": "prefill quantizes x by its own values, decode with a static scale: judged as dynamic",
    "W8A8_PDMIX": "prefill quantizes x by its own values, decode with a static scale: judged as dynamic",
    "W4A4_FLATQUANT_DYNAMIC": "the transformation of x before it is quantized stays in the graph",
}


def known(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Ascend | None:
    """The reader for a description that lies in the folder; None where there is none."""
    del config
    found = [d for name, d in checkpoint.files.items() if name.startswith("quant_model_description")]
    return Ascend(found[0]) if found else None


class Ascend:
    """Reads its modules: each tensor has its type in the description."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        self._types = description
        group = description.get("group_size", 0)
        self._group = group if isinstance(group, int) and group > 0 else 0
        self.title = f"AscendV1, {description.get('model_quant_type', 'a type for each tensor')}"
        cache = description.get("kv_quant_type") or description.get("kv_cache_type")
        said = f"the KV cache is quantized as well ({cache}): no matmul of a linear, and not judged here"
        self.notes: tuple[str, ...] = (said,) if cache else ()

    def read(self, module: Module) -> Quantized | None:
        kind = self._types.get(f"{module.name}.weight")
        if kind is None or kind == "FLOAT" or "weight" not in module.tensors:
            return None
        if not isinstance(kind, str):
            raise CheckpointError(f"{module.name}: its type is {kind!r}; a text such as 'W8A8' is wanted")
        stored = module.tensors["weight"]
        if len(stored.shape) not in (2, 3):
            return None
        bias = "bias" in module.tensors or "quant_bias" in module.tensors
        if kind not in _INTEGERS:
            n, k = stored.shape[-2:]
            fact = f"{kind}: {_OTHERS.get(kind, 'a type of floats, or one that is not known here')}"
            return no_integers(k, n, kind, fact, bias=bias)
        bits, x = _INTEGERS[kind]
        n, k, packed_k, packed_n = _sizes(module, stored, bits)
        if x is not None and not x.dynamic and not all_zero(module.tensors.get("input_offset")):
            x = ActivationScheme(dynamic=False, per="tensor", zero_point=True, codes=True)
        offset = module.tensors.get("weight_offset")
        weight = WeightScheme(bits, self._groups(module, k), zero_point=not all_zero(offset))
        experts = stored.shape[0] if len(stored.shape) == 3 else 0
        notes = (_NOTES[kind],) if kind in _NOTES else ()
        return Quantized(k, n, weight, x, bias, packed_k, packed_n, experts, whole=True, notes=notes)

    def _groups(self, module: Module, k: int) -> int:
        second = module.tensors.get("weight_scale_second")
        scale = second or module.tensors.get("weight_scale")
        along_k = scale.shape[-1] if scale is not None and len(scale.shape) > 1 else 1
        return groups_of(module, k, along_k, self._group or None) if along_k > 1 else 0


def _sizes(module: Module, stored: StoredTensor, bits: int) -> tuple[int, int, int, int]:
    """N, K, and how many rows and columns one stored element holds."""
    n, k = stored.shape[-2:]
    if stored.dtype == "int32" and bits == 4:
        return n, k * 8, 8, 1
    if stored.dtype != "int8":
        raise CheckpointError(f"{module.name}.weight is {stored.dtype}; wanted int8, or int32 that carries int4")
    scale = tensor(module, "weight_scale", (1, 2, 3))
    if scale.shape[0 if len(scale.shape) < 3 else 1] == 2 * n and bits == 4:
        return 2 * n, k, 1, 2
    return n, k, 1, 1
