"""What makes a matrix of integers a quantized weight, and what does not.

Float models are full of matrices made of integers: adjacency, one-hot, pooling and permutation matrices, masks, hash
projections, powers and positions. Their matmuls are not quantized ones. An operand counts as quantized where codes
reach it that somebody *stored* or *rounded*:

* a stored tensor (parameter, buffer, constant) of int8, uint8 or a smaller type;
* a stored tensor of 16 or 32 bits whose integers are unpacked by shifts, masks or division, or that reads as 8-bit
  codes with a scale or a zero point;
* a floating parameter that the graph rounds, casts to a narrow integer, or quantizes and dequantizes by a named
  operator;
* a stored boolean tensor that chooses between two numbers, neither of them zero, times a scale that is not 1: binary
  weights.

It does not count where integers are computed (``arange``, ``eye``, comparisons, ``one_hot``), or stored as int64, which
is PyTorch's type for indices and counts and takes 8 bytes for a code. Nor where the integers are just 0 and 1 without a
zero point, whatever their type: that is a mask. Where the *other* operand is quantized, or the matmul is one of 8-bit
integers, it is a site in any case, and such a matrix is read as the weight that it can be.
"""

from __future__ import annotations

from dataclasses import replace
from enum import IntEnum

import torch
from torch.fx import Node

from quantpass.graph import expr as ex
from quantpass.graph.expr import Expr
from quantpass.graph.instructions import Round
from quantpass.graph.records import Weight
from quantpass.graph.static_values import StaticValues
from quantpass.patterns.affine import Affine, AffineReader, NotAffine

aten = torch.ops.aten

NUMBERS = frozenset(
    {
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
    }
)
"""The types of an operand that can be read."""

_WORDS = (torch.int16, torch.uint16, torch.int32, torch.uint32)
_INDICES = (torch.int64, torch.uint64)
_NARROW = (torch.int8, torch.uint8, torch.int16)
_UNPACKS = frozenset(
    f"aten::{name}"
    for name in [
        *("bitwise_and", "__and__", "bitwise_right_shift", "__rshift__", "bitwise_left_shift", "__lshift__"),
        *("remainder", "fmod", "floor_divide", "div", "bitwise_or", "__or__", "bitwise_xor", "__xor__"),
    ]
)
_SHARE = 16
"""A weight's codes take at least 2 bits each: fewer words than a sixteenth of its elements can't hold them."""


class Evidence(IntEnum):
    """What the integers behind an operand are."""

    NONE = 0
    BITS = 1
    WORDS = 2
    CODES = 3


def is_readable(fake: torch.Tensor) -> bool:
    """True for a dense tensor of plain numbers."""
    return fake.layout == torch.strided and fake.dtype in NUMBERS


def _is_evident(reader: AffineReader, node: Node, read: Weight | NotAffine) -> bool:
    """True where the static ``node``, read as ``read``, holds quantized values."""
    found = evidence(reader, node)
    if isinstance(read, NotAffine):
        return found is Evidence.CODES
    if found is Evidence.NONE or _is_mask(read):
        return False
    return found is Evidence.CODES or read.zero_point is not None or not ex.is_all(read.scale, 1.0)


def judged(reader: AffineReader, node: Node, read: Weight | NotAffine) -> Weight | NotAffine:
    """``read``, what the operand ``node`` was read as, marked as not quantized where nothing says that it is."""
    if not read.quantized or node.meta["val"].dtype in (torch.int8, torch.uint8):
        return read
    if isinstance(read, NotAffine) and read.rule == "read.weight.folded":
        return read
    if reader.values.is_static(node):
        evident = _is_evident(reader, node, read)
    else:
        affine = reader.read(node)
        evident = isinstance(affine, NotAffine) or not is_mask(reader, affine.codes)
    return read if evident else replace(read, quantized=False)


def is_evident_activation(reader: AffineReader, node: Node, read: Affine | NotAffine) -> bool:
    """True unless the left operand is a matrix of a float model that happens to be held in a narrow integer type."""
    if isinstance(read, NotAffine) and not read.quantized:
        return False
    if node.meta["val"].dtype in (torch.int8, torch.uint8):
        return True
    if reader.values.is_static(node):
        return evidence(reader, node) is Evidence.CODES
    return isinstance(read, NotAffine) or not is_mask(reader, read.codes)


def evidence(reader: AffineReader, node: Node) -> Evidence:
    """The best evidence of codes among all that the static ``node`` is computed from."""
    least = node.meta["val"].numel()
    if not isinstance(least, int):
        return Evidence.CODES
    found, unpacked, seen, todo = Evidence.NONE, False, {node}, [node]
    while todo and found is not Evidence.CODES:
        n = todo.pop()
        if n.op != "call_function":
            found = max(found, _of_leaf(reader.values, n, least))
            continue
        unpacked = unpacked or _unpacks(n)
        if reader.dequantizes(n) or (_rounds(reader.values, n) and _large(n, least) and _has_float_leaf(n, least)):
            return Evidence.CODES
        fresh = [i for i in n.all_input_nodes if i not in seen]
        seen.update(fresh)
        todo.extend(fresh)
    return Evidence.CODES if found is Evidence.WORDS and unpacked else found


def is_mask(reader: AffineReader, codes: Expr) -> bool:
    """True where the codes of a value that is computed when the graph runs are a mask: booleans in another type."""
    nodes = [leaf.node for leaf in ex.leaves_of(codes) if isinstance(leaf, ex.Ref)]
    return bool(nodes) and all(_is_cast_boolean(n) or _is_static_mask(reader, n) for n in nodes)


def _is_static_mask(reader: AffineReader, node: Node) -> bool:
    return reader.values.is_static(node) and evidence(reader, node) <= Evidence.BITS


def _is_cast_boolean(node: Node) -> bool:
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
        fake = node.meta.get("val")
        if not isinstance(fake, torch.Tensor) or fake.is_floating_point():
            return False
        if fake.dtype == torch.bool:
            return True
    return False


def _of_leaf(values: StaticValues, leaf: Node, least: int) -> Evidence:
    fake = leaf.meta.get("val")
    if not isinstance(fake, torch.Tensor) or fake.is_floating_point() or fake.is_complex() or not _large(leaf, least):
        return Evidence.NONE
    if fake.dtype in _INDICES:
        return Evidence.NONE
    if fake.dtype == torch.bool:
        return Evidence.BITS
    if fake.dtype in _WORDS:
        return Evidence.WORDS
    return Evidence.BITS if fake.dtype in (torch.int8, torch.uint8) and _is_bits(values, leaf) else Evidence.CODES


def _is_bits(values: StaticValues, leaf: Node) -> bool:
    """True where a stored tensor holds zeros and ones and nothing else; both of them."""
    held = values.value(leaf).reshape(-1)
    for part in (held[:4096], held):
        low, high = part.min(), part.max()
        if low < 0 or high > 1:
            return False
    return bool(low != high)


def _is_mask(weight: Weight) -> bool:
    """True where a weight's integers are 0 and 1, with no zero point between them."""
    if weight.high - weight.low != 1:
        return False
    return weight.low == 0 if weight.zero_point is None else ex.is_all(weight.zero_point, weight.low)


def _large(node: Node, least: int) -> bool:
    fake = node.meta.get("val")
    return isinstance(fake, torch.Tensor) and isinstance(fake.numel(), int) and fake.numel() * _SHARE >= least


def _rounds(values: StaticValues, n: Node) -> bool:
    """True for a rounding, and for a cast of floats to a narrow integer."""
    if isinstance(values.decode(n), Round):
        return True
    fake = n.meta.get("val")
    if not isinstance(fake, torch.Tensor) or fake.dtype not in _NARROW:
        return False
    sources = [i.meta.get("val") for i in n.all_input_nodes]
    return any(isinstance(s, torch.Tensor) and s.is_floating_point() for s in sources)


def _unpacks(n: Node) -> bool:
    fake = n.meta.get("val")
    integer = isinstance(fake, torch.Tensor) and not fake.is_floating_point() and fake.dtype != torch.bool
    schema = getattr(n.target, "_schema", None)
    return integer and (n.target is aten.view.dtype or (schema is not None and schema.name in _UNPACKS))


def _has_float_leaf(node: Node, least: int) -> bool:
    """True where ``node`` is computed from a stored floating tensor, not only from what the graph makes itself."""
    seen, todo = {node}, [node]
    while todo:
        n = todo.pop()
        fake = n.meta.get("val")
        stored = n.op != "call_function" and isinstance(fake, torch.Tensor) and fake.is_floating_point()
        if stored and _large(n, least):
            return True
        fresh = [i for i in n.all_input_nodes if i not in seen]
        seen.update(fresh)
        todo.extend(fresh)
    return False
