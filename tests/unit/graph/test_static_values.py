"""What is known when compiling: which nodes, their values, and their values in float64."""

import operator

import pytest
import torch
from torch.fx import Graph

from quantpass.graph import static_values
from quantpass.graph.expr import Const, Ref
from quantpass.graph.static_values import StaticValues, as_dtype
from tests.unit.graphs import Traced

aten = torch.ops.aten
W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def graph_of(*calls, known=(0,)):
    """A graph of two inputs and calls on earlier nodes (given by number); its values, and the nodes."""
    graph = Graph()
    nodes = [graph.placeholder("w"), graph.placeholder("x")]
    for n in nodes:
        n.meta["val"] = W
    for target, *args in calls:
        args = [nodes[a] if isinstance(a, int) and not isinstance(a, bool) else a for a in args]
        make = graph.call_method if isinstance(target, str) else graph.call_function
        nodes.append(make(target, tuple(args)))
        nodes[-1].meta["val"] = W
    return StaticValues(graph, {nodes[i]: W.clone() for i in known}), nodes


# -- which nodes are static --------------------------------------------------------------------------------------------


def test_static_is_what_depends_on_known_tensors_only():
    values, (w, x, both, alone, nothing) = graph_of(
        (aten.add.Tensor, 0, 1), (aten.neg.default, 0), (aten.ones.default, [2])
    )
    assert [values.is_static(n) for n in (w, x, both, alone, nothing)] == [True, False, False, True, True]


@pytest.mark.parametrize(
    "call",
    [
        (aten.rand_like.default, 0),  # another value each time
        (aten.neg_.default, 0),
        ("neg", 0),
        (torch.ops.higher_order.cond, 0),
        (print, 0),
    ],
)
def test_what_is_not_evaluated(call):
    values, nodes = graph_of(call)
    assert not values.is_static(nodes[-1])


def test_tuples_are_taken_apart():
    values, nodes = graph_of((aten.unbind.int, 0), (operator.getitem, 2, 0))
    nodes[3].args = (nodes[2], 1)
    assert values.is_static(nodes[3])
    assert values.value(nodes[3]).tolist() == [3, 4]


def test_long_chains():
    values, nodes = graph_of(*((aten.neg.default, i) for i in [0, *range(2, 2002)]))
    assert values.is_static(nodes[-1]) and torch.equal(values.value(nodes[-1]), -W)
    values, nodes = graph_of(*((aten.neg.default, i) for i in [1, *range(2, 2002)]))
    assert not values.is_static(nodes[-1])


# -- writes ------------------------------------------------------------------------------------------------------------


def test_what_is_written_to_is_not_known_nor_any_view_of_it():
    values, (w, x, view, _write, other) = graph_of(
        (aten.view.default, 0, [4]), (aten.neg_.default, 2), (aten.neg.default, 0)
    )
    assert values.mutated >= {w, view} and x not in values.mutated
    assert not values.is_static(w) and not values.is_static(other)


def test_a_copy_is_not_the_tensor():
    values, (w, _, copy, _write) = graph_of((aten.clone.default, 0), (aten.neg_.default, 2))
    assert values.is_static(w) and not values.is_static(copy)


def test_a_cast_or_reshape_may_be_the_tensor():
    for target in (aten.reshape.default, aten.contiguous.default, aten._unsafe_view.default):
        values, (w, *_) = graph_of((target, 0), (aten.neg_.default, 2))
        assert w in values.mutated


def test_a_part_of_several_views_is_a_view():
    values, nodes = graph_of((aten.unbind.int, 0), (operator.getitem, 2, 0))
    nodes[3].args = (nodes[2], 1)
    nodes[3].graph.call_function(aten.neg_.default, (nodes[3],))
    values = StaticValues(nodes[0].graph, {nodes[0]: W})
    assert not values.is_static(nodes[0])
    # but the result of another function is no view
    graph = Graph()
    w = graph.placeholder("w")
    made = graph.call_function(print, (w,))
    graph.call_function(aten.neg_.default, (made,))
    assert StaticValues(graph, {w: W}).is_static(w)


@pytest.mark.parametrize(
    ("call", "shares"),
    [((aten.dropout.default, 0, 0.5, False), True), ((aten._unsafe_view.default, 0, [4]), True),
     ((aten.reshape.default, 0, [4]), True), ((aten.clone.default, 0), False)],
)  # fmt: skip
def test_what_may_be_its_input(call, shares):
    values, (w, *_) = graph_of(call, (aten.neg_.default, 2))
    assert (w in values.mutated) == shares


def test_the_same_memory_under_another_name():
    graph = Graph()
    a, b, c = (graph.placeholder(n) for n in "abc")
    view = graph.call_function(aten.view.default, (b, [4]))
    graph.call_function(aten.neg_.default, (a,))
    shared = torch.ones(4)
    values = StaticValues(graph, {a: shared, b: shared.view(2, 2), c: torch.ones(4)})
    assert not values.is_static(a) and not values.is_static(b) and not values.is_static(view)
    assert values.is_static(c)


def test_tensors_without_memory_share_none():
    graph = Graph()
    a, b = (graph.placeholder(n) for n in "ab")
    graph.call_function(aten.neg_.default, (a,))
    values = StaticValues(graph, {a: torch.empty(0), b: torch.empty(0)})
    assert values.is_static(b) and not values.is_static(a)
    sparse = [torch.ones(2).to_sparse() for _ in range(2)]
    values = StaticValues(graph, {a: sparse[0], b: sparse[1]})
    assert values.is_static(b)


def test_methods_may_write_to_anything():
    values, (w, *_) = graph_of(("frobnicate", 0))
    assert w in values.mutated


# -- values ------------------------------------------------------------------------------------------------------------


def test_values_are_computed_once_where_small(monkeypatch):
    values, nodes = graph_of((aten.neg.default, 0))
    assert torch.equal(values.value(nodes[2]), -W)
    assert values.value(nodes[2]) is values.value(nodes[2])
    monkeypatch.setattr(static_values, "SMALL", 4)
    values, nodes = graph_of((aten.neg.default, 0))
    assert values.value(nodes[2]) is values.value(nodes[2])
    monkeypatch.setattr(static_values, "SMALL", 3)
    values, nodes = graph_of((aten.neg.default, 0))
    assert values.value(nodes[2]) is not values.value(nodes[2])


def test_a_diamond_is_evaluated_rightly():
    values, nodes = graph_of(
        (aten.neg.default, 0), (aten.mul.Tensor, 0, 2), (aten.add.Tensor, 2, 3), (aten.sub.Tensor, 4, 0)
    )
    assert torch.equal(values.value(nodes[5]), -W - W * W - W)


def test_leaves_that_were_read_are_noted():
    values, nodes = graph_of((aten.neg.default, 0), known=(0, 1))
    values.value(nodes[2])
    assert values.read_leaves == {nodes[0]}


def test_subclasses_are_read_as_plain_tensors():
    class Own(torch.Tensor):
        pass

    graph = Graph()
    a = graph.placeholder("a")
    values = StaticValues(graph, {a: torch.ones(2).as_subclass(Own).requires_grad_()})
    assert type(values.value(a)) is torch.Tensor and not values.value(a).requires_grad


def test_devices_are_all_the_cpu():
    graph = Graph()
    node = graph.call_function(aten.full.default, ([2], 3.0), {"device": torch.device("meta")})
    assert StaticValues(graph, {}).value(node).tolist() == [3, 3]


def test_expressions():
    values, (w, x, computed) = graph_of((aten.neg.default, 0))
    assert values.expr(w).origin is w and values.expr(w).label == "w"
    assert isinstance(values.expr(computed), Const) and values.expr(computed).origin is None
    assert isinstance(values.expr(x), Ref)


# -- one number --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "number"),
    [
        (lambda x: torch.zeros_like(x), 0),
        (lambda x: x.new_zeros([3]), 0),
        (lambda x: torch.ones_like(x), 1),
        (lambda x: x.new_ones([3]), 1),
        (lambda x: torch.full_like(x, 2.5), 2.5),
        (lambda x: x.new_full([3], 2.5), 2.5),
        (lambda x: torch.full_like(x, 2.5).to(torch.int8), 2),
        (lambda x: torch.full_like(x, 2.5, dtype=torch.int32), 2),
        (lambda x: torch.full_like(x, 300.0).t().reshape(4).to(torch.uint8), 44),
        (lambda x: torch.full_like(x, 0.1).half(), torch.tensor(0.1).half().item()),
        (lambda x: torch.full_like(x, 1, dtype=torch.bool), None),
        (lambda x: torch.full_like(x, 1.0).view(torch.int32), None),  # its bits
        (lambda x: x * 0, None),
        (lambda x: x.view(4), None),
    ],
)
def test_uniform(function, number):
    t = Traced(function, torch.rand(2, 2))
    assert t.values.uniform(t.result) == number
    assert t.values.uniform(t.result) == number  # the same the second time


def test_a_fill_that_is_computed():
    t = Traced(lambda x, s: torch.full_like(x, 2.0) * s, torch.rand(2, 2), torch.rand(1))
    (node,) = t.calls(aten.full_like.default)
    node.args = (node.args[0], t.inputs[1])
    assert t.values.uniform(node) is None


@pytest.mark.parametrize(("tensor", "number"), [
    (torch.full((2, 2), 7.0), 7.0), (torch.tensor(3), 3), (torch.tensor([1.0, 2.0]), None), (torch.empty(0), None),
    (torch.tensor(True), None), (torch.full((2,), float("nan")), None),
])  # fmt: skip
def test_uniform_tensors(tensor, number):
    t = Traced(lambda w: w.clone(), tensor, known=1)
    assert t.values.uniform(t.inputs[0]) == number
    assert t.values.uniform(t.result) == number


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_numbers_that_are_not_computed_with(dtype):
    t = Traced(lambda w: w.clone(), torch.zeros(4).to(dtype), known=1)
    assert t.values.uniform(t.inputs[0]) is None
    t = Traced(lambda w: w.clone(), torch.zeros(4).to(torch.float16), known=1)
    assert t.values.uniform(t.inputs[0]) == 0


def test_a_part_of_several_tensors():
    t = Traced(lambda w: w.unbind(0)[1], torch.tensor([[1.0, 2.0], [3.0, 3.0]]), known=1)
    assert t.values.uniform(t.result) == 3


def test_large_tensors_are_not_looked_through(monkeypatch):
    t = Traced(lambda w: w.neg(), torch.full((4,), 2.0), known=1)
    monkeypatch.setattr(static_values, "SMALL", 3)
    assert t.values.uniform(t.result) is None
    monkeypatch.setattr(static_values, "SMALL", 4)
    t = Traced(lambda w: w.neg(), torch.full((4,), 2.0), known=1)
    assert t.values.uniform(t.result) == -2


def test_numbers_and_what_is_none():
    values, _ = graph_of()
    assert values.uniform(3) == 3 and values.uniform(0.5) == 0.5
    assert values.uniform(True) is None and values.uniform("x") is None and values.uniform(None) is None


def test_what_is_written_to_holds_no_one_number():
    values, nodes = graph_of((aten.zeros_like.default, 1), (aten.neg_.default, 2), (aten.view.default, 2, [4]))
    assert values.uniform(nodes[2]) is None and values.uniform(nodes[4]) is None


def test_as_dtype():
    assert as_dtype(2.7, torch.int32) == 2
    assert as_dtype(257, torch.bfloat16) == 256


# -- in float64 --------------------------------------------------------------------------------------------------------

CODES = torch.arange(-32, 32, dtype=torch.int8).reshape(8, 8)
SCALE = torch.linspace(0.1, 0.7, 8).half()


def widened(function, *inputs):
    t = Traced(function, *inputs, known=len(inputs))
    return t.values.widened(t.result)


def test_products_of_codes_are_not_rounded():
    exact = CODES.double() * SCALE.double()
    assert torch.equal(widened(lambda c, s: c.half() * s, CODES, SCALE), exact)
    assert not torch.equal((CODES.half() * SCALE).double(), exact)


def test_parameters_are_taken_as_the_graph_computes_them():
    """A scale that the graph rounds is the scale that it uses."""
    found = widened(lambda c, s: c.half() * (s / 3), CODES, SCALE)
    assert torch.equal(found, CODES.double() * (SCALE / 3).double())
    # also where it has the weight's size
    full = torch.rand(8, 8).half()
    found = widened(lambda c, s: c.half() * (s / 3), CODES, full)
    assert torch.equal(found, CODES.double() * (full / 3).double())


def test_codes_are_the_graphs_own():
    """What the graph rounds to integers in its own dtype is not rounded anew in a wider one."""
    x = torch.full((8, 8), 0.49999).half()
    found = widened(lambda x: (x + 1e-5).round() * 3.0, x)
    assert torch.equal(found, ((x + 1e-5).round() * 3.0).double())
    found = widened(lambda x: (x * 1000).to(torch.int8).half() / 3, x / 100)
    assert torch.equal(found, (x / 100 * 1000).to(torch.int8).double() / 3)


def test_replaced_nodes():
    t = Traced(lambda c, s: c.half() * s, CODES, SCALE, known=2)
    found = t.values.widened(t.result, {t.inputs[0]: torch.ones(8, 8)})
    assert torch.equal(found, SCALE.double().expand(8, 8))


def test_bit_casts_stay_in_their_dtype():
    bits = torch.arange(64, dtype=torch.int16).reshape(8, 8)
    found = widened(lambda b: (b.view(torch.bfloat16).view(torch.int16) - 3) * 0.5, bits)
    assert torch.equal(found, (bits.double() - 3) * 0.5)


def test_how_small_a_parameter_is():
    """Less than a sixteenth of the weight's elements: not widened, since the graph uses it as it is."""
    z = torch.arange(1, 5, dtype=torch.int8)
    for columns, is_parameter in ((8, False), (16, False), (20, True)):
        codes = torch.arange(4 * columns, dtype=torch.int8).reshape(4, columns)
        found = widened(lambda c, z: c.half() * (z.half() / 3).repeat(c.shape[1] // 4), codes, z)
        rounded = (z.half() / 3).double() if is_parameter else z.double() / 3
        assert torch.equal(found, codes.double() * rounded.repeat(columns // 4)), columns


def test_operators_that_know_no_float64():
    """They run in float32, or in their own dtype, and their result is widened."""
    with torch.library._scoped_library("quantpass_test", "DEF") as lib:
        lib.define("single(Tensor x) -> Tensor")
        lib.define("half(Tensor x, int times=2) -> Tensor")

        def only(dtype):
            def kernel(x, times=2):
                if x.dtype != dtype:
                    raise RuntimeError(f"{x.dtype} is not {dtype}")
                return x * times

            return kernel

        for name, dtype in (("single", torch.float32), ("half", torch.float16)):
            lib.impl(name, only(dtype), "CPU")
            lib.impl(name, lambda x, times=2: x * times, "Meta")
            op = getattr(torch.ops.quantpass_test, name).default
            t = Traced(lambda c: c.half() * 1.5, CODES, known=1)
            node = t.result
            with t.graph.inserting_after(node):
                doubled = t.graph.call_function(op, (node, 2) if name == "half" else (node,))
            doubled.meta["val"] = node.meta["val"]
            found = t.values.widened(doubled)
            assert found.dtype == torch.float64 and torch.equal(found, CODES.double() * 3)


def test_dtypes_among_the_arguments_are_widened_too():
    found = widened(lambda c, s: torch.ops.aten._to_copy(c, dtype=torch.float16) * s, CODES, SCALE)
    assert found.dtype == torch.float64


def test_several_tensors_at_once():
    found = widened(lambda c, s: torch.cat((c.half() * s).split(4)), CODES, SCALE)
    assert torch.equal(found, CODES.double() * SCALE.double())
    found = widened(lambda c, s: torch.cat(c.split(4)).half() * s, CODES, SCALE)
    assert torch.equal(found, CODES.double() * SCALE.double())
    found = widened(lambda c, s: torch.cat((c & 15, c >> 4)).half() * s, CODES, SCALE)
    assert torch.equal(found, torch.cat((CODES & 15, CODES >> 4)).double() * SCALE.double())
