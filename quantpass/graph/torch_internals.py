"""Everything quantpass takes from PyTorch that is not public API, in one place.

What differs between its versions is in :mod:`quantpass.graph.torch_versions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import CompileContext, TracingContext, detect_fake_mode
from torch._logging._internal import trace_structured
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.node import map_arg
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from quantpass.graph import torch_versions
from quantpass.graph.torch_versions import compile_apart, describe_inputs, guard_source, source_value

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "GuardOnDataDependentSymNode",
    "StaticInputs",
    "StorageWeakRef",
    "attribute_tensors",
    "attribute_values",
    "can_run",
    "checks_guards",
    "compile_isolated",
    "compile_with_aot",
    "contiguous_fake",
    "decomposition_table",
    "fake_mode_of",
    "fake_result",
    "fill_in_values",
    "frame_of",
    "graph_breaks",
    "inductor_compile",
    "is_wrapper_subclass",
    "known_contiguous",
    "like_inputs",
    "no_data_reason",
    "real_tensors",
    "running_fakes",
    "static_inputs",
    "traced_as_on_npu",
    "without_function_modes",
]

is_wrapper_subclass = is_traceable_wrapper_subclass


@contextmanager
def real_tensors() -> Iterator[None]:
    """Run real kernels even while a compiler's fake mode is active."""
    with unset_fake_temporarily():
        yield


def known_contiguous(t: torch.Tensor) -> bool:
    """True where a tensor is contiguous whatever its symbolic sizes are.

    PyTorch's check for symbolic sizes is Python, some 60 calls: a tensor without any is asked itself.
    """
    if all(type(size) is int for size in t.shape):
        return t.is_contiguous()
    return torch_versions.known_contiguous(t)


def contiguous_fake(mode: FakeTensorMode, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> FakeTensor:
    """A fake tensor without running an operator; to be called outside any fake mode."""
    return FakeTensor(mode, torch.empty(tuple(shape), dtype=dtype, device="meta"), device)


def fake_mode_of(values: Sequence[Any]) -> FakeTensorMode | None:
    """The fake mode that the fake tensors among ``values`` belong to."""
    return detect_fake_mode(list(values))


@contextmanager
def running_fakes(mode: FakeTensorMode, given: Any) -> Iterator[None]:
    """Run operators on fake tensors of ``mode``; ``given`` is what they are given, in any containers.

    PyTorch traces symbolic sizes with its dispatcher for Python on; before 2.9 ``view`` knows none without it.
    """
    sizes = [s for a in tree_leaves(given) for s in (a.shape if isinstance(a, torch.Tensor) else (a,))]
    symbolic = any(isinstance(s, torch.SymInt) for s in sizes)
    with mode, torch.no_grad(), enable_python_dispatcher() if symbolic else nullcontext():
        yield


def fake_result(
    mode: FakeTensorMode, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """What a call gives for fake tensors of ``mode``."""
    with running_fakes(mode, (args, kwargs)):
        return target(*args, **kwargs)


def like_inputs(constants: Sequence[torch.Tensor], inputs: Sequence[Any]) -> list[torch.Tensor]:
    """Constants for a run on inputs without data: fake where these are, or on the meta device."""
    tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
    mode = fake_mode_of(tensors)
    if mode is not None:
        return [mode.from_tensor(t, static_shapes=True) for t in constants]
    return [t.to("meta") if any(i.device.type == "meta" for i in tensors) else t for t in constants]


def compile_with_aot(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    compiler: Callable[[GraphModule, StaticInputs, list[Any]], Callable[..., Any]],
    decompositions: dict[Any, Any] | None = None,
) -> Callable[..., Any]:
    """Trace a Dynamo graph to ATen and compile it; inference only.

    Args:
        gm: what Dynamo hands to a backend.
        example_inputs: its real inputs.
        compiler: is given the ATen graph, its weights and its fake inputs.
        decompositions: of operators, while tracing.
    """
    given: list[Any] = [gm, list(example_inputs)]

    def compile_aten(aot: GraphModule, fake_inputs: list[Any]) -> Callable[..., Any]:
        dynamo_graph, inputs = given
        return compiler(aot, static_inputs(aot, dynamo_graph, inputs), fake_inputs)

    try:
        return aot_module_simplified(
            gm,
            given[1],
            fw_compiler=compile_aten,  # type: ignore[arg-type]
            inference_compiler=compile_aten,  # type: ignore[arg-type]
            decompositions=decompositions,
            keep_inference_input_mutations=True,
        )
    finally:
        given.clear()  # what is compiled outlives the first call's inputs, and the weights of that day


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


def no_data_reason(value: Any) -> str:
    """Why there are no values to be read from a tensor, in words; empty where there are.

    Asked for every weight before every call, so what a plain tensor passes takes about a microsecond.
    """
    if isinstance(value, FakeTensor):
        return "a fake tensor"
    if isinstance(value, torch.Tensor) and value.is_meta:
        return "on the meta device"
    if not isinstance(value, torch.Tensor) or is_wrapper_subclass(value) or torch._is_functional_tensor(value):
        return "wrapped"
    if value.layout != torch.strided or value.is_quantized:
        return "neither dense nor plain"
    if value.is_inference() and not value.is_cpu:
        return f"made in inference mode on {value.device.type}, where PyTorch counts no writes"
    if value.numel() and value.untyped_storage().nbytes() < (_last_place(value) + 1) * value.element_size():
        return "freed"
    return ""


def _last_place(t: torch.Tensor) -> int:
    """How many elements lie before the last one of ``t`` in its memory."""
    if t.is_contiguous():
        return int(t.storage_offset()) + t.numel() - 1
    return int(t.storage_offset()) + sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))


@dataclass(frozen=True, slots=True)
class StaticInputs:
    """A graph's parameters, buffers and tensor attributes, whichever way they come into it.

    Attributes:
        known: their tensors, where these hold data.
        unread: the others, and why they can't be read.
    """

    known: dict[Node, torch.Tensor]
    unread: dict[Node, str]

    def add(self, node: Node, tensor: torch.Tensor) -> None:
        """Sort one in."""
        why = no_data_reason(tensor)
        if why:
            self.unread[node] = why
        else:
            self.known[node] = tensor

    def on(self, copy_of: Mapping[Node, Node]) -> StaticInputs:
        """The same for a copy of the graph."""
        return StaticInputs(
            {copy_of[n]: t for n, t in self.known.items()}, {copy_of[n]: why for n, why in self.unread.items()}
        )


def static_inputs(aot: GraphModule, dynamo_graph: GraphModule, example_inputs: Sequence[Any]) -> StaticInputs:
    """The weights of an ATen graph that AOTAutograd made of Dynamo's; to be called while it is being compiled.

    AOTAutograd says through ``meta["desc"]`` which of Dynamo's inputs each placeholder came from; tensor subclasses are
    unwrapped into one placeholder for each inner tensor. Its own list of static inputs is not enough: parameters are no
    inputs at all with Inductor's freezing on, and of a subclass that is taken apart in the frame that is compiled (its
    ``__torch_function__``) it lists nothing.

    Args:
        aot: the ATen graph.
        dynamo_graph: what Dynamo handed to the backend.
        example_inputs: its inputs.
    """
    inputs = list(dynamo_graph.graph.find_nodes(op="placeholder"))
    listed = _static_input_indices()
    frame_of(aot)  # noted while it is being compiled
    describe_inputs(aot, dynamo_graph, example_inputs)
    found = StaticInputs({}, {})
    for index, node in enumerate(aot.graph.find_nodes(op="placeholder")):
        desc = node.meta.get("desc")
        root = desc
        while type(root).__name__ == "SubclassGetAttrAOTInput":
            root = root.base
        position = getattr(root, "idx", None)
        if type(root).__name__ == "PlainAOTInput" and position is not None and position < len(inputs):
            static = index in listed or _is_static_source(inputs[position])
        else:
            static = type(root).__name__ in ("ParamAOTInput", "BufferAOTInput")
        value = _described_value(desc, dynamo_graph, example_inputs) if static else None
        if isinstance(value, torch.Tensor):
            found.add(node, value)
        elif desc is None and index in listed:
            found.unread[node] = "of an input that PyTorch does not name"
    for node, value in attribute_tensors(aot):
        found.add(node, value)
    return found


def _static_input_indices() -> frozenset[int]:
    """What AOTAutograd lists, for the graph being compiled."""
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    return frozenset(metadata.static_input_indices or ()) if metadata is not None else frozenset()


def _is_static_source(placeholder: Node) -> bool:
    """True for an input of Dynamo's graph that is a parameter, belongs to a module, or is a part of a parameter."""
    if placeholder.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"):
        return True
    source = getattr(placeholder, "_dynamo_source", None)
    kind = guard_source(source)
    if kind is not None and (kind.is_unspecialized_nn_module() or kind.is_specialized_nn_module()):
        return True
    owner = source_value(getattr(source, "base", None))
    return isinstance(owner, torch.nn.Parameter) and is_wrapper_subclass(owner)


def attribute_values(gm: GraphModule) -> dict[Node, torch.Tensor]:
    """The real tensors behind a graph's attributes; their nodes get a ``meta["val"]`` where they have none."""
    return {node: value for node, value in attribute_tensors(gm) if not no_data_reason(value)}


def attribute_tensors(gm: GraphModule) -> Iterator[tuple[Node, torch.Tensor]]:
    """The tensors behind a graph's attributes; their nodes get a ``meta["val"]`` where they have none."""
    for node in gm.graph.find_nodes(op="get_attr"):
        value: Any = gm
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
        if isinstance(value, torch.Tensor):
            node.meta.setdefault("val", value)
            yield node, value


def compile_isolated(
    model: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None, *, whole: bool = False
) -> Callable[..., Any]:
    """``torch.compile`` that shares no cache with the user's own compilations of the same model.

    ``whole``: it fails where the model is more than one graph.
    """
    return compile_apart(model, backend, dynamic, whole=whole)


def without_function_modes(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` with ``__torch_function__`` off: Dynamo has traced what modes and subclasses do into the graph.

    A mode that is on when a compiled graph runs would act a second time, on the graph's own operators.
    """

    def traced_already(*args: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return run(*args)

    return traced_already


def graph_breaks() -> dict[str, int]:
    """Why Dynamo broke graphs in this process so far, and how often."""
    from torch._dynamo.utils import counters

    return dict(counters["graph_break"])


def frame_of(gm: GraphModule) -> int | None:
    """Dynamo's number of the frame (the code object) that a graph was made from; None where that is not known."""
    current = CompileContext.current_compile_id()
    if _FRAME not in gm.meta and current is not None:
        gm.meta[_FRAME] = current.frame_id
    frame: int | None = gm.meta.get(_FRAME)
    return frame


_FRAME = "quantpass_frame"


def checks_guards(node: Node) -> bool:
    """True for the call with which an unlifted exported program checks its input shapes; it only reads."""
    return node.op == "call_module" and node.target == "_guards_fn"


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
            node.meta["val"] = fake_result(mode, node.target, args, kwargs)
        value = node.meta["val"]
        env[node] = (
            mode.from_tensor(value) if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) else value
        )


def _described_value(desc: Any, dynamo_graph: GraphModule, example_inputs: Sequence[Any]) -> Any:
    kind = type(desc).__name__
    if kind == "PlainAOTInput":
        return example_inputs[desc.idx]
    if kind in ("ParamAOTInput", "BufferAOTInput"):
        value: Any = dynamo_graph
        for part in desc.target.split("."):
            value = getattr(value, part, None)
        return value
    if kind == "SubclassGetAttrAOTInput":
        return getattr(_described_value(desc.base, dynamo_graph, example_inputs), desc.attr, None)
    return None


def inductor_compile(gm: GraphModule, fake_inputs: list[Any]) -> Callable[..., Any]:
    """Compile an ATen graph (not yet decomposed) with Inductor; returns a function of boxed inputs."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = fake_mode_of(fake_inputs)
    assert mode is not None
    allowed = mode.allow_non_fake_inputs
    mode.allow_non_fake_inputs = True  # attributes in oneDNN's layout, as Inductor's own freezing does
    try:
        with mode, torch.no_grad():
            traced = make_fx(gm, decomposition_table=select_decomp_table(), _allow_non_fake_inputs=True)(*fake_inputs)
        return compile_fx_inner(traced, fake_inputs)
    finally:
        mode.allow_non_fake_inputs = allowed


def storage_key(t: torch.Tensor) -> int:
    """Equal for two tensors that are alive where they share memory."""
    return int(t.untyped_storage()._cdata)


def is_erased(node: Node) -> bool:
    """True for a node that is in its graph no longer."""
    return node._erased


def order_key(node: Node) -> Any:
    """What a node sorts by in its graph; it outlives the node's erasing."""
    return node._sort_key


def count(name: str, by: int) -> None:
    """Add to ``torch._dynamo.utils.counters["quantpass"]``, which PyTorch's own tools show and tests look at."""
    from torch._dynamo.utils import counters

    counters["quantpass"][name] += by


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """A text of that name in PyTorch's structured trace, where one is being written (``TORCH_TRACE``; tlparse)."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)
