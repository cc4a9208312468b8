"""The net under the tables: which operands are quantized though no matmul reader says so.

Covers operators that multiply matrices in a form that is not read, operators that nobody knows, and operands that are
computed from a dequantized weight and something known at run time only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch._ops import OpOverload
from torch.fx import Node

from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject
from quantpass.patterns.affine import Affine, AffineReader, NotAffine
from quantpass.patterns.contractions import Contraction, NoContraction
from quantpass.patterns.derived import DerivedWeights, Found
from quantpass.patterns.evidence import Evidence, evidence
from quantpass.patterns.unread_matmuls import higher_order, unread_contraction
from quantpass.patterns.weights import is_weight


class Net:
    """Finds the quantized operands of one graph that its readers do not see.

    Args:
        reader: what the graph's nodes are read with.
    """

    def __init__(self, reader: AffineReader) -> None:
        self._reader = reader
        self._derived = DerivedWeights(reader)

    def unread(self, node: Node, *, looked_into: bool) -> NoContraction | None:
        """``node`` as a matmul that is not read, or as an operator that nobody knows.

        Args:
            node: a node that no reader of matmuls has taken.
            looked_into: the graphs that it calls are read themselves.
        """
        aten = isinstance(node.target, OpOverload) and node.target.namespace == "aten"  # it is not asked for
        known = not aten and self._reader.dialects.know(node.target)
        return higher_order(node, looked_into) or unread_contraction(node, known)

    def returned(self, output: Node) -> Iterator[tuple[Node, Reject]]:
        """Weights that a graph dequantizes and returns: whoever multiplies by them is not in the graph."""
        for node in output.all_input_nodes:
            fake = node.meta.get("val")
            if not isinstance(fake, torch.Tensor) or not fake.dtype.is_floating_point or len(node.users) != 1:
                continue
            static = node.op == "call_function" and self._reader.values.is_static(node)
            if static and is_weight(self._reader, node):
                found = f"the graph dequantizes a weight {list(fake.shape)} and returns it ({node.name})"
                yield node, refuse("read.weight.returned", found)

    def behind(self, c: Contraction) -> NotAffine | None:
        """The weight behind an operand of ``c`` that could not be read as one, and what stands between."""
        static = self._reader.values.is_static
        found = self._derived.find(c.rhs)
        if found is None and not static(c.rhs):
            found = self._derived.find(c.lhs)
            stored = found is not None and (found.kind == "packed" or static(found.codes))
            if found is not None and (found.kind == "lookup" or not stored):
                return None  # an activation: looked up in a quantized table, or quantized itself
        elif found is not None and found.kind == "lookup" and static(c.lhs):
            return None
        return None if found is None or found.kind == "plain" else found.reason()

    def quantized_operand(self, found: NoContraction) -> Found | Node | None:
        """The first operand of ``found`` that is quantized: as read, or what is behind it."""
        for operand in found.operands:
            if self._is_quantized(operand, found):
                return operand
            behind = self._derived.find(operand)
            if behind is None or behind.kind == "lookup" or found.weights_only:
                continue
            if behind.kind != "plain" or found.codes:
                return behind
        return None

    def _is_quantized(self, operand: Node, found: NoContraction) -> bool:
        read = self._reader.read(operand)
        static = self._reader.values.is_static(operand)
        if isinstance(read, Affine):
            stored = static or operand.op in ("placeholder", "get_attr") or self._derived.is_stored(read.codes)
            if found.weights_only and not (stored and operand.meta["val"].dim() >= 2):
                return False
            if static and evidence(self._reader, operand) < Evidence.WORDS:
                return False
            return bool(read.factors) or (found.codes and not found.weights_only)
        if read.quantized:
            return not found.weights_only or static or operand.op == "placeholder"
        return static and operand.op == "call_function" and is_weight(self._reader, operand)
