"""Terms follow their value through views, or say that they can't: always compared with the numbers themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpass.graph.expr import Const, Ref
from quantpass.graph.instructions import Move
from quantpass.patterns.terms import Term, term_of
from tests.unit.graphs import Traced, evaluate, node_of

VALUE = (2, 3, 4)
"""Shape of the value that the terms here belong to."""

SHAPES = {
    "scalar": [(1, 1, 1)],
    "columns": [(1, 1, 4)],
    "rows": [(1, 3, 1), (2, 1, 1), (2, 3, 1)],
    "other": [(1, 3, 4), (2, 3, 4), (2, 1, 4)],
}
EVERY = [(kind, shape) for kind, shapes in SHAPES.items() for shape in shapes]


def term(shape, known=True):
    """A term of distinct numbers, and the values to evaluate it with."""
    tensor = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
    if known:
        return Term(Const(tensor), shape), {}
    node = node_of(tensor)
    return Term(Ref(node), shape), {node: tensor}


def full(t, values, shape):
    """The term's number for each element of its value."""
    return evaluate(t.expr, values).reshape(t.shape).expand(shape)


@pytest.mark.parametrize(("kind", "shape"), EVERY)
def test_kind(kind, shape):
    assert term(shape)[0].kind == kind


def test_kind_of_a_term_of_a_number():
    assert Term(Const(torch.tensor(2.0)), ()).kind == "scalar"


def test_constant():
    assert term((1, 1, 4))[0].constant.tolist() == [[[1, 2, 3, 4]]]
    assert term((1, 1, 4), known=False)[0].constant is None


def test_flat():
    assert term((1, 1, 1))[0].flat().tensor.shape == (1,)
    assert term((1, 1, 4))[0].flat().tensor.tolist() == [1, 2, 3, 4]
    single = Term(Const(torch.tensor(2.0)), (1, 1))
    assert single.flat().tensor.shape == (1,)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("kind", "shape"), EVERY)
def test_per_row(kind, shape, known):
    t, values = term(shape, known)
    rows = t.per_row(VALUE)
    if kind in ("columns", "other"):
        assert rows is None
    elif kind == "scalar":
        assert evaluate(rows, values).tolist() == [1.0]
    else:
        assert torch.equal(evaluate(rows, values), full(t, values, VALUE)[..., 0].reshape(-1))


def test_per_row_of_sizes_that_only_the_run_knows():
    """A full term is a vector as it is; what would have to be repeated is not."""
    t = Traced(lambda a: a + 1, torch.ones(5, 7), symbolic=True)
    m, n = t.result.meta["val"].shape
    assert Term(Ref(t.inputs[0]), (m, 1)).per_row((m, n)) is not None
    assert Term(Ref(t.inputs[0]), (1, m, 1)).per_row((1, m, n)) is not None
    assert Term(Ref(t.inputs[0]), (m, 1, 1)).per_row((m, 3, n)) is None


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("kind", "shape"), EVERY)
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 0, 1)])
def test_permuted(kind, shape, order, known):
    t, values = term(shape, known)
    after = tuple(VALUE[d] for d in order)
    moved = t.moved(Move("permute", None, order), VALUE, after)
    assert torch.equal(full(moved, values, after), full(t, values, VALUE).permute(order))


@pytest.mark.parametrize(("kind", "shape"), EVERY)
@pytest.mark.parametrize("after", [(6, 4), (2, 1, 3, 4), (24,), (2, 12), (3, 2, 4), (8, 3), (2, 3, 2, 2)])
def test_reshaped_or_refused(kind, shape, after):
    t, values = term(shape)
    moved = t.moved(Move("reshape", None), VALUE, after)
    if moved is None:
        return
    assert torch.equal(full(moved, values, after), full(t, values, VALUE).reshape(after))


@pytest.mark.parametrize(
    ("shape", "after", "follows"),
    [
        ((1, 1, 4), (6, 4), True),
        ((1, 1, 4), (24,), False),  # the columns are no dimension of their own any more
        ((2, 3, 1), (6, 4), True),
        ((2, 1, 1), (6, 4), False),  # a factor for each batch would have to be repeated for its rows
        ((1, 3, 1), (6, 4), False),
        ((2, 3, 4), (6, 4), False),
        ((1, 1, 1), (24,), True),
        ((2, 3, 1), (6, 2, 2), False),
    ],
)
def test_what_follows_a_reshape(shape, after, follows):
    assert (term(shape)[0].moved(Move("reshape", None), VALUE, after) is not None) == follows


def test_nothing_but_one_number_follows_into_or_out_of_no_dimensions():
    one = Term(Const(torch.ones(1)), (1,))
    assert one.moved(Move("reshape", None), (1,), ()).shape == ()
    columns = Term(Const(torch.ones(3)), (3,))
    assert columns.moved(Move("reshape", None), (3,), ()) is None


def test_same_keeps_the_term():
    t, _ = term((2, 3, 1))
    assert t.moved(Move("same", None), VALUE, VALUE) is t


@pytest.mark.parametrize(("kind", "shape"), EVERY)
def test_expanded(kind, shape):
    t, values = term(shape)
    after = (5, *VALUE)
    moved = t.moved(Move("expand", None), VALUE, after)
    assert torch.equal(full(moved, values, after), full(t, values, VALUE).expand(after))


# -- reading a term ----------------------------------------------------------------------------------------------------


def read(other, shape=VALUE, known=True):
    traced = Traced(lambda a: a, other, known=int(known))
    return term_of(traced.values, traced.inputs[0], shape)


@pytest.mark.parametrize(
    ("other", "aligned"),
    [
        ((), (1, 1, 1)),
        ((1,), (1, 1, 1)),
        ((4,), (1, 1, 4)),
        ((3, 1), (1, 3, 1)),
        ((2, 3, 4), (2, 3, 4)),
        ((3,), None),  # aligns with no dimension
        ((5, 3, 4), None),  # would enlarge the value
        ((1, 2, 3, 4), None),
        ((2, 1, 2, 3, 4), None),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_a_tensor_that_broadcasts_is_a_term(other, aligned, known):
    tensor = torch.arange(float(torch.Size(other).numel())).reshape(other)
    t = read(tensor, known=known)
    assert (None if t is None else t.shape) == aligned
    if t is not None:
        assert (t.constant is not None) == known


def test_numbers_are_terms_and_truth_is_not():
    values = Traced(lambda a: a, torch.ones(1)).values
    assert term_of(values, 2, VALUE).shape == (1, 1, 1)
    assert term_of(values, 0.5, VALUE).constant == 0.5
    assert term_of(values, True, VALUE) is None
    assert term_of(values, "x", VALUE) is None
    assert term_of(values, None, VALUE) is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_what_is_no_number_is_no_term(dtype):
    assert read(torch.zeros(4).to(dtype), known=False) is None
    assert read(torch.zeros(4).to(torch.int64), known=False) is not None


def test_equal_elements_are_one_number_even_at_full_size():
    t = read(torch.full((2, 3, 4), 7.0))
    assert (t.kind, t.constant.item()) == ("scalar", 7.0)


def test_an_expand_is_looked_through():
    traced = Traced(lambda s: s.expand(2, 3, 4) * 1, torch.ones(2, 1, 1))
    (node,) = traced.calls(torch.ops.aten.expand.default)
    t = term_of(traced.values, node, VALUE)
    assert t.shape == (2, 1, 1) and t.expr.node is traced.inputs[0]


def test_an_expand_that_adds_dimensions_is_taken_as_it_is():
    traced = Traced(lambda s: s.expand(2, 3, 4) * 1, torch.ones(4))
    (node,) = traced.calls(torch.ops.aten.expand.default)
    t = term_of(traced.values, node, VALUE)
    assert t.expr.node is node


@settings(max_examples=60)
@given(st.data())
def test_any_chain_of_views_is_followed_rightly_or_not_at_all(data):
    """Moved through a random chain of views, a term means for each element what it meant before."""
    value = torch.arange(24.0).reshape(VALUE)
    _, shape = data.draw(st.sampled_from(EVERY))
    t, values = term(shape)
    numbers = full(t, values, VALUE)
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["permute", "reshape", "expand"]))
        before = tuple(value.shape)
        if kind == "permute":
            order = tuple(data.draw(st.permutations(range(value.dim()))))
            value, numbers, movement = value.permute(order), numbers.permute(order), Move(kind, None, order)
        elif kind == "reshape":
            after = data.draw(st.sampled_from([(6, 4), (24,), (2, 3, 4), (4, 6), (1, 24), (2, 3, 2, 2), (6, 4, 1)]))
            if value.numel() != 24:
                return
            value, numbers, movement = value.reshape(after), numbers.reshape(after), Move(kind, None)
        else:
            after = (data.draw(st.integers(1, 2)), *before)
            value, numbers, movement = value.expand(after), numbers.expand(after), Move(kind, None)
        t = t.moved(movement, before, tuple(value.shape))
        if t is None:
            return
        assert torch.equal(full(t, values, value.shape), numbers)
