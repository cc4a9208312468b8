"""The GE graph that torchair would compile, on a machine without CANN and without an NPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule
from typing_extensions import Unpack

from quantpass.chips import NPUS
from quantpass.doors.backend import refuse_training, report_of, warn_unmatched
from quantpass.doors.compiled import CompiledGraph
from quantpass.doors.settings import PreviewOptions, make_options
from quantpass.graph.dump import dump
from quantpass.graph.torch_internals import StaticInputs, compile_isolated, compile_with_aot, traced_as_on_npu
from quantpass.graph.writes import written_arguments
from quantpass.lowering import GE
from quantpass.lowering.fx_parcel import pack
from quantpass.lowering.ge_graph import GeGraph, first_difference
from quantpass.lowering.standin_process import Request, TorchairProcess
from quantpass.lowering.torchair_graphs import GraphCompiler, hand_over
from quantpass.planning.options import Options
from quantpass.report import Report


@dataclass(frozen=True, slots=True)
class PreviewedGraph:
    """One graph of a previewed model; a model has one unless Dynamo broke it.

    Attributes:
        graph: the GE graph.
        pbtxt: torchair's ``GraphDef`` as text.
        fx: the FX graph that torchair was given, as text.
        inputs: the inputs of that graph, weights and prepared constants among them, as they were at the call.
        outputs: what the FX graph computed from them, on the CPU.
    """

    graph: GeGraph
    pbtxt: str
    fx: str
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class GePreview:
    """What torchair makes of a model for one chip.

    Attributes:
        target: the chip.
        soc_name: the chip's name as its driver gives it.
        graphs: one for each graph that Dynamo made.
        report: the verdict on every quantized matmul; empty without fusion.
    """

    target: str
    soc_name: str
    graphs: tuple[PreviewedGraph, ...]
    report: Report

    def __repr__(self) -> str:
        return f"<quantpass.GePreview for {self.soc_name}: {len(self.graphs)} graphs, {len(self.ops)} operators>"

    @property
    def ops(self) -> list[str]:
        """The types of the operators that compute something, in order, over all graphs."""
        return [name for g in self.graphs for name in g.graph.op_types]

    @property
    def pbtxt(self) -> str:
        """The ``GraphDef`` of every graph as text."""
        return "\n".join(g.pbtxt for g in self.graphs)

    def __str__(self) -> str:
        return "\n\n".join(str(g.graph) for g in self.graphs)

    def outline(self) -> str:
        """The operators without their numbers, for comparing texts; see :meth:`GeGraph.outline`."""
        return "\n".join(g.graph.outline() for g in self.graphs)

    def first_difference(self, other: GePreview) -> str | None:
        """Where two previews part, following data from the inputs on; None where they compute the same.

        What operators are called does not count, nor do operators that nothing needs.
        """
        if len(self.graphs) != len(other.graphs):
            return f"{len(self.graphs)} and {len(other.graphs)} graphs"
        apart = (first_difference(a.graph, b.graph) for a, b in zip(self.graphs, other.graphs, strict=True))
        return next(filter(None, apart), None)

    def run(self, *, exact_gelu: bool = False) -> list[tuple[Any, ...]]:
        """Interpret the GE graphs on the inputs they were made with; one tuple of outputs for each graph.

        Args:
            exact_gelu: compute ``Gelu`` with erf, as the model does. GE has the tanh form, which torchair emits for
                both.

        Raises:
            NotImplementedError: an operator or attribute that the interpreter does not know; the message names it.
        """
        from quantpass.lowering.ge_interpreter import interpret

        return [interpret(g.graph, g.inputs, target=self.target, exact_gelu=exact_gelu) for g in self.graphs]


@dataclass(slots=True)
class _Captured:
    """A graph on its way to torchair."""

    gm: GraphModule
    inputs: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()


def preview_ge(
    model: torch.nn.Module | Callable[..., Any] | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    target: str,
    fuse: bool = True,
    torch_npu: str | os.PathLike[str] | None = None,
    process: TorchairProcess | None = None,
    **options: Unpack[PreviewOptions],
) -> GePreview:
    """The GE graph that torchair compiles for a chip. Needs torch_npu's wheel and a C compiler, no device, no CANN.

    The model is captured here, as ``torch.compile`` would (and runs once on ``args``); only graphs go to the child
    process that runs torchair, so any model that compiles can be previewed, and no weight is copied. Shapes are static.

    Args:
        model: a module, a function or an ``ExportedProgram``, on CPU tensors.
        args: positional inputs.
        kwargs: keyword inputs.
        target: one chip: ``"ascend310p"``, ``"ascend910b"``, ``"ascend910_93"``, ``"ascend950"``, or a SoC name.
        fuse: False gives the graph that the model has without quantpass.
        torch_npu: the folder that holds torch_npu, where it is not installed beside torch; default: the environment
            variable ``QUANTPASS_TORCH_NPU``.
        process: a started :class:`quantpass.TorchairProcess`, for many previews in a row.
        options: as for :func:`quantpass.backend`.

    Raises:
        TypeError: ``args`` is not a tuple or list, or an option that does not exist.
        ValueError: a value that is not accepted.
        quantpass.StandinError: torch_npu or the C compiler is missing; says what to install.
        quantpass.PreviewError: torchair refuses the graph; names the operator.
    """
    if not isinstance(args, tuple | list):
        raise TypeError(f"args is a {type(args).__name__}; give the model's inputs as a tuple, e.g. args=(x,)")
    settings = make_options({"target": target, **options}, "preview_ge")
    chip = settings.chip
    if chip.name not in NPUS:
        raise ValueError(f"target is {target!r}; a GE preview takes one of {', '.join(NPUS)}, or a SoC name")
    if isinstance(model, ExportedProgram):
        model = model.module()
    soc_name = chip.soc_name(target)
    captured, reports = _capture(model, args, kwargs or {}, settings, fuse)
    with TorchairProcess(torch_npu) if process is None else nullcontext(process) as running:
        graphs, note = _converted(captured, soc_name, running), running.note
    none = Report((), (chip.name,), settings.mode, notes=(note,) if note else (), leave=settings.leave)
    report = sum(reports, none)
    warn_unmatched(report)
    return GePreview(chip.name, soc_name, graphs, report)


def _capture(
    model: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], settings: Options, fuse: bool
) -> tuple[list[_Captured], list[Report]]:
    captured: list[_Captured] = []
    reports: list[Report] = []

    def keep(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        del inputs
        record = _Captured(gm)
        captured.append(record)
        written = _written_inputs(gm)

        def run(*real: Any) -> Any:
            if not record.inputs:
                record.inputs = tuple(t.clone() if i in written else t for i, t in enumerate(real))
                record.outputs = tuple(gm(*real))
                return record.outputs
            return gm(*real)

        return run

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return compile_for_npu(gm, example_inputs, settings, keep, fuse=fuse, gather=reports.append)

    with torch.no_grad(), traced_as_on_npu():
        compile_isolated(model, backend, False)(*args, **kwargs)
    return captured, reports


def _written_inputs(gm: GraphModule) -> set[int]:
    """The positions of inputs that the graph writes to."""
    position = {n: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
    written = {given for node in gm.graph.nodes for given in written_arguments(node)}
    return {position[given] for given in written if given in position}


def _converted(captured: list[_Captured], soc_name: str, process: TorchairProcess) -> tuple[PreviewedGraph, ...]:
    found = []
    for record in captured:
        reply = process.convert(Request(pack(record.gm), soc_name))
        assert reply.graph is not None
        found.append(PreviewedGraph(reply.graph, reply.pbtxt, dump(record.gm), record.inputs, record.outputs))
    return tuple(found)


def compile_for_npu(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    torchair_compiler: GraphCompiler,
    *,
    fuse: bool = True,
    decompositions: dict[Any, Any] | None = None,
    gather: Callable[[Report], None] | None = None,
) -> Callable[..., Any]:
    """Trace a Dynamo graph to ATen, fuse it and compile the result with torchair.

    Args:
        gm: what Dynamo hands to a backend.
        example_inputs: the real inputs, weights among them.
        options: target and settings; ``inner`` and ``lowering`` are not looked at.
        torchair_compiler: compiles the fused graph. Its placeholders are those of the traced graph and then the
            prepared constants; one that has to be in a format other than ND says so as ``meta["acl_format"]``.
        fuse: False hands the traced graph over as it is.
        decompositions: torchair's (``torchair._utils.get_npu_default_decompositions()``).
        gather: called with the report of every graph.

    Raises:
        RuntimeError: autograd would record the graph.
    """
    refuse_training(example_inputs)

    def compiler(aot: GraphModule, weights: StaticInputs, fake_inputs: list[Any]) -> Callable[..., Any]:
        inner = hand_over(torchair_compiler, None, len(fake_inputs))
        if not fuse:
            return _boxed(inner(aot, fake_inputs))
        settings = replace(options, inner=inner, lowering=GE.name)
        return CompiledGraph(aot, weights, fake_inputs, settings, report_of(options, gather))

    return compile_with_aot(gm, example_inputs, compiler, decompositions)


def _boxed(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A function of boxed inputs, as AOTAutograd wants it."""
    if getattr(compiled, "_boxed_call", False):
        return compiled

    def call(inputs: list[Any]) -> Any:
        args = list(inputs)
        inputs.clear()
        return compiled(*args)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call
