"""What differs between the versions of PyTorch that quantpass runs on; nothing else asks for a version.

Each difference is found by looking for the feature, and named with the version that brought it:

* ``torch.compile(isolate_recompiles=True)`` and ``OutputGraph.resolve_source_value``: 2.13;
* ``Source.name`` and ``Source.guard_source`` as properties, ``torch.Tag.reduction``: 2.10;
* ``ExportGraphSignature.parameters_to_mutate``, ``is_contiguous_or_false`` (before: ``definitely_contiguous``) and
  ``meta["desc"]``, which says what input of Dynamo's graph a placeholder of AOTAutograd's came from: 2.9.
"""

from __future__ import annotations

import inspect
import os
import re
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import _prims_common
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

TESTED = ("2.8", "2.9", "2.10", "2.11", "2.12", "2.13", "2.14", "2.15")
"""The versions that quantpass's tests run with; docs/versions.md says which tests, and beside which torchair."""

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


def isolates() -> bool:
    """True where PyTorch compiles code apart from the user's compilations of it; there it compiles fake models too."""
    return "isolate_recompiles" in inspect.signature(torch.compile).parameters


def compile_apart(
    model: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None, *, whole: bool = False
) -> Callable[..., Any]:
    """``torch.compile`` that leaves the user's own compilations of the same code as they are.

    ``whole`` is its ``fullgraph``.

    2.13 brought ``isolate_recompiles``: a cache of its own for one ``torch.compile``. Before, code has one cache: the
    limit of recompilations is lifted for the call, and what it added counts no longer afterwards.

    Raises:
        ValueError: when called, before 2.13: a model or inputs of fake tensors, which PyTorch can't compile there.
        RuntimeError: when called, before 2.13: PyTorch gave up compiling this code, since it was recompiled too often.
    """
    if isolates():
        return torch.compile(  # type: ignore[call-overload,no-any-return]
            model, backend=backend, dynamic=dynamic, fullgraph=whole, isolate_recompiles=True
        )
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=whole)

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = list(model.parameters()) + list(model.buffers()) if isinstance(model, torch.nn.Module) else []
        if detect_fake_mode([*tensors, *args, *kwargs.values()]) is not None:
            raise ValueError(
                "PyTorch before 2.13 compiles no model of fake tensors: give it on the meta device (model.to('meta')), "
                "or as an ExportedProgram"
            )
        with _forgotten_afterwards() as codes:
            results = compiled(*args, **kwargs)
        if not codes and _was_given_up(model):
            raise RuntimeError(
                "PyTorch compiles this model no longer: it was recompiled too often (torch._dynamo.config."
                "recompile_limit). Call torch._dynamo.reset(), or do this before compiling the model for other inputs."
            )
        return results

    return run


@dataclass(frozen=True, slots=True)
class PlainAOTInput:
    """As 2.9 describes an input of Dynamo's graph."""

    idx: int


@dataclass(frozen=True, slots=True)
class ParamAOTInput:
    """As 2.9 describes a parameter or buffer of Dynamo's graph."""

    target: str


@dataclass(frozen=True, slots=True)
class SubclassGetAttrAOTInput:
    """As 2.9 describes a tensor inside of a tensor subclass."""

    base: Any
    attr: str


def describe_inputs(aot: GraphModule, dynamo_graph: GraphModule, example_inputs: Sequence[Any]) -> None:
    """Give placeholders the ``meta["desc"]`` that 2.9 brought, where they have none.

    AOTAutograd's inputs are Dynamo's in order, after parameters and buffers; a tensor subclass is replaced by its inner
    tensors. Unless every shape and dtype fits, nothing is said (equal inputs may have been merged into one).
    """
    placeholders = list(aot.graph.find_nodes(op="placeholder"))
    if any("desc" in n.meta for n in placeholders):
        return
    named: dict[str, torch.Tensor] = dict(dynamo_graph.named_parameters(remove_duplicate=False))
    named |= dynamo_graph.named_buffers(remove_duplicate=False)
    found = [(ParamAOTInput(name), tensor) for name, tensor in named.items()]
    for i, value in enumerate(example_inputs):
        found += _unwrapped(PlainAOTInput(i), value)
    if len(found) != len(placeholders):
        return
    if all(_fits(n.meta.get("val"), value) for n, (_, value) in zip(placeholders, found, strict=True)):
        for node, (desc, _) in zip(placeholders, found, strict=True):
            node.meta["desc"] = desc


def _unwrapped(desc: Any, value: Any) -> list[tuple[Any, Any]]:
    if not is_traceable_wrapper_subclass(value):
        return [(desc, value)]
    inner, _ = value.__tensor_flatten__()
    parts = [_unwrapped(SubclassGetAttrAOTInput(desc, name), getattr(value, name)) for name in inner]
    return [part for several in parts for part in several]


def _fits(fake: Any, value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return not isinstance(fake, torch.Tensor)
    if not isinstance(fake, torch.Tensor) or fake.dtype != value.dtype or fake.dim() != value.dim():
        return False
    return all(not isinstance(a, int) or a == b for a, b in zip(fake.shape, value.shape, strict=True))


def known_contiguous(fake: torch.Tensor) -> bool:
    """True where a tensor is contiguous whatever its symbolic sizes are."""
    name = "is_contiguous_or_false" if hasattr(_prims_common, "is_contiguous_or_false") else "definitely_contiguous"
    return bool(getattr(_prims_common, name)(fake))


def guard_source(source: Any) -> Any:
    """What kind of thing a source stands for; None where that is not known. A method before 2.10."""
    kind = getattr(source, "guard_source", None)
    return kind() if callable(kind) else kind


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
def _forgotten_afterwards() -> Iterator[Collection[types.CodeType]]:
    """Gives the code that is compiled inside. What was made of it is dropped afterwards."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.convert_frame import register_bytecode_hook

    before: dict[types.CodeType, set[Any]] = {}

    def note(code: types.CodeType, new_code: types.CodeType) -> types.CodeType | None:
        del new_code
        before.setdefault(code, {e.compile_id for e in _debug_get_cache_entry_list(code)})
        return None  # nothing in place of what was compiled

    hook = register_bytecode_hook(note)
    try:
        with torch._dynamo.config.patch(recompile_limit=_NO_LIMIT, accumulated_recompile_limit=_NO_LIMIT):
            yield before.keys()
    finally:
        hook.remove()
        for code, kept in before.items():
            _forget([e for e in _debug_get_cache_entry_list(code) if e.compile_id not in kept])


def _forget(entries: Iterable[Any]) -> None:
    """Drop what was compiled. The emptied entries stay in a list that only PyTorch edits."""
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    for entry in entries:
        deleted = DeletedGuardManagerWrapper("quantpass only looked at this code")
        # Entries made for other objects than a frame's own do not count for it: let no frame have this one.
        deleted.id_matched_objs = {"": weakref.ref(_forget)}
        entry.guard_manager.extra_state.invalidate(entry, deleted)


def _was_given_up(model: Callable[..., Any]) -> bool:
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    code = getattr(getattr(model, "forward", model), "__code__", None)
    entries = [] if code is None else _debug_get_cache_entry_list(code)
    users = [e for e in entries if not isinstance(e.guard_manager, DeletedGuardManagerWrapper)]
    return len(users) >= torch._dynamo.config.recompile_limit
