"""Values that are made of a dequantized weight and of something known at run time only.

``dq(w) + B @ A``, ``dq(w) * mask``, ``dq(w)[expert]``: no scale and zero point describe these, so they can't be fused.
But whoever multiplies by one has quantized that weight, so the matmul gets a verdict that says what stands between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from quantpass.basics.symbolic import same_shape
from quantpass.graph.expr import Call, Expr, Recentred, Ref
from quantpass.graph.schema import op_name
from quantpass.patterns.affine import Affine, AffineReader, NotAffine
from quantpass.patterns.unread_matmuls import EXPERTS
from quantpass.patterns.weights import is_weight

CHOOSES = frozenset(
    f"aten::{name}"
    for name in ("index", "index_select", "select", "gather", "take_along_dim", "embedding", "take", "_unsafe_index")
)
"""Operators that take some of the elements of their first operand."""

_KEEPS = frozenset(
    f"aten::{name}"
    for name in (
        *(
            "_to_copy",
            "to",
            "slice",
            "narrow",
            "split",
            "split_with_sizes",
            "chunk",
            "unbind",
            "cat",
            "concat",
            "stack",
        ),
        *("constant_pad_nd", "pad", "flip", "roll", "repeat", "repeat_interleave", "tril", "triu", "tile", "index_put"),
        *("slice_scatter", "select_scatter", "scatter", "scatter_add", "index_add", "index_copy", "as_strided"),
        *("masked_scatter", "unsafe_chunk", "unsafe_split", "dropout", "native_dropout", "hstack", "vstack"),
        *("unfold", "diagonal", "movedim", "copy", "type_as", "to_dense"),
    )
) | {"prims::convert_element_type"}
"""Operators that are no pointwise ones, whose result holds elements of their operands."""

_SUMS = ("add", "sub", "rsub", "addcmul", "addcdiv", "lerp", "index_add", "scatter_add")
_MASKS = ("mul", "div", "where", "masked_fill", "masked_scatter")
_BITS = ("bitwise_and", "bitwise_or", "__and__", "__or__", "bitwise_right_shift", "__rshift__", "bitwise_left_shift")
_WORDS = (torch.int16, torch.int32)
_CODES = (torch.int8, torch.uint8, *_WORDS)

_SPLIT_HINT = (
    "multiply by each part of the sum: x @ w with the dequantized weight alone, plus x @ the rest, which for factors "
    "is (x @ A) @ B"
)
_MASK_HINT = (
    "make it part of the codes or of the scale before compiling (a tensor of the module, not an input), or multiply "
    "the result where it varies along the columns only"
)
_ROWS_HINT = "multiply by the whole weight and take the wanted columns of the result"


@dataclass(frozen=True, slots=True)
class Found:
    """Codes behind a value.

    Attributes:
        kind: ``"plain"``, ``"raw"`` (words that may hold several codes each, or be something else), ``"experts"``,
            ``"lookup"`` (rows of a table), ``"sum"``, ``"mask"``, ``"other"``, ``"opaque"`` (an operator that nobody
            knows makes floats of codes), ``"packed"`` (bits of unknown values).
        codes: the dequantized value or the codes.
        at: the node that made it unreadable.
    """

    kind: str
    codes: Node
    at: Node

    def reason(self) -> NotAffine:
        """Why the value can't be an operand of a fused matmul."""
        codes, op = self.codes.name, op_name(self.at) if self.at.op == "call_function" else self.at.name
        shape = list(self.at.all_input_nodes[0].meta["val"].shape) if self.kind == "experts" else None
        what, hint, rule = {
            "experts": (
                f"{op} ({self.at.name}) picks matrices of {codes} {shape} when the graph runs",
                "",
                EXPERTS,
            ),
            "lookup": (f"{op} ({self.at.name}) picks rows of {codes} when the graph runs", _ROWS_HINT, ""),
            "sum": (
                f"{op} ({self.at.name}) adds something known at run time only to the dequantized {codes}",
                _SPLIT_HINT,
                "",
            ),
            "mask": (
                f"{op} ({self.at.name}) multiplies or replaces elements of the dequantized {codes} by something known "
                "at run time only",
                _MASK_HINT,
                "",
            ),
            "opaque": (
                f"{op} ({self.at.name}) makes floats of the integers {codes}, and is not an operator that is known",
                "",
                "read.weight.opaque",
            ),
            "packed": (
                f"{op} ({self.at.name}) takes bits of {codes}, whose values are not known when compiling",
                "",
                "read.weight.packed",
            ),
        }.get(self.kind, (f"{op} ({self.at.name}) computes it from the dequantized {codes}", "", ""))
        return NotAffine(what, quantized=True, hint=hint, rule=rule or "read.weight.runtime")


class DerivedWeights:
    """Finds the codes behind the values of one graph; each node is looked at once.

    Args:
        reader: what the graph's nodes are read with.
    """

    def __init__(self, reader: AffineReader) -> None:
        self._reader = reader
        self._memo: dict[Node, Found | None] = {}

    def find(self, node: Node) -> Found | None:
        """What ``node`` holds of stored codes; None where it holds none."""
        stack = [node]
        while stack:
            n = stack[-1]
            if n in self._memo:
                stack.pop()
                continue
            found, inputs = self._look(n)
            missing = [i for i in inputs if i not in self._memo]
            if missing:
                stack.extend(missing)
                continue
            self._memo[n] = found or self._combined(n, inputs)
            stack.pop()
        result = self._memo[node]
        return None if result is None or result.kind == "raw" else result

    def _look(self, n: Node) -> tuple[Found | None, list[Node]]:
        """What is known of ``n`` at once, or else the nodes to look at first."""
        fake = n.meta.get("val")
        if not isinstance(fake, torch.Tensor):
            several = n.op == "call_function" and isinstance(fake, list | tuple)
            return None, self._carriers(n) if several else []
        if fake.dtype == torch.bool or fake.dtype.is_complex or not fake.dim():
            return None, []
        if n.op in ("placeholder", "get_attr"):
            if fake.dtype in _WORDS:
                return Found("raw", n, n), []
            stored = (fake.dtype in _CODES and not self._is_mask(n)) or self._given(n)
            return (Found("plain", n, n) if stored else None), []
        if n.op != "call_function":
            return None, []
        if self._reader.values.is_static(n) and fake.dim() > 1:
            return (Found("plain", n, n) if is_weight(self._reader, n) else None), []
        read = self._reader.read(n)
        if isinstance(read, Affine) and read.factors and self.is_stored(read.codes):
            return Found("plain", n, n), []
        return None, self._carriers(n)

    def _is_mask(self, leaf: Node) -> bool:
        """True for a known tensor of zeros and ones: adjacency, permutation, one-hot matrices of float models."""
        held = self._reader.values.leaf(leaf)
        return held is not None and held.device.type != "meta" and bool(((held == 0) | (held == 1)).all())

    def _given(self, n: Node) -> bool:
        read = self._reader.read(n)
        return isinstance(read, NotAffine) and read.quantized

    def is_stored(self, codes: Expr) -> bool:
        """True where codes are inputs of the graph as they are, not made by a quantization in the graph."""
        todo: list[Any] = [codes]
        while todo:
            e = todo.pop()
            if isinstance(e, Ref):
                node = e.node
                while (movement := self._reader.movement(node)) is not None:
                    node = movement.source
                if node.op not in ("placeholder", "get_attr"):
                    return False
            elif isinstance(e, Recentred):
                todo.append(e.otherwise)
            elif isinstance(e, Call):
                todo.extend(a for a in e.args if isinstance(a, Expr))
        return True

    def _carriers(self, n: Node) -> list[Node]:
        """The operands whose elements ``n`` holds."""
        target = n.target
        if getattr(target, "__module__", "") == "_operator":
            return n.all_input_nodes[:1]
        if not isinstance(target, OpOverload):
            return []
        name = target._schema.name
        if name.startswith("_c10d_functional") or name in CHOOSES or self._reader.movement(n) is not None:
            return n.all_input_nodes[:1]
        if name in _KEEPS:
            return [i for i in n.all_input_nodes if _is_float_or_codes(i)]
        if name.split("::")[1] in _BITS:  # words are spread over a dimension of their own: (N, K / 8, 1) >> shifts
            stored = [i for i in n.all_input_nodes if _is_float_or_codes(i) and i.meta["val"].dim() > 1]
            return [i for i in stored if not self._reader.values.is_static(i)]
        if _is_pointwise(target):
            shape = n.meta["val"].shape
            return [i for i in n.all_input_nodes if _is_float_or_codes(i) and _same_matrix(i.meta["val"].shape, shape)]
        if target.namespace in ("aten", "prims", "quantpass", "npu") or self._reader.dialects.know(target):
            return []
        return [i for i in n.all_input_nodes if _is_float_or_codes(i)]

    def _combined(self, n: Node, inputs: list[Node]) -> Found | None:
        target = n.target
        found = [f for f in (self._memo[i] for i in inputs) if f is not None]
        if not found or not isinstance(target, OpOverload):
            return found[0] if found else None
        first = next((f for f in found if f.kind not in ("plain", "raw")), found[0])
        name = target._schema.name.split("::")[1]
        kind = first.kind
        if target._schema.name in CHOOSES and len(n.all_input_nodes) > 1:
            rank = inputs[0].meta["val"].dim()
            if kind != "raw" or self._reader.values.is_static(inputs[0]):
                kind = kind if kind == "experts" else "experts" if rank > 2 else "lookup"
        elif kind not in ("plain", "raw"):
            return first
        elif _is_pointwise(target):
            kind = self._pointwise(n, name, kind)
        elif target.namespace not in ("aten", "prims", "_c10d_functional"):
            kind = "opaque"
        elif kind == "raw":
            pass
        elif target._schema.name in _KEEPS and name not in ("_to_copy", "to", "convert_element_type"):
            kind = "other"
        return first if kind == first.kind else Found(kind, first.codes, n)

    def _pointwise(self, n: Node, name: str, kind: str) -> str:
        fake = n.meta["val"]
        if name in _BITS and not fake.dtype.is_floating_point:
            return "packed"
        if kind == "raw":
            return kind
        if not fake.dtype.is_floating_point:
            return "plain"
        integers = [i for i in n.all_input_nodes if not i.meta["val"].dtype.is_floating_point]
        if integers and len(n.all_input_nodes) == len(integers):
            return "plain"  # integers become floats
        return "sum" if name in _SUMS else "mask" if name in _MASKS else "plain" if name == "clone" else "other"


def _is_pointwise(target: OpOverload) -> bool:
    # Not every overload is tagged.
    return torch.Tag.pointwise in target.tags or target._schema.name.split("::")[1] in (*_SUMS, *_MASKS, *_BITS)


def _is_float_or_codes(n: Node) -> bool:
    fake = n.meta.get("val")
    return isinstance(fake, torch.Tensor) and (fake.dtype.is_floating_point or fake.dtype in _CODES)


def _same_matrix(shape: Any, result: Any) -> bool:
    """True where an operand of a pointwise operator is not broadcast along the last two dimensions."""
    return len(shape) >= 2 and same_shape(shape[-2:], result[-2:])
