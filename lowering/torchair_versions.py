"""What differs between the generations of torchair that quantpass runs with; nothing else asks for a version.

torchair's Python is the same, byte for byte, in many wheels of torch_npu, whatever PyTorch these are for. A generation
is known by its files. What it has or lacks is found by looking for it, and named here with the generation that brought
it:

* ``post_grad_custom_pre_pass`` in ``CompilerConfig``: C;
* ``torch.compile(backend="npugraph_ex")``: C, carried out by torchair; a package of its own from D on;
* ``_compile_graph_with_aot`` and ``_get_merged_decompositions``: D; it needs no ``pkg_resources`` any more, which
  setuptools 82 dropped;
* ``dump_config.data_dump_stage``: D;
* graphs that are compiled after Dynamo is done, with no fake mode to be found: E.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch.fx import GraphModule

NPUGRAPH_EX = "npugraph_ex"
PASS_HOOK = "post_grad_custom_pre_pass"

_PKG_RESOURCES = "pkg_resources"
_DROPPED = 'which setuptools has no more since 82: pip install "setuptools<82"'


@dataclass(frozen=True, slots=True)
class Generation:
    """One state of torchair's Python.

    Attributes:
        name: a letter.
        digest: of all its files; see :func:`digest_of`.
        wheels: the wheels of torch_npu that hold it.
        tested: False where quantpass's tests do not run with it.
    """

    name: str
    digest: str
    wheels: tuple[str, ...]
    tested: bool = True


GENERATIONS = (
    Generation("B", "25928577224b765d", ("2.7.1", "2.8.0"), tested=False),
    Generation("C", "87bd8a2c8a4558b8", ("2.7.1.post2", "2.8.0.post2", "2.9.0")),
    Generation(
        "D", "2b957a2720aff6e5", ("2.7.1.post4", "2.8.0.post4", "2.8.0.post5", "2.9.0.post2", "2.9.1", "2.10.0")
    ),
    Generation("D'", "1b3cd5c1c05a3d4d", ("2.7.1.post6", "2.9.0.post4", "2.10.0.post2")),
    Generation(
        "E",
        "583acf0be4c39cba",
        (
            *("2.7.1.post8", "2.7.1.post10", "2.9.0.post6", "2.9.0.post8", "2.10.0.post4", "2.10.0.post6"),
            *("2.11.0", "2.11.0.post2", "2.12.0", "2.12.0.post2"),
        ),
    ),
    Generation(
        "F",
        "5399901029224323",
        ("2.7.1.post11", "2.9.0.post9", "2.10.0.post7", "2.11.0.post3", "2.12.0.post3", "2.13.0", "2.14.0"),
    ),
)


def install_line(*options: str) -> str:
    """What to install beside the PyTorch that is loaded: the newest wheel that is known for it."""
    minor, newest = _minor(torch.__version__), GENERATIONS[-1].wheels[-1]
    wheels = [w for g in GENERATIONS for w in g.wheels if _minor(w) == minor]
    line = " ".join(["pip install", *options, f"torch_npu=={wheels[-1] if wheels else newest}"])
    return line if wheels else f"{line} beside PyTorch {_minor(newest)}: none is known for {minor}"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def digest_of(torchair: Path) -> str:
    """Names and contents of every Python file under a folder, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, path in sorted((p.relative_to(torchair).as_posix(), p) for p in torchair.rglob("*.py")):
        digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def generation_of(torch_npu: Path) -> Generation | None:
    """The generation of torchair in a ``torch_npu`` package; None where it is none that is known."""
    digest = digest_of(torch_npu / "dynamo" / "torchair")
    return next((g for g in GENERATIONS if g.digest == digest), None)


def missing_modules(torch_npu: Path) -> str:
    """What the torchair in a ``torch_npu`` package imports and can't, and what to install; empty where nothing is."""
    if importlib.util.find_spec(_PKG_RESOURCES) is not None:
        return ""
    imports = f"import {_PKG_RESOURCES}"
    if any(imports in p.read_text(errors="replace") for p in (torch_npu / "dynamo" / "torchair").rglob("*.py")):
        return f"it imports {_PKG_RESOURCES}, {_DROPPED}"
    return ""


def untested_note(torch_npu: Path) -> str:
    """What a report says of a torchair that quantpass's tests do not run with; empty for one that they do."""
    known = generation_of(torch_npu)
    if known is not None and known.tested:
        return ""
    digest = digest_of(torch_npu / "dynamo" / "torchair")
    which = f"generation {known.name}" if known else f"whose files are none that are known (digest {digest})"
    tested = ", ".join(f"{g.name} (torch_npu {g.wheels[-1]})" for g in GENERATIONS if g.tested)
    return f"quantpass is not tested with this torchair, {which}; tested are {tested}. Compare results with eager runs"


def loaded_note() -> str:
    """:func:`untested_note` of the torch_npu that is loaded; empty where none is."""
    file = getattr(sys.modules.get("torch_npu"), "__file__", None)
    package = Path(file).parent if file else None
    return untested_note(package) if package and (package / "dynamo" / "torchair").is_dir() else ""


def load_torchair() -> Any:
    """torchair. torch_npu postpones what goes wrong in it: the import works, the first use fails.

    Raises:
        ImportError: it does not load; says why.
    """
    import torchair

    try:
        torchair.CompilerConfig  # noqa: B018 - the first use
    except Exception as error:
        cause = error.__cause__ or error
        why = (str(cause).splitlines() or [""])[0] or type(cause).__name__
        if getattr(cause, "name", None) == _PKG_RESOURCES:
            why += f", {_DROPPED}"
        raise ImportError(f"torchair does not load: {why}") from error
    return torchair


def without_hook(config: Any) -> str:
    """Why the pass can't be put into a config; empty where it can."""
    if hasattr(config, PASS_HOOK):
        return ""
    said = f"config is a {type(config).__name__}, which has no {PASS_HOOK}"
    if "torchair" in type(config).__module__:
        return f"{said}: torchair has it since torch_npu 2.8.0.post2 and 2.9.0. quantpass.npu_backend needs no hook"
    return f"{said}; give a torchair.CompilerConfig()"


def merged_decompositions(config: Any, custom: Mapping[Any, Any]) -> dict[Any, Any]:
    """torchair's decompositions for a config, and the user's."""
    from torchair import npu_fx_compiler

    merge = getattr(npu_fx_compiler, "_get_merged_decompositions", None)
    if merge is not None:
        return dict(merge(config, dict(custom)))
    backend = npu_fx_compiler.get_npu_backend(compiler_config=config, custom_decompositions=dict(custom))
    return dict(backend.keywords["decompositions"])


def compile_with(
    compiler: Callable[..., Any],
    gm: GraphModule,
    example_inputs: Sequence[Any],
    config: Any,
    decompositions: Mapping[Any, Any],
) -> Callable[..., Any]:
    """torchair's own tracing, which marks static inputs, hands gears over and replaces streams and events.

    Args:
        compiler: stands where torchair would take its own.
        gm: what Dynamo hands to a backend.
        example_inputs: its real inputs.
        config: torchair's.
        decompositions: of :func:`merged_decompositions`.
    """
    from torchair import npu_fx_compiler

    trace = getattr(npu_fx_compiler, "_compile_graph_with_aot", None)
    if trace is not None:
        return trace(gm, compiler, example_inputs, config, dict(decompositions), is_cache=False)  # type: ignore[no-any-return]
    with _given(npu_fx_compiler, compiler):
        return npu_fx_compiler._npu_backend(gm, example_inputs, config, dict(decompositions))  # type: ignore[no-any-return]


def compile_after_tracing(
    compiler: Callable[[GraphModule, list[Any]], Callable[..., Any]], gm: GraphModule, inputs: list[Any]
) -> Callable[..., Any]:
    """Call torchair's compiler; where nothing is being traced (a weight changed), it is told the inputs' fake mode."""
    if TracingContext.try_get() is not None:
        return compiler(gm, inputs)
    with tracing(TracingContext(detect_fake_mode(inputs))):
        return compiler(gm, inputs)


@contextmanager
def _given(npu_fx_compiler: ModuleType, compiler: Callable[..., Any]) -> Iterator[None]:
    """Before D the compiler is asked for inside the tracing. Dynamo compiles one graph at a time."""
    own = npu_fx_compiler.get_compiler
    npu_fx_compiler.get_compiler = lambda *_, **__: compiler  # type: ignore[attr-defined]
    try:
        yield
    finally:
        npu_fx_compiler.get_compiler = own  # type: ignore[attr-defined]
