"""Weights that were dequantized before the pass are named, in every floating dtype; trained ones are not."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import quantpass as qp
from quantpass.patterns import folded
from quantpass.patterns.folded import looks_dequantized
from tests.helpers import rules

K, N = 256, 48
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def grid(dtype, low, high, group=None, zero=(0, 1), seed=0):
    """``(K, N)``: codes times scales as a graph in ``dtype`` computes them."""
    g = generator(seed)
    groups = K // group if group else 1
    codes = torch.randint(low, high, (groups, K // groups, N), generator=g)
    zeros = torch.randint(*zero, (groups, 1, N), generator=g)
    scale = (torch.rand(groups, 1, N, generator=g) * 1e-2 + 1e-3).to(dtype)
    return ((codes - zeros).to(dtype) * scale).view(K, N)


GRIDS = {
    "int8": {"low": -127, "high": 128},
    "int4": {"low": -8, "high": 8},
    "int4 in groups of 32": {"low": -8, "high": 8, "group": 32},
    "int4 in groups of 128": {"low": -8, "high": 8, "group": 128},
    "uint8": {"low": 0, "high": 256, "zero": (110, 150)},
    "uint4 in groups of 64": {"low": 0, "high": 16, "group": 64, "zero": (5, 11)},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("seed", range(3))
def test_codes_times_scales_are_told(name, dtype, seed):
    assert looks_dequantized(grid(dtype, seed=seed, **GRIDS[name]))


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_folded_in_16_bits_and_held_in_32(narrow):
    assert looks_dequantized(grid(narrow, -127, 128).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int8", "int4 in groups of 32"])
def test_a_site_says_so(name, dtype):
    model = nn.Linear(K, N, dtype=dtype).requires_grad_(False)
    model.weight.copy_(grid(dtype, **GRIDS[name]).t())
    report = qp.explain(model, (torch.randn(3, K).to(dtype),), target="cpu")
    assert rules(report) == {"read.weight.folded"}
    assert "before constant folding" in report.sites[0].rejects[0].hint


DRAWN = {
    "normal": lambda *s, g: torch.randn(*s, generator=g) * 0.02,
    "uniform": lambda *s, g: torch.rand(*s, generator=g) - 0.5,
    "positive": lambda *s, g: torch.rand(*s, generator=g),
    "around one": lambda *s, g: 1 + 0.05 * torch.randn(*s, generator=g),
    "heavy tails": lambda *s, g: torch.randn(*s, generator=g) ** 3,
    "sparse": lambda *s, g: torch.randn(*s, generator=g) * (torch.rand(*s, generator=g) > 0.9),
    "small": lambda *s, g: torch.randn(*s, generator=g) * 1e-7,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DRAWN)
def test_floats_are_not_told(name, dtype):
    for seed, (k, n) in enumerate([(32, 1), (32, 300), (64, 8), (100, 48), (384, 384), (4096, 5)]):
        w = DRAWN[name](k, n, g=generator(seed))
        assert not looks_dequantized(w.to(dtype))
        assert not looks_dequantized(w.bfloat16().to(dtype)), "a bfloat16 checkpoint in another dtype"


def made_of_positions(dtype):
    i, j = torch.arange(K)[:, None], torch.arange(N)
    ring = (i - j) % K
    yield "ramp", (i * 64 + j).to(dtype) / 64
    yield "distances", (i - j).abs().to(dtype) * 0.125
    yield "distances on a ring", torch.minimum(ring, K - ring).to(dtype) * 0.3
    yield "steps", (i // 8).to(dtype) * 0.1
    yield "triangle", torch.clamp(9 - (i - 5 * j).abs(), min=0).to(dtype) * 0.1
    yield "counts", torch.randint(0, 40, (K, N), generator=generator(1)).to(dtype)
    yield "zeros and ones", (torch.rand(K, N, generator=generator(2)) > 0.5).to(dtype) * 0.25


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_formulas_make_is_not_told(dtype):
    told = [name for name, matrix in made_of_positions(dtype) if looks_dequantized(matrix)]
    assert told == []
    for _, matrix in made_of_positions(dtype):
        model = nn.Linear(K, N, bias=False, dtype=dtype).requires_grad_(False)
        model.weight.copy_(matrix.t())
        assert qp.explain(model, (torch.randn(3, K).to(dtype),), target="cpu").total == 0


# -- weights that are refused by some of their values ----------------------------------------------------------------


@st.composite
def columns(draw, k):
    """``(k,)`` in float64: on a grid, nearly on one, on one for a while, or drawn."""
    g = generator(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["grid", "nearly", *DRAWN]))
    if kind in DRAWN:
        return DRAWN[kind](k, g=g).double()
    low, least = draw(st.sampled_from([-127, -8, -2, 0, 1, 3])), draw(st.integers(1, 12))
    codes = torch.randint(low, draw(st.sampled_from([low + 9, low + 16, 127, 260])) + 1, (k,), generator=g).double()
    codes = torch.where(codes.abs() < least, draw(st.sampled_from([0, least])), codes)  # how far from zero it begins
    codes[draw(st.integers(8, k)) :] += draw(st.sampled_from([0, 0, 0.5]))  # no grid any more
    off = draw(st.sampled_from([0.0, 1e-7, 1e-3, 4e-3, 6e-3, 1.2e-2])) if kind == "nearly" else 0.0
    away = 1 + off * (2 * torch.rand(k, generator=g, dtype=torch.float64) - 1)
    return codes * away * 10.0 ** draw(st.floats(-9, 3))


@st.composite
def matrices(draw):
    """``(K, N)`` of one to ten columns, most of them of one kind."""
    k = draw(st.sampled_from([32, 33, 64, 128, 129, 300, 1024, 1100]))
    kinds = draw(st.lists(columns(k), min_size=1, max_size=2))
    some = [draw(st.sampled_from(kinds)) * (1 + i / 7) for i in range(draw(st.integers(1, 10)))]
    return torch.stack(some, dim=1).to(draw(st.sampled_from([*DTYPES, torch.float64])))


def told_by_all_values(matrix):
    with patch.object(folded, "_surely_off_grids", lambda *_: False):
        return looks_dequantized(matrix)


@settings(max_examples=300, deadline=None)
@given(matrices())
def test_a_weight_is_refused_early_only_where_all_its_values_refuse_it(matrix):
    assert looks_dequantized(matrix) == told_by_all_values(matrix)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [384, 768, 4096])
@pytest.mark.parametrize("name", ["normal", "uniform"])
def test_weights_as_models_have_them_are_refused_early(name, k, dtype):
    """Where this fails, no answer is wrong, but each weight costs twenty times as much."""
    with patch.object(folded, "_on_grids", side_effect=AssertionError("all values are looked at")):
        for seed in range(20):
            assert not looks_dequantized(DRAWN[name](k, 64, g=generator(seed)).to(dtype))


@pytest.mark.parametrize("steps", [3, 60])
def test_zeros_in_front(steps):
    """Rows that were pruned, or padded, hold no values to fit a grid to; the others tell."""
    weight = torch.randint(-steps, steps + 1, (256, 8), generator=torch.Generator().manual_seed(0)) * 0.1
    weight[:32] = 0
    assert looks_dequantized(weight) == (steps == 60)
    assert looks_dequantized(weight[32:]) == (steps == 60)
