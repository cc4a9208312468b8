"""Handing a fused graph to torchair's compiler: what it asks of passes that create its operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

GraphCompiler = Callable[[GraphModule, list[Any]], Callable[..., Any]]
"""A graph compiler as torchair's ``get_compiler`` returns it."""

ops = torch.ops.quantpass


def turn_off_view_optimize(gm: GraphModule, config: Any) -> None:
    """What torchair itself does for a graph that holds a weight-quant matmul, but before passes have run."""
    if not gm.graph.find_nodes(op="call_function", target=ops.weight_quant_matmul.default):
        return
    experimental = getattr(config, "experimental_config", None)
    if experimental is not None and hasattr(experimental, "enable_view_optimize"):
        experimental.enable_view_optimize = False


def make_torchair_compiler(config: Any) -> GraphCompiler:
    """torchair's compiler for one ``CompilerConfig``, with what it asks of passes that create its operators."""
    import torchair

    compiler = torchair.get_compiler(config)

    def compile_graph(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        turn_off_view_optimize(gm, config)
        return compiler(gm, inputs)  # type: ignore[no-any-return]

    return compile_graph
