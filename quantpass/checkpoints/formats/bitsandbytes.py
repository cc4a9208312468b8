"""bitsandbytes: LLM.int8() and the 4-bit types.

Layout: ``Linear8bitLt`` int8 ``weight`` ``(N, K)`` and ``SCB`` ``(N,)``; ``Linear4bit`` packed ``weight`` with
``weight.quant_state.bitsandbytes__nf4``, JSON that holds the shape (``bitsandbytes/functional.py`` 0.50).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpass.checkpoints.folder import Checkpoint, Module
from quantpass.checkpoints.formats.parts import no_integers, tensor
from quantpass.checkpoints.headers import CheckpointError, parsed
from quantpass.checkpoints.scheme import ActivationScheme, Quantized, WeightScheme

_STATE = "weight.quant_state.bitsandbytes__"


def known(checkpoint: Checkpoint, config: Mapping[str, Any]) -> BitsAndBytes | None:
    """The reader for ``config``; None where another tool wrote it."""
    del checkpoint
    own = str(config.get("quant_method", "")).startswith("bitsandbytes") or "load_in_8bit" in config
    return BitsAndBytes(config) if own else None


class BitsAndBytes:
    """Reads its modules."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        four = config.get("load_in_4bit") or config.get("_load_in_4bit")
        threshold = config.get("llm_int8_threshold", 6.0)
        self.title = f"bitsandbytes, {config.get('bnb_4bit_quant_type', 'fp4') if four else 'LLM.int8()'}"
        self.notes: tuple[str, ...] = ()
        if not four and isinstance(threshold, int | float) and threshold:
            self.notes = (
                f"llm_int8_threshold is {threshold:g}: columns of x above it are multiplied as floats, outside of any "
                "graph; the verdicts are those of llm_int8_threshold=0.0, which drops that path",
            )

    def read(self, module: Module) -> Quantized | None:
        state = next((name for name in module.tensors if name.startswith(_STATE)), None)
        bias = "bias" in module.tensors
        if state is not None:
            n, k = _shape(module, state)
            kind = state.removeprefix(_STATE).upper()
            fact = f"{kind} codes stand for values in a table, not for integers times a scale"
            return no_integers(k, n, f"{kind} weight; float activation", fact, bias=bias)
        if "SCB" not in module.tensors:
            return None
        weight = tensor(module, "weight", (2,), ("int8",))
        n, k = weight.shape
        if tensor(module, "SCB", (1, 2)).shape[-1] not in (n, 1):
            raise CheckpointError(f"{module.name}: SCB has shape {module.tensors['SCB'].shape}, and N is {n}")
        return Quantized(k, n, WeightScheme(8), ActivationScheme(codes=True, opaque=True), bias, whole=True)


def _shape(module: Module, state: str) -> tuple[int, int]:
    found = tensor(module, state, (1,), ("uint8",))
    described = parsed(found.read(), found.path)
    shape = described.get("shape") if isinstance(described, dict) else None
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(s, int) and s > 0 for s in shape):
        raise CheckpointError(f"{module.name}: {state} has the shape {shape!r}; two positive numbers are wanted")
    return shape[0], shape[1]
