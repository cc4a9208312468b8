"""A weight put together as an operator will has to give back each element of the graph's value."""

import dataclasses

import pytest
import torch

from quantpass.graph.expr import Const
from quantpass.graph.records import Weight
from quantpass.patterns import proof
from quantpass.patterns.proof import FLOAT32, FLOAT64, TOLERANCE, is_rebuilt, rows_at_a_time

K, N = 8, 3
CODES = torch.arange(K * N).reshape(K, N).sub(12).to(torch.int8)
SCALE = torch.tensor([0.5, 1e-3, 64.0], dtype=torch.float64)
GROUPS = torch.tensor([[0.5, 1e-3, 64.0], [2.0, 7e-3, 1.0]], dtype=torch.float64)
ZERO = torch.tensor([3.0, 0.0, -2.0], dtype=torch.float64)


def weight(**changed):
    plain = Weight(Const(CODES), False, K, N, Const(SCALE), None, 0, -12, 11, False)
    return dataclasses.replace(plain, **changed)


def rebuilt(w, actual, scale=SCALE, zero=None, same=FLOAT64, codes=CODES, **more):
    return is_rebuilt(w, codes, scale, zero, actual, same=same, **more)


def value(scale=SCALE, zero=0.0):
    return (CODES.double() - zero) * scale


def test_rows_at_a_time(monkeypatch):
    assert list(rows_at_a_time(5, 3)) == [slice(0, 5)]
    assert list(rows_at_a_time(0, 3)) == []
    monkeypatch.setattr(proof, "_ELEMENTS", 6)
    assert list(rows_at_a_time(5, 3)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert list(rows_at_a_time(2, 100)) == [slice(0, 1), slice(1, 2)]
    assert list(rows_at_a_time(4, 0)) == [slice(0, 4)]


@pytest.mark.parametrize("small", [False, True])
def test_what_is_equal(monkeypatch, small):
    if small:  # row by row
        monkeypatch.setattr(proof, "_ELEMENTS", 1)
    assert rebuilt(weight(), value())
    assert rebuilt(weight(transposed=True), value(), codes=CODES.t())
    assert rebuilt(weight(), value(zero=ZERO), zero=ZERO)
    assert rebuilt(weight(), value(SCALE[:1]), scale=SCALE[:1])
    by_row = GROUPS.repeat_interleave(4, dim=0)
    assert rebuilt(weight(group_size=4), value(by_row), scale=GROUPS)
    zeros = torch.stack([ZERO, ZERO + 1])
    actual = (CODES.double() - zeros.repeat_interleave(4, dim=0)) * by_row
    assert rebuilt(weight(group_size=4), actual, scale=GROUPS, zero=zeros)
    order = torch.tensor([3, 1, 2, 0, 7, 6, 5, 4])
    assert rebuilt(weight(k_order=order), value()[torch.argsort(order)])
    along_k = torch.linspace(0.1, 1, K).double()
    assert rebuilt(weight(k_scale=along_k), value() * along_k[:, None])


def test_a_column_of_zeros():
    nothing = SCALE.clone()
    nothing[1] = 0.0
    assert rebuilt(weight(), value(nothing), scale=nothing)


def test_what_is_not():
    assert not rebuilt(weight(), value().t())
    assert not rebuilt(weight(), value(zero=ZERO))
    assert not rebuilt(weight(), value(), zero=ZERO)
    assert not rebuilt(weight(group_size=4), value(GROUPS.repeat_interleave(4, dim=0)), scale=GROUPS.flip(0))
    assert not rebuilt(weight(k_order=torch.arange(K).flip(0)), value())
    assert not rebuilt(weight(), value(), scale=SCALE * float("nan"))
    assert not rebuilt(weight(), torch.full((K, N), float("nan"), dtype=torch.float64))


@pytest.mark.parametrize("at", [(0, 0), (3, 1), (7, 2)])
def test_one_element_off_by_its_own_tolerance(at):
    """However small its column's scale is beside the others."""
    column = SCALE[at[1]]
    for off, holds in ((0.5 * TOLERANCE, True), (2 * TOLERANCE, False), (-2 * TOLERANCE, False)):
        actual = value()
        actual[at] += off * column
        assert rebuilt(weight(), actual, same=1.0) == holds


def test_the_tolerance_grows_with_the_magnitude_up_to_a_limit():
    def off_by(share, at, same, zero=None):
        actual = value(zero=0.0 if zero is None else zero)
        actual[at] += share * SCALE[at[1]]
        return rebuilt(weight(), actual, same=same, zero=zero)

    large, small = (0, 0), (4, 0)  # codes -12 and 0
    assert off_by(12e-6, large, FLOAT32) and not off_by(12e-6, small, FLOAT32)
    assert off_by(0.9e-6, small, FLOAT32) and not off_by(14e-6, large, FLOAT32)
    # a large zero point makes the numbers that were subtracted large
    assert off_by(0.9e-4, small, FLOAT32, zero=torch.tensor([100.0]))
    assert not off_by(0.9e-4, small, FLOAT32, zero=torch.tensor([10.0]))
    assert not off_by(2e-3, small, FLOAT32, zero=torch.tensor([1e5]))


def test_the_graphs_own_steps_count_where_they_are_smaller():
    actual = value()
    actual[0, 0] += 0.5 * TOLERANCE * SCALE[0]
    wide = SCALE.expand(K, N).clone()
    assert rebuilt(weight(), actual, same=1.0, slope=wide)
    wide[0, 0] /= 4
    assert not rebuilt(weight(), actual, same=1.0, slope=wide)
    assert rebuilt(weight(), actual, same=1.0, slope=100 * wide.abs().clamp(min=1.0))


def test_values_that_the_graph_rounded():
    rounded = value(SCALE * 1.001).half()
    exact = SCALE * 1.001
    assert not rebuilt(weight(), rounded, scale=exact, same=FLOAT32)
    assert rebuilt(weight(), rounded, scale=exact, same=FLOAT32, rounding=torch.float16)
    assert not rebuilt(weight(), rounded, scale=SCALE * 1.002, same=FLOAT32, rounding=torch.float16)
    # subnormal numbers are rounded by half of the least of them
    tiny = torch.tensor([1e-7, 1e-7, 1e-7], dtype=torch.float64)
    assert rebuilt(weight(), value(tiny).half(), scale=tiny, same=FLOAT32, rounding=torch.float16)
    assert not rebuilt(weight(), value(tiny).half() * 2, scale=tiny, same=FLOAT32, rounding=torch.float16)
    # by no more than that: one such number is too much
    least = torch.finfo(torch.float16).tiny * torch.finfo(torch.float16).eps
    ones = torch.full((N,), least, dtype=torch.float64)
    off = (CODES.double() + 1) * least
    assert not rebuilt(weight(), off, scale=ones, same=FLOAT32, rounding=torch.float16)
    # integers are not rounded
    ones = torch.ones(N, dtype=torch.float64)
    assert rebuilt(weight(), value(ones).int(), scale=ones, rounding=torch.int32)
    assert not rebuilt(weight(), value(ones).int() + 1, scale=ones, rounding=torch.int32)
