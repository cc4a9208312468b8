"""Activations quantized by an operator: its codes beside the graph's, and what may lie between the two."""

import pytest
import torch
import torch.ao.quantization.fx._decomposed

from quantpass.basics.reject import Reject
from quantpass.chips import chip_named
from quantpass.planning.options import Options
from quantpass.planning.requantize import Requantized, requantized
from tests.unit.graphs import evaluate
from tests.unit.planning.test_plans import CODES, SCALE, K, M, Site, draw, randn

X = randn(M, K) * torch.logspace(-2, 2, M).unsqueeze(1)
HALF = X.half()


def dynamic(divisor=127.0, high=127, dim=-1, dtype=torch.float32, beside=1.0):
    def quantize(x):
        x = x.to(dtype)
        scale = (x.abs().amax(dim, keepdim=True) if dim is not None else x.abs().amax()) / divisor
        codes = (
            ((x * beside) / (scale * beside) if beside != 1 else x / scale)
            .round()
            .clamp(-high - 1, high)
            .to(torch.int8)
        )
        return codes, codes.float() * scale.float()

    return quantize


def static(scale, zero=0, low=-128, high=127):
    def quantize(x):
        codes = ((x.float() / scale).round() + zero).clamp(low, high).to(torch.int8)
        return codes, (codes.float() - zero) * scale

    return quantize


def made(quantize, x=HALF, numerics="vendor", target="ascend910b", already=False):
    """What an operator makes of a site's activation, with the graph's own codes and values."""

    def function(x, w, s):
        return quantize(x)[1].to(x.dtype) @ (w.to(x.dtype) * s.to(x.dtype))

    site = Site(function, x, CODES, SCALE, known=2)
    nodes = (
        {n for n in site.t.graph.nodes if getattr(n.meta.get("val"), "dtype", None) == torch.int8} if already else ()
    )
    found = requantized(site.reading, chip_named(target), Options(target=target, numerics=numerics), nodes)
    if isinstance(found, Requantized):
        codes = evaluate(found.codes, site.values).double()
        graph, real = (v.double() for v in quantize(x))
        assert int((codes - graph).abs().max()) <= found.apart
        if found.scale is not None:
            scale = evaluate(found.scale, site.values).double()
            step = real.abs().amax(-1, keepdim=True) / 127
            operators = codes * (scale.unsqueeze(-1) if scale.numel() > 1 else scale)
            assert ((operators - real).abs() <= found.steps * step * 1.02 + found.absolute).all()
    return found


@pytest.mark.parametrize(("dim", "mode"), [(-1, "pertoken"), (None, "pertensor")])
def test_the_largest_magnitude(dim, mode):
    """Both are off by half a step and a little: together one step, and no more than the arithmetic adds."""
    m = made(dynamic(dim=dim))
    assert m.apart == 1 and 1.0 < m.steps < 1.05 and 0 <= m.absolute < 1e-30 and m.ratio == 1.0
    assert m.call.args["quant_mode"] == mode and m.scale is not None
    assert "at most one" in m.why and "magnitudes above" not in m.why


def test_rows_below_the_graphs_floor_are_told_of():
    """There the operator's scale is smaller than the graph's."""

    def floored(x):
        scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-3) / 127
        codes = (x.float() / scale).round().clamp(-128, 127).to(torch.int8)
        return codes, codes.float() * scale

    assert "in rows with magnitudes above 0.001" in made(floored).why


@pytest.mark.parametrize(("divisor", "rule"), [(127.5, ""), (126.5, ""), (126.0, "divisor"), (128.0, "divisor")])
def test_divisors_near_the_operators_own(divisor, rule):
    m = made(dynamic(divisor))
    assert (m.rule if isinstance(m, Reject) else "") == (rule and f"requantize.{rule}")
    if not rule:
        assert m.apart == 1 and 1.0 < m.steps < 1.6


def test_few_bits_move_codes_further():
    exact, few = made(dynamic()), made(dynamic(dtype=torch.bfloat16), X.bfloat16())
    assert few.apart == 1 and few.steps > exact.steps + 0.5
    fewer = made(dynamic(dtype=torch.bfloat16, beside=3.0), X.bfloat16())
    assert fewer.apart == 2 and "at most two" in fewer.why and fewer.steps > few.steps + 0.5
    assert made(dynamic(beside=3.0)).apart == 1


@pytest.mark.parametrize("high", [100, 63, 7])
def test_codes_of_another_range(high):
    assert made(dynamic(high=high)).rule == "requantize.range"
    assert made(static(0.03, low=-high - 1, high=high)).rule == "requantize.range"


@pytest.mark.parametrize(
    ("zero", "rule"), [(0, ""), (5, ""), (-128, ""), (127, ""), (-129, "zero_point"), (128, "zero_point")]
)
def test_static_scales_and_zero_points(zero, rule):
    m = made(static(0.25, zero))
    assert (m.rule if isinstance(m, Reject) else "") == (rule and f"requantize.{rule}")
    if not rule:
        assert m.scale is None and m.apart == 1 and m.steps == 1.0 and m.ratio == 1.0  # 4 is a float16
        assert ("zero_points" in m.call.args and m.call.args["zero_points"] is not None) == bool(zero)


@pytest.mark.parametrize(("scale", "zero"), [(0.03, 0), (0.03, 40), (0.0307, -100)])
def test_a_rounded_rate_is_scaled_back(scale, zero):
    """The operator takes the inverse of the scale in x's dtype; its codes mean x but for half a step each."""
    m = made(static(scale, zero))
    rate = torch.tensor(1 / scale, dtype=torch.float64)
    off = float((rate.half().double() / rate - 1).abs())
    assert m.ratio == pytest.approx(float(rate / rate.half().double()), rel=1e-6)
    assert 1 + max(127 - zero, 128 + zero) * off < m.steps < 1.1 + (max(127 - zero, 128 + zero) + 2) * off
    own = m.with_the_graphs_scale()
    assert own.ratio == 1.0 and own.steps == m.apart


def test_rates_that_the_dtype_of_x_does_not_hold():
    assert made(static(1e-6)).rule == "requantize.scale"
    assert made(static(1e6)).rule == "requantize.scale"
    assert isinstance(made(static(1e-6), X.bfloat16() * 1e-6), Requantized)


def test_where_nothing_is_to_be_made():
    """Codes that are given, that another plan makes, and a user who wants the graph's own."""
    assert made(dynamic(), numerics="strict") is None
    assert made(dynamic(), already=True) is None
    site = Site(lambda x, w, s: (x.float() * 0.5) @ (w.float() * s), draw(M, K), CODES, SCALE, known=2)
    assert requantized(site.reading, chip_named("ascend910b"), Options(numerics="vendor"), ()) is None


def test_the_graphs_scale_is_found_by_what_it_is():
    """Another tensor's largest magnitude is another scale."""
    site = Site(lambda x, w, s: dynamic()(x)[1].half() @ (w.half() * s.half()), X.half(), CODES, SCALE, known=2)
    m = requantized(site.reading, chip_named("ascend910b"), Options(target="ascend910b", numerics="vendor"), ())
    (factor,) = [f.expr for f in site.reading.activation.factors]
    own, ratio = m.in_place_of(factor)
    assert ratio == 1.0 and own.steps > m.steps
    assert m.in_place_of(site.reading.weight.scale) is None
