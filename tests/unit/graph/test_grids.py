"""Values that are constant along parts of their dimensions compute as dense ones do, and stay small."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpass.graph.grids import Grid, constant, dense, pointwise


def grouped(tensor, group):
    """``(N, groups)`` as ``(N, groups * group)``."""
    n, groups = tensor.shape
    return Grid(tensor.reshape(n, groups, 1), ((n,), (groups, group)))


def test_a_value_and_its_shape():
    g = grouped(torch.arange(6).reshape(2, 3), 4)
    assert g.shape == (2, 12)
    assert g.dense()[1].tolist() == [3] * 4 + [4] * 4 + [5] * 4
    assert constant(torch.tensor(7), (2, 3)).dense().tolist() == [[7] * 3] * 2


def test_a_view_of_groups_stays_small():
    scale = dense(torch.arange(6.0).reshape(2, 3, 1)).expanded((2, 3, 4))
    flat = scale.reshaped((2, 12))
    assert flat.tensor.numel() == 6
    assert torch.equal(flat.dense(), torch.arange(6.0).repeat_interleave(4).reshape(2, 12))
    assert flat.permuted((1, 0)).tensor.numel() == 6
    assert torch.equal(flat.permuted((1, 0)).dense(), flat.dense().t())
    assert flat.reshaped((2, 1, 6, 2)).tensor.numel() == 6


def test_groups_of_different_sizes_meet_in_the_finest():
    a, b = grouped(torch.arange(6).reshape(2, 3), 4), grouped(torch.arange(12).reshape(2, 6), 2)
    both = pointwise(lambda t: t[0] * 100 + t[1], [a, b])
    assert both.tensor.numel() == 12
    assert torch.equal(both.dense(), a.dense() * 100 + b.dense())


def test_parts_without_a_common_one_become_dense():
    a, b = grouped(torch.arange(4).reshape(2, 2), 3), grouped(torch.arange(6).reshape(2, 3), 2)
    both = pointwise(lambda t: t[0] * 100 + t[1], [a, b])
    assert torch.equal(both.dense(), a.dense() * 100 + b.dense())
    assert torch.equal(a.reshaped((4, 3)).dense(), a.dense().reshape(4, 3))
    assert torch.equal(grouped(torch.arange(4).reshape(2, 2), 3).reshaped((3, 4)).dense(), a.dense().reshape(3, 4))


def test_a_number_keeps_its_place_in_the_promotion_of_dtypes():
    half, number = dense(torch.ones(2, 2, dtype=torch.float16)), dense(torch.tensor(0.5, dtype=torch.float32))
    assert pointwise(lambda t: t[0] * t[1], [half, number]).tensor.dtype == torch.float16


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_like_dense_values(data):
    """Any chain of views, permutations and sums gives what the dense values give."""
    sizes = [data.draw(st.sampled_from([1, 2, 3, 4])) for _ in range(3)]

    def value():
        held = [data.draw(st.sampled_from([1, s])) for s in sizes]
        return dense(torch.randint(0, 99, held)).expanded(sizes)

    grid, whole = (g := value()), g.dense()
    for _ in range(data.draw(st.integers(1, 4))):
        match data.draw(st.sampled_from(["view", "permute", "add"])):
            case "view":
                shape = data.draw(st.sampled_from(_shapes(whole.numel())))
                grid, whole = grid.reshaped(shape), whole.reshape(shape)
            case "permute":
                order = data.draw(st.permutations(range(whole.dim())))
                grid, whole = grid.permuted(order), whole.permute(order)
            case "add":
                held = [data.draw(st.sampled_from([1, s])) for s in whole.shape]
                other = torch.randint(0, 99, held)
                grid, whole = pointwise(lambda t: t[0] + t[1], [grid, dense(other)]), whole + other
        assert torch.equal(grid.dense(), whole)
        assert grid.tensor.numel() <= whole.numel()


def _shapes(numel):
    return [(numel,)] + [(a, numel // a) for a in range(1, numel + 1) if numel % a == 0] + [
        (a, 2, numel // a // 2) for a in range(1, numel + 1) if numel % (2 * a) == 0
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(6, 4), (2, 12), (24,), (2, 3, 2, 2)])
def test_a_dense_value_is_viewed_not_copied(shape):
    tensor = torch.arange(24).reshape(2, 3, 4)
    assert dense(tensor).reshaped(shape).tensor.data_ptr() == tensor.data_ptr()
