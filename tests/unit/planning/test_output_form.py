"""A fused value in the shape of the node that it replaces, with sizes known or only known when it runs."""

from types import SimpleNamespace

import pytest
import torch

from quantpass.graph.expr import Call, Ref, Size
from quantpass.planning.candidates import in_output_form
from tests.unit.graphs import Traced

aten = torch.ops.aten
K, N = 8, 4


def form(x, build, *, symbolic, out_order=None, last_view=False):
    """The value that replaces the result of ``build(x, w)``, from a product of all rows ``(M, N)``."""
    t = Traced(build, x, torch.randn(K, N), symbolic=symbolic)
    node, lhs = t.result, t.inputs[0]
    product_shape = (*lhs.meta["val"].shape[:-1], N)
    contraction = SimpleNamespace(out_order=out_order, lhs_order=None, lhs=lhs, product_shape=product_shape)
    composition = SimpleNamespace(output=node, last_view=node if last_view else None)
    fake = Call(aten.mm.default, (Ref(lhs), Ref(lhs)), {}, torch.float32, (12, N))
    value = in_output_form(fake, SimpleNamespace(contraction=contraction), composition)
    return fake, value, t


def sizes(value):
    return list(value.args[1])


def test_static_sizes_are_written_as_they_are():
    _, value, _ = form(torch.randn(3, 4, K), lambda x, w: x @ w, symbolic=False)
    assert value.target is aten.reshape.default and sizes(value) == [3, 4, N]


def test_a_matrix_stays_as_it_is():
    fake, value, _ = form(torch.randn(12, K), lambda x, w: x @ w, symbolic=False)
    assert value is fake


def test_one_unknown_size_is_what_is_left():
    x = torch.randn(3, 4, K)
    t = Traced(lambda x, w: x @ w, x, torch.randn(K, N), symbolic=True)
    (lhs,) = t.inputs[:1]
    unknown = lhs.meta["val"].shape[0]
    fake = Call(aten.mm.default, (Ref(lhs), Ref(lhs)), {}, torch.float32, (12, N))
    output = SimpleNamespace(meta={"val": SimpleNamespace(shape=(unknown, 4, N))})
    contraction = SimpleNamespace(out_order=None, lhs_order=None, lhs=lhs, product_shape=(unknown, 4, N))
    value = in_output_form(
        fake, SimpleNamespace(contraction=contraction), SimpleNamespace(output=output, last_view=None)
    )
    assert sizes(value) == [-1, 4, N]


def test_several_unknown_sizes_are_those_of_the_activation():
    _, value, t = form(torch.randn(3, 4, K), lambda x, w: x @ w, symbolic=True)
    first, second, last = sizes(value)
    assert [(s.node, s.dim) for s in (first, second)] == [(t.inputs[0], 0), (t.inputs[0], 1)]
    assert all(isinstance(s, Size) for s in (first, second)) and last == N


@pytest.mark.parametrize("symbolic", [False, True])
def test_a_turned_product_is_turned_at_the_end(symbolic):
    _, value, _ = form(
        torch.randn(3, 4, K), lambda x, w: (x @ w).transpose(1, 2), symbolic=symbolic, out_order=(0, 2, 1)
    )
    assert value.target is aten.permute.default and list(value.args[1]) == [0, 2, 1]
    inner = value.args[0]
    assert inner.target is aten.reshape.default and inner.args[1][-1] == N
