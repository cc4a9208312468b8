"""The door for checkpoints: ``check_checkpoint``. A folder is looked at without PyTorch, a model by ``explain``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from quantpass.checkpoints.check import Settings, check_folder
from quantpass.chips import DOCUMENTED

if TYPE_CHECKING:
    from quantpass.checkpoints.report import CheckpointReport
    from quantpass.report import Report


@overload
def check_checkpoint(
    path: str | Path,
    *,
    targets: str | Sequence[str] | None = None,
    tp: int = 1,
    mode: str = "graph",
    dtype: Any = None,
    bias_dtype: Any = None,
    allow: Sequence[str] = (),
) -> CheckpointReport: ...


@overload
def check_checkpoint(
    path: Callable[..., Any],
    *,
    args: Sequence[Any],
    targets: str | Sequence[str] | None = None,
    mode: str = "graph",
    allow: Sequence[str] = (),
) -> Report: ...


def check_checkpoint(
    path: str | Path | Callable[..., Any],
    *,
    args: Sequence[Any] | None = None,
    targets: str | Sequence[str] | None = None,
    tp: int = 1,
    mode: str = "graph",
    dtype: Any = None,
    bias_dtype: Any = None,
    allow: Sequence[str] = (),
) -> CheckpointReport | Report:
    """The verdict on every quantized linear of a checkpoint, from its configuration and the headers of its files.

    Nothing is fetched, executed or loaded: of tensors' data only those that a verdict needs are looked at (the order of
    groups, zero points). The rules are those of ``explain`` and ``check_op``, the calls those that doors to an NPU
    build (``numerics="vendor"``). PyTorch is not needed.

    Args:
        path: a folder with ``config.json`` (or Ascend's ``quant_model_description.json``) and safetensors files. Or a
            model, on the meta device for one that is not loaded: ``explain`` answers then, by its shapes.
        args: a model's inputs; for a folder none.
        targets: one target or several; None for the chips of the two module documents.
        tp: how many tensor-parallel ranks share the weights: each verdict is on a rank's part.
        mode: ``"graph"`` (GE, through torchair) or ``"eager"`` (aclnn).
        dtype: of activations and results, ``"float16"``, ``"bfloat16"`` or ``"float32"``; None for its own.
        bias_dtype: of the bias; None for what the operator takes.
        allow: contradicted rules to lift, and permissions, by id.

    Returns:
        A :class:`~quantpass.checkpoints.report.CheckpointReport`; for a model the report of ``explain``.

    Raises:
        ValueError: the checkpoint can't be read, or a value that is not accepted.
        TypeError: neither a path nor a model, ``args`` that are missing or not asked for, or ``allow`` as one text.
    """
    names = DOCUMENTED if targets is None else (targets,) if isinstance(targets, str) else tuple(targets)
    settings = Settings(tuple(dict.fromkeys(names)), tp, mode, dtype, bias_dtype, allow)  # type: ignore[arg-type]
    if isinstance(path, str | Path):
        if args is not None:
            raise TypeError("check_checkpoint: args are the inputs of a model, and a folder was given")
        return check_folder(path, settings)
    return _explained(path, args, settings)


def _explained(model: Any, args: Sequence[Any] | None, settings: Settings) -> Report:
    if not callable(model):
        raise TypeError(f"check_checkpoint: {type(model).__name__} is neither the path of a folder nor a model")
    if args is None:
        raise TypeError("check_checkpoint: a model needs its inputs, e.g. args=(ids,); those may be on the meta device")
    if settings.ranks > 1 or settings.dtype or settings.bias:
        raise ValueError("check_checkpoint: a model is judged as it is: tp, dtype and bias_dtype are for a folder")
    from quantpass.doors.explain import explain

    mode: Any = settings.mode
    return explain(model, args, target=settings.targets, mode=mode, allow=settings.allow, numerics="vendor")
