"""torchao: what transformers saves as safetensors.

Layout: ``torchao/prototype/safetensors/safetensors_support.py`` of torchao 0.18: the parts of a quantized tensor lie
beside each other as ``_weight_qdata``, ``_weight_scale`` ..., and the files' metadata say what they are parts of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject
from quantpass.checkpoints.folder import Checkpoint, Module
from quantpass.checkpoints.formats.parts import all_zero, groups_of, no_integers, tensor
from quantpass.checkpoints.headers import CheckpointError
from quantpass.checkpoints.scheme import ActivationScheme, Quantized, WeightScheme

_INT8, _INTX, _INT4 = "Int8Tensor", "IntxUnpackedToInt8Tensor", "Int4Tensor"


def known(checkpoint: Checkpoint, config: Mapping[str, Any]) -> TorchAo | None:
    """The reader for ``config``; None where another tool wrote it."""
    return TorchAo(checkpoint.metadata, config) if config.get("quant_method") == "torchao" else None


class TorchAo:
    """Reads its modules: what each tensor is stands in the files' metadata."""

    def __init__(self, metadata: Mapping[str, str], config: Mapping[str, Any]) -> None:
        self._metadata = metadata
        named = config.get("quant_type")
        default = named.get("default") if isinstance(named, dict) else None
        self.title = f"torchao, {default.get('_type', '?') if isinstance(default, dict) else named}"
        self.notes: tuple[str, ...] = ()

    def read(self, module: Module) -> Quantized | None:
        if "_weight_qdata" not in module.tensors:
            return None
        kind, data = self._described(module)
        codes, bias = tensor(module, "_weight_qdata", (2, 3)), "bias" in module.tensors
        n, k = codes.shape[-2:]
        if kind not in (_INT8, _INTX, _INT4):
            return no_integers(k, n, f"torchao {kind}", f"the weight is a {kind}", bias=bias)
        if kind == _INT4:
            k *= 2
            # Its kernels' own packing of floats beside the codes.
            return _grouped(module, data, k, n, 4, None, bias, 2)
        target = data.get("target_dtype")
        bits = _bits(target.get("_data") if isinstance(target, dict) else "int8", module)
        return _grouped(module, data, k, n, bits, _activation(module, kind, data), bias, 1)

    def _described(self, module: Module) -> tuple[str, dict[str, Any]]:
        text = self._metadata.get(f"{module.name}.weight")
        try:
            found = json.loads(text or "")
            return str(found["_type"]), dict(found["_data"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(
                f"{module.name}: the files' metadata do not say which of torchao's tensors its weight is"
            ) from error


def _grouped(
    module: Module, data: dict[str, Any], k: int, n: int, bits: int, x: ActivationScheme | None, bias: bool, packed: int
) -> Quantized:
    block, scale = data.get("block_size"), tensor(module, "_weight_scale", (0, 1, 2, 3))
    if not isinstance(block, list) or len(block) < 2 or not all(isinstance(b, int) and b > 0 for b in block):
        raise CheckpointError(f"{module.name}: block_size is {block!r}; two positive numbers are wanted")
    rows, along = block[-2:]
    rejects: tuple[Reject, ...] = ()
    if rows not in (1, n):
        rejects = (refuse("checkpoint.scheme", f"the weight has a scale for each block of {rows} by {along}"),)
    per_tensor = rows == n and n > 1
    groups = 0 if along >= k or rejects or per_tensor else groups_of(module, k, -(-k // along), along)
    if groups and scale.shape[-1] != -(-k // along) and scale.shape[0] != -(-k // along):
        raise CheckpointError(f"{module.name}: scales of shape {scale.shape}, and K is {k}, in groups of {along}")
    zero = not all_zero(module.tensors.get("_weight_zero_point"))
    weight = WeightScheme(bits, groups, per_tensor, zero)
    shape = module.tensors["_weight_qdata"].shape
    experts = shape[0] if len(shape) == 3 else 0
    return Quantized(k, n, weight, x, bias, packed_k=packed, experts=experts, rejects=rejects)


def _bits(name: Any, module: Module) -> int:
    digits = str(name).removeprefix("uint").removeprefix("int")
    if not digits.isdigit() or not 1 <= int(digits) <= 8:
        raise CheckpointError(f"{module.name}: its codes are {name!r}; accepted: int1 to int8")
    return int(digits)


def _activation(module: Module, kind: str, data: dict[str, Any]) -> ActivationScheme | None:
    if kind == _INTX:
        how = data.get("activation_quantization")
        if how is None:
            return None
        return ActivationScheme(dynamic=True, per="token", zero_point="asym" in str(how).lower())
    given = data.get("act_quant_kwargs")
    if not isinstance(given, dict):
        return None
    settings = given.get("_data")
    settings = settings if isinstance(settings, dict) else {}
    zero = "ASYMMETRIC" in str(settings.get("mapping_type"))
    if "_weight_act_quant_scale" in module.tensors:
        zero = zero and not all_zero(module.tensors.get("_weight_act_quant_zero_point"))
        return ActivationScheme(dynamic=False, per="tensor", zero_point=zero, codes=True)
    per = "tensor" if "PerTensor" in str(settings.get("granularity")) else "token"
    return ActivationScheme(dynamic=True, per=per, zero_point=zero, codes=True)
