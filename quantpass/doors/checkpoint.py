"""The door for checkpoints: ``check_checkpoint``. A folder is looked at without PyTorch, a model by ``explain``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantpass.checkpoints.check import Settings, check_folder
from quantpass.chips import DOCUMENTED

if TYPE_CHECKING:
    from quantpass.checkpoints.report import CheckpointReport


def check_checkpoint(
    path: str | Path,
    *,
    targets: str | Sequence[str] | None = None,
    tp: int = 1,
    mode: str = "graph",
    dtype: Any = None,
    bias_dtype: Any = None,
    allow: Sequence[str] = (),
) -> CheckpointReport:
    """The verdict on every quantized linear of a checkpoint, from its configuration and the headers of its files.

    Nothing is fetched, executed or loaded: of tensors' data only those that a verdict needs are looked at (the order of
    groups, zero points). The rules are those of ``explain`` and ``check_op``. PyTorch is not needed.

    Args:
        path: a folder with ``config.json`` (or Ascend's ``quant_model_description.json``) and safetensors files.
        targets: one target or several; None for the chips of the two module documents.
        tp: how many tensor-parallel ranks share the weights: each verdict is on a rank's part.
        mode: ``"graph"`` (GE, through torchair) or ``"eager"`` (aclnn).
        dtype: of activations and results, ``"float16"``, ``"bfloat16"`` or ``"float32"``; None for its own.
        bias_dtype: of the bias; None for what the operator takes.
        allow: contradicted rules to lift, and permissions, by id.

    Raises:
        ValueError: the checkpoint can't be read, or a value that is not accepted.
        TypeError: ``path`` is no path, or ``allow`` is one text.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"check_checkpoint: the checkpoint is a {type(path).__name__}; give the path of its folder")
    names = DOCUMENTED if targets is None else (targets,) if isinstance(targets, str) else tuple(targets)
    settings = Settings(tuple(dict.fromkeys(names)), tp, mode, dtype, bias_dtype, allow)  # type: ignore[arg-type]
    return check_folder(path, settings)
