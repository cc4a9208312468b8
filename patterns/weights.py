"""Reading a right operand as ``scale * (codes - zero_point)``.

Plain spellings are read symbolically, which keeps the stored tensor. Any other spelling of a static operand is read by
value (:mod:`quantpass.patterns.weights_by_value`). Either way a static reading is compared with what the graph itself
computes from the real tensors, so for this weight it is proved, not inferred.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch.fx import Node

from quantpass.basics.symbolic import elements, has_no_elements, is_one, same_shape, same_size
from quantpass.graph import expr as ex
from quantpass.graph.decode import decode
from quantpass.graph.expr import Call, Const, Expr, Recentred, Ref
from quantpass.graph.instructions import Move
from quantpass.graph.records import Weight
from quantpass.graph.row_rules import RowRules
from quantpass.graph.static_values import StaticValues
from quantpass.patterns.affine import Affine, AffineReader, NotAffine, along_k
from quantpass.patterns.evidence import Evidence, evidence, is_readable, judged
from quantpass.patterns.operands import Operand, blocks_of
from quantpass.patterns.proof import FLOAT32, is_rebuilt
from quantpass.patterns.terms import Term
from quantpass.patterns.weights_by_structure import is_proved_by_structure
from quantpass.patterns.weights_by_value import integer_cuts, weight_by_value

aten = torch.ops.aten

_CERTAIN = ("read.weight", "read.weight.along_k", "read.weight.batched", "read.weight.bits")
"""Why a static weight may be unreadable although it surely is a quantized one."""


def read_weight(
    reader: AffineReader, node: Node, *, transposed: bool, matrix: tuple[int, int] | None = None
) -> Weight | NotAffine:
    """Read the right operand of a matmul.

    Args:
        reader: what the graph's nodes are read with.
        node: the operand, ``(..., K, N)``, or ``(..., N, K)`` where ``transposed``.
        transposed: how it lies.
        matrix: its shape as a matrix, where it is stored in more dimensions.
    """
    one = node if matrix else matrix_node(node)
    if one.meta["val"].dim() > 2 and not reader.values.is_static(one):
        one = node  # a matrix for each batch
    operand = Operand(one, transposed, matrix)
    if operand not in reader.weights:
        reader.weights[operand] = judged(reader, operand.node, _read(reader, operand))
        if operand.is_structured and reader.values.is_static(operand.node):
            reader.forget(operand.node)
    found: Weight | NotAffine = reader.weights[operand]
    return found


def is_weight(reader: AffineReader, node: Node) -> bool:
    """True where the static ``node`` is made of stored or rounded integers and is surely a quantized weight."""
    fake = node.meta["val"]
    if fake.dim() < 2 or has_no_elements(fake.shape) or evidence(reader, node) < Evidence.WORDS:
        return False
    read = read_weight(reader, node, transposed=False)
    return read.quantized and (not isinstance(read, NotAffine) or read.rule in _CERTAIN)


def _read(reader: AffineReader, operand: Operand) -> Weight | NotAffine:
    fake = operand.node.meta["val"]
    if not is_readable(fake):
        return NotAffine(f"a {fake.dtype} tensor" if fake.layout == torch.strided else f"a {fake.layout} tensor")
    if has_no_elements(fake.shape):
        return NotAffine("it has no elements")
    affine = reader.read(operand.node)
    weight = affine if isinstance(affine, NotAffine) else _from_affine(reader.values, affine, operand)
    if not reader.values.is_static(operand.node):
        return weight
    if isinstance(weight, Weight) and _is_proved(reader.values, operand, weight, reader.dialects.rows):
        low, high = _known_span(weight)
        return replace(weight, low=low, high=high, proved=True)
    by_value = _by_value(reader, operand)
    float_values = isinstance(by_value, NotAffine) and (not by_value.quantized or by_value.rule == "read.weight.folded")
    if isinstance(weight, NotAffine) and weight.quantized and float_values:
        return weight  # a named operator says more than its values do
    return by_value if isinstance(weight, NotAffine) or isinstance(by_value, Weight) else _unproved(operand.node)


def _by_value(reader: AffineReader, operand: Operand) -> Weight | NotAffine:
    try:
        return weight_by_value(reader.values, operand, reader.dialects.rows)
    except Exception as error:  # whatever some operator of the graph raises when it is run by itself
        return NotAffine(f"its value can't be computed: {type(error).__name__}: {error}", quantized=True)


def _unproved(node: Node) -> NotAffine:
    return NotAffine(f"the value of {node.name} is not scale * (codes - zero_point)", quantized=True)


def matrix_node(node: Node) -> Node:
    """The 2-D tensor behind a weight that is repeated along leading dimensions."""
    while node.op == "call_function" and node.meta["val"].dim() > 2:
        move = decode(node)
        if not isinstance(move, Move) or move.kind not in ("expand", "reshape"):
            break
        before, after = move.source.meta["val"], node.meta["val"]
        same_matrix = before.dim() >= 2 and same_shape(before.shape[-2:], after.shape[-2:])
        leads = elements(before.shape[:-2]), elements(after.shape[:-2])
        repeated = move.kind == "expand" or same_size(*leads)
        if not same_matrix or not repeated or not (is_one(leads[0]) or same_size(*leads)):
            break
        node = move.source
    return node


# -- symbolic ------------------------------------------------------------------------------------------------------


def _from_affine(values: StaticValues, value: Affine, operand: Operand) -> Weight | NotAffine:
    if len(value.shape) > 2 and not values.is_static(operand.node):
        return _batched(value, operand.transposed)
    if len(value.shape) != 2:
        return NotAffine(f"a weight of rank {len(value.shape)}", quantized=True, rule="read.weight.batched")
    if not all(isinstance(s, int) for s in value.shape):
        return NotAffine("a weight with symbolic sizes", quantized=True)
    transposed = operand.transposed
    n, k = value.shape if transposed else reversed(value.shape)
    scale = _along_n([*value.factors], transposed, one=True)
    zero = _along_n([value.zero_point] if value.zero_point else [], transposed, one=False)
    if scale is None or zero is None:
        return along_k()
    low, high = value.span
    codes, base_transposed = _storage(value.codes, transposed)
    stored = _evaluated(values, codes)
    if isinstance(codes, Ref):
        codes = values.expr(codes.node)
    elif stored is not None:
        codes = Const(stored)
    zero_point = None if ex.is_all(zero, 0) else _same_size_as(zero, scale)
    if zero_point is not None:
        scale = _same_size_as(scale, zero_point)
    return Weight(codes, base_transposed, k, n, scale, zero_point, 0, int(low), int(high), proved=False)


def _batched(value: Affine, transposed: bool) -> Weight | NotAffine:
    """A right operand that is computed when the graph runs, with a matrix for each batch: attention."""
    if value.zero_point is not None:
        return NotAffine(
            "both operands are computed at run time and the right one has a zero point",
            quantized=True,
            rule="read.batched.zero_point",
        )
    if any(f.kind != "scalar" for f in value.factors):
        return NotAffine(
            "both operands are computed at run time and the right one has more than one scale",
            quantized=True,
            rule="read.batched.scale",
        )
    n, k = (value.shape[-2], value.shape[-1]) if transposed else (value.shape[-1], value.shape[-2])
    scale: Expr = ex.reshape(ex.scalar(1.0), (1,))
    for factor in value.factors:
        scale = ex.mul(scale, factor.flat())
    low, high = value.span
    return Weight(value.codes, transposed, k, n, scale, None, 0, int(low), int(high), proved=False)


def _along_n(terms: list[Term], transposed: bool, *, one: bool) -> Expr | None:
    """The product of ``terms`` as a vector along N (or of one element); None where one varies along K."""
    along = ("scalar", "rows" if transposed else "columns")
    result: Expr = ex.reshape(ex.scalar(1.0 if one else 0.0), (1,))
    for term in terms:
        if term.kind not in along:
            return None
        result = ex.mul(result, term.flat()) if one else term.flat()
    return result


def _same_size_as(vector: Expr, other: Expr) -> Expr:
    size = ex.shape_of(other)
    if same_shape(ex.shape_of(vector), size) or size == (1,):
        return vector
    return ex.apply(aten.expand.default, vector, list(size), dtype=ex.dtype_of(vector), shape=size)


def _storage(codes: Expr, transposed: bool) -> tuple[Expr, bool]:
    """Look through transposes of a stored matrix: the stored tensor, and whether it is ``(N, K)``."""
    while isinstance(codes, Call):
        move = ex.movement_in(codes, len(codes.shape))
        if move is None or move.order != (1, 0):
            break
        codes, transposed = codes.args[0], not transposed
    return codes, transposed


# -- proof ---------------------------------------------------------------------------------------------------------


def _is_proved(values: StaticValues, operand: Operand, weight: Weight, rules: RowRules | None = None) -> bool:
    """True where the graph's value, computed in float64, equals ``scale * (codes - zero_point)``."""
    codes, scale, zero = (_evaluated(values, e) for e in (weight.codes, weight.scale, weight.zero_point))
    if codes is None or scale is None or (zero is None) != (weight.zero_point is None):
        return False
    if operand.is_structured:
        cuts = next(integer_cuts(values, operand.node, operand.node.meta["val"].numel()), None)
        if cuts and is_proved_by_structure(values, operand, cuts, weight, codes, scale, zero, rules):
            return True
    rebuilt = True
    for columns, actual in blocks_of(values, operand, rules):
        if not math.isfinite(float(actual.sum())) and not bool(torch.isfinite(actual).all()):
            return False
        rebuilt = rebuilt and is_rebuilt(weight, codes, scale, zero, actual, same=FLOAT32, columns=columns)
    # An operator that rounds to codes by itself may round otherwise in float64: then what the graph computes counts,
    # up to the rounding of its dtype.
    return rebuilt or all(
        is_rebuilt(weight, codes, scale, zero, computed, same=FLOAT32, rounding=computed.dtype, columns=columns)
        for columns, computed in blocks_of(values, operand, rules, wide=False)
    )


def _evaluated(values: StaticValues, e: Expr | None) -> torch.Tensor | None:
    if isinstance(e, Const):
        return e.tensor
    if isinstance(e, Ref) and values.is_static(e.node):
        value: torch.Tensor = values.value(e.node)
        return value
    if isinstance(e, Recentred):
        return _evaluated(values, e.otherwise)
    if isinstance(e, Call):
        arguments = [_evaluated(values, a) if isinstance(a, Expr) else a for a in e.args]
        if any(a is None and isinstance(o, Expr) for a, o in zip(arguments, e.args, strict=True)):
            return None
        result: torch.Tensor = e.target(*arguments, **e.kwargs)
        return result
    return None


def _known_span(weight: Weight) -> tuple[int, int]:
    if isinstance(weight.codes, Const):
        return int(weight.codes.tensor.min()), int(weight.codes.tensor.max())
    return weight.low, weight.high
