"""The formats of tools: a file each, with a function that says whether a configuration is its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpass.basics.suggestions import did_you_mean
from quantpass.checkpoints.folder import Checkpoint
from quantpass.checkpoints.formats import (
    ascend,
    awq,
    bitsandbytes,
    compressed_tensors,
    floating,
    gptq,
    hqq,
    quanto,
    torchao,
)
from quantpass.checkpoints.headers import CheckpointError
from quantpass.checkpoints.scheme import Format

KNOWN = (
    ascend.known,
    compressed_tensors.known,
    gptq.known,
    awq.known,
    torchao.known,
    bitsandbytes.known,
    quanto.known,
    hqq.known,
    floating.known,
)

_METHODS = ("compressed-tensors", "gptq", "awq", "auto-round", "torchao", "bitsandbytes", "quanto", "hqq")


def format_of(checkpoint: Checkpoint) -> Format:
    """The reader for a checkpoint.

    Raises:
        CheckpointError: it says that a tool quantized it that is not known, or says so in no way that is.
    """
    config = _configuration(checkpoint)
    for known in KNOWN:
        found: Format | None = known(checkpoint, config)
        if found is not None:
            return found
    method = config.get("quant_method")
    raise CheckpointError(
        f"{checkpoint.path}: quant_method is {method!r}. Accepted: {', '.join(_METHODS)}, and AscendV1 with its "
        f"quant_model_description.json.{did_you_mean(method, _METHODS)}"
    )


def _configuration(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The settings of the tool: in ``config.json``, or in a file of its own."""
    found = checkpoint.setting("quantization_config", "compression_config")
    if found is None:
        others = [f for name, f in checkpoint.files.items() if name.startswith("quant") and "desc" not in name]
        found = next((f for f in others if "bits" in f or "w_bit" in f), {})
    if not isinstance(found, dict):
        raise CheckpointError(f"{checkpoint.path}: quantization_config is {type(found).__name__}; an object is wanted")
    return found
