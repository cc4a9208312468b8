"""How far codes reach in a graph: found in one walk, so that matmuls of plain floats need not be read.

Codes start at tensors of any type but ``float16`` to ``float64``, ``int64`` and ``bool``, at what is rounded, at tools'
operators that return integers or dequantized values, at higher-order operators, and at a body's placeholders that the
outer graph says something of. They reach all that is computed from them; when the graph runs, though, not the product
of a matmul, nor a comparison, nor what is only looked up by them. So this is an upper bound: what they do not reach, no
reader of this layer takes for quantized, unless its values say so (:mod:`quantpass.patterns.folded`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, Node

from quantpass.graph.decode import rounds
from quantpass.graph.static_values import StaticValues
from quantpass.patterns.derived import CHOOSES
from quantpass.patterns.dialect import Dialects

_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_NO_CODES = _FLOATS | {torch.int64, torch.bool, None}
"""What holds no codes unless something makes them: int64 is PyTorch's type for indices, None stands for no tensor."""

_PRODUCTS = _FLOATS | {torch.int32}


class Reach:
    """What codes reach in one graph.

    Args:
        graph: the graph.
        values: its static values.
        dialects: the tools' operators.
        given: the placeholders that something is known of from outside of the graph.
    """

    def __init__(self, graph: Graph, values: StaticValues, dialects: Dialects, given: Collection[Node]) -> None:
        self._values, self._dialects = values, dialects
        self._held: set[Node] = set(given)
        self._touched: set[Node] = set()
        self._static: set[Node] = set()
        self._matmuls: set[Node] = set()
        self._known: dict[Any, tuple[bool, bool]] = {}
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self._follow_leaf(node)
            else:
                self._follow(node)

    def concerns(self, node: Node) -> bool:
        """False where ``node`` is surely no site, nor returns one's weight."""
        return node in self._touched or node in self._matmuls

    def holds(self, node: Node) -> bool:
        """False where the value of ``node`` is surely made of no codes."""
        return node in self._held

    def touches(self, node: Node) -> bool:
        """False where ``node`` surely takes no codes, and makes none."""
        return node in self._touched

    def is_static(self, node: Node) -> bool:
        """True where ``node`` can be evaluated, as :meth:`StaticValues.is_static` says it."""
        return node in self._static

    def _follow_leaf(self, leaf: Node) -> None:
        if self._values.leaf(leaf) is not None:
            self._static.add(leaf)
        if _dtype(leaf) not in _NO_CODES:
            self._held.add(leaf)

    def _follow(self, node: Node) -> None:
        inputs, dtype = node.all_input_nodes, _dtype(node)
        if all(i in self._static for i in inputs) and self._values.is_static(node):
            self._static.add(node)
        starts, multiplies = self._known.get(node.target) or self._look_up(node.target)
        if multiplies:
            self._matmuls.add(node)
        reached = [i for i in inputs if i in self._held] if self._held else []
        if starts or reached or dtype not in _NO_CODES:
            self._touched.add(node)
            product = multiplies and dtype in _PRODUCTS  # an accumulator, whatever was multiplied
            if starts or node in self._static or not (product or self._drops(node, dtype, reached)):
                self._held.add(node)

    def _look_up(self, target: Any) -> tuple[bool, bool]:
        """Whether an operator may make codes of anything, and whether it is a matmul that is read."""
        starts = isinstance(target, HigherOrderOperator) or self._dialects.make_codes(target) or rounds(target)
        self._known[target] = found = (starts, self._dialects.contractions.get(target) is not None)
        return found

    def _drops(self, node: Node, dtype: torch.dtype | None, reached: list[Node]) -> bool:
        """True where what comes of ``node`` when the graph runs holds nothing of its inputs ``reached``."""
        if dtype in _FLOATS and isinstance(node.target, OpOverload) and node.target._schema.name in CHOOSES:
            return node.all_input_nodes[0] not in reached
        return dtype == torch.bool


def _dtype(node: Node) -> torch.dtype | None:
    fake = node.meta.get("val")
    return fake.dtype if isinstance(fake, torch.Tensor) else None
