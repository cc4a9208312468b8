"""Sizes are compared without guarding on them: what only the run knows is neither equal nor different."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from quantpass.basics.symbolic import (
    broadcast_shape,
    elements,
    has_no_elements,
    is_one,
    same_shape,
    same_size,
    statically_true,
)
from tests.unit.graphs import Traced


@pytest.fixture
def unbacked():
    return ShapeEnv().create_unbacked_symint()


@pytest.fixture
def backed():
    t = Traced(lambda x: x + 1, torch.ones(5, 7), symbolic=True)
    return t.result.meta["val"].shape


def test_numbers():
    assert same_size(3, 3) and not same_size(3, 4)
    assert same_shape((2, 3), (2, 3))
    assert not same_shape((2, 3), (2, 4))
    assert not same_shape((2, 3), (2, 3, 1))
    assert is_one(1) and not is_one(2) and not is_one(1.0)
    assert has_no_elements((2, 0)) and not has_no_elements((2, 3)) and not has_no_elements(())
    assert elements((2, 3, 4)) == 24 and elements(()) == 1


def test_what_is_known_of_symbols(unbacked, backed):
    assert statically_true(True) is True and statically_true(False) is False
    assert statically_true(unbacked == unbacked) is True
    assert statically_true(unbacked == unbacked + 1) is False
    assert statically_true(unbacked == 5) is None
    m, n = backed
    assert statically_true(m == n) is None


def test_symbols_are_equal_to_themselves_only(unbacked, backed):
    m, n = backed
    assert same_size(m, m) and same_size(unbacked, unbacked)
    assert not same_size(m, n) and not same_size(m, 5)
    assert same_shape((2, m), (2, m)) and not same_shape((2, m), (2, n))
    assert not is_one(m) and not is_one(unbacked)
    assert not has_no_elements((m, unbacked))
    assert same_size(elements((m, 3)), 3 * m)


@given(st.lists(st.lists(st.sampled_from([1, 2, 3]), max_size=3), max_size=3))
def test_broadcasting_of_numbers(shapes):
    try:
        expected = tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        with pytest.raises(ValueError, match="do not broadcast"):
            broadcast_shape(*shapes)
    else:
        assert broadcast_shape(*shapes) == expected


def test_broadcasting_of_symbols(backed):
    m, n = backed
    assert broadcast_shape((m, 1), (1, n)) == (m, n)
    assert broadcast_shape((m, 4), (4,)) == (m, 4)
    # of two that may differ the number counts, whichever comes first
    assert broadcast_shape((m,), (4,)) == (4,)
    assert broadcast_shape((4,), (m,)) == (4,)
    assert broadcast_shape((m,), (n,)) == (m,)
