"""optimum-quanto.

Layout: ``weight._data`` int8 ``(N, K)`` and ``weight._scale``; below 8 bits ``weight._data._data``, packed uint8 of
``(N * K / group, group)`` codes, with ``weight._shift``; ``quanto_qmap.json`` names each module's types
(``optimum/quanto/tensor/`` and ``models/transformers_models.py`` 0.2.7).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpass.basics.reasons import refuse
from quantpass.checkpoints.folder import Checkpoint, Module
from quantpass.checkpoints.formats.parts import no_integers, tensor
from quantpass.checkpoints.headers import CheckpointError, StoredTensor
from quantpass.checkpoints.scheme import ActivationScheme, Quantized, WeightScheme

_MAP = "quanto_qmap.json"
_PACKED = "weight._data._data"


def known(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Quanto | None:
    """The reader for ``config`` or a map of types; None where another tool wrote it."""
    own = config.get("quant_method") == "quanto" or _MAP in checkpoint.files
    return Quanto(checkpoint, checkpoint.files.get(_MAP, {}), config) if own else None


class Quanto:
    """Reads its modules."""

    def __init__(self, checkpoint: Checkpoint, types: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self._checkpoint, self._types, self._config = checkpoint, types, config
        self.title = "optimum-quanto"
        self.notes: tuple[str, ...] = ()

    def read(self, module: Module) -> Quantized | None:
        if "weight._scale" not in module.tensors:
            return None
        of_module = self._types.get(module.name)
        of_module = of_module if isinstance(of_module, dict) else self._config
        codes = of_module.get("activations") in ("qint8", "int8")
        x = ActivationScheme(dynamic=False, per="tensor", codes=True) if codes else None
        bias = "bias" in module.tensors
        scale = tensor(module, "weight._scale", (0, 1, 2))
        if _PACKED not in module.tensors:
            weight = tensor(module, "weight._data", (2,))
            n, k = weight.shape
            if weight.dtype != "int8":
                return no_integers(k, n, f"{weight.dtype} weight", f"the weight is {weight.dtype}", bias=bias)
            return Quantized(k, n, WeightScheme(8, per_tensor=scale.shape in ((), (1,))), x, bias)
        packed = tensor(module, _PACKED, (2,), ("uint8",))
        bits = {"qint4": 4, "qint2": 2}.get(str(of_module.get("weights")), 4)
        per = 8 // bits
        group, elements = packed.shape[1], packed.shape[0] * packed.shape[1] * per
        n, k = self._sizes(module, elements, group, scale)
        if not k:
            fact = (
                f"{elements} codes in groups of {group}; nothing in the folder says how many rows and columns they are"
            )
            return Quantized(0, 0, None, words=f"int{bits} weight", rejects=(refuse("checkpoint.tensors", fact),))
        return Quantized(k, n, WeightScheme(bits, group if group < k else 0, zero_point=True), x, bias, packed_k=group)

    def _sizes(self, module: Module, elements: int, group: int, scale: StoredTensor) -> tuple[int, int]:
        """N and K of codes whose file has groups only: from the bias, or from the model's sizes."""
        if scale.shape and scale.shape[0] and elements != scale.shape[0] * group:
            raise CheckpointError(f"{module.name}: {elements} codes, and {scale.shape[0]} scales for groups of {group}")
        own = module.tensors.get("bias")
        n = own.shape[0] if own is not None and len(own.shape) == 1 else 0
        if not n:
            k = self._columns(module.name)
            n = elements // k if k else 0
        return (n, elements // n) if n and elements % n == 0 else (0, 0)

    def _columns(self, name: str) -> int:
        """What the model's own configuration says of the input of a projection."""
        last, setting = name.rpartition(".")[2], self._checkpoint.setting
        hidden = setting("hidden_size", "d_model", "n_embd")
        heads, size = setting("num_attention_heads"), setting("head_dim")
        if last == "o_proj" and isinstance(heads, int) and isinstance(size, int):
            hidden = heads * size
        elif last == "down_proj":
            hidden = setting("intermediate_size")
        elif last not in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "lm_head"):
            hidden = 0
        return hidden if isinstance(hidden, int) and hidden > 0 else 0
