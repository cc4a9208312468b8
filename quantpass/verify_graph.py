"""The graph after the rewrite, checked as compilers check theirs: what stands in it is what its operators give.

Nothing here trusts what planning or rewriting have said. Every value is recomputed by its operator's own shape
function, every fused call is judged again on what is really in the graph. The tests run it on every graph that the pass
rewrites; users ask for it with the environment variable ``QUANTPASS_VERIFY_GRAPH=1``.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from quantpass.basics.symbolic import has_no_elements, is_one
from quantpass.graph.dump import describe_node
from quantpass.graph.torch_internals import GuardOnDataDependentSymNode, fake_mode_of, fake_result
from quantpass.planning.already_fused import broken_calls
from quantpass.planning.options import Options

VERIFY = "QUANTPASS_VERIFY_GRAPH"
"""Environment variable: where it is set and not empty, every rewritten graph is verified."""


class GraphVerificationError(RuntimeError):
    """A rewritten graph is not what the pass says it is. This is a fault of quantpass."""


def is_asked_for() -> bool:
    """True where :data:`VERIFY` is set."""
    return bool(os.environ.get(VERIFY))


def verify_graph(gm: GraphModule, options: Options) -> None:
    """Check a graph that :func:`quantpass.pipeline.fuse_graph` has rewritten.

    * the graph is well-formed (``Graph.lint``);
    * the dtype, shape, strides and device that each node claims are those that its operator gives;
    * no operator that the pass made is unused;
    * each of them says which site it belongs to;
    * each fused call is legal on the chip as it stands in the graph.

    Raises:
        GraphVerificationError: names every node that fails, and what was expected.
    """
    gm.graph.lint()
    problems = [*_untrue_values(gm), *_loose_ends(gm), *broken_calls(gm.graph, options)]
    if problems:
        raise GraphVerificationError(
            f"the rewritten graph is not sound ({len(problems)} problems); please report it:\n" + "\n".join(problems)
        )


def _is_of_the_pass(node: Node) -> bool:
    return "quantpass" in node.meta


def _untrue_values(gm: GraphModule) -> Iterator[str]:
    """What the pass made, and what reads it, against the operators' own shape functions."""
    mode = fake_mode_of([v for n in gm.graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor)])
    if mode is None:
        return
    for node in gm.graph.nodes:
        computes = isinstance(node.target, OpOverload) or node.target is operator.getitem
        if not computes or not any(map(_is_of_the_pass, (node, *node.all_input_nodes))):
            continue
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("val"))
        try:
            found = fake_result(mode, node.target, args, kwargs)
        except GuardOnDataDependentSymNode:
            continue  # it asks for a size that only the run knows
        except Exception as error:
            yield f"{describe_node(node)}: refused by its operator: {type(error).__name__}: {error}"
            continue
        claimed = node.meta.get("val")
        if not _agree(found, claimed):
            yield f"{describe_node(node)}: claimed to be {_look(claimed)}, its operator gives {_look(found)}"


def _agree(found: Any, claimed: Any) -> bool:
    """True where ``claimed`` is a tensor wherever ``found`` is one, and looks the same; also one by one in a tuple."""
    if isinstance(found, list | tuple):
        several = isinstance(claimed, list | tuple) and len(found) == len(claimed)
        return several and all(map(_agree, found, claimed))
    return not isinstance(found, torch.Tensor) or (isinstance(claimed, torch.Tensor) and _look_alike(found, claimed))


def _look_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Sizes and strides that are symbolic on one side only are no contradiction; those of one element lie anywhere."""
    if (a.dtype, a.device, a.dim()) != (b.dtype, b.device, b.dim()):
        return False
    steps = [(x, y) for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True) if not is_one(size)]
    pairs = [*zip(a.shape, b.shape, strict=True), *(() if has_no_elements(a.shape) else steps)]
    return all(x == y for x, y in pairs if isinstance(x, int) and isinstance(y, int))


def _look(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_look, value))})"
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"{value.dtype} {list(value.shape)} with strides {list(value.stride())} on {value.device}"


def _loose_ends(gm: GraphModule) -> Iterator[str]:
    for node in filter(_is_of_the_pass, gm.graph.nodes):
        replaces = "quantpass_replaces" in node.meta  # what the model itself computes and nobody reads
        if not node.users and not replaces and not node.is_impure():
            yield f"{describe_node(node)}: made for {node.meta['quantpass']!r} and read by nobody"
        elif not node.meta["quantpass"]:
            yield f"{describe_node(node)}: does not say which site it belongs to"
