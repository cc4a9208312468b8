"""Everything quantpass takes from PyTorch that is not public API, in one place.

Tested against the versions that ``pyproject.toml`` declares. Another version is supported by making the functions of
this module work on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext, detect_fake_mode
from torch._ops import OpOverload
from torch._prims_common import is_contiguous_or_false
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "aot_placeholder_values",
    "attribute_values",
    "can_run",
    "checks_guards",
    "compile_isolated",
    "compile_with_aot",
    "contiguous_fake",
    "decomposition_table",
    "fake_mode_of",
    "fill_in_values",
    "inductor_compile",
    "is_wrapper_subclass",
    "known_contiguous",
    "real_tensors",
    "traced_as_on_npu",
]

is_wrapper_subclass = is_traceable_wrapper_subclass


@contextmanager
def real_tensors() -> Iterator[None]:
    """Run real kernels even while a compiler's fake mode is active."""
    with unset_fake_temporarily():
        yield


def contiguous_fake(mode: FakeTensorMode, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> FakeTensor:
    """A fake tensor without running an operator; to be called outside any fake mode."""
    return FakeTensor(mode, torch.empty(tuple(shape), dtype=dtype, device="meta"), device)


def fake_mode_of(values: Sequence[Any]) -> FakeTensorMode | None:
    """The fake mode that the fake tensors among ``values`` belong to."""
    return detect_fake_mode(list(values))  # type: ignore[no-any-return]


def compile_with_aot(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    compiler: Callable[[GraphModule, list[Any]], Callable[..., Any]],
    decompositions: dict[Any, Any] | None = None,
) -> Callable[..., Any]:
    """Trace a Dynamo graph to ATen and compile it with ``compiler``; inference only."""
    return aot_module_simplified(  # type: ignore[no-any-return]
        gm,
        list(example_inputs),
        fw_compiler=compiler,  # type: ignore[arg-type]
        inference_compiler=compiler,  # type: ignore[arg-type]
        decompositions=decompositions,
        keep_inference_input_mutations=True,
    )


def can_run(target: OpOverload) -> bool:
    """False for a tool's operator that is declared here but has no kernel (its tool is not imported)."""
    if target.namespace in ("aten", "prims", "quantpass"):
        return True
    keys = ("CPU", "PrivateUse1", "CUDA", "CompositeImplicitAutograd", "CompositeExplicitAutograd")
    return bool(target.py_kernels) or any(
        torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), key) for key in keys
    )


def decomposition_table(name: str) -> dict[Any, Any] | None:
    """The decompositions that ``"none"``, ``"inductor"`` or ``"core"`` stands for."""
    if name == "inductor":
        from torch._inductor.decomposition import select_decomp_table

        return dict(select_decomp_table())
    if name == "core":
        from torch._decomp import core_aten_decompositions

        return dict(core_aten_decompositions())
    return None


@contextmanager
def traced_as_on_npu() -> Iterator[None]:
    """Trace CPU tensors to the operators that NPU tensors are traced to.

    Seen with torch_npu 2.13.0: ``matmul`` is an operator of its own there, of any rank, and attention is spelled out
    in matmuls and a softmax.
    """
    from torch.export.exported_program import _override_composite_implicit_decomp
    from torch.nn.attention import SDPBackend, sdpa_kernel

    whole = {torch.ops.aten.matmul.default: lambda *_, **__: NotImplemented}
    with _override_composite_implicit_decomp(whole), sdpa_kernel(SDPBackend.MATH):
        yield


def static_input_indices() -> frozenset[int]:
    """Which inputs of the graph being compiled are parameters, buffers or tensor attributes of the module."""
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    return frozenset(metadata.static_input_indices or ()) if metadata is not None else frozenset()


def aot_placeholder_values(gm: GraphModule, example_inputs: Sequence[Any]) -> dict[Node, torch.Tensor]:
    """The real tensors behind the static placeholders of an ATen graph.

    AOTAutograd says through ``meta["desc"]`` which of Dynamo's inputs each placeholder came from; tensor subclasses are
    unwrapped into one placeholder per inner tensor.
    """
    static = static_input_indices()
    found: dict[Node, torch.Tensor] = {}
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if index in static:
            value = _described_value(node.meta.get("desc"), example_inputs)
            plain = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
            if plain and not is_wrapper_subclass(value):
                found[node] = value
    return found


def attribute_values(gm: GraphModule) -> dict[Node, torch.Tensor]:
    """The real tensors behind a graph's attributes; their nodes get a ``meta["val"]`` where they have none."""
    found: dict[Node, torch.Tensor] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        value: Any = gm
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) and not is_wrapper_subclass(value):
            found[node] = value
            node.meta.setdefault("val", value)
    return found


def compile_isolated(
    model: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None
) -> Callable[..., Any]:
    """``torch.compile`` that shares no cache with the user's own compilations of the same model."""
    return torch.compile(model, backend=backend, dynamic=dynamic, isolate_recompiles=True)  # type: ignore[call-overload,no-any-return]


def checks_guards(node: Node) -> bool:
    """True for the call with which an unlifted exported program checks its input shapes; it only reads."""
    return node.op == "call_module" and node.target == "_guards_fn"


def known_contiguous(fake: torch.Tensor) -> bool:
    """True where a tensor is contiguous whatever its symbolic sizes are."""
    return bool(is_contiguous_or_false(fake))


def fill_in_values(gm: GraphModule) -> None:
    """Give every node a ``meta["val"]``, computed from those of the placeholders.

    Raises:
        ValueError: the placeholders have none either, or a node can't be evaluated.
    """
    nodes = [n for n in gm.graph.nodes if n.op not in ("output", "get_attr") and not checks_guards(n)]
    if all("val" in n.meta for n in nodes):
        return
    missing = [n.name for n in gm.graph.find_nodes(op="placeholder") if "val" not in n.meta]
    opaque = [n.name for n in nodes if n.op in ("call_module", "call_method")]
    if missing or opaque:
        what = f"the inputs {missing} have no shapes" if missing else f"{opaque[:3]} are calls of modules or methods"
        raise ValueError(
            f"this graph is not at ATen level with shapes: {what}. Use a graph from torch.export.export(...).module(), "
            "from PT2E's convert_pt2e, or from make_fx(f, tracing_mode='fake')(*inputs)."
        )
    mode = fake_mode_of([n.meta.get("val") for n in nodes]) or FakeTensorMode()
    env: dict[Node, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "output" or checks_guards(node):
            continue
        if node.op == "get_attr":
            value: Any = gm
            for part in str(node.target).split("."):
                value = getattr(value, part)
            node.meta.setdefault(
                "val", mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value
            )
        elif "val" not in node.meta:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: env[n])
            with mode, torch.no_grad():
                node.meta["val"] = node.target(*args, **kwargs)
        value = node.meta["val"]
        env[node] = (
            mode.from_tensor(value) if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) else value
        )


def _described_value(desc: Any, example_inputs: Sequence[Any]) -> Any:
    kind = type(desc).__name__
    if kind in ("PlainAOTInput", "ParamAOTInput", "BufferAOTInput") and hasattr(desc, "idx"):
        return example_inputs[desc.idx]
    if kind == "SubclassGetAttrAOTInput":
        base = _described_value(desc.base, example_inputs)
        return getattr(base, desc.attr, None)
    return None


def input_source(desc: Any, sources: Sequence[str]) -> str:
    """Dynamo's name of the input behind a placeholder (``L['self']._modules['fc']...``), or an empty string."""
    kind = type(desc).__name__
    if kind == "PlainAOTInput":
        return sources[desc.idx] if desc.idx < len(sources) else ""
    if kind == "SubclassGetAttrAOTInput":
        return f"{input_source(desc.base, sources)}.{desc.attr}"
    return ""


def inductor_compile(gm: GraphModule, fake_inputs: list[Any]) -> Callable[..., Any]:
    """Compile an ATen graph (not yet decomposed) with Inductor; returns a function of boxed inputs."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = fake_mode_of(fake_inputs)
    assert mode is not None
    with mode, torch.no_grad():
        traced = make_fx(gm, decomposition_table=select_decomp_table(), _allow_non_fake_inputs=True)(*fake_inputs)
    return compile_fx_inner(traced, fake_inputs)  # type: ignore[no-any-return]
