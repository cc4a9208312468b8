"""What differs between the versions of PyTorch that quantpass runs on; nothing else asks for a version.

Each difference is found by looking for the feature, and named with the version that brought it:

* ``torch.compile(isolate_recompiles=True)`` and ``OutputGraph.resolve_source_value``: 2.13;
* ``torch.Tag.reduction``: 2.10;
* ``ExportGraphSignature.parameters_to_mutate``: 2.9.
"""

from __future__ import annotations

import inspect
import os
import re
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._ops import OpOverload
from torch.export.graph_signature import ExportGraphSignature

TESTED = ("2.8", "2.9", "2.10", "2.11", "2.12", "2.13", "2.14")
"""The versions that quantpass's tests run with (docs/versions.md)."""

UNTESTED_VARIABLE = "QUANTPASS_UNTESTED_TORCH"
"""The environment variable that lets quantpass go on with any other version."""

_NO_LIMIT = 1 << 30

_REDUCTIONS = frozenset(
    f"aten::{name}"
    for name in [
        *(
            "all",
            "amax",
            "amin",
            "aminmax",
            "any",
            "argmax",
            "argmin",
            "count_nonzero",
            "linalg_vector_norm",
            "logsumexp",
        ),
        *("max", "mean", "min", "nansum", "norm", "prod", "std", "std_mean", "sum", "var", "var_mean"),
    ]
)
"""What 2.13 marks as reductions."""


def require_tested() -> None:
    """Raise ``RuntimeError`` with a PyTorch that quantpass is not tested with, unless the user wants to go on."""
    version = re.match(r"\d+\.\d+", torch.__version__)
    if (version is None or version[0] not in TESTED) and os.environ.get(UNTESTED_VARIABLE, "0") in ("", "0"):
        raise RuntimeError(untested_words())


def untested_words() -> str:
    """What is said of the PyTorch that is loaded where it is none of :data:`TESTED`."""
    return (
        f"quantpass is tested with PyTorch {', '.join(TESTED)}, and this is {torch.__version__}. Install one of these, "
        f"or set {UNTESTED_VARIABLE}=1 to go on; then compare results with quantpass.verify."
    )


def is_reduction(target: OpOverload) -> bool:
    """True for an operator that PyTorch marks as a reduction."""
    tag = getattr(torch.Tag, "reduction", None)
    if tag is not None:
        return tag in target.tags
    return target._schema.name in _REDUCTIONS


def updated_inputs(signature: ExportGraphSignature) -> set[str]:
    """The names of parameters and buffers that a program updates."""
    return {*signature.buffers_to_mutate.values(), *getattr(signature, "parameters_to_mutate", {}).values()}


def compile_apart(model: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
    """``torch.compile`` that leaves the user's own compilations of the same code as they are.

    2.13 brought ``isolate_recompiles``: a cache of its own for one ``torch.compile``. Before, code has one cache: the
    limit of recompilations is lifted for the call, and what it added counts no longer afterwards.

    Raises:
        RuntimeError: when called, before 2.13: PyTorch gave up compiling this code, since it was recompiled too often.
    """
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        return torch.compile(model, backend=backend, dynamic=dynamic, isolate_recompiles=True)  # type: ignore[call-overload,no-any-return]
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)

    def run(*args: Any, **kwargs: Any) -> Any:
        with _forgotten_afterwards(backend) as codes:
            results = compiled(*args, **kwargs)
        if not codes and _was_given_up(model):
            raise RuntimeError(
                "PyTorch compiles this model no longer: it was recompiled too often (torch._dynamo.config."
                "recompile_limit). Call torch._dynamo.reset(), or do this before compiling the model for other inputs."
            )
        return results

    return run


def source_value(source: Any) -> Any:
    """What a source stands for in the frame that Dynamo is compiling; None where that can't be told.

    Before 2.13 there is no ``resolve_source_value``: a source has a name, an expression in the frame's variables.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        output = InstructionTranslator.current_tx().output
        if hasattr(output, "resolve_source_value"):
            return output.resolve_source_value(source)
        name = source.name if isinstance(source.name, str) else source.name()  # a method before 2.10
        return eval(name, {"G": output.root_tx.f_globals, "L": output.root_tx.f_locals})
    except Exception:  # no frame is being compiled, or the name needs what only a guard has
        return None


@contextmanager
def _forgotten_afterwards(backend: Callable[..., Any]) -> Iterator[list[types.CodeType]]:
    """Gives the code that is compiled inside. What ``backend`` made of it is dropped afterwards."""
    from torch._dynamo.convert_frame import register_bytecode_hook

    codes: list[types.CodeType] = []
    hook = register_bytecode_hook(lambda code, _: codes.append(code))  # returning code would replace what was compiled
    try:
        with torch._dynamo.config.patch(recompile_limit=_NO_LIMIT, accumulated_recompile_limit=_NO_LIMIT):
            yield codes
    finally:
        hook.remove()
        for code in set(codes):
            _forget(code, backend)


def _forget(code: types.CodeType, backend: Callable[..., Any]) -> None:
    """Drop what a backend made of some code. The emptied entries stay in a list that only PyTorch edits."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    for entry in _debug_get_cache_entry_list(code):
        if getattr(entry.backend, "compiler_fn", None) is backend:
            deleted = DeletedGuardManagerWrapper("quantpass only looked at this code")
            # Entries made for other objects than a frame's own do not count for it: let no frame have this one.
            deleted.id_matched_objs = {"": weakref.ref(_forget)}
            state: Any = entry.guard_manager.extra_state
            state.invalidate(entry, deleted)


def _was_given_up(model: Callable[..., Any]) -> bool:
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    code = getattr(getattr(model, "forward", model), "__code__", None)
    return code is not None and len(_debug_get_cache_entry_list(code)) >= torch._dynamo.config.recompile_limit
