"""Sizes that are symbolic in a graph although the weights at hand have them.

Where each Linear is compiled in a frame of its own, all of them are calls of one piece of code, so PyTorch makes the
sizes of their weights symbolic. A graph that is compiled for one weight has that weight's sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from quantpass.graph.torch_internals import FakeTensorMode, fake_mode_of

Sizes = dict[sympy.Symbol, sympy.Integer]


def known_sizes(leaves: Mapping[Node, torch.Tensor]) -> Sizes:
    """The symbols that are a size or step of a known tensor, and their values."""
    found: Sizes = {}
    for node, tensor in leaves.items():
        fake = node.meta.get("val")
        if isinstance(fake, torch.Tensor):
            pairs = zip((*fake.shape, *fake.stride()), (*tensor.shape, *tensor.stride()), strict=True)
            found.update(
                (s.node.expr, sympy.Integer(n))
                for s, n in pairs
                if isinstance(s, torch.SymInt) and s.node.expr.is_Symbol
            )
    return found


def with_known_sizes(gm: GraphModule, inputs: list[Any], sizes: Sizes) -> list[Any]:
    """Put numbers in place of symbols, in what a graph's nodes say of their values and in place; returns the inputs so.

    Args:
        gm: a graph with symbolic sizes; its placeholders stay.
        inputs: its fake inputs.
        sizes: what to put in.
    """
    mode = fake_mode_of([v for v in inputs if isinstance(v, torch.Tensor)])
    numbers: dict[Node, int] = {}
    for node in gm.graph.nodes:
        before = node.meta.get("val")
        if before is not None:
            node.meta["val"] = after = map_aggregate(before, lambda v: _known(v, sizes, mode))
            if isinstance(before, torch.SymInt) and isinstance(after, int):
                numbers[node] = after
    for node in reversed(numbers):
        for user in tuple(node.users):
            user.args, user.kwargs = map_aggregate(
                (user.args, user.kwargs), lambda a: numbers.get(a, a) if isinstance(a, Node) else a
            )
        if node.op != "placeholder" and not node.users:
            gm.graph.erase_node(node)
    gm.recompile()
    return [_known(v, sizes, mode) for v in inputs]


def _known(value: Any, sizes: Sizes, mode: FakeTensorMode | None) -> Any:
    if isinstance(value, torch.SymInt):
        return _number(value, sizes)
    if not isinstance(value, torch.Tensor) or mode is None:
        return value
    layout = (*value.shape, *value.stride())
    after = [_number(s, sizes) for s in layout]
    if all(a is s for a, s in zip(after, layout, strict=True)):
        return value
    with mode:
        return torch.empty_strided(after[: value.dim()], after[value.dim() :], dtype=value.dtype, device=value.device)


def _number(size: Any, sizes: Sizes) -> Any:
    if not isinstance(size, torch.SymInt):
        return size
    before = size.node.expr
    expr = before.xreplace(sizes)
    if expr.is_Integer:
        return int(expr)
    return size if expr == before else size.node.shape_env.create_symintnode(expr, hint=size.node.hint)
