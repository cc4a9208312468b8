"""From a Dynamo graph to torchair: trace to ATen, fuse, prepare the weights, hand over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule

from quantpass.doors.backend import refuse_training, report_of
from quantpass.doors.compiled import CompiledGraph
from quantpass.graph.torch_internals import StaticInputs, compile_with_aot
from quantpass.lowering.leftovers import expand_leftovers
from quantpass.lowering.torchair_graphs import GraphCompiler
from quantpass.planning.options import Options
from quantpass.report import Report


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
        options: target and settings; ``inner`` is not looked at.
        torchair_compiler: compiles the fused graph. Its placeholders are those of the traced graph and then the
            prepared constants; one that has to be in a format other than ND says so as ``meta["acl_format"]``.
        fuse: False hands the traced graph over as it is.
        decompositions: torchair's (``torchair._utils.get_npu_default_decompositions()``).
        gather: called with the report of every graph.

    Raises:
        RuntimeError: autograd would record the graph.
    """
    refuse_training(example_inputs)

    def hand_over(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        expand_leftovers(graph)
        return torchair_compiler(graph, inputs)

    def compiler(aot: GraphModule, weights: StaticInputs, fake_inputs: list[Any]) -> Callable[..., Any]:
        if not fuse:
            return _boxed(hand_over(aot, fake_inputs))
        listener = report_of(options, gather)
        return CompiledGraph(aot, weights, fake_inputs, replace(options, inner=hand_over), listener)

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
