"""Matmuls of plain floats, told without reading their operands: in a graph with nothing quantized, all of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from quantpass.graph.instructions import Move
from quantpass.graph.static_values import StaticValues
from quantpass.patterns.affine import AffineReader
from quantpass.patterns.contractions import Contraction, NoContraction, read_contraction
from quantpass.patterns.evidence import is_readable
from quantpass.patterns.folded import looks_dequantized
from quantpass.patterns.operands import Operand
from quantpass.patterns.reach import Reach
from quantpass.patterns.weights import matrix_node


def is_plain(reach: Reach, reader: AffineReader, node: Node) -> bool:
    """True where ``node`` is surely no site, because it multiplies nothing that is quantized; False says nothing.

    Args:
        reach: what codes reach in the graph.
        reader: what the graph's nodes are read with.
        node: any node.
    """
    if reach.touches(node):
        return False
    found = read_contraction(reader.dialects.contractions, node)
    if found is None:
        return True  # what is no matmul, or one in a form that is not read, is a site for its operands alone
    if isinstance(found, NoContraction):
        return not found.certain and not any(map(reach.holds, found.operands))
    return found.weight is None and not any(_may_be_quantized(reach, reader.values, o) for o in _operands(found))


def _operands(c: Contraction) -> tuple[Operand, Operand]:
    """What may be the weight: the right operand, or else the left one, transposed."""
    right = c.rhs if c.matrix is not None else matrix_node(c.rhs)
    return Operand(right, c.rhs_transposed, c.matrix), Operand(matrix_node(c.lhs), transposed=True)


def _may_be_quantized(reach: Reach, values: StaticValues, operand: Operand) -> bool:
    """Whether codes reach an operand, or did before it was folded; True as well where that is not told here."""
    if reach.holds(operand.node):
        return True
    if not reach.is_static(operand.node):
        return False
    operand = _stored(values, operand)
    if not _is_made_of_floats(operand.node):
        return True
    try:
        return looks_dequantized(operand.kn(values.value(operand.node)))
    except Exception:  # whatever some operator of the graph raises when it is run by itself
        return True


def _stored(values: StaticValues, operand: Operand) -> Operand:
    """The matrix that ``operand`` only shows, transposed or not."""
    while operand.matrix is None and isinstance(move := values.decode(operand.node), Move) and move.order == (1, 0):
        operand = replace(operand, node=move.source, transposed=not operand.transposed)
    return operand


def _is_made_of_floats(node: Node) -> bool:
    """True where all tensors that ``node`` is computed from are floats of known sizes."""
    todo, seen = [node], {node}
    for n in todo:
        fake = n.meta.get("val")
        if isinstance(fake, torch.Tensor):
            if not (fake.is_floating_point() and is_readable(fake) and isinstance(fake.numel(), int)):
                return False
        elif n.op != "call_function":
            return False
        fresh = [i for i in n.all_input_nodes if i not in seen]
        seen.update(fresh)
        todo.extend(fresh)
    return True
