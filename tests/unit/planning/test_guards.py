"""What has to be known of a value before it is narrowed, divided or rounded."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantpass.graph import expr as ex
from quantpass.graph.expr import Call, Const, Recentred, Ref
from quantpass.planning.guards import all_finite, held_dtype, lossless, magnitude, relative_change, same_range
from tests.unit.graphs import evaluate, node_of

aten = torch.ops.aten
INF, NAN = math.inf, math.nan


def ref(dtype, *shape):
    return Ref(node_of(torch.zeros(shape or (2,), dtype=dtype)))


def const(*values, dtype=torch.float32):
    return Const(torch.tensor(values, dtype=dtype))


# -- magnitudes --------------------------------------------------------------------------------------------------------


def test_of_numbers_and_constants():
    assert magnitude(-3, {}) == 3.0 == magnitude(3.0, {})
    assert magnitude(const(1.0, -5.0, 4.0), {}) == 5.0
    assert magnitude(const(), {}) == 0.0
    assert magnitude(const(1.0, NAN), {}) == INF == magnitude(const(-INF), {})


def test_of_what_the_run_brings():
    assert magnitude(ref(torch.int8), {}) == 128 and magnitude(ref(torch.uint8), {}) == 255
    for dtype in (torch.float32, torch.bool, torch.complex64):
        assert magnitude(ref(dtype), {}) == INF
    node = ref(torch.int32)
    assert magnitude(node, {}) == 2**31
    assert magnitude(node, {node.node: (-7, 3)}) == 7 == magnitude(node, {node.node: (-3, 7)})
    assert magnitude(Recentred(node.node, Call(aten.neg.default, (node,))), {}) == 128
    assert magnitude(None, {}) == INF


def test_of_calls():
    codes, wide = ref(torch.int8, 4, 6), ref(torch.float32, 4, 6)
    assert magnitude(ex.neg(ex.reshape(codes, (24,))), {}) == 128
    assert (
        magnitude(ex.add(codes, ref(torch.uint8, 4, 6)), {})
        == 383
        == magnitude(ex.sub(codes, ref(torch.uint8, 4, 6)), {})
    )
    assert magnitude(ex.mul(codes, const(3.0, dtype=torch.float64)), {}) == 384
    assert (
        magnitude(Call(aten.mul.Tensor, (wide, const(0.0))), {})
        == 0
        == magnitude(Call(aten.mul.Tensor, (const(0.0), wide)), {})
    )
    total = Call(aten.sum.dim_IntList, (codes, [1]), {}, torch.int32, (4,))
    assert magnitude(total, {}) == 6 * 128
    assert magnitude(Call(aten.sum.dim_IntList, (codes, [0]), {}, torch.int32, (6,)), {}) == 4 * 128
    assert magnitude(Call(aten.exp.default, (codes,)), {}) == INF


def test_of_casts():
    assert magnitude(ex.cast(ref(torch.int8), torch.int32), {}) == 128
    assert magnitude(ex.cast(ref(torch.int8), torch.float32), {}) == 128
    assert magnitude(ex.cast(ref(torch.uint8), torch.int8), {}) == INF  # may wrap around
    assert magnitude(Call(aten._to_copy.default, (const(127.0),), {}, torch.int8, (1,)), {}) == 127
    assert magnitude(ex.cast(ref(torch.float32), torch.int32), {}) == INF


@given(st.lists(st.sampled_from(["neg", "add", "mul", "sum", "cast", "reshape"]), max_size=5))
def test_no_value_exceeds_its_magnitude(names):
    codes = torch.arange(-128, 128, dtype=torch.int32).to(torch.int8).reshape(16, 16)
    e, values = Ref(node_of(codes)), None
    values = {e.node: codes}
    for name in names:
        if name == "neg":
            e = ex.neg(e)
        elif name == "add":
            e = ex.add(e, const(*range(ex.shape_of(e)[-1]), dtype=torch.int64))
        elif name == "mul":
            e = ex.mul(e, const(-3.0, dtype=torch.float64))
        elif name == "sum" and len(ex.shape_of(e)) == 2:
            e = Call(aten.sum.dim_IntList, (e, [0]), {"dtype": torch.int32}, torch.int32, ex.shape_of(e)[1:])
        elif name == "cast":
            e = ex.cast(e, torch.int32)
        elif name == "reshape":
            e = ex.reshape(e, (*ex.shape_of(e)[::-1],))
    assert evaluate(e, values).double().abs().max() <= magnitude(e, {})


# -- dtypes ------------------------------------------------------------------------------------------------------------

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_lossless_between_floats(source, target):
    a, b = torch.finfo(source), torch.finfo(target)
    assert lossless(source, target) == (a.max <= b.max and a.eps >= b.eps and a.tiny >= b.tiny)
    # no overflow and no flush to zero
    assert same_range(source, target) == (a.max <= 2 * b.max and a.tiny >= b.tiny)


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", [*FLOATS, *INTEGERS])
def test_lossless_from_integers(source, target):
    info = torch.iinfo(source)
    if target.is_floating_point:
        # the largest odd number has to be one of the target's
        expected = all(float(torch.tensor(n).to(target)) == n for n in (info.min + 1, info.max, info.max - 1))
    else:
        expected = torch.iinfo(target).min <= info.min and info.max <= torch.iinfo(target).max
    assert lossless(source, target) == expected
    assert not same_range(source, torch.float32)


def test_held_dtype_looks_through_what_only_widens():
    half = ref(torch.float16)
    assert held_dtype(ex.cast(half, torch.float32)) == torch.float16
    assert held_dtype(ex.neg(ex.reshape(ex.cast(half, torch.float32), (2, 1)))) == torch.float16
    assert held_dtype(ex.cast(ref(torch.float32), torch.float16)) == torch.float16
    assert held_dtype(ex.mul(half, const(2.0))) == torch.float32
    assert held_dtype(half) == torch.float16


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_all_finite():
    assert all_finite(None) and all_finite(const(1.0, -2.0))
    assert not all_finite(const(1.0, INF)) and not all_finite(const(NAN))
    assert not all_finite(ref(torch.float32)) and not all_finite(ref(torch.int8))


def test_relative_change():
    wide = torch.tensor([1.0, 0.0, -2.0])
    assert relative_change(wide, wide) == 0.0
    assert relative_change(wide, torch.tensor([1.0, 0.0, -2.5])) == 0.25
    assert relative_change(wide, torch.tensor([1.0, 1e-9, -2.0])) == INF
    assert relative_change(torch.tensor([1e-9]), torch.tensor([0.0])) == 1.0
    assert relative_change(wide[:0], wide[:0]) == 0.0
    for bad in (INF, NAN):
        assert relative_change(torch.tensor([bad]), torch.tensor([bad])) == INF
        assert relative_change(torch.tensor([1.0]), torch.tensor([bad])) == INF
