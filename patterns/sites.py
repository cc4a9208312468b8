"""Finding the quantized matmuls of a graph and reading everything around them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch.fx import Graph, Node

from quantpass.basics.boundary import guarded
from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject
from quantpass.basics.symbolic import is_one, same_shape
from quantpass.graph import expr as ex
from quantpass.graph.expr import Expr, Ref
from quantpass.graph.records import Weight
from quantpass.graph.schema import op_name
from quantpass.graph.static_values import StaticValues
from quantpass.patterns.activations import ActivationReader
from quantpass.patterns.affine import Affine, AffineReader, NotAffine
from quantpass.patterns.contractions import Contraction, NoContraction, read_contraction
from quantpass.patterns.derived import Found
from quantpass.patterns.dialect import Dialects
from quantpass.patterns.epilogues import Epilogue, read_epilogue
from quantpass.patterns.evidence import is_evident_activation
from quantpass.patterns.integers import Range
from quantpass.patterns.net import Net
from quantpass.patterns.operands import Operand
from quantpass.patterns.plain_matmuls import is_plain
from quantpass.patterns.reach import Reach
from quantpass.patterns.scheme import scheme
from quantpass.patterns.subgraphs import Body, bodies_of
from quantpass.patterns.unread_matmuls import EXPERTS
from quantpass.patterns.weights import matrix_node, read_weight

_FORMLESS = ("read.weight.along_k", "read.weight.bits", "read.weight.nonlinear")
"""Why a quantized weight may have a value, and no form."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A matmul with a quantized operand, as read.

    Attributes:
        name: module path or node name.
        source: ``file:line`` of the user's code, or empty.
        node: the matmul.
        contraction: its operands; None where the form is not read.
        x: the left operand, ``(..., M, K)``.
        activation: the left operand as affine value, or why it is not one.
        weight: the right operand, or why it could not be read.
        epilogue: what follows.
        text: what was read, in words.
        rejects: why the site can't be fused whatever the target.
        ranges: what the graph guarantees of the integers in the activation's zero point.
        activations: reads how the activation was quantized.
        body: the graph of a higher-order operator that it lies in, or empty.
        own_value: computes the right operand, ``(K, N)``, where that is static and nothing else stands against the site
            than that it is quantized in no form of :class:`Weight`.
    """

    name: str
    source: str
    node: Node
    contraction: Contraction | None
    x: Expr | None
    activation: Affine | NotAffine
    weight: Weight | NotAffine
    epilogue: Epilogue | None
    text: str
    rejects: tuple[Reject, ...] = ()
    ranges: Mapping[Node, Range] = field(default_factory=dict)
    activations: ActivationReader | None = None
    body: str = ""
    own_value: Callable[[], torch.Tensor] | None = field(default=None, repr=False)


def find_sites(
    graph: Graph, values: StaticValues, dialects: Dialects, given: Mapping[Node, NotAffine] | None = None
) -> Iterator[Reading]:
    """Read every matmul of ``graph`` that has a quantized operand, in graph order, bodies of its operators included.

    Args:
        graph: the graph.
        values: its static values.
        dialects: how things are spelled.
        given: what is known of nodes from outside of the graph.
    """
    reader = AffineReader(values, dialects, given)
    net, activations = Net(reader), ActivationReader(reader)
    reach = Reach(graph, values, dialects, given or ())
    for node in filter(reach.concerns, graph.nodes):
        read = partial(_read, reader, net, reach, node)
        for reading in guarded(read, partial(_failed, node), f"reading {node.name}"):
            yield replace(reading, activations=activations) if reading.activations is None else reading


def _read(reader: AffineReader, net: Net, reach: Reach, node: Node) -> tuple[Reading, ...]:
    """The sites of one node: itself, or those of the graphs that it calls."""
    if is_plain(reach, reader, node):
        return ()
    if node.op == "output":
        return tuple(unreadable(returned, reject) for returned, reject in net.returned(node))
    bodies = tuple(bodies_of(node))
    inside = tuple(reading for body in bodies for reading in _sites_of_body(reader, body))
    found = read_contraction(reader.dialects.contractions, node) or net.unread(node, looked_into=bool(bodies))
    reading = None if found is None else _read_site(reader, net, node, found)
    return inside if reading is None else (*inside, reading)


def _failed(node: Node, reject: Reject) -> tuple[Reading, ...]:
    return (unreadable(node, reject),)


def _sites_of_body(reader: AffineReader, body: Body) -> Iterator[Reading]:
    """A body is read like a graph, but left as it is: it may be called several times, with other values."""
    values = StaticValues(body.graph, body.leaves(reader))
    for reading in find_sites(body.graph, values, reader.dialects, body.given(reader)):
        path = f"{body.name}.{reading.body}" if reading.body else body.name
        rejects = reading.rejects or (body.reject(),)
        yield replace(reading, name=f"{body.name}.{reading.name}", rejects=rejects, body=path)


def _read_site(reader: AffineReader, net: Net, node: Node, found: Contraction | NoContraction) -> Reading | None:
    if isinstance(found, NoContraction):
        return _unread_site(net, node, found)
    weight = _weight(reader, found)
    if not _is_quantized(weight) and reader.values.is_static(matrix_node(found.lhs)):
        swapped = found.swapped()
        if swapped is not None:
            on_the_left = _weight(reader, swapped)
            if _is_quantized(on_the_left):
                found, weight = swapped, on_the_left
    if isinstance(weight, NotAffine):
        behind = net.behind(found)
        weight = behind if behind is not None and (not weight.quantized or behind.rule == EXPERTS) else weight
    x, activation = _activation(reader, found)
    if not _is_quantized(weight) and not is_evident_activation(reader, found.lhs, activation):
        return None
    rejects = tuple(_reading_rejects(reader, found, weight))
    own_value = _own_value(reader, found, weight) if len(rejects) == 1 else None
    epilogue = read_epilogue(reader, found) if not rejects or own_value is not None else None
    text = scheme(found, activation, weight, epilogue)
    ranges = _ranges(reader, activation)
    site = provenance(node)
    return Reading(*site, node, found, x, activation, weight, epilogue, text, rejects, ranges, own_value=own_value)


def _own_value(reader: AffineReader, c: Contraction, weight: Weight | NotAffine) -> Callable[[], torch.Tensor] | None:
    """What computes a static weight of regular values that is no ``scale * (codes - zero_point)``; None for others."""
    formless = isinstance(weight, NotAffine) and weight.rule in _FORMLESS
    if not formless or c.weight is not None or not reader.values.is_static(c.rhs) or not _covers_batches(c):
        return None
    operand = Operand(c.rhs if c.matrix else matrix_node(c.rhs), c.rhs_transposed, c.matrix)
    return lambda: operand.kn(reader.values.widened(operand.node))


def _ranges(reader: AffineReader, read: Affine | NotAffine) -> dict[Node, Range]:
    if isinstance(read, NotAffine) or read.zero_point is None:
        return {}
    nodes = [leaf.node for leaf in ex.leaves_of(read.zero_point.expr) if isinstance(leaf, Ref)]
    held = {n: reader.integer_range(n) for n in nodes}
    return {n: r for n, r in held.items() if r is not None}


def _unread_site(net: Net, node: Node, found: NoContraction) -> Reading | None:
    operand = None if found.certain else net.quantized_operand(found)
    if operand is None and not found.certain:
        return None
    reject = refuse(found.rule, found.reason, hint=found.hint)
    if isinstance(operand, Found):
        behind = operand.reason()
        if behind.rule == EXPERTS:
            reject = refuse(EXPERTS, f"{found.reason}; {behind.reason}")
    return unreadable(node, reject)


def unreadable(node: Node, reject: Reject) -> Reading:
    """A site of which nothing is known but why it can't be read."""
    unread = NotAffine("not read")
    return Reading(*provenance(node), node, None, None, unread, unread, None, "not read", (reject,))


def _weight(reader: AffineReader, c: Contraction) -> Weight | NotAffine:
    if c.weight is not None:
        special: Weight | NotAffine = c.weight(reader)
        return special
    return read_weight(reader, c.rhs, transposed=c.rhs_transposed, matrix=c.matrix)


def _activation(reader: AffineReader, c: Contraction) -> tuple[Expr, Affine | NotAffine]:
    x, read = Ref(c.lhs), reader.read(c.lhs)
    if c.lhs_order is None:
        return x, read
    if isinstance(read, Affine):
        read = read.permuted(c.lhs_order) or NotAffine("its scale does not follow the transposition", quantized=True)
    return ex.permute(x, c.lhs_order), read


def _is_quantized(read: Affine | Weight | NotAffine) -> bool:
    return isinstance(read, Affine) or read.quantized


def _reading_rejects(reader: AffineReader, c: Contraction, weight: Weight | NotAffine) -> Iterator[Reject]:
    if c.node in reader.values.mutated:
        yield refuse(
            "read.mutated",
            "the graph writes to the result in place",
            want="a result that is not written to",
            hint="make the graph functional first: run_decompositions({}) on an exported program",
        )
    if not isinstance(weight, NotAffine):
        if len(ex.shape_of(weight.codes)) == 2 and not _covers_batches(c):
            yield refuse(
                "read.matmul",
                f"the right operand of {c.form} ({c.rhs.name}) is one matrix for more batches than the left one has",
                want="a left operand with all rows of the result",
                hint="multiply once and expand the result",
            )
        return
    static = reader.values.is_static(c.rhs)
    what = f"the right operand of {c.form} ({c.rhs.name}): {weight.reason}"
    if not weight.quantized:
        hint = "quantize the weight as well" if static or c.rhs.op == "placeholder" else ""
        yield refuse("read.weight.float", what, hint=hint)
        return
    yield refuse(weight.rule, what, hint=weight.hint)


def _covers_batches(c: Contraction) -> bool:
    """True where the left operand has a row for each row of the product, so that one matrix serves them all."""
    if c.matrix is not None:
        return True
    left = [s for s in c.lhs.meta["val"].shape[:-2] if not is_one(s)]
    return same_shape(left, [s for s in c.product_shape[:-2] if not is_one(s)])


def provenance(node: Node) -> tuple[str, str]:
    """Module path and ``file:line`` of a node, as far as its metadata tells them."""
    stack = node.meta.get("nn_module_stack")
    name = _module_path(str(list(stack.values())[-1][0])) if stack else ""
    trace = node.meta.get("stack_trace") or ""
    places = re.findall(r'File "([^"]+)", line (\d+)', trace)
    source = f"{places[-1][0]}:{places[-1][1]}" if places else ""
    return name or node.name, source


def _module_path(of_dynamo: str) -> str:
    """A module's name as ``named_modules`` has it; for a container's item Dynamo of 2.8 writes ``_modules['0']``."""
    path = re.sub(r"^L\['\w+'\]\.?|^self\.", "", of_dynamo)
    return re.sub(r"\b_modules\[(['\"])(.*?)\1\]", r"\2", path)


def matmuls_named(graph: Graph, dialects: Dialects) -> list[str]:
    """The names of all matmuls whose form is read, quantized or not, each once."""
    found = (n for n in graph.nodes if read_contraction(dialects.contractions, n) is not None)
    return list(dict.fromkeys(provenance(n)[0] for n in found))


def matmul_name(node: Node) -> str:
    """The matmul's operator, for reports."""
    return op_name(node)
