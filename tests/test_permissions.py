"""What ``allow`` permits beyond rules: re-fitted weights and float16, their cost told, and never without being asked."""

import importlib
import re
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

import quantpass as qp
from quantpass.planning import permissions
from quantpass.planning.refit import SAMPLE
from tests.helpers import CHIPS

K, N, GROUP = 64, 48, 32
REFIT, HALF = "weights.refit", "numerics.float16"


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def codes(low=-8, high=7):
    return torch.randint(low, high + 1, (N, K), generator=torch.Generator().manual_seed(high))


class Layer(torch.nn.Module):
    """A Linear whose weight is one of several forms, most of which the 310P has not."""

    def __init__(self, form="groups", dtype=torch.float16, bias=1.0, scale=0.01):
        super().__init__()
        self.form, self.dtype = form, dtype
        bits = {"table": (0, 15), "per channel": (-127, 127)}.get(form, (-8, 7))
        self.register_buffer("codes", codes(*bits).to(torch.int8))
        shape = {"per channel": (N, 1), "along K": (N, K), "groups along N": (2, 1, K)}
        steps = (rand(*shape.get(form, (N, K // GROUP, 1))) + 0.3) * scale
        self.register_buffer("scale", steps.to(dtype))
        self.register_buffer("zero", torch.randint(-3, 4, steps.shape).to(dtype))
        self.register_buffer("order", torch.randperm(K, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("levels", randn(16).sort().values.to(dtype))
        self.bias = torch.nn.Parameter((randn(N) * bias).to(dtype), requires_grad=False)

    def weight(self):
        c = self.codes
        if self.form in ("groups", "zero points by group", "in order of activations"):
            c = c.view(N, -1, GROUP).to(self.dtype)
            w = ((c - self.zero if self.form == "zero points by group" else c) * self.scale).view(N, K)
            return w[:, self.order] if self.form == "in order of activations" else w
        if self.form == "groups along N":
            return (c.view(2, N // 2, K).to(self.dtype) * self.scale).view(N, K)
        if self.form == "table":
            return self.levels[c.long()] * self.scale.expand(-1, -1, GROUP).reshape(N, K)
        return c.to(self.dtype) * self.scale

    def forward(self, x):
        return linear(x, self.weight(), self.bias)


def run(model, x, target, **options):
    backend = qp.backend(target=target, **options)
    torch._dynamo.reset()
    with torch.no_grad():
        y = torch.compile(model, backend=backend)(x)
    return y, backend.report


def within_the_bound(y, x, w, bias, numerics):
    """Element by element, against float64."""
    x, w, bias = x.double(), w.double(), bias.double()
    exact, size = x @ w.t() + bias, x.abs() @ w.t().abs() + bias.abs()
    bound = numerics.relative * size + numerics.of_x * x.abs().sum(-1, keepdim=True) + numerics.absolute
    bound = bound + torch.finfo(y.dtype).eps / 2 * exact.abs()
    return bool(((y.double() - exact).abs() <= bound).all())


FORMS = [
    "groups",
    "zero points by group",
    "in order of activations",
    "groups along N",
    "along K",
    "table",
]


# -- re-fitted weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_that_the_chip_has_no_form_for(form):
    model, x = Layer(form), randn(5, K).half()
    (plain,) = qp.explain(model, (x,), target="ascend310p").sites
    assert not plain.fused
    y, report = run(model, x, "ascend310p", allow=(REFIT,))
    (site,) = report.sites
    assert site.fused and site.plan.weight_format == "NZ" and site.plan.call["weight"].dtype == torch.int8
    assert site.plan.call["antiquant_scale"].shape == (N,) and not site.plan.call["antiquant_group_size"]
    assert site.numerics.kind == "bounded" and "re-fitted" in str(site.numerics)
    assert within_the_bound(y, x, model.weight(), model.bias, site.numerics)


def test_codes_of_more_than_eight_bits():
    stored, steps, zero = codes(-512, 511).to(torch.int16), rand(N) * 0.01 + 0.01, torch.zeros(N, dtype=torch.int64)
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers the operators
    dequantize = torch.ops.quantized_decomposed.dequantize_per_channel
    model = _Wrapped(lambda x: linear(x, dequantize(stored, steps, zero, 0, -512, 511, torch.int16).half()))
    x = randn(5, K).half()
    (refused,) = qp.explain(model, (x,), target="ascend310p").sites
    assert [r.rule for r in refused.rejects] == ["read.weight.bits", REFIT]
    y, report = run(model, x, "ascend310p", allow=(REFIT,))
    w = stored.double() * steps.double()[:, None]
    assert within_the_bound(y, x, w, torch.zeros(N), report.sites[0].numerics)


@pytest.mark.parametrize("form", FORMS)
def test_the_bound_is_no_larger_than_the_largest_error_makes_it(form):
    """Rows with a single 1 give the weight itself: what the re-fit changed is more than the rest of the bound."""
    model, x = Layer(form, bias=0.0), torch.eye(K).half()
    y, report = run(model, x, "ascend310p", allow=(REFIT,))
    (site,) = report.sites
    assert site.plan.refit.largest_error < site.numerics.of_x <= 1.1 * site.plan.refit.largest_error
    assert within_the_bound(y, x, model.weight(), model.bias, site.numerics)
    assert not within_the_bound(y, x, model.weight(), model.bias, replace(site.numerics, of_x=0.0))


def test_the_cost_is_told():
    model, x = Layer(), randn(5, K).half()
    _, report = run(model, x, "ascend310p", allow=(REFIT,))
    (site,) = report.sites
    cost = f"SQNR {site.plan.refit.sqnr:.1f} dB in the worst column, largest error {site.plan.refit.largest_error:.3g}"
    assert cost in str(site.numerics) and cost in str(report)
    assert report.as_dict()["sites"][0]["plan"]["refit"]["sqnr"] == site.plan.refit.sqnr


def test_a_limit_just_below_and_just_above_the_sqnr():
    model, x = Layer(), randn(5, K).half()
    (site,) = qp.explain(model, (x,), target="ascend310p", allow=(REFIT,)).sites
    sqnr = site.plan.refit.sqnr
    (below,) = qp.explain(model, (x,), target="ascend310p", allow=(f"{REFIT}:{sqnr - 1e-6:.9f}",)).sites
    (above,) = qp.explain(model, (x,), target="ascend310p", allow=(f"{REFIT}:{sqnr + 1e-6:.9f}",)).sites
    assert below.fused and not above.fused
    (reject,) = [r for r in above.rejects if r.rule == REFIT]
    assert f"SQNR {sqnr:.1f} dB" in reject.fact and "at least" in reject.want
    (hinted,) = re.findall(r"'(weights\.refit:\d+)'", reject.hint)
    assert qp.explain(model, (x,), target="ascend310p", allow=(hinted,)).fused == 1


def test_thirty_decibels_are_asked_for_where_nothing_is_said():
    """One outlier in each column leaves half a step for the others."""
    stored, steps = torch.ones(N, 1024, dtype=torch.int8), torch.full((N, 32, 1), 0.005).half()
    stored[:, :GROUP], stored[:, 0], steps[:, 0] = 0, 7, 1.27 / 7
    model = _Wrapped(lambda x: linear(x, (stored.view(N, 32, GROUP).half() * steps).view(N, 1024)))
    x = randn(5, 1024).half()
    plain = qp.explain(model, (x,), target="ascend310p")
    assert not plain["ascend310p"].offers and REFIT in {r.rule for r in plain.sites[0].rejects}
    (refused,) = qp.explain(model, (x,), target="ascend310p", allow=(REFIT,)).sites
    assert "at least 30 dB" in next(r.want for r in refused.rejects if r.rule == REFIT)
    (site,) = qp.explain(model, (x,), target="ascend310p", allow=(f"{REFIT}:0",)).sites
    assert site.fused and site.plan.refit.sqnr < 30


@pytest.mark.parametrize("target", ["ascend910b", "ascend910_93"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["groups", "zero points by group", "in order of activations", "per channel"])
def test_nothing_changes_where_the_chip_has_a_form(form, dtype, target):
    model, x = Layer(form, dtype), randn(5, K).to(dtype)
    plain, plain_report = run(model, x, target)
    allowed, report = run(model, x, target, allow=(REFIT, HALF))
    assert str(report) == str(plain_report) and torch.equal(plain, allowed)
    assert report.fused == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_cpu_is_no_chip(form, dtype):
    model, x = Layer(form, dtype), randn(5, K).to(dtype)
    plain, allowed = (qp.explain(model, (x,), target="cpu", allow=allow) for allow in ((), (REFIT, HALF)))
    assert str(plain) == str(allowed) and not plain.offers


def test_a_weight_of_the_run_can_not_be_fitted():
    model, x = Layer(), randn(5, K).half()

    def forward(x, stored, steps):
        return linear(x, (stored.view(N, -1, GROUP).half() * steps).view(N, K))

    known = qp.explain(model, (x,), target="ascend310p", allow=(REFIT,))
    assert known.fused == 1
    program = torch.export.export(_Wrapped(forward), (x, model.codes, model.scale))
    report = qp.explain(program, target="ascend310p", allow=(REFIT,))
    assert not report.fused and not report.offers
    assert not qp.explain(program, target="ascend310p").offers


def test_that_only_the_run_knows_the_weight_is_the_reason():
    model, x = Layer("per channel", torch.bfloat16), randn(5, K).bfloat16()
    program = torch.export.export(
        _Wrapped(lambda x, steps: linear(x, (model.codes.bfloat16() - 3) * steps)), (x, model.scale)
    )
    report = qp.explain(program, target="ascend310p", allow=(HALF, REFIT))
    assert not report.fused
    facts = [r.fact for s in report.sites for r in s.rejects if r.rule == REFIT]
    assert facts == ["the weight is known only when the graph runs"]


class _Wrapped(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


# -- float16 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["per channel", "groups", "table"])
def test_computed_in_float16(form, dtype):
    model, x = Layer(form, dtype), randn(5, K).to(dtype)
    assert not qp.explain(model, (x,), target="ascend310p").fused
    y, report = run(model, x, "ascend310p", allow=(HALF, REFIT))
    (site,) = report.sites
    assert site.plan.call["x"].dtype == torch.float16 and y.dtype == dtype
    assert "overflows above 65504" in str(site.numerics) and "computed in float16, as allow permits" in str(report)
    assert within_the_bound(y, x, model.weight(), model.bias, site.numerics)


def test_a_result_beyond_float16_is_limited_as_the_contract_says():
    model, x = Layer("per channel", torch.bfloat16), torch.full((1, K), 3e4).bfloat16()
    y, _ = run(model, x, "ascend310p", allow=(HALF,))
    with torch.no_grad():
        plain = model(x)
    assert float(plain.abs().max()) > 65504 and float(y.abs().max()) == float(torch.tensor(65504.0).bfloat16())


@pytest.mark.parametrize(("bias", "inside"), [(1.0, True), (1e5, False)])
def test_a_bias_that_float16_does_not_hold_stays_outside(bias, inside):
    model, x = Layer("per channel", torch.bfloat16, bias=bias), randn(5, K).bfloat16()
    y, report = run(model, x, "ascend310p", allow=(HALF,))
    (site,) = report.sites
    assert site.fused is inside or site.plan.call["bias"] is None
    assert bool(torch.isfinite(y).all())
    if not site.fused:
        assert "wqmm.bias.value" in {r.rule for r in site.rejects}


@pytest.mark.parametrize(("scale", "fused"), [(1e-2, True), (1e-9, False)])
def test_scales_that_float16_does_not_hold_are_refused(scale, fused):
    model, x = Layer("per channel", torch.bfloat16, scale=scale), randn(5, K).bfloat16()
    (site,) = qp.explain(model, (x,), target="ascend310p", allow=(HALF,)).sites
    assert site.fused is fused
    assert fused or "wqmm.scale.value" in {r.rule for r in site.rejects}
    assert bool(qp.explain(model, (x,), target="ascend310p").offers) is fused


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [64, 1024])
def test_an_integer_product_with_row_scales(k, dtype):
    """Dynamic W8A8, codes as large as they get: no product leaves float16's range, and each is rounded once."""
    g = torch.Generator().manual_seed(0)
    w = torch.randint(-128, 128, (k, N), generator=g).to(torch.int8)
    w[:, 0] = 127
    scale = (torch.rand(N, generator=g) * 0.01).float()

    def forward(x):
        rows = x.float().abs().amax(-1, keepdim=True) / 127
        q = (x.float() / rows).round().clamp(-128, 127).to(torch.int8)
        return (torch._int_mm(q, w).float() * rows * scale).to(x.dtype)

    x = torch.randn(32, k, generator=g)
    x[0] = 5.0
    x = x.to(dtype)
    model = _Wrapped(forward)
    y, report = run(model, x, "ascend310p", allow=(HALF,))
    (site,) = report.sites
    assert site.plan.call["output_dtype"] == torch.float16 and "rounded to float16" in str(site.numerics)
    with torch.no_grad():
        rows = x.float().abs().amax(-1, keepdim=True) / 127
        q = (x.float() / rows).round().clamp(-128, 127).double()
    exact = (q @ w.double()) * rows.double() * scale.double()
    size = (q.abs() @ w.double().abs()) * rows.double() * scale.double()
    slack = site.numerics.relative * size + 3 * torch.finfo(dtype).eps * exact.abs()
    assert float(exact.abs().max()) > 1 and bool(((y.double() - exact).abs() <= slack).all())


# -- offers ------------------------------------------------------------------------------------------------------------


def test_what_each_permission_would_gain_is_said_before_it_is_given():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (
                Layer("per channel", torch.bfloat16),
                *(Layer(f, torch.bfloat16) for f in FORMS[:2]),
            )

        def forward(self, x):
            return self.a(x), self.b(x), self.c(x)

    model, x = Model(), randn(5, K).bfloat16()
    report = qp.explain(model, (x,), target=["ascend310p", "ascend910b"])
    half, both = report["ascend310p"].offers
    assert half == f"1 of 3 with allow=('{HALF}',)"
    said = re.fullmatch(rf"3 of 3 with allow=\('{HALF}', '{REFIT}'\), SQNR at least ([\d.]+) dB", both)
    assert said and f"    {both}\n" in str(report)
    assert not report["ascend910b"].offers
    given = qp.explain(model, (x,), target="ascend310p", allow=(HALF, REFIT))
    assert given.fused == 3 and not given.offers
    assert min(s.plan.refit.sqnr for s in given.sites if s.plan.refit) >= float(said[1])
    one = qp.explain(model, (x,), target="ascend310p", allow=(HALF,))
    assert one.fused == 1 and one.offers[0].startswith(f"3 of 3 with allow=('{HALF}', '{REFIT}'), SQNR")
    assert all(o["allow"] for s in report.as_dict()["sites"] for o in s["offers"])


class Wide(torch.nn.Module):
    """A Linear of many columns; one weight of a column may be so large that a re-fit rounds the others away."""

    def __init__(self, spoilt):
        super().__init__()
        n, g = 8 * SAMPLE, torch.Generator().manual_seed(0)
        codes = torch.randint(-8, 8, (n, 32, GROUP), dtype=torch.int8, generator=g)
        scale = torch.rand(n, 32, 1, generator=g) * 1e-3 + 5e-3
        scale[spoilt, 0] *= 150
        codes[spoilt, 0] = 7 * (torch.arange(GROUP) == 0).to(torch.int8)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.half())

    def forward(self, x):
        return linear(x, (self.codes.half() * self.scale).flatten(1))


@pytest.mark.parametrize(("spoilt", "seen"), [(slice(0, 0), None), (slice(1, 2), False), (slice(0, 1), True)])
def test_compiling_without_permission_fits_a_sample_and_says_so(spoilt, seen, monkeypatch):
    """What ``explain`` says is measured on every column."""
    model, x = Wide(spoilt), randn(5, 32 * GROUP).half()
    program = torch.export.export(model, (x,))
    (least,) = (r.sqnr for r in _refits(qp.explain(program, target="ascend310p", allow=(f"{REFIT}:0",))))
    with monkeypatch.context() as patched:
        patched.setattr(permissions, "refit", _never)
        report = qp.fuse(program, target="ascend310p")
    (site,) = report.sites
    assert not report.fused and REFIT in {r.rule for r in site.rejects}
    hint = next(r.hint for r in site.rejects if r.rule == REFIT)
    if seen:
        assert not report.offers and "not all columns were looked at, explain looks at all" in hint
    else:
        (offer,) = site.offers
        assert offer.sampled and 30 < offer.sqnr < 60
        assert re.fullmatch(rf"1 of 1 with allow=\('{REFIT}',\), SQNR about [\d.]+ dB", *report.offers)
    measured = qp.explain(program, target="ascend310p")
    if seen is None:
        (offer,) = measured.sites[0].offers
        assert not offer.sampled and offer.sqnr == pytest.approx(least, abs=0.5)
        assert "SQNR at least" in measured.offers[0]
    else:
        assert not measured.offers and least < 30
        assert "not all columns" not in str(measured)


def _refits(report):
    return [s.plan.refit for s in report.sites]


def _never(*args, **options):
    raise AssertionError("a whole weight was fitted, and nobody permitted it")


def test_an_offer_is_a_hint_of_the_refusal():
    model, x = Layer(), randn(5, K).half()
    (site,) = qp.explain(model, (x,), target="ascend310p").sites
    (reject,) = [r for r in site.rejects if r.rule == REFIT]
    assert "allow=('weights.refit',) would have it fused" in reject.hint
    assert [o.allow for o in site.offers] == [(REFIT,)]


def test_nothing_is_offered_that_does_not_help():
    """The 310P has no matrix for each batch, in whatever dtype."""
    product = _Wrapped(lambda x: x.bfloat16() @ (stored.bfloat16() * 0.1))
    stored = torch.stack([codes(), codes(-7, 6)]).transpose(1, 2).to(torch.int8)
    report = qp.explain(product, (randn(2, 5, K),), target="ascend310p")
    assert report.total == 1 and not report.fused and not report.offers and not report.sites[0].offers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_verify_measures_it(form, dtype):
    model, x = Layer(form, dtype), randn(5, K).to(dtype)
    found = qp.verify(model, (x,), target="ascend310p", allow=(HALF, REFIT))
    found.require()
    assert "re-fitted" in str(found)


def test_every_documented_chip_can_be_asked():
    for target in CHIPS:
        assert qp.backend(target=target, allow=(REFIT, HALF, f"{REFIT}:35"))
