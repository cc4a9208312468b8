"""What the user's word gains: a re-fitted weight, a site in float16, the product alone in float16."""

import dataclasses
import math

import pytest
import torch

from quantpass.chips import chip_named
from quantpass.graph.writes import writes_of
from quantpass.planning.candidates import FLOAT32_STEPS
from quantpass.planning.choose import Others, plan_site
from quantpass.planning.composition import compositions
from quantpass.planning.half_product import half_product_candidates
from quantpass.planning.options import Options
from quantpass.planning.permissions import plan_as_allowed
from quantpass.planning.refit import refit
from tests.unit.graphs import evaluate
from tests.unit.planning.test_plans import CODES, SCALE, K, N, Site, draw, integer, rand, randn, weight_only

HALF, REFIT = "numerics.float16", "weights.refit"
GROUPS = (rand(K // 4, N) + 0.01).repeat_interleave(4, 0)
GROUPED = {"codes": CODES, "scale": GROUPS}


def planned(site, target="ascend310p", **options):
    chosen = Options(target=target, **options)
    return plan_as_allowed(site.reading, chosen.chip, chosen, writes_of(site.t.graph, site.t.values.mutated), Others())


def offers(found):
    return [(o.allow, o.sqnr) for o in found.offers]


# -- what is offered ---------------------------------------------------------------------------------------------------


def test_nothing_where_the_site_is_legal_or_the_target_is_no_chip():
    for site, target in ((weight_only(codes=CODES), "ascend310p"), (weight_only(**GROUPED), "cpu")):
        chosen = Options(target=target)
        writes = writes_of(site.t.graph, site.t.values.mutated)
        alone = plan_site(site.reading, chosen.chip, chosen, writes, Others())
        for found in (
            planned(site, target),
            planned(site, target, allow=(REFIT,)),
            planned(site, target, allow=(HALF,)),
        ):
            assert found.plan.fixups == alone.plan.fixups and found.rejects == found.offers == ()
            assert found.plan.refit is None and found.numerics == alone.numerics


def test_the_fewest_permissions_that_help():
    def fitted(site):
        return refit(site.reading.weight, thorough=False).refit.sqnr

    half, single = weight_only(**GROUPED), weight_only(torch.float32, **GROUPED)
    assert offers(planned(half)) == [((REFIT,), fitted(half))]
    assert offers(planned(weight_only(torch.float32, codes=CODES))) == [((HALF,), math.inf)]
    assert offers(planned(single)) == [((HALF, REFIT), fitted(single))]
    assert offers(planned(single, allow=(HALF,))) == [((HALF, REFIT), fitted(single))]


def test_an_offer_is_told_with_the_reason():
    found = planned(weight_only(**GROUPED))
    told = {r.rule: r for r in found.rejects}
    assert len(told) == len(found.rejects)
    assert "weights.refit" in told[REFIT].hint and "the chip has no form" in told[REFIT].fact
    found = planned(weight_only(torch.bfloat16, codes=CODES))
    (half,) = [r for r in found.rejects if r.rule == HALF]
    assert half.fact == "the activation is bfloat16" and repr((HALF,)) in half.hint
    both = planned(weight_only(torch.bfloat16, **GROUPED))
    assert REFIT in {r.rule for r in both.rejects}
    rest = planned(weight_only(torch.bfloat16, **GROUPED), allow=(REFIT,))
    assert HALF in {r.rule for r in rest.rejects}


def test_a_fit_that_is_too_coarse_is_told_and_not_offered():
    """One outlier in a column takes the resolution from all others."""
    k = 16384
    scale = torch.full((k, N), 0.01)
    scale[:4] *= 3000
    inputs = randn(5, k).half(), draw(k, N), scale
    site = Site(lambda x, c, s: x @ (c.half() * s.half()), *inputs, known=2)
    found = planned(site)
    assert found.offers == ()
    sqnr = refit(site.reading.weight, thorough=False).refit.sqnr
    assert sqnr < 30
    (said,) = [r for r in found.rejects if r.rule == REFIT]
    assert f"{sqnr:.1f} dB" in said.fact and f"'{REFIT}:{math.floor(sqnr)}'" in said.hint


# -- what is done ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_is_fitted_where_that_is_allowed(dtype):
    allow = (REFIT,) if dtype == torch.float16 else (REFIT, HALF)
    site = weight_only(dtype, **GROUPED)
    found = planned(site, allow=allow)
    assert found.plan.refit == refit(site.reading.weight).refit and found.offers == ()
    actual, graph = evaluate(found.plan.value, site.values).double(), site.values[found.plan.output].double()
    x = site.inputs[0].double().abs().sum(-1, keepdim=True)
    allowed = found.numerics.of_x * x + (found.numerics.relative + 2e-2) * graph.abs().max()
    assert ((actual - graph).abs() <= allowed).all()


def test_only_as_coarse_as_the_limit_allows():
    site = weight_only(**GROUPED)
    sqnr = refit(site.reading.weight).refit.sqnr
    assert planned(site, allow=(f"{REFIT}:{math.floor(sqnr)}",)).plan is not None
    found = planned(site, allow=(f"{REFIT}:{math.ceil(sqnr)}",))
    assert found.plan is None and found.offers == ()
    (said,) = [r for r in found.rejects if r.rule == REFIT]
    assert f"at least {math.ceil(sqnr)} dB" in said.want and f"'{REFIT}:{math.floor(sqnr)}'" in said.hint


def test_weights_that_can_not_be_fitted():
    def reasons(site, target="ascend310p"):
        return [r.fact for r in planned(site, target, allow=(REFIT,)).rejects if r.rule == REFIT]

    plain = weight_only(torch.float32, codes=CODES)  # nothing to fit: the activation is in the way
    assert reasons(plain) == []
    runtime = Site(
        lambda x, c, s: x @ (c.half().reshape(2, -1, N) * s[:, None]).reshape(K, N),
        *(randn(5, K).half(), CODES, torch.stack([SCALE, SCALE]).half()),
        known=0,
    )
    assert reasons(runtime) == []


LEVELS = torch.linspace(-1, 1, 256) ** 3
"""Codes by a table that is no line: a weight without a form."""


def test_a_weight_without_a_form_is_fitted_from_its_value():
    codes = (CODES.int() + 128).to(torch.uint8)
    site = Site(lambda x, i, t: x @ t[i.long()].half(), randn(5, K).half(), codes, LEVELS, known=2)
    assert site.reading.own_value is not None
    assert [allow for allow, _ in offers(planned(site))] == [(REFIT,)]
    assert planned(site, allow=(REFIT,)).plan.refit is not None
    spoilt = dataclasses.replace(site.reading, own_value=lambda: torch.full((K, N), math.nan))
    site.reading = spoilt
    found = planned(site, allow=(REFIT,))
    assert found.plan is None and "the weight holds values that are not finite" in [r.fact for r in found.rejects]


# -- the product alone -------------------------------------------------------------------------------------------------


def products(site, target="ascend310p", **options):
    reading, chosen = site.reading, Options(target=target, **{"allow": (HALF,), **options})
    prefixes = compositions(reading.node, reading.contraction.product_dtype, reading.epilogue.steps)
    return list(half_product_candidates(reading, prefixes, chip_named(target), chosen))


def by_rows(dtype=torch.float32, offset=None):
    def after(y, r, s):
        y = y if offset is None else y + offset
        return (y.float() * r * s).to(dtype)

    return integer(after, rand(32, 1) + 0.1, SCALE, known=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("offset", [None, 40000])
def test_products_are_scaled_in_the_graph(dtype, offset):
    site = by_rows(dtype, offset)
    calls = products(site)
    assert calls
    for c in calls:
        graph, actual = (v.double() for v in (site.values[c.composition.output], evaluate(c.value, site.values)))
        assert c.numerics.relative == 2.0**-11 + FLOAT32_STEPS and c.numerics.kind == "bounded"
        sums = CODES.double().abs().sum(0).max() * 127 + (offset or 0)
        allowed = c.numerics.relative * (graph.abs() + (dtype == torch.float16) * graph.abs().max())
        assert torch.isfinite(actual).all() and sums > 65504
        assert ((actual - graph).abs() <= allowed + c.numerics.absolute).all()
        assert c.call.args["output_dtype"] == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "after", [lambda y, r: y * r, lambda y, r: (y + 3.0) * r, lambda y, r: y.relu() * r, torch.mul]
)
def test_a_product_of_codes_is_not_rounded_before_it_is_scaled(after, dtype):
    """Codes multiplied as floats reach a million, whatever they are multiplied by afterwards."""
    site = Site(
        lambda x, r, w: after(x.to(dtype) @ w.to(dtype), r.to(dtype)), draw(5, K), rand(5, 1) * 0.01, CODES, known=1
    )
    found = planned(site, allow=(HALF,))
    assert found.plan.op == "npu_quant_matmul"
    graph, actual = (v.double() for v in (site.values[found.plan.output], evaluate(found.plan.value, site.values)))
    assert torch.isfinite(actual).all()
    step = torch.finfo(dtype).eps * 4 + 2.0**-10
    assert ((actual - graph).abs() <= step * graph.abs().max()).all()


def test_where_the_product_alone_is_not_asked_for():
    site = by_rows()
    assert products(site, allow=()) == [] == products(site, "cpu")
    assert products(weight_only(codes=CODES)) == []  # no integer product
    zero = Site(lambda x, w, s: (x.float() * 0.5) @ ((w.float() - 3) * s), draw(5, K), CODES, SCALE, known=2)
    assert products(zero) == []


def test_strict_keeps_the_roundings_of_the_graph():
    """A cast between two factors rounds where one product in float32 would not."""
    twice = integer(lambda y, r, s: (y.float() * r).half().float() * s, rand(32, 1) + 0.1, SCALE, known=2)
    strict, vendor = ({c.composition.length for c in products(twice, numerics=n)} for n in ("strict", "vendor"))
    assert max(strict) < max(vendor)
