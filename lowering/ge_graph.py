"""GE graphs as plain data: made from torchair's ``GraphDef``, printed, compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import networkx as nx

_SHORT = {
    "DOUBLE": "f64", "FLOAT": "f32", "FLOAT16": "f16", "BF16": "bf16", "INT4": "i4", "INT8": "i8", "UINT8": "u8",
    "INT16": "i16", "INT32": "i32", "INT64": "i64", "UINT64": "u64", "BOOL": "bool",
}  # fmt: skip
_FORMATS = {29: "NZ"}
_INPUTS = ("Data", "RefData")


@dataclass(frozen=True, slots=True)
class GeTensor:
    """A tensor description.

    Attributes:
        name: the input's or output's name in the operator's prototype.
        dtype: GE's name without ``DT_``, e.g. ``"FLOAT16"``; empty where torchair leaves it open.
        shape: where it is known.
        format: ``"ND"`` or ``"NZ"``: how it lies in memory.
        fed: False for an optional input that was left out.
    """

    name: str
    dtype: str = ""
    shape: tuple[int, ...] | None = None
    format: str = "ND"
    fed: bool = True

    def __str__(self) -> str:
        shape = "" if self.shape is None else f"[{', '.join(map(str, self.shape))}]"
        if not self.dtype:
            return "?"
        return f"{_SHORT.get(self.dtype, self.dtype.lower())}{shape}{'' if self.format == 'ND' else ':' + self.format}"


@dataclass(frozen=True, slots=True)
class GeConstant:
    """The value of a ``Const``: dtype, shape and its bytes, little endian."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class GeOp:
    """One operator.

    Attributes:
        name: unique in the graph.
        type: e.g. ``"QuantBatchMatmulV3"``.
        inputs: ``(operator, output index)`` for each input in order; None where an optional input was left out.
        attrs: attributes without torchair's bookkeeping.
        input_tensors: one for each input.
        outputs: one for each output.
        after: operators that must run before, by name.
    """

    name: str
    type: str
    inputs: tuple[tuple[str, int] | None, ...]
    attrs: dict[str, Any]
    input_tensors: tuple[GeTensor, ...]
    outputs: tuple[GeTensor, ...]
    after: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"%{self.name}: {self.described(lambda source: '%' + _reference(source))}"

    def described(self, shown: Callable[[tuple[str, int]], str]) -> str:
        """Outputs, type, inputs and attributes; ``shown`` says how an input is written."""
        pairs = zip(self.inputs, self.input_tensors, strict=False)
        given = [f"{tensor.name}={shown(source)}" for source, tensor in pairs if source is not None]
        given += [f"{k}={_attribute_text(v)}" for k, v in sorted(self.attrs.items())]
        result = ", ".join(map(str, self.outputs))
        return f"{result + ' = ' if result else ''}{self.type}({', '.join(given)})"


@dataclass(frozen=True, slots=True)
class GeGraph:
    """A GE graph.

    Attributes:
        ops: in torchair's order, each after its inputs.
        input_positions: which input of the FX graph each ``Data`` takes, by its ``index``.
        results: for each result of the FX graph, the number of the ``NetOutput``'s input; or the position of the
            input of which it is a view, with sizes, strides and offset; or a number or None that the graph returns.
    """

    ops: tuple[GeOp, ...]
    input_positions: tuple[int, ...] = ()
    results: tuple[Any, ...] = ()

    @property
    def op_types(self) -> list[str]:
        """The types of the operators that compute something (no inputs, constants and outputs), in order."""
        return [op.type for op in self.ops if op.type not in (*_INPUTS, "Const", "ConstPlaceHolder", "NetOutput")]

    def to_networkx(self) -> nx.DiGraph:
        """Operators as nodes (attribute ``op``), data and control dependencies as edges."""
        graph = nx.DiGraph()
        for op in self.ops:
            graph.add_node(op.name, op=op, type=op.type)
        for op in self.ops:
            graph.add_edges_from((source[0], op.name) for source in op.inputs if source is not None)
            graph.add_edges_from((name, op.name) for name in op.after)
        return graph

    def __str__(self) -> str:
        return "\n".join(map(str, self.ops))

    def outline(self) -> str:
        """One line an operator, an input written as the type of what made it (inputs and constants as themselves).

        torchair numbers operators of a type, so one more Cast renames all that follow; here it is one line more.
        """
        by_name = {op.name: op for op in self.ops}

        def shown(source: tuple[str, int]) -> str:
            made_by = by_name[source[0]]
            if made_by.type in _INPUTS:
                return "%" + _reference(source)
            if made_by.type == "Const":
                return _attribute_text(made_by.attrs["value"])
            return made_by.type

        lines = []
        for op in self.ops:
            if op.type in _INPUTS:
                lines.append(f"%{op.name}: {', '.join(map(str, op.outputs))} = {op.type}")
            elif op.type != "Const":
                lines.append(op.described(shown))
        return "\n".join(lines)

    def __getitem__(self, name: str) -> GeOp:
        for op in self.ops:
            if op.name == name:
                return op
        raise KeyError(f"the graph has no operator {name!r}")


def same_up_to_names(a: GeGraph, b: GeGraph) -> bool:
    """Whether two graphs compute the same by the same operators, whatever these are called."""
    return first_difference(a, b) is None


def first_difference(a: GeGraph, b: GeGraph) -> str | None:
    """Where two graphs differ first, following data from the inputs on; None where they do not.

    Operators that nothing needs do not count. Inputs correspond by their index.
    """
    left, right = _Live(a), _Live(b)
    twins: dict[str, str] = {}
    taken: set[str] = set()
    pairs = list(zip(left.outputs, right.outputs, strict=False))
    if len(left.outputs) != len(right.outputs):
        return f"{len(left.outputs)} and {len(right.outputs)} NetOutput operators"
    stack: list[tuple[str, str, bool]] = [(x, y, False) for x, y in reversed(pairs)]
    while stack:
        x, y, inputs_done = stack.pop()
        if not inputs_done:
            if x in twins or y in taken:
                continue  # if they are no twins, the operator that reads them differs in this input
            stack.append((x, y, True))
            sources = zip(left.ops[x].inputs, right.ops[y].inputs, strict=False)
            later = [(p[0], q[0], False) for p, q in sources if p is not None and q is not None]
            stack.extend(reversed(later))
            continue
        if x in twins or y in taken:
            continue
        problem = _mismatch(left.ops[x], right.ops[y], twins)
        if problem:
            return f"{problem}: {left.ops[x]}  |  {right.ops[y]}"
        twins[x] = y
        taken.add(y)
    return None


class _Live:
    """The part of a graph that its outputs need."""

    def __init__(self, graph: GeGraph) -> None:
        net = graph.to_networkx()
        self.outputs = [op.name for op in graph.ops if op.type == "NetOutput"]
        needed = set(self.outputs).union(*(nx.ancestors(net, o) for o in self.outputs)) if self.outputs else set()
        self.ops = {op.name: op for op in graph.ops if op.name in needed or not self.outputs}


def _mismatch(x: GeOp, y: GeOp, twins: dict[str, str]) -> str | None:
    if x.type != y.type:
        return f"{x.type} and {y.type}"
    if len(x.inputs) != len(y.inputs):
        return f"{len(x.inputs)} and {len(y.inputs)} inputs"
    for i, (p, q) in enumerate(zip(x.inputs, y.inputs, strict=True)):
        if (None if p is None else (twins.get(p[0]), p[1])) != q:
            return f"input {i}"
    for key in sorted(x.attrs.keys() | y.attrs.keys()):
        if x.attrs.get(key) != y.attrs.get(key):
            return f"attribute {key}"
    if x.type in _INPUTS:
        for p, q in zip(x.outputs, y.outputs, strict=True):
            if str(p) != str(q):
                return f"{p} and {q}"
    return None


def _reference(source: tuple[str, int]) -> str:
    return source[0] if source[1] == 0 else f"{source[0]}:{source[1]}"


def _attribute_text(value: Any) -> str:
    if isinstance(value, GeConstant):
        import hashlib

        numbers = 1
        for size in value.shape:
            numbers *= size
        if numbers > 8:
            return f"{GeTensor('', value.dtype, value.shape)}#{hashlib.sha256(value.data).hexdigest()[:8]}"
        return f"{GeTensor('', value.dtype, value.shape)}({_numbers(value)})"
    return str(value)


def _numbers(value: GeConstant) -> str:
    from quantpass.lowering.ge_constants import constant_tensor

    return ", ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in constant_tensor(value).flatten().tolist())


# -- from torchair's protocol buffers --------------------------------------------------------------------------------


def from_proto(proto: Any, dtype_names: dict[int, str]) -> tuple[GeOp, ...]:
    """The operators of a ``GraphDef`` (of torchair's ``ge_ir_pb2``).

    Args:
        proto: the message.
        dtype_names: names of its ``DataType`` numbers, with ``DT_``.
    """
    return tuple(_op(op, dtype_names) for op in proto.op)


def _op(op: Any, names: dict[int, str]) -> GeOp:
    sources = [_source(text) for text in op.input]
    inputs = tuple(
        (name, index) if name and index >= 0 else None for name, index in sources if name == "" or index >= 0
    )
    after = tuple(name for name, index in sources if name and index < 0)
    attrs = {k: _attribute(v, names) for k, v in op.attr.items() if not k.startswith("_")}
    layouts = {k: attrs.pop(k) for k in ("input_layout_info", "output_layout_info") if k in attrs}
    del layouts  # repeats what is in the descriptions
    return GeOp(
        op.name,
        op.type,
        inputs,
        attrs,
        tuple(_tensor(d, names) for d in op.input_desc),
        () if op.type == "NetOutput" else tuple(_tensor(d, names, op.type) for d in op.output_desc),
        after,
    )


def _source(text: str) -> tuple[str, int]:
    name, _, index = text.rpartition(":")
    return (name, int(index)) if name else ("", 0)


def _tensor(desc: Any, names: dict[int, str], op_type: str = "") -> GeTensor:
    stored = desc.attr["format_for_int"].i if "format_for_int" in desc.attr else 2
    shape: tuple[int, ...] | None = tuple(desc.shape.dim) or None
    if "origin_shape" in desc.attr:
        shape = tuple(desc.attr["origin_shape"].list.i)
    elif "_meta" in desc.attr:
        shape = _shape_of_meta(desc.attr["_meta"].s.decode())
    fed = "_is_unfed_optional" not in desc.attr
    # torchair writes FLOAT for a dtype that it does not know; it notes the ones that it knows.
    known = op_type in (*_INPUTS, "Const") or "_meta" in desc.attr
    return GeTensor(desc.name, _dtype(desc.dtype, names) if known else "", shape, _FORMATS.get(stored, "ND"), fed)


def _shape_of_meta(text: str) -> tuple[int, ...] | None:
    """The sizes in torchair's note ``Tensor(dtype=torch.float16, shape=torch.Size([4, 96])``."""
    _, found, rest = text.partition("torch.Size([")
    inner = rest.partition("]")[0]
    sizes = [s.strip() for s in inner.split(",") if s.strip()]
    return tuple(map(int, sizes)) if found and all(s.isdigit() for s in sizes) else None


def _dtype(number: int, names: dict[int, str]) -> str:
    name = names.get(number, str(number)).removeprefix("DT_")
    return "" if name == "UNDEFINED" else name


def _attribute(value: Any, names: dict[int, str]) -> Any:
    kind = value.WhichOneof("value")
    if kind == "s":
        return value.s.decode(errors="replace")
    if kind == "t":
        t = value.t
        return GeConstant(_dtype(t.desc.dtype, names), tuple(t.desc.shape.dim), bytes(t.data))
    if kind == "list":
        return list(_listed(value.list))
    if kind in ("list_list_int", "list_list_float"):
        inner = getattr(value, kind)
        return [
            list(next(iter(x.ListFields()))[1]) if x.ListFields() else [] for x in next(iter(inner.ListFields()))[1]
        ]
    return getattr(value, kind) if kind in ("i", "f", "b", "dt") else str(value)


def _listed(values: Any) -> Iterator[Any]:
    for item in ("s", "i", "f", "b", "dt"):
        for x in getattr(values, item):
            yield x.decode(errors="replace") if isinstance(x, bytes) else x
