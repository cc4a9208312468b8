"""Expressions: constants fold, nodes stay, and both mean the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Graph

from quantpass.graph import expr as ex
from quantpass.graph.expr import Call, Const, Recentred, Ref, Size
from tests.unit.graphs import evaluate, node_of

aten = torch.ops.aten
BINARY = {ex.mul: torch.mul, ex.add: torch.add, ex.sub: torch.sub, ex.div: torch.div}


def const(*values, dtype=torch.float32):
    return Const(torch.tensor(values, dtype=dtype))


def graph_value(tensor):
    """A reference to a node that holds ``tensor`` when the graph runs, and the values to evaluate with."""
    node = node_of(tensor)
    return Ref(node), {node: tensor}


# -- what is known now -------------------------------------------------------------------------------------------------


def test_known_means_constant_or_absent():
    ref, _ = graph_value(torch.ones(2))
    assert ex.known()
    assert ex.known(const(1.0), None)
    assert not ex.known(const(1.0), ref)
    assert not ex.known(ex.neg(ref))


@pytest.mark.parametrize(("value", "dtype"), [(2, torch.int64), (2.0, torch.float64)])
def test_numbers_become_wide_constants(value, dtype):
    e = ex.scalar(value)
    assert (e.tensor.dtype, e.tensor.dim(), e.tensor.item()) == (dtype, 0, value)


def test_apply_computes_now_only_what_holds_no_node():
    ref, values = graph_value(torch.tensor([1.0, 2.0]))
    now = ex.apply(torch.clamp, const(-3.0, 3.0), dtype=torch.float32, shape=(2,), max=const(1.0).tensor)
    assert isinstance(now, Const) and now.tensor.tolist() == [-3.0, 1.0]
    # a node among the keyword arguments is a node too, and constants there are unwrapped
    later = ex.apply(torch.add, const(1.0, 1.0), dtype=torch.float32, shape=[2], other=ref)
    assert isinstance(later, Call) and later.shape == (2,)
    assert evaluate(later, values).tolist() == [2.0, 3.0]
    sum_now = ex.apply(torch.add, const(1.0), dtype=torch.float32, shape=(1,), other=const(2.0))
    assert isinstance(sum_now, Const) and sum_now.tensor.tolist() == [3.0]
    # an expression over a node counts as one, and so do recentred codes
    nested = ex.apply(aten.neg.default, Call(aten.neg.default, (ref,)), dtype=torch.float32, shape=(2,))
    assert isinstance(nested, Call)
    codes = Recentred(ref.node, Call(aten.neg.default, (ref,), {}, torch.int8, (2,)))
    assert isinstance(ex.apply(aten.neg.default, codes, dtype=torch.int8, shape=(2,)), Call)


@pytest.mark.parametrize("value", [0, 1.0, -3])
def test_is_all(value):
    assert ex.is_all(const(float(value), float(value)), value)
    assert not ex.is_all(const(float(value), value + 1.0), value)
    assert not ex.is_all(graph_value(torch.ones(1))[0], value)
    assert ex.is_all(None, value) == (value == 0)


# -- dtype and shape ---------------------------------------------------------------------------------------------------


def test_dtype_and_shape_of_each_kind():
    ref, _ = graph_value(torch.zeros(2, 3, dtype=torch.uint8))
    assert (ex.dtype_of(ref), ex.shape_of(ref)) == (torch.uint8, (2, 3))
    assert (ex.dtype_of(const(1.0)), ex.shape_of(const(1.0))) == (torch.float32, (1,))
    call = Call(aten.neg.default, (ref,), {}, torch.float16, (7,))
    assert (ex.dtype_of(call), ex.shape_of(call)) == (torch.float16, (7,))
    codes = Recentred(ref.node, call)
    assert (ex.dtype_of(codes), ex.shape_of(codes)) == (torch.int8, (2, 3))


def test_leaves_are_found_once_each():
    ref, _ = graph_value(torch.ones(2, 3))
    shared, number = const(1.0), const(2.0)
    size = Size(ref.node, 0, "s0")
    e = Call(aten.add.Tensor, (Call(aten.mul.Tensor, (ref, shared)), [size, 3]), {"other": shared, "more": number})
    leaves = list(ex.leaves_of(e))
    assert {id(leaf) for leaf in leaves} == {id(ref), id(shared), id(size), id(number)}
    assert len(leaves) == 4
    assert list(ex.leaves_of([ref.node, 3])) == [ref.node]


def test_leaves_of_recentred_codes_are_the_codes_and_what_makes_them():
    ref, _ = graph_value(torch.ones(2))
    more = const(1.0)
    leaves = list(ex.leaves_of(Recentred(ref.node, Call(aten.add.Tensor, (ref, more)))))
    assert [leaf.node for leaf in leaves if isinstance(leaf, Ref)] == [ref.node, ref.node]
    assert more in leaves


# -- casts -------------------------------------------------------------------------------------------------------------


def test_cast_to_its_own_dtype_is_nothing():
    ref, _ = graph_value(torch.ones(2))
    assert ex.cast(ref, torch.float32) is ref


def test_cast_of_a_constant_keeps_its_label():
    cast = ex.cast(Const(torch.tensor([1.5]), label="scale"), torch.float64)
    assert cast.tensor.dtype == torch.float64 and cast.label == "scale"


def test_widened_and_narrowed_again_is_the_value_itself():
    ref, _ = graph_value(torch.ones(2, dtype=torch.float16))
    assert ex.cast(ex.cast(ref, torch.float32), torch.float16) is ref


def test_narrowed_and_widened_again_keeps_the_rounding():
    ref, values = graph_value(torch.tensor([1.0001]))
    again = ex.cast(ex.cast(ref, torch.float16), torch.float32)
    assert evaluate(again, values).item() == 1.0 and ex.dtype_of(again) == torch.float32


def test_a_cast_of_another_cast_to_a_third_dtype_stays():
    ref, _ = graph_value(torch.ones(2, dtype=torch.float16))
    twice = ex.cast(ex.cast(ref, torch.float32), torch.bfloat16)
    assert isinstance(twice, Call) and isinstance(twice.args[0], Call)
    assert ex.shape_of(twice) == (2,)


def test_another_operator_that_is_undone_by_no_cast():
    ref, values = graph_value(torch.tensor([1], dtype=torch.int32))
    negated = Call(aten.neg.default, (ref,), {}, torch.int64, (1,))
    assert evaluate(ex.cast(negated, torch.int32), values).tolist() == [-1]


# -- shapes ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_reshape_means_reshape(shape, data):
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    ref, values = graph_value(tensor)
    target = data.draw(st.permutations(shape))
    at = data.draw(st.integers(-1, len(target) - 1))
    target = [-1 if i == at else s for i, s in enumerate(target)]
    e = ex.reshape(ref, target)
    assert torch.equal(evaluate(e, values), tensor.reshape(target))
    assert ex.shape_of(e) == tuple(tensor.reshape(target).shape)
    assert torch.equal(ex.reshape(Const(tensor), target).tensor, tensor.reshape(target))


def test_reshape_to_its_own_shape_is_nothing():
    ref, _ = graph_value(torch.ones(2, 3))
    assert ex.reshape(ref, (2, -1)) is ref
    assert ex.reshape(ref, [2, 3]) is ref


def test_reshape_of_a_reshape_is_one():
    ref, _ = graph_value(torch.ones(2, 6))
    e = ex.reshape(ex.reshape(ref, (3, 4)), (12,))
    assert e.args[0] is ref
    other = Call(aten.neg.default, (ref,), {}, torch.float32, (2, 6))
    assert ex.reshape(other, (12,)).args[0] is other


def test_sizes_known_only_at_run_time_are_never_taken_for_equal():
    ref, _ = graph_value(torch.ones(4, 6))
    size = Size(ref.node, 0, 4)
    e = ex.reshape(ref, (size, 6))
    assert isinstance(e, Call) and ex.shape_of(e) == (4, 6)
    assert ex.shape_of(ex.reshape(ref, (size, 3, -1))) == (4, 3, 2)


def test_sizes_of_a_node():
    node = node_of(torch.ones(2, 3))
    assert ex.sizes_of(node) == [2, 3]


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0)])
def test_permute_means_permute(order):
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    ref, values = graph_value(tensor)
    e = ex.permute(ref, order)
    assert torch.equal(evaluate(e, values), tensor.permute(order))
    assert ex.shape_of(e) == tuple(tensor.permute(order).shape)
    assert torch.equal(ex.permute(Const(tensor, label="w"), order).tensor, tensor.permute(order))
    assert (e is ref) == (order == (0, 1, 2))


def _moved(target, rank, *args):
    """``x`` and a node that permutes it by an operator of ``target``'s kind."""
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(*range(2, 2 + rank), device="meta")
    node = graph.call_function(target, (x, *args))
    node.meta["val"] = target(x.meta["val"], *args)
    return x, node


@pytest.mark.parametrize(
    ("target", "rank", "args", "back"),
    [
        (aten.permute.default, 3, ([2, 0, 1],), (1, 2, 0)),
        (aten.permute.default, 3, ([-1, 0, 1],), (1, 2, 0)),
        (aten.transpose.int, 3, (1, 2), (0, 2, 1)),
        (aten.transpose.int, 3, (-1, 0), (2, 1, 0)),
        (aten.t.default, 2, (), (1, 0)),
    ],
)
def test_a_permutation_put_back_is_the_source_itself(target, rank, args, back):
    x, node = _moved(target, rank, *args)
    undone = ex.permute(Ref(node), back)
    assert isinstance(undone, Ref) and undone.node is x
    if rank == 3:
        other = next(o for o in [(0, 2, 1), (2, 1, 0)] if o != back)
        assert isinstance(ex.permute(Ref(node), other), Call)


@pytest.mark.parametrize(("target", "rank"), [(aten.t.default, 1), (aten.neg.default, 2), (aten.relu.default, 2)])
def test_what_is_no_permutation_is_not_undone(target, rank):
    _, node = _moved(target, rank)
    order = tuple(reversed(range(rank)))
    e = ex.permute(Ref(node), order)
    assert e.node is node if rank == 1 else e.args[0].node is node


def test_a_placeholder_is_not_looked_through():
    node = node_of(torch.ones(2, 3))
    assert isinstance(ex.permute(Ref(node), (1, 0)), Call)


def test_swap_last():
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    ref, values = graph_value(tensor)
    assert torch.equal(evaluate(ex.swap_last(ref), values), tensor.mT)
    assert ex.shape_of(ex.swap_last(ref)) == (2, 4, 3)
    swapped = ex.swap_last(Const(tensor, label="w"))
    assert torch.equal(swapped.tensor, tensor.mT) and swapped.label == "w"


def test_expanded():
    ref, values = graph_value(torch.ones(1))
    assert ex.expanded(ref, (1,)) is ref
    assert evaluate(ex.expanded(ref, [3]), values).tolist() == [1, 1, 1]
    assert ex.shape_of(ex.expanded(ref, [3])) == (3,)


def test_named_is_contiguous_and_labelled():
    turned = Const(torch.arange(6.0).reshape(2, 3).t(), origin=node_of(torch.ones(3, 2)), label="w")
    named = ex.named(turned, "scale")
    assert named.tensor.is_contiguous() and named.origin is None and named.label == "scale"
    assert torch.equal(named.tensor, turned.tensor)


def test_named_leaves_a_tensor_of_the_graph_and_a_node_as_they_are():
    own = Const(torch.ones(2), origin=node_of(torch.ones(2)), label="w")
    ref, _ = graph_value(torch.ones(2))
    assert ex.named(own, "scale") is own
    assert ex.named(ref, "scale") is ref
    assert ex.named(Const(torch.ones(2), label="w"), "scale").label == "scale"


# -- arithmetic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("known", [(True, True), (True, False), (False, True), (False, False)])
def test_arithmetic_means_arithmetic(op, known):
    a, b = torch.tensor([[1.5, 2.0, -3.0]]), torch.tensor([[2.0], [4.0]])
    (ra, va), (rb, vb) = graph_value(a), graph_value(b)
    e = op(Const(a) if known[0] else ra, Const(b) if known[1] else rb)
    torch.testing.assert_close(evaluate(e, va | vb), BINARY[op](a, b))
    assert ex.shape_of(e) == (2, 3) and ex.known(e) == all(known)


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("number_first", [True, False])
def test_a_single_number_goes_in_as_a_number(op, number_first):
    tensor = torch.tensor([1.5, 2.0])
    ref, values = graph_value(tensor)
    number = const(4.0)
    e = op(number, ref) if number_first else op(ref, number)
    expected = BINARY[op](number.tensor, tensor) if number_first else BINARY[op](tensor, number.tensor)
    torch.testing.assert_close(evaluate(e, values), expected)
    if not number_first or op in (ex.mul, ex.add):
        assert e.args == (ref, 4.0)


def test_a_stored_number_stays_the_tensor_it_is():
    ref, _ = graph_value(torch.ones(2))
    own = Const(torch.tensor([4.0]), origin=node_of(torch.ones(1)))
    assert ex.mul(ref, own).args[1] is own


def test_a_number_that_adds_dimensions_stays_a_tensor():
    ref, values = graph_value(torch.tensor(2.0))
    e = ex.mul(ref, const(3.0))
    assert evaluate(e, values).shape == (1,) == ex.shape_of(e)


@pytest.mark.parametrize("op", [ex.mul, ex.div])
def test_one_is_neither_multiplied_nor_divided_by(op):
    ref, _ = graph_value(torch.ones(2))
    assert op(ref, const(1.0)) is ref


@pytest.mark.parametrize("op", [ex.add, ex.sub])
def test_one_is_added_and_subtracted(op):
    ref, values = graph_value(torch.ones(2))
    assert evaluate(op(ref, const(1.0)), values).tolist() == BINARY[op](torch.ones(2), 1.0).tolist()


@pytest.mark.parametrize(
    ("node", "constant", "dtype"),
    [
        (torch.float32, torch.float64, torch.float32),  # float64 never enters the graph
        (torch.float16, torch.float64, torch.float32),  # and float16 is widened
        (torch.bfloat16, torch.int64, torch.float32),
        (torch.int8, torch.int64, torch.int32),  # where no product of codes wraps around
        (torch.int8, torch.float64, torch.int32),  # a whole number beside integers
        (torch.int64, torch.int64, torch.int64),
        (torch.float64, torch.float64, torch.float64),
    ],
)
def test_where_a_node_and_a_constant_meet(node, constant, dtype):
    ref, values = graph_value(torch.tensor([3, -2]).to(node))
    for e in (ex.mul(ref, const(5, 7, dtype=constant)), ex.sub(const(5, 7, dtype=constant), ref)):
        assert ex.dtype_of(e) == dtype
        assert evaluate(e, values).dtype == dtype


def test_a_fraction_beside_integers_makes_floats():
    ref, values = graph_value(torch.tensor([3, -2], dtype=torch.int8))
    e = ex.mul(ref, const(0.5, 2.0, dtype=torch.float64))
    assert ex.dtype_of(e) == torch.float32
    assert evaluate(e, values).tolist() == [1.5, -4.0]


def test_two_nodes_meet_in_the_wider_dtype():
    (a, va), (b, vb) = graph_value(torch.tensor([3], dtype=torch.int8)), graph_value(torch.tensor([0.5]).half())
    e = ex.add(a, b)
    assert ex.dtype_of(e) == torch.float32
    assert evaluate(e, va | vb).tolist() == [3.5]


def test_products_of_codes_do_not_wrap_around():
    (a, va), (b, vb) = (graph_value(torch.tensor([100], dtype=torch.int8)) for _ in range(2))
    assert evaluate(ex.mul(a, b), va | vb).item() == 10000


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float16])
def test_neg(dtype):
    tensor = torch.tensor([0, 1, 100]).to(dtype)
    ref, values = graph_value(tensor)
    expected = [0, -1, -100]
    assert evaluate(ex.neg(ref), values).tolist() == expected
    assert ex.neg(Const(tensor)).tensor.tolist() == expected


def test_minus_the_least_int8():
    ref, values = graph_value(torch.tensor([-128], dtype=torch.int8))
    assert evaluate(ex.neg(ref), values).tolist() == [128]


def test_neg_undoes_itself():
    ref, _ = graph_value(torch.ones(2))
    assert ex.neg(ex.neg(ref)) is ref
    half, _ = graph_value(torch.ones(2).half())
    assert ex.neg(ex.neg(half)) is half


def test_neg_goes_into_a_product_with_a_number():
    ref, values = graph_value(torch.tensor([2.0]))
    e = ex.neg(ex.mul(ref, Const(torch.tensor(3.0))))
    assert e.args == (ref, -3.0)
    assert ex.neg(ex.mul(ref, Const(torch.tensor(-1.0)))) is ref
    other, more = graph_value(torch.tensor([5.0]))
    assert evaluate(ex.neg(ex.mul(ref, other)), values | more).tolist() == [-10.0]
    assert evaluate(ex.neg(ex.add(ref, const(3.0))), values).tolist() == [-5.0]


def test_neg_goes_below_a_reshape():
    ref, values = graph_value(torch.ones(2, 3))
    e = ex.neg(ex.reshape(ex.neg(ref), (6,)))
    assert e.args[0] is ref and ex.shape_of(e) == (6,)
    assert evaluate(ex.neg(ex.reshape(ref, (6,))), values).tolist() == [-1.0] * 6


def test_constants_are_widened():
    assert ex.wide(Const(torch.ones(1))).tensor.dtype == torch.float64
    ref = Ref(node_of(torch.ones(1)))
    assert ex.wide(ref) is ref


def test_whole_numbers():
    assert ex.is_whole(Const(torch.tensor([1.0, -2.0]))) and not ex.is_whole(Const(torch.tensor([1.0, 0.5])))
    assert ex.is_whole(Const(torch.tensor([3]))) and ex.is_whole(Ref(node_of(torch.ones(1).int())))
    assert not ex.is_whole(Ref(node_of(torch.ones(1))))
