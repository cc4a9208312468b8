"""Fused sites against the graph's formula in float64, within the bound that each site states."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quantpass.lowering.cpu_contest import is_exact
from quantpass.lowering.cpu_products import INTEGER_PRODUCTS
from tests.helpers import compiled

HALF_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
FLOATS = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
SIZES = st.integers(1, 40) | st.sampled_from([16, 32])


def assert_within_bound(actual, exact, size, numerics):
    """``|fused - formula| <= relative * S + absolute + half a unit of the output dtype``."""
    rounding = HALF_UNIT[actual.dtype] * exact.abs() + torch.finfo(actual.dtype).tiny
    allowed = numerics.relative * size + numerics.absolute + rounding
    excess = (actual.double() - exact).abs() - allowed
    assert bool((excess <= 0).all()), f"{float(excess.max()):.3g} beyond the stated bound {numerics}"


class Formula(nn.Module):
    """A dequantized matmul whose parts are drawn; ``exact`` is the same in float64."""

    def __init__(self, codes, w_scale, w_zero, bias, x_quant, after):
        super().__init__()
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.w_scale = nn.Parameter(w_scale, requires_grad=False)
        self.w_zero = None if w_zero is None else nn.Parameter(w_zero, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.x_quant, self.after = x_quant, after

    def operand(self, x):
        if self.x_quant is None:
            return x
        scale, zero = self.x_quant
        q = torch.clamp(torch.round(x / scale) + zero, -128, 127).to(torch.int8)
        return (q.to(x.dtype) - zero) * scale

    def weight(self, dtype):
        w = self.codes.to(dtype)
        return (w if self.w_zero is None else w - self.w_zero.to(dtype)) * self.w_scale.to(dtype)

    def forward(self, x):
        y = nn.functional.linear(self.operand(x), self.weight(x.dtype))
        if self.after is not None:
            y = y * self.after
        return y if self.bias is None else y + self.bias

    def exact(self, x):
        real = self.operand(x).double()
        if self.x_quant is not None:  # the codes are the graph's own, what they mean is exact
            scale, zero = self.x_quant
            q = torch.clamp(torch.round(x / scale) + zero, -128, 127).double()
            real = (q - zero) * scale
        w, after = self.weight(torch.float64), 1.0 if self.after is None else self.after
        y = real @ w.t() * after
        size = real.abs() @ w.t().abs() * abs(after)
        if self.bias is not None:
            y, size = y + self.bias.double(), size + self.bias.double().abs()
        return y, size


@st.composite
def formulas(draw, quantized):
    dtype = draw(FLOATS)
    m, k, n = draw(SIZES), draw(SIZES), draw(SIZES)
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    low, high = draw(st.sampled_from([(-128, 128), (-127, 128), (-8, 8), (0, 1)]))
    codes = torch.randint(low, high, (n, k), dtype=torch.int8, generator=g)
    shape = draw(st.sampled_from([(n, 1), (1,)]))
    w_scale = (torch.rand(shape, generator=g) * 0.02 + 1e-3).to(dtype)
    w_zero = None
    if not quantized and draw(st.booleans()):
        w_zero = torch.randint(-20, 20, shape, generator=g).to(draw(st.sampled_from([dtype, torch.int32])))
    bias = torch.randn(n, generator=g).to(dtype) if draw(st.booleans()) else None
    x_quant = (draw(st.sampled_from([0.03, 0.0625, 0.11])), draw(st.integers(-128, 127))) if quantized else None
    after = draw(st.sampled_from([None, 0.5, 1.7]))
    x = torch.randn(m, k, generator=g).to(dtype)
    return Formula(codes, w_scale, w_zero, bias, x_quant, after), x


def check(model, x, target, **options):
    actual, report = compiled(model, x, target=target, **options)
    (site,) = report.sites
    if not site.fused:
        assert site.rejects
        return False
    exact, size = model.exact(x)
    assert_within_bound(actual, exact, size, site.numerics)
    return True


@settings(max_examples=40, deadline=None)
@given(formulas(quantized=False))
def test_weight_only_stays_within_its_bound(case):
    assert check(*case, target="cpu", lowering="reference")


@contextmanager
def kernel(number):
    """Have ``native`` take any of its kernels, where it would take the fastest."""

    def taken(products, weight, shape, dtype, m):
        able = [p for p in products if p.takes(weight, dtype) and (p not in INTEGER_PRODUCTS or is_exact(p.name))]
        return (p := able[number % len(able)], p.prepare(weight, dtype)) if able else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantpass.lowering.native.fastest", taken)
        yield


@settings(max_examples=40, deadline=None)
@given(formulas(quantized=False), st.integers(0, 2))
def test_weight_only_through_any_native_kernel_stays_within_its_bound(case, number):
    with kernel(number):
        assert check(*case, target="cpu", lowering="native")


@settings(max_examples=40, deadline=None)
@given(formulas(quantized=True))
def test_quantized_activation_stays_within_its_bound(case):
    assert check(*case, target="cpu", lowering="reference")


@settings(max_examples=20, deadline=None)
@given(formulas(quantized=True), st.integers(0, 2))
def test_native_kernels_give_the_reference_s_numbers(case, number):
    model, x = case
    with kernel(number):
        actual, _ = compiled(model, x, lowering="native")
    assert torch.equal(actual, compiled(model, x, lowering="reference")[0])


@settings(max_examples=30, deadline=None)
@given(formulas(quantized=True), st.sampled_from(["ascend310p", "ascend910b"]))
def test_chips_stay_within_the_bound_or_refuse(case, target):
    check(*case, target=target)
