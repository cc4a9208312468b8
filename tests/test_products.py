"""What an operator multiplies and adds inside: checked on the product that it forms, not on each factor."""

import math

import pytest
import torch
from torch.nn.functional import linear

import quantpass as qp
from tests.helpers import CHIPS
from tests.oracle import traced

N, K, M = 32, 64, 4
G = torch.Generator().manual_seed(6)
CODES = torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=G)
SCALE = torch.rand(N, 1, generator=G) * 1e-3 + 2e-4
X = torch.randn(M, K, generator=G)
TARGETS = ("cpu", *CHIPS)


def codes(x, scale=0.02):
    return torch.clamp(torch.round(x / scale), -128, 127).to(torch.int8)


def fused(f, *args, target, **options):
    """``f`` fused and run: its result beside the graph's, and the site. Results are finite where the graph's are."""
    gm = traced(f, *args)
    with torch.no_grad():
        wanted = gm(*args)
        report = qp.fuse(gm, target=target, **options)
        actual = gm(*args)
    (site,) = report.sites
    assert torch.equal(actual.isfinite(), wanted.isfinite()), report
    assert torch.equal(actual.isnan(), wanted.isnan())
    assert all(note in str(report) for note in (site.plan.notes if site.fused else ()))
    return actual.double(), wanted.double(), site


def assert_near(actual, wanted, tolerance):
    finite = wanted.isfinite()
    assert torch.equal(actual[~finite].nan_to_num(), wanted[~finite].nan_to_num())
    scale = wanted[finite].abs().max()
    assert (actual - wanted)[finite].abs().max() <= tolerance * scale


FACTORS = {
    "times": lambda y: y * 600.0,
    "times a vector": lambda y: y * torch.full((N,), 600.0).half(),
    "one column": lambda y: y * torch.where(torch.arange(N) == 5, 600.0, 0.01).half(),
    "divided": lambda y: y / 1.7e-3,
    "twice": lambda y: y * 30.0 * 20.0,
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("shifted", [False, True])
def test_codes_times_scale_overflow_float16(factor, shifted, target):
    """A factor behind the matmul that the weight has no room for stays behind it."""

    def f(x):
        w = CODES.half().t()
        return FACTORS[factor](x @ (w + 100.0 if shifted else w))

    actual, wanted, site = fused(f, X.half() * 1e-3, target=target)
    assert site.fused
    assert "wqmm.scale.product" in " ".join(site.plan.notes)
    assert_near(actual, wanted, 4e-3)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("factor", [0.5, 400.0])
def test_a_factor_that_fits_is_still_taken_in(factor, target):
    def f(x):
        return (x @ CODES.half().t()) * factor

    actual, wanted, site = fused(f, X.half() * 1e-3, target=target)
    assert site.fused
    assert not site.plan.notes
    assert_near(actual, wanted, 4e-3)


@pytest.mark.parametrize("target", ["cpu", "ascend910b", "ascend910_93"])
def test_one_group_overflows(target):
    s = torch.full((K // 32, 1, N), 0.01)
    s[1, 0, 7] = 0.9

    def f(x):
        w = (CODES.t().half().reshape(K // 32, 32, N) * s.half()).reshape(K, N)
        return (x @ w) * 1000.0

    actual, wanted, site = fused(f, X.half() * 1e-3, target=target)
    assert site.fused
    assert site.plan.call["antiquant_group_size"] == 32
    assert "wqmm.scale.product" in " ".join(site.plan.notes)
    assert_near(actual, wanted, 4e-3)


def test_the_product_in_the_float16_that_a_user_asked_for():
    def f(x):
        return (x @ CODES.float().t()) * 600.0

    for target in CHIPS:
        actual, wanted, site = fused(f, X * 1e-3, target=target, allow=("numerics.float16",))
        assert site.fused
        assert "computed in float16, which overflows above 65504" in site.numerics.why
        assert_near(actual, wanted, 4e-3)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("weight_scale", "x_scale", "after"), [(1e-45, 0.05, 1.0), (1e-30, 1e-12, 1.0), (1e-45, 1.0, 0.05)]
)
def test_scales_whose_product_vanishes(weight_scale, x_scale, after, target):
    """Each factor is a float32, their product is none; the graph multiplies sums that are far larger."""

    w, t, s = (torch.tensor([value]) for value in (weight_scale, x_scale, after))

    def quantized(x):
        return linear(codes(x, 0.05).float() * t, CODES.float() * w) * s * 1e30

    def plain(x):
        return linear(x * 1e25, CODES.float() * w) * s * 1e-10

    for f in (quantized, plain):
        actual, wanted, site = fused(f, X, target=target)
        if bool(wanted.any()):
            assert_near(actual, wanted, 1e-2)  # the graph rounds below the normal numbers
        assert not site.fused or math.isfinite(site.numerics.absolute)


def test_k_scales_that_float16_does_not_hold():
    """A scale along K goes onto x, where float16 would make it 0."""
    of_k = torch.ones(1, K)
    of_k[0, :4] = 1e-9

    def g(x):
        return linear(x, CODES.float() * SCALE * of_k)

    x = X.clone()
    x[:, :4] *= 1e9
    actual, wanted, _ = fused(g, x, target="cpu")
    assert_near(actual, wanted, 1e-4)
    _, _, site = fused(g, X, target="ascend910b", allow=("numerics.float16",))
    assert not site.fused or site.numerics.relative < 0.02


@pytest.mark.parametrize("k", [131071, 131072, 140000])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_accumulator_of_the_reference_kernels(k, sign):
    """The int32 sum of 131071 full products is the largest that can't wrap."""
    c = torch.full((2, k), -128, dtype=torch.int8)

    def f(x):
        return torch.clamp(torch.round(x), -128, 127) @ (c.float() * 1e-3).t()

    actual, wanted, site = fused(f, torch.full((2, k), -128.0 * sign), target="cpu")
    assert_near(actual, wanted, 1e-3)  # the graph's own float32 sum is that far off
    integer = site.plan.op == "npu_quant_matmul"
    assert integer == (k <= 131071)
    assert integer or "cpu.qmm.k.range" in " ".join(site.plan.notes)


def test_the_rule_of_the_accumulator():
    for k, legal in ((131071, True), (131072, False)):
        arguments = {
            "x1": qp.TensorSpec(torch.int8, (16, k)),
            "x2": qp.TensorSpec(torch.int8, (k, 32)),
            "scale": qp.TensorSpec(torch.float32, (32,)),
            "output_dtype": torch.float32,
        }
        verdict = qp.check_op("npu_quant_matmul", target="cpu", **arguments)
        assert verdict.legal == legal
        assert {r.rule for r in verdict.rejects} == (set() if legal else {"cpu.qmm.k.range"})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bias", [3000.0, -60000.0, -math.inf, math.nan])
def test_a_constant_bias_beside_a_small_scale(bias, target):
    """In units of the scale it is no int32; the matmul is fused all the same."""
    b = torch.where(torch.arange(N) % 4 == 0, bias, 0.25).half()

    def f(x):
        return linear(codes(x, 1e-3).half() * 1e-3, CODES.half() * 1e-6) + b

    actual, wanted, site = fused(f, X.half() * 0.05, target=target)
    assert site.fused
    assert site.plan.op == "npu_quant_matmul"
    assert site.plan.call["bias"] is None or site.plan.call["bias"].dtype != torch.int32
    assert_near(actual, wanted, 2e-3)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("factor", [math.inf, math.nan, 0.0])
@pytest.mark.parametrize("quantized", [True, False])
def test_factors_that_are_not_finite(quantized, factor, target):
    def f(x):
        return linear(codes(x).half() * 0.02 if quantized else x, CODES.half() * SCALE.half()) * factor

    actual, wanted, _ = fused(f, X.half(), target=target)
    assert_near(actual.nan_to_num(), wanted.nan_to_num(), 1e-3) if factor == 0 else None


# -- why not the better operator -----------------------------------------------------------------------------------


def notes(f, *args, target="ascend910b"):
    _, _, site = fused(f, *args, target=target)
    assert site.fused
    return site.plan.op, " ".join(site.plan.notes)


def test_an_activation_that_is_rounded_and_not_clamped():
    def f(x):
        return linear(torch.round(x / 0.02) * 0.02, CODES.half() * SCALE.half())

    op, why = notes(f, X.half())
    assert op == "npu_weight_quant_batchmatmul"
    assert "read.activation.unbounded" in why


def test_an_activation_whose_scale_varies_along_k():
    t = torch.rand(K, generator=G).half() * 0.01 + 0.01

    def f(x):
        q = torch.clamp(torch.round(x / t), -128, 127).to(torch.int8)
        return linear(q.half() * t, CODES.half() * SCALE.half())

    op, why = notes(f, X.half())
    assert op == "npu_weight_quant_batchmatmul"
    assert "qmm.activation.scale" in why


def test_a_quantize_that_is_not_folded():
    def f(x):
        y = linear(codes(x).half() * 0.02, CODES.half() * SCALE.half())
        return torch.clamp(torch.round(torch.tanh(y) / 0.01), -128, 127).to(torch.int8)

    op, why = notes(f, X.half())
    assert op == "npu_quant_matmul"
    assert "the quantize that follows is not part of the matmul" in why
    assert "tanh" in why


def test_nothing_is_said_where_nothing_was_left():
    def f(x):
        y = linear(codes(x).half() * 0.02, CODES.half() * SCALE.half())
        return torch.clamp(torch.round(y / 0.05), -128, 127).to(torch.int8)

    assert notes(f, X.half()) == ("npu_quant_matmul", "")
