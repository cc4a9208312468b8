"""Handing a fused graph to torchair's compiler: what it asks of passes that create its operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from quantpass.lowering.leftovers import expand_leftovers
from quantpass.lowering.torchair_versions import compile_after_tracing
from quantpass.operators.weight_quant_matmul import WEIGHT_QUANT_MATMUL

GraphCompiler = Callable[[GraphModule, list[Any]], Callable[..., Any]]
"""A graph compiler as torchair's ``get_compiler`` returns it."""


def turn_off_view_optimize(gm: GraphModule, config: Any) -> None:
    """What torchair itself does for a graph that holds a weight-quant matmul, but before passes have run."""
    if not gm.graph.find_nodes(op="call_function", target=WEIGHT_QUANT_MATMUL.overload):
        return
    experimental = getattr(config, "experimental_config", None)
    if experimental is not None and hasattr(experimental, "enable_view_optimize"):
        experimental.enable_view_optimize = False


def hand_over(compiler: GraphCompiler, config: Any, given: int) -> GraphCompiler:
    """What stands in front of torchair's compiler for a fused graph.

    Args:
        compiler: torchair's, or what stands in for it.
        config: torchair's.
        given: how many inputs the graph had; those behind them are constants that were prepared.
    """

    def compile_graph(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        for tensor in inputs[given:]:  # they keep their address, as parameters do
            if isinstance(tensor, torch.Tensor):
                tensor._torchair_is_parameter = True  # type: ignore[attr-defined]
        turn_off_view_optimize(gm, config)
        expand_leftovers(gm)
        return compile_after_tracing(compiler, gm, inputs)

    return compile_graph
