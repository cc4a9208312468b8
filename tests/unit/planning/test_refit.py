"""Re-fitting a weight as symmetric int8 per channel: how good the fit is, and that its cost is told exactly."""

import math

import pytest
import torch

from quantpass.graph.expr import Const, Ref
from quantpass.graph.records import Weight
from quantpass.planning import refit as module
from quantpass.planning.refit import can_be_refitted, refit

K, N = 64, 24


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def codes(k=K, n=N, low=-8, high=7):
    return torch.randint(low, high + 1, (k, n), generator=torch.Generator().manual_seed(k + n)).to(torch.int8)


def weight(c, scale, zero=None, group=0, *, transposed=False, **more):
    stored = Const(c.t().contiguous() if transposed else c)
    offsets = None if zero is None else Const(zero)
    return Weight(stored, transposed, *c.shape, Const(scale), offsets, group, int(c.min()), int(c.max()), True, **more)


def rebuilt(fitted):
    assert fitted.transposed and not fitted.group_size and fitted.zero_point is None
    assert fitted.codes.tensor.dtype == torch.int8 and int(fitted.codes.tensor.min()) >= -127
    return fitted.codes.tensor.t().double() * fitted.scale.tensor


def squares(w, scale):
    """The least sum of squares of one column with ``scale``."""
    return float((w - (w / scale).round().clamp(-127, 127) * scale).square().sum())


@pytest.mark.parametrize("k", [16, 64, 256])
def test_no_scale_is_much_better(k):
    """Against 2,000 scales for each column, with the sum of squares: close in each, and hardly worse on the whole."""
    w = randn(k, 16)
    fitted = rebuilt(refit(lambda: w))
    worse = []
    for column in range(w.shape[1]):
        w_n = w[:, column]
        least = min(squares(w_n, s) for s in (w_n.abs().max() / torch.linspace(100, 300, 2000, dtype=torch.float64)))
        worse.append(float((w_n - fitted[:, column]).square().sum()) / least)
    assert max(worse) < (1.6 if k == 16 else 1.3)
    assert sum(worse) / len(worse) < (1.25 if k == 16 else 1.1)


def test_better_than_the_largest_magnitude_alone():
    w = randn(K, N)
    plain = (w / (w.abs().amax(0) / 127)).round() * (w.abs().amax(0) / 127)
    assert (rebuilt(refit(lambda: w)) - w).square().sum() < 0.95 * (plain - w).square().sum()


def test_codes_are_the_nearest_and_scales_are_those_of_float16():
    w = randn(K, N)
    fitted = refit(lambda: w)
    scale = fitted.scale.tensor
    assert torch.equal(scale.half().double(), scale)
    assert torch.equal(fitted.codes.tensor.t().double(), (w / scale).round().clamp(-127, 127))


def test_scales_below_the_normal_range_of_float16_stay_as_they_are():
    fitted = refit(lambda: randn(K, N) * 1e-6)
    assert not torch.equal(fitted.scale.tensor.half().double(), fitted.scale.tensor)
    assert fitted.refit.sqnr > 40


def test_no_element_is_clipped():
    w = randn(4096, 4)
    w[7] *= 20
    fitted = refit(lambda: w)
    assert fitted.refit.largest_error <= 0.6 * float(fitted.scale.tensor.max())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [16, 32, 48])  # in groups of 16 each element is fitted, in larger ones each value
@pytest.mark.parametrize(
    "form", ["groups", "zero points by group", "order", "scale along K", "channel zero points", "tensor zero point"]
)
def test_the_cost_is_that_of_the_graphs_own_weight(form, size, transposed):
    c, group, steps = codes(), size, randn(math.ceil(K / size), N).abs() + 0.1
    zero, order, k_scale = None, None, None
    if form == "zero points by group":
        zero = torch.randint(-3, 4, steps.shape, generator=torch.Generator().manual_seed(2)).double()
    elif form == "order":
        order = torch.randperm(K, generator=torch.Generator().manual_seed(1))
    elif form == "scale along K":
        group, steps, k_scale = 0, steps[0], torch.rand(K, dtype=torch.float64)
    elif form == "channel zero points":
        group, steps, zero = 0, steps[0], torch.arange(N).double()
    elif form == "tensor zero point":
        group, steps, zero = 0, steps[0, :1], torch.tensor([3.0]).double()

    def spread(t):
        return t.repeat_interleave(size, 0)[:K] if t.dim() == 2 else t

    w = c.double() * spread(steps) if zero is None else (c.double() - spread(zero)) * spread(steps)
    w = w if k_scale is None else w * k_scale[:, None]
    if order is not None:  # row i of the codes is row order[i] of the operand
        w = torch.empty_like(w).index_copy_(0, order, w)
    source = weight(c, steps, zero, group, transposed=transposed, k_order=order, k_scale=k_scale)
    assert can_be_refitted(source)
    for thorough in (True, False):
        fitted = refit(source, thorough=thorough)
        error = rebuilt(fitted) - w
        sqnr = 10 * torch.log10(w.square().sum(0) / error.square().sum(0))
        assert fitted.refit.sqnr == pytest.approx(float(sqnr.min()), rel=1e-12)
        assert fitted.refit.largest_error == pytest.approx(float(error.abs().max()), rel=1e-12)
        assert fitted.refit.largest == pytest.approx(float(w.abs().max()), rel=1e-12)
        growth = rebuilt(fitted).abs().sum(0) / w.abs().sum(0)
        assert fitted.refit.growth == pytest.approx(float(growth.max()), rel=1e-12)
        of_elements = refit(lambda w=w: w, thorough=thorough)
        assert torch.equal(fitted.scale.tensor, of_elements.scale.tensor)
        assert torch.equal(fitted.codes.tensor, of_elements.codes.tensor)


def test_what_a_code_that_is_not_there_would_be_does_not_count():
    c = codes(low=0, high=1)
    c[:32, 3:] = codes(k=32, n=N - 3)
    steps = torch.ones(K // 32, N, dtype=torch.float64)
    steps[0, :3] = 1e308  # seven of them are no number
    source = weight(c, steps, group=32)
    fitted, of_elements = refit(source), refit(lambda: c.double() * steps.repeat_interleave(32, 0))
    assert torch.equal(fitted.codes.tensor, of_elements.codes.tensor)
    assert fitted.refit.largest == of_elements.refit.largest == 1e308
    c[0, 0] = 7
    assert refit(source) is None


def test_blocks_of_columns_are_fitted_as_one(monkeypatch):
    w = randn(K, N)
    whole = refit(lambda: w)
    monkeypatch.setattr(module, "_ELEMENTS", 5 * K)
    parts = refit(lambda: w)
    assert torch.equal(parts.codes.tensor, whole.codes.tensor) and parts.refit == whole.refit


def test_a_weight_that_has_the_form_loses_nothing():
    c = codes(low=-127, high=127)
    c[0] = 127
    fitted = refit(lambda: c.double() * 0.03125)
    assert torch.equal(fitted.codes.tensor.t(), c) and fitted.refit.largest_error == 0 and fitted.refit.sqnr == math.inf


def test_columns_of_zeros():
    w = randn(K, N)
    w[:, 3] = 0
    fitted = refit(lambda: w)
    assert not rebuilt(fitted)[:, 3].any() and 0 < float(fitted.scale.tensor[3]) <= float(fitted.scale.tensor.max())
    assert not rebuilt(refit(lambda: torch.zeros(K, N))).any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_has_no_fit(value):
    w = randn(K, N)
    w[5, 7] = value
    assert refit(lambda: w) is None


def test_what_can_be_refitted():
    c, scale = codes(), torch.ones(N).double()
    grouped = torch.ones(K // 16, N).double()
    node = Ref(torch.fx.Graph().placeholder("s"))
    node.node.meta["val"] = grouped
    assert can_be_refitted(weight(c, grouped, group=16))
    assert can_be_refitted(weight(c, scale, zero=scale))
    assert not can_be_refitted(weight(c, scale))
    unknown = weight(c, grouped, group=16)
    for part in ("codes", "scale", "zero_point"):
        fields = {f: getattr(unknown, f) for f in unknown.__slots__} | {part: node}
        assert not can_be_refitted(Weight(**fields))
