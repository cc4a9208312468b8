"""What is computed twice on the way to fused operators is found, and nothing that only looks alike."""

import operator

import pytest
import torch
from torch.fx import Graph

from quantpass.graph.merge import duplicates
from quantpass.operators import OPERATORS as _operators  # noqa: F401  (defines the fused operators)

aten = torch.ops.aten


class Twice:
    """``function`` of one input, twice in a graph, each read by a fused operator."""

    def __init__(self, *functions):
        self.graph = Graph()
        self.x, self.y = (self.graph.placeholder(n) for n in "xy")
        self.first, self.second = (f(self) for f in (functions * 2)[:2])
        self.fused = [
            self.graph.call_function(torch.ops.quantpass.pack_int4.default, (n,)) for n in (self.first, self.second)
        ]
        self.graph.output(tuple(self.fused))

    def call(self, target, *args, **kwargs):
        return self.graph.call_function(target, args, kwargs)

    def merged(self, written_to=(), results=()):
        return list(duplicates(self.fused, written_to, results))


@pytest.mark.parametrize(
    "function",
    [
        lambda t: t.call(aten.mul.Tensor, t.x, 2.0),
        lambda t: t.call(aten.amax.default, t.x, [-1], True),
        lambda t: t.call(aten.view.default, t.x, [2, 3]),
        lambda t: t.call(aten._to_copy.default, t.x, dtype=torch.int8),
        lambda t: t.call(aten.sum.dim_IntList, t.x, [0]),
        lambda t: t.call(operator.getitem, t.x, 0),
        lambda t: t.call(torch.ops.aten.clone.default, t.x),
    ],
)
def test_equal_calls_are_found(function):
    t = Twice(function)
    assert t.merged() == [(t.second, t.first)]


def test_with_what_leads_up_to_them_inputs_first():
    t = Twice(lambda t: t.call(aten.neg.default, t.call(aten.mul.Tensor, t.x, 2.0)))
    inner, outer = t.merged()
    assert inner == (t.second.args[0], t.first.args[0])
    assert outer == (t.second, t.first)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda t: t.call(aten.mul.Tensor, t.x, 2.0), lambda t: t.call(aten.mul.Tensor, t.x, 3.0)),
        (lambda t: t.call(aten.mul.Tensor, t.x, 2.0), lambda t: t.call(aten.mul.Tensor, t.y, 2.0)),
        (lambda t: t.call(aten.mul.Tensor, t.x, 2.0), lambda t: t.call(aten.add.Tensor, t.x, 2.0)),
        (lambda t: t.call(aten.mul.Tensor, t.x, 1), lambda t: t.call(aten.mul.Tensor, t.x, 1.0)),
        (lambda t: t.call(aten.mul.Tensor, t.x, True), lambda t: t.call(aten.mul.Tensor, t.x, 1)),
        (lambda t: t.call(aten.amax.default, t.x, [0]), lambda t: t.call(aten.amax.default, t.x, [1])),
        (
            lambda t: t.call(aten._to_copy.default, t.x, dtype=torch.int8),
            lambda t: t.call(aten._to_copy.default, t.x, dtype=torch.uint8),
        ),
        (
            lambda t: t.call(aten.add.Tensor, t.x, t.y, alpha=2),
            lambda t: t.call(aten.add.Tensor, t.x, t.y),
        ),
    ],
)
def test_different_calls_are_not(one, other):
    assert Twice(one, other).merged() == []


@pytest.mark.parametrize(
    "function",
    [
        lambda t: t.call(aten.rand_like.default, t.x),  # another value each time
        lambda t: t.call(aten.bernoulli.p, t.x, 0.5),
        lambda t: t.call(aten.add_.Tensor, t.x, 1.0),  # writes
        lambda t: t.call(aten.mm.default, t.x, t.y),  # the graph's own business
        lambda t: t.call(torch.ops.quantpass.pack_int4.default, t.x),
        lambda t: t.graph.call_method("neg", (t.x,)),
        lambda t: t.call(operator.add, t.x, 1),
    ],
)
def test_what_is_left_alone(function):
    assert Twice(function).merged() == []


def test_elementwise_operators_that_draw_numbers():
    tags = (torch.Tag.pointwise, torch.Tag.nondeterministic_seeded)
    with torch.library._scoped_library("quantpass_merge_test", "DEF") as lib:
        lib.define("noisy(Tensor x) -> Tensor", tags=tags)
        lib.define("quiet(Tensor x) -> Tensor", tags=tags[:1])
        ops = torch.ops.quantpass_merge_test
        assert Twice(lambda t: t.call(ops.noisy.default, t.x)).merged() == []
        assert len(Twice(lambda t: t.call(ops.quiet.default, t.x)).merged()) == 1


def test_results_of_the_graph_stay_tensors_of_their_own():
    t = Twice(lambda t: t.call(aten.mul.Tensor, t.x, 2.0))
    assert t.merged(results={t.second}) == []
    assert t.merged(results={t.first}) == []
    assert t.merged(results={t.x}) == [(t.second, t.first)]


def test_what_reads_or_is_a_tensor_that_changes_is_not_merged():
    t = Twice(lambda t: t.call(aten.mul.Tensor, t.x, 2.0))
    assert t.merged(written_to={t.x}) == []
    assert t.merged(written_to={t.first, t.second}) == []
    assert t.merged(written_to={t.y}) == [(t.second, t.first)]
