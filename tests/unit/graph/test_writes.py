"""What a graph writes to in place, and what may not be moved across a write."""

import operator

import pytest
import torch
from torch.fx import Graph

from quantpass.graph.expr import Call, Const, Ref
from quantpass.graph.writes import Writes, writes_of, written_arguments, written_before

aten = torch.ops.aten


def nodes(*targets_and_args):
    """A graph of two inputs and calls; integers among the arguments stand for earlier nodes."""
    graph = Graph()
    made = [graph.placeholder("x"), graph.placeholder("y")]

    def filled(a):
        return [filled(x) for x in a] if isinstance(a, list) else made[a] if isinstance(a, int) else a

    for target, *args in targets_and_args:
        kwargs = args.pop() if args and isinstance(args[-1], dict) else {}
        kwargs = {k: filled(a) for k, a in kwargs.items()}
        if isinstance(target, str):
            made.append(graph.call_method(target, tuple(filled(a) for a in args), kwargs))
        else:
            made.append(graph.call_function(target, tuple(filled(a) for a in args), kwargs))
    return made


@pytest.mark.parametrize(
    ("call", "written"),
    [
        ((aten.add_.Tensor, 0, 1), [0]),
        ((aten.copy_.default, 1, 0), [1]),
        ((aten.add.Tensor, 0, 1), []),
        ((aten.add.out, 0, 1, {"out": 1}), [1]),  # keyword arguments
        ((aten._foreach_add_.Scalar, [0, 1], 1.0), [0, 1]),  # lists
        ((operator.iadd, 0, 1), [0, 1]),
        ((operator.setitem, 0, 1, 1), [0, 1]),
        ((operator.add, 0, 1), []),
        ((operator.getitem, 0, 1.0), []),
        (("add_", 0, 1), [0, 1]),  # nothing is known of methods
    ],
)
def test_written_arguments(call, written):
    made = nodes(call)
    assert sorted(written_arguments(made[-1])) == sorted(made[i] for i in written)


def test_operators_on_graphs_say_so_in_their_names():
    class Wrapper(torch._ops.HigherOrderOperator):
        def __call__(self, *args):
            return args

    graph = Graph()
    x = graph.placeholder("x")
    writing, plain = (
        graph.call_function(Wrapper(name), (x,)) for name in ("kernel_mutation_test", "kernel_plain_test")
    )
    assert written_arguments(writing) == (x,) and written_arguments(plain) == ()


def test_inputs_write_to_nothing():
    made = nodes((aten.add.Tensor, 0, 1))
    assert written_arguments(made[0]) == ()


def test_writers_in_graph_order():
    made = nodes((aten.add.Tensor, 0, 1), (aten.add_.Tensor, 2, 1), (aten.mul.Tensor, 2, 1), (aten.mul_.Tensor, 2, 1))
    graph = made[0].graph
    assert writes_of(graph, frozenset({made[2]})).writers == (made[3], made[5])
    assert writes_of(graph, frozenset()).writers == ()


def test_a_write_between_an_operand_and_the_result():
    x, y, read, write, output, late = nodes(
        (aten.neg.default, 0), (aten.add_.Tensor, 0, 1), (aten.mul.Tensor, 0, 1), (aten.mul_.Tensor, 0, 1)
    )
    writes = Writes(frozenset({x, write, late}), (write, late))
    value = Call(aten.add.Tensor, (Ref(x), 1.0))
    assert written_before(value, output, writes) is x
    # not before it, not after it, and not of another tensor
    assert written_before(value, read, writes) is None
    assert written_before(value, write, writes) is None
    assert written_before(Call(aten.add.Tensor, (Ref(y), 1.0)), output, writes) is None
    assert written_before(Ref(write), output, writes) is None
    assert written_before(value, output, Writes(frozenset({x}), ())) is None
    assert written_before(value, output, Writes(frozenset(), (write,))) is None
    assert written_before(x, output, writes) is x
    # a weight that is a tensor of the graph is read there too
    assert written_before(Const(torch.ones(1), origin=x), output, writes) is x
    assert written_before(Const(torch.ones(1)), output, writes) is None
