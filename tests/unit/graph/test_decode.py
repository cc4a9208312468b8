"""What each operator does to the elements of its input, compared with what it does to numbers."""

import sys

import pytest
import torch

from quantpass.graph.decode import decode
from quantpass.graph.instructions import Add, Cast, Clamp, Move, Multiply, Part, Round, ways
from tests.unit.graphs import Traced

aten = torch.ops.aten

PERMUTATIONS = {
    "t": (lambda x: aten.t(x), (3, 4)),
    "numpy_T": (lambda x: aten.numpy_T(x), (2, 3, 4)),
    "mT": (lambda x: aten.mT(x), (2, 3, 4)),
    "mT of a matrix": (lambda x: aten.mT(x), (3, 4)),
    "transpose": (lambda x: aten.transpose(x, 0, 2), (2, 3, 4)),
    "transpose from the end": (lambda x: aten.transpose(x, -1, 0), (2, 3, 4)),
    "swapaxes": (lambda x: aten.swapaxes(x, 0, 1), (2, 3, 4)),
    "permute": (lambda x: aten.permute(x, [2, 0, 1]), (2, 3, 4)),
    "permute from the end": (lambda x: aten.permute(x, [-1, -3, -2]), (2, 3, 4)),
}
RESHAPES = {
    "view": lambda x: aten.view(x, [6, 4]),
    "unsqueeze": lambda x: aten.unsqueeze(x, 1),
    "squeeze": lambda x: aten.squeeze(x),
    "squeeze one": lambda x: aten.squeeze(x, 0),
    "squeeze several": lambda x: aten.squeeze(x, [0]),
    "unsafe view": lambda x: aten._unsafe_view(x, [24]),
    "view copy": lambda x: aten.view_copy(x, [24]),
}
COPIES = {
    "alias": lambda x: aten.alias(x),
    "detach": lambda x: aten.detach(x),
    "clone": lambda x: aten.clone(x),
    "lift": lambda x: aten.lift_fresh_copy(x),
    "slice of all": lambda x: aten.slice(x, 1, 0, sys.maxsize),
    "slice without bounds": lambda x: aten.slice(x),
}


def traced_one(function, *inputs, **options):
    """The movement of the node that ``function`` is, where tracing keeps it whole."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = inputs[0]
    node = function(_Maker(graph, x))
    node.meta["val"] = function(inputs[0])
    return decode(node), node.meta["val"], x


class _Maker:
    """Stands for ``x`` in calls of ``torch.ops.aten``: makes the node instead of the tensor."""

    def __init__(self, graph, node):
        self.graph, self.node = graph, node

    def __torch_function__(self, function, types, args=(), kwargs=None):
        packet_args = tuple(self.node if a is self else a for a in args)
        overload = function
        if isinstance(function, torch._ops.OpOverloadPacket):
            real = [a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in packet_args]
            overload = _overload_of(function, real)
        return self.graph.call_function(overload, packet_args, kwargs or {})


def _overload_of(packet, args):
    for name in packet.overloads():
        overload = getattr(packet, name)
        try:
            overload(*args)
        except (RuntimeError, TypeError):
            continue
        return overload
    raise AssertionError(packet)


@pytest.mark.parametrize("name", PERMUTATIONS)
def test_permutations(name):
    function, shape = PERMUTATIONS[name]
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    movement, result, source = traced_one(function, x)
    assert movement.kind == "permute" and movement.source is source
    assert torch.equal(x.permute(movement.order), result)


@pytest.mark.parametrize("name", RESHAPES)
def test_reshapes_keep_the_order(name):
    x = torch.arange(24.0).reshape(1, 6, 4)
    movement, result, source = traced_one(RESHAPES[name], x)
    assert (movement.kind, movement.source) == ("reshape", source)
    assert torch.equal(result.flatten(), x.flatten())


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_the_same(name):
    movement, _, source = traced_one(COPIES[name], torch.ones(2, 3))
    assert movement == Move("same", source)


@pytest.mark.parametrize("bounds", [(1, sys.maxsize), (0, 2), (None, None, 2)])
def test_a_slice_of_some_is_not_all(bounds):
    movement, _, source = traced_one(lambda x: aten.slice(x, 1, *bounds), torch.ones(2, 3))
    assert movement == Part(source)


def test_nothing_to_permute():
    movement, _, source = traced_one(lambda x: aten.transpose(x, 0, -1), torch.tensor(3.0))
    assert movement == Move("permute", source)


def test_expand():
    movement, _, source = traced_one(lambda x: aten.expand(x, [2, 3]), torch.ones(1, 3))
    assert movement == Move("expand", source, sizes=(2, 3))


@pytest.mark.parametrize(
    ("p", "train", "moves"), [(0.5, False, True), (0.0, True, True), (0.0, False, True), (0.5, True, False)]
)
def test_dropout_only_where_it_drops_nothing(p, train, moves):
    movement, _, source = traced_one(lambda x: aten.dropout(x, p, train), torch.ones(2, 3))
    assert movement == (Move("same", source) if moves else None)


def test_arithmetic_moves_nothing():
    t = Traced(lambda x: x + 1, torch.ones(2))
    assert not isinstance(decode(t.result), Move) and decode(t.inputs[0]) is None


def test_a_view_of_a_number_is_no_movement_of_a_node():
    graph = torch.fx.Graph()
    node = graph.call_function(aten.clone.default, (3.0,))
    assert decode(node) is None


# -- arithmetic --------------------------------------------------------------------------------------------------------


def applied(instruction, values):
    """What an instruction says that its operator computes."""
    number = [values.get(a, a) for a in vars_of(instruction)]
    match instruction:
        case Multiply(inverted=inverted):
            return number[0] / number[1] if inverted else number[0] * number[1]
        case Add(multiple=multiple):
            return number[0] + multiple * number[1]
        case Clamp():
            return torch.clamp(*number[:3])
        case Cast(dtype=dtype):
            return number[0].to(dtype)


def vars_of(instruction):
    return [getattr(instruction, name) for name in instruction.__slots__]


@pytest.mark.parametrize(
    ("function", "number_of_ways"),
    [
        (lambda a, b: a * b, 2),
        (lambda a, b: a / b, 1),
        (lambda a, b: a + b, 2),
        (lambda a, b: a - b, 1),
        (lambda a, b: torch.add(a, b, alpha=3), 1),
        (lambda a, b: torch.sub(a, b, alpha=-1), 2),
        (lambda a, b: torch.maximum(a, b), 2),
        (lambda a, b: torch.minimum(a, b), 2),
        (lambda a, b: torch.clamp(a, b), 1),
        (lambda a, b: torch.clamp(a, max=b), 1),
        (lambda a, b: aten.clamp_min.Tensor(a, b), 1),
        (lambda a, b: a.to(torch.int32), 1),
        (lambda a, b: a.relu(), 1),
    ],
)
def test_every_way_to_read_an_operator_computes_the_same(function, number_of_ways):
    a, b = torch.randn(2, 3) * 3, torch.randn(2, 3) * 3
    t = Traced(function, a, b)
    found = ways(decode(t.result))
    assert len(found) == number_of_ways
    for way in found:
        assert torch.equal(applied(way, t.run(a, b)), function(a, b))


def test_arguments_that_are_not_understood():
    t = Traced(lambda a, b: torch.add(a, b, alpha=3), torch.ones(2), torch.ones(2))
    t.result.kwargs = {"alpha": t.inputs[0]}
    assert decode(t.result) is None
    t = Traced(lambda a: a.half(), torch.ones(2))
    assert decode(t.result) == Cast(t.inputs[0], torch.half)
    t.result.kwargs = {**t.result.kwargs, "layout": torch.sparse_coo}
    assert decode(t.result) is None


@pytest.mark.parametrize(
    ("function", "to"),
    [(torch.round, "nearest"), (torch.floor, "down"), (torch.ceil, "up"), (torch.trunc, "zero")],
)
def test_roundings(function, to):
    t = Traced(function, torch.ones(2))
    assert decode(t.result) == Round(t.inputs[0], to)


def test_parts():
    t = Traced(lambda a: a[1], torch.ones(2, 3))
    assert decode(t.result) == Part(t.inputs[0])


def test_each_node_is_decoded_once(monkeypatch):
    asked = []
    monkeypatch.setattr("quantpass.graph.decode.decode", lambda n: asked.append(n))
    t = Traced(lambda a: a + 1, torch.ones(2))
    t.values.decode(t.result)
    t.values.decode(t.result)
    assert asked == [t.result]
