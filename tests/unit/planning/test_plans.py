"""Planning: every call that is considered computes the site within the bound it states, legal on a chip or not."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from quantpass.chips import chip_named
from quantpass.chips.legality import judge
from quantpass.chips.quant_matmul import QMM
from quantpass.graph import expr as ex
from quantpass.graph.expr import Const, Ref
from quantpass.graph.records import Refit, Weight
from quantpass.graph.writes import writes_of
from quantpass.patterns.affine import Affine
from quantpass.patterns.proof import FLOAT64
from quantpass.patterns.sites import find_sites
from quantpass.planning.candidates import Candidate, flattened, rows_of, weight_layouts
from quantpass.planning.choose import Others, plan_site
from quantpass.planning.composition import compositions
from quantpass.planning.options import Options
from quantpass.planning.quant_matmul import quant_matmul_candidates
from quantpass.planning.quant_product import Products, accumulator_problem
from quantpass.planning.weight_quant_matmul import (
    _as_int4,
    _bias_problem,
    _zero_point_survives,
    weight_quant_candidates,
)
from tests.unit.graphs import Traced, evaluate, node_of

M, K, N = 5, 64, 32
TARGETS = ("ascend310p", "ascend910b", "cpu")
FP19 = 2.0**-10
STEPS = 2.0**-22


def draw(*shape, low=-127, high=127):
    g = torch.Generator().manual_seed(sum(shape) + high)
    return torch.randint(low, high + 1, shape, generator=g).to(torch.int8 if high < 128 else torch.uint8)


def rand(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


CODES = draw(K, N)
SCALE = rand(N) * 0.01 + 0.001
BIAS = randn(N)
X = draw(M, K)


class Site:
    """The one site of a traced function, with the values of a run."""

    def __init__(self, function, *inputs, known):
        self.t = Traced(function, *inputs, known=known)
        (self.reading,) = find_sites(self.t.graph, self.t.values, self.t.dialects)
        self.values = self.t.run(*inputs)
        self.inputs = inputs

    def candidates(self, target, **options):
        """Everything that planning considers, calls and refusals."""
        reading, chosen = self.reading, Options(target=target, **options)
        chip = chip_named(target)
        assert not reading.rejects, reading.rejects
        assert isinstance(reading.weight, Weight)
        prefixes = compositions(reading.node, reading.contraction.product_dtype, reading.epilogue.steps)
        if reading.contraction.whole:
            prefixes = [p for p in prefixes if p.length >= len(reading.contraction.own)]
        found = []
        if isinstance(reading.activation, Affine):
            found += quant_matmul_candidates(reading, prefixes, chip, chosen)
        return [*found, *weight_quant_candidates(reading, prefixes, chip, chosen)]

    def calls(self, target="cpu", **options):
        return [c for c in self.candidates(target, **options) if isinstance(c, Candidate)]

    def refusals(self, target="cpu", **options):
        return [c.rule for c in self.candidates(target, **options) if not isinstance(c, Candidate)]

    def plan(self, target="cpu", **options):
        return plan_site(
            self.reading,
            chip_named(target),
            Options(target=target, **options),
            writes_of(self.t.graph, self.t.values.mutated),
        )

    def check(self, target="cpu", **options):
        """Every call computes what it replaces."""
        calls = self.calls(target, **options)
        for c in calls:
            expected = self.values[c.composition.output]
            actual = evaluate(c.value, self.values)
            assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
            assert ex.dtype_of(c.value) == actual.dtype and tuple(ex.shape_of(c.value)) == tuple(actual.shape)
            self._close(actual, expected, c)
            if c.int8_codes is not None:
                codes = evaluate(c.int8_codes, self.values)
                assert codes.dtype == torch.int8
                moved = 128 if c.composition.requantize.low >= 0 else 0
                assert torch.equal(codes.int() + moved, actual.int())
        return calls

    def _close(self, actual, expected, c):
        if c.composition.requantize is not None:
            off = (actual.double() - expected.double()).abs()
            assert off.max() <= 1 and (off > 0).double().mean() < 0.2
            return
        if not actual.is_floating_point():
            assert torch.equal(actual, expected)
            return
        graph = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5}[expected.dtype]
        size = expected.double().abs().mean()
        allowed = (graph + 8 * c.numerics.relative) * size + 2 * c.numerics.absolute
        assert ((actual.double() - expected.double()).abs() <= 4 * allowed).all()


def weight_only(dtype=torch.float16, known=None, **parts):
    """``x @ ((codes - zero) * scale) + bias`` with the parts that are given."""
    parts = {"scale": SCALE, **parts}
    names = list(parts)

    def function(x, *values):
        p = dict(zip(names, values, strict=True))
        w = p["codes"].to(x.dtype)
        if "zero" in p:
            w = w - p["zero"].to(x.dtype)
        w = w * p["scale"].to(x.dtype)
        y = x @ w
        if "after" in p:
            y = y * p["after"].to(x.dtype)
        return y + p["bias"].to(x.dtype) if "bias" in p else y

    x = randn(M, K).to(dtype)
    return Site(function, x, *parts.values(), known=len(parts) if known is None else known)


def integer(after, *more, known=None, x=X, codes=CODES):
    """``after(int32 product, *more)``."""
    inputs = (codes, *more)
    return Site(
        lambda x, w, *more: after(torch._int_mm(x, w), *more),
        draw(32, K),
        *inputs,
        known=len(inputs) if known is None else known,
    )


def static_w8a8(dtype, zero=0, unsigned=False, bias=BIAS, x_scale=0.03, after=lambda y: y, known=None, w_scale=SCALE):
    low, high, container = (0, 255, torch.uint8) if unsigned else (-128, 127, torch.int8)

    def function(x, codes, scale, bias):
        q = ((x / x_scale).round() + zero).clamp(low, high).to(container)
        real = (q.to(x.dtype) - zero) * x_scale
        y = real @ (codes.to(x.dtype) * scale.to(x.dtype))
        return after(y if bias is None else y + bias.to(x.dtype))

    x = randn(M, K).to(dtype)
    if bias is None:
        return Site(lambda x, c, s: function(x, c, s, None), x, CODES, w_scale, known=2)
    return Site(function, x, CODES, w_scale, bias, known=3 if known is None else known)


# -- floating activations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "parts",
    [
        {"codes": CODES},
        {"codes": CODES, "bias": BIAS},
        {"codes": CODES, "zero": torch.arange(-16.0, 16.0)},
        {"codes": CODES.clamp(-8, 7), "scale": torch.tensor(0.25)},
        {"codes": CODES.clamp(0, 15), "bias": BIAS},
        {"codes": CODES, "after": rand(N) + 0.5, "bias": BIAS},
        {"codes": CODES, "scale": rand(K, 1).repeat_interleave(N, 1) + 0.01},
        {"codes": CODES, "scale": (rand(2, N) + 0.01).repeat_interleave(K // 2, 0)},
        {"codes": CODES.clamp(-8, 7), "scale": (rand(2, N) + 0.01).repeat_interleave(K // 2, 0)},
    ],
)
def test_weight_only(parts, dtype, target):
    calls = weight_only(dtype, **parts).check(target, allow=("numerics.float16",))
    along_k = parts.get("scale", SCALE).shape == (K, N) and parts["scale"][0, 0] != parts["scale"][1, 0]
    in_half = dtype == torch.bfloat16 and target != "cpu"
    # One more rounding of x in bfloat16 is too much; in float16 it is not.
    assert bool(calls) == (not along_k or dtype != torch.bfloat16 or in_half)
    assert not in_half or torch.float16 in {c.call.args["x"].dtype for c in calls}


@pytest.mark.parametrize(
    ("dtype", "unit"), [(torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-8), (torch.float32, 2.0**-23)]
)
def test_the_bound_of_an_exact_call(dtype, unit):
    """Two roundings of each product, and a float32 sum over K."""
    scale = torch.full((N,), 0.25)
    (call, *_) = weight_only(dtype, codes=CODES, scale=scale).calls()
    assert call.numerics == dataclasses.replace(
        call.numerics, kind="exact", relative=unit + K * 2.0**-24, absolute=0.0, of_x=0.0, why=()
    )


def test_what_a_rounded_bias_may_change():
    """A float32 bias of a float16 site: half a unit at its size, and nothing where it is a float16 number."""
    (call, *_) = [
        c for c in weight_only(torch.float16, codes=CODES, bias=BIAS.half()).calls() if c.composition.addend is not None
    ]
    assert call.numerics.absolute == 0.0


def test_a_bias_put_together_loses_no_more_than_float32():
    site = Site(lambda x, w, s, b: x @ (w.float() * s) + b + b / 3 * 100, randn(M, K), CODES, SCALE, BIAS, known=3)
    (call, *_) = site.check()
    assert call.composition.length == 2 and call.numerics.kind == "exact" and call.numerics.absolute == 0.0


def test_codes_and_offsets_that_overflow_together():
    """The operator forms (codes - zero) * scale in float16."""
    codes, scale = draw(K, N, low=0, high=127), torch.full((N,), 400.0)
    for zero, fits in ((100.0, True), (-100.0, False)):
        x = randn(M, K).half() * 1e-3
        site = Site(
            lambda x, w, s, z: x @ ((w.half() - z.half()) * s.half()), x, codes, scale, torch.full((N,), zero), known=3
        )
        assert ("wqmm.scale.product" not in site.refusals()) == fits or not isinstance(site.reading.weight, Weight)


def test_int4_codes_are_moved_with_their_zero_point():
    for low, high in ((0, 15), (-7, 8), (3, 12), (-15, 0)):
        site = weight_only(codes=draw(K, N, low=0, high=high - low) + low)
        int4 = [c for c in site.check("ascend910b") if "weight packed as int4" in c.fixups]
        assert int4 and all(c.call.args["antiquant_offset"] is not None for c in int4), (low, high)
    wide = weight_only(codes=draw(K, N, low=0, high=16).to(torch.int8))
    assert not [c for c in wide.calls("ascend910b") if "weight packed as int4" in c.fixups]
    plain = weight_only(codes=draw(K, N, low=-8, high=7))
    assert all(
        c.call.args["antiquant_offset"] is None
        for c in plain.check("ascend910b")
        if "weight packed as int4" in c.fixups
    )


def test_int4_by_group_where_each_group_is_narrow():
    codes = draw(K, N, low=0, high=15)
    codes[K // 2 :] += 50
    scale = (rand(2, N) + 0.01).repeat_interleave(K // 2, 0)
    calls = weight_only(codes=codes, scale=scale).check("ascend910b")
    assert any("weight packed as int4" in c.fixups for c in calls)
    # not for one scale for each column, which no tool packs that way
    assert not any("weight packed as int4" in c.fixups for c in weight_only(codes=codes).check("ascend910b"))


def test_a_width_that_int4_can_not_be_packed_in():
    odd = draw(K, 12, low=-8, high=7)
    calls = weight_only(codes=odd, scale=SCALE[:12]).check("cpu")
    packed = [c for c in calls if "weight packed as int4" in c.fixups]
    assert all(c.call.args["weight"].transposed for c in packed)


def test_float32_in_float16_only_where_allowed():
    site = weight_only(torch.float32, codes=CODES)
    assert {c.call.args["x"].dtype for c in site.calls("ascend910b")} == {torch.float32}
    assert "numerics.float16" in site.refusals("ascend910b")
    allowed = site.calls("ascend910b", allow=("numerics.float16",))
    assert {c.call.args["x"].dtype for c in allowed} == {torch.float32, torch.float16}
    assert "numerics.float16" not in site.refusals("ascend910b", allow=("numerics.float16",))
    (half, *_) = [c for c in allowed if c.call.args["x"].dtype == torch.float16]
    assert half.numerics.kind == "bounded"
    assert any("overflows above 65504" in why for why in half.numerics.why)
    assert not site.calls("ascend910b")[0].numerics.why
    assert half.numerics.absolute == pytest.approx((K * 127 * float(SCALE.max()) + 1) * 2.0**-14)


def test_float64_is_refused():
    assert weight_only(torch.float64, codes=CODES).refusals() == ["wqmm.x.dtype"]


def test_a_weight_along_k_goes_onto_x():
    rows = torch.linspace(0.1, 1, K)[:, None] * SCALE
    site = weight_only(torch.float32, codes=CODES, scale=rows)
    (call, *_) = site.check()
    assert "the weight's scale along K moved onto x" in call.fixups and call.numerics.kind == "bounded"
    assert call.numerics.absolute == pytest.approx(K * 127 * float(SCALE.max()) * 2.0**-126)
    assert call.numerics.why == ("x multiplied by the weight's scale along K",)


def test_rounding_x_in_bfloat16():
    """A scale along K of powers of two: only the product with x is rounded."""
    rows = 2.0 ** -torch.arange(K)[:, None] * torch.ones(N)
    (call, *_) = weight_only(torch.bfloat16, codes=CODES, scale=rows).check()
    assert call.numerics.relative == 2.0**-8 + K * 2.0**-24 + 2.0**-8


def test_a_scale_of_the_run_beside_a_known_zero_point():
    site = Site(lambda x, s, w: x @ ((w.half() - 3) * s), randn(M, K).half(), SCALE.half(), CODES, known=1)
    (call, *_) = site.check()
    assert call.numerics.of_x == 0.0


def test_parameters_known_at_run_time():
    x_dtype = torch.float16
    site = weight_only(x_dtype, known=0, codes=CODES, scale=SCALE.half(), bias=BIAS.half())
    assert site.check("cpu")
    assert weight_only(x_dtype, known=0, codes=CODES, scale=SCALE.half(), after=SCALE.half()).check("cpu")


def test_a_scale_that_float16_can_not_hold():
    """Where the graph multiplies after the matmul, in float32 it holds."""
    tiny = torch.full((N,), 1e-9)
    site = weight_only(torch.float32, codes=CODES, scale=tiny)
    assert "wqmm.scale.value" in site.refusals("ascend910b", allow=("numerics.float16",))
    assert site.check("cpu")


def test_a_bias_that_float16_can_not_hold():
    site = weight_only(torch.float32, codes=CODES, bias=torch.full((N,), 1e5))
    assert "wqmm.bias.value" in site.refusals("ascend910b", allow=("numerics.float16",))
    assert "wqmm.bias.value" not in site.refusals("ascend910b")


def test_what_rounding_a_bias_may_change():
    site = weight_only(torch.float32, codes=CODES, bias=BIAS)
    calls = [c for c in site.calls(allow=("numerics.float16",)) if c.composition.addend is not None]
    half = next(c for c in calls if c.call.args["x"].dtype == torch.float16)
    rounding = (BIAS.half().double() - BIAS.double()).abs().max()
    assert half.numerics.absolute == pytest.approx((K * 127 * float(SCALE.max()) + 1) * 2.0**-14 + float(rounding))


@pytest.mark.parametrize(("largest", "counts"), [(1024.0, False), (512.0, True)])
def test_changes_of_a_bias_that_are_none(largest, counts):
    """What float32 could round as well, at the size of the largest, is in the relative bound already."""
    change = 2.0**-14
    bias = torch.full((N,), 0.125 + change)  # halfway between two numbers of float16
    bias[0] = largest
    calls = [
        c for c in weight_only(torch.float32, codes=CODES, bias=bias).calls(allow=("numerics.float16",))
        if c.composition.addend is not None and c.call.args["x"].dtype == torch.float16
    ]  # fmt: skip
    of_x = (K * 127 * float(SCALE.max()) + 1) * 2.0**-14
    assert calls and [c.numerics.absolute for c in calls] == [pytest.approx(of_x + counts * change)] * len(calls)


def test_codes_of_four_bits_are_moved_as_one():
    """Columns that span less keep the zero point of the others."""
    codes = draw(K, N, low=0, high=15)
    codes[:, 0] = codes[:, 0].clamp(4, 9)
    moved = _as_int4(weight_only(codes=codes).reading.weight)
    assert moved.zero_point.tensor.tolist() == [-8.0] * N


@pytest.mark.parametrize("sign", [1, -1])
def test_zero_points_too_far_from_int4_codes(sign):
    """What is stored stays, where a step of one is no more than float64 may be wrong by."""
    codes = draw(K, N, low=0, high=15)
    codes[K // 2 :] += 50
    weight = weight_only(codes=codes, scale=(rand(2, N) + 0.01).repeat_interleave(K // 2, 0)).reading.weight

    def moved(zero):
        shifts = torch.stack([codes[: K // 2].amin(0), codes[K // 2 :].amin(0)]).double() + 8
        return _as_int4(dataclasses.replace(weight, zero_point=Const(zero + shifts)))

    assert moved(sign / FLOAT64) is None
    assert moved(sign * math.nextafter(1 / FLOAT64, 0)) is not None


# -- quantized activations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("numerics", ["strict", "vendor"])
@pytest.mark.parametrize(
    ("after", "more"),
    [
        (lambda y: y, ()),
        (lambda y: y.float(), ()),
        (lambda y, s: y.float() * s, (SCALE,)),
        (lambda y, s: y.float() * s * 0.5, (SCALE,)),
        (lambda y, s: y.float() * s + 1.0, (SCALE,)),
        (lambda y, s, r: y.float() * s * r, (SCALE, rand(32, 1))),
        (lambda y, s, r, b: y.float() * s * r + b, (SCALE, rand(32, 1), BIAS)),
        (lambda y, s: (y.float() * s).half(), (SCALE,)),
        (lambda y, s: (y.float() * s).bfloat16(), (SCALE,)),
        (lambda y, s, b: (y.float() * s + b).half(), (SCALE, BIAS)),
        (lambda y, s, b: (y.float() * s).half() + b, (SCALE, BIAS.half())),
        (lambda y, b, s: (y + b).float() * s, (draw(N).int(), SCALE)),
        (lambda y, s: (y.float() * (s * 10)).round().clamp(-128, 127).to(torch.int8), (SCALE / 100,)),
        (lambda y, s: ((y.float() * s).round() + 128).clamp(0, 255).to(torch.uint8), (SCALE / 10,)),
        (lambda y, s: (y.float() * s).relu().round().clamp(0, 255).to(torch.uint8), (SCALE / 10,)),
    ],
)
def test_integer_products(after, more, numerics, target):
    calls = integer(after, *more).check(target, numerics=numerics)
    assert calls


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arguments", [
    {}, {"bias": None}, {"zero": 7}, {"zero": 128, "unsigned": True}, {"zero": 7, "bias": None}, {"x_scale": 0.5},
])  # fmt: skip
def test_static_w8a8(dtype, arguments, target):
    calls = static_w8a8(dtype, **arguments).check(target, allow=("numerics.float16",))
    assert {c.call.op.name for c in calls} >= {"npu_quant_matmul"}


def test_strict_keeps_the_roundings_of_an_integer_graph():
    """float32 * columns * rows in another order is a shorter epilogue only."""
    reordered = integer(lambda y, s, r: y.float() * r * s, SCALE, rand(32, 1))
    assert max(c.composition.length for c in reordered.calls() if c.call.op.name == "npu_quant_matmul") == 2
    assert max(c.composition.length for c in reordered.calls(numerics="vendor")) == 3


def test_bounds_of_the_words():
    site = static_w8a8(torch.float16)
    word = next(c for c in site.calls() if c.call.args["scale"].dtype == torch.int64)
    assert word.numerics.relative == STEPS + FP19
    assert word.numerics.absolute == pytest.approx(float(SCALE.half().max()) * 0.03 / 2, rel=1e-3)
    assert "bias rounded to int32" in word.fixups
    float32 = next(c for c in static_w8a8(torch.float32).calls() if c.call.args["output_dtype"] == torch.float32)
    assert float32.numerics.relative == STEPS and float32.numerics.kind == "exact"
    half = next(
        c
        for c in static_w8a8(torch.float32).calls(allow=("numerics.float16",))
        if c.call.args["output_dtype"] == torch.float16
    )
    assert half.numerics.relative == STEPS + FP19 + 2.0**-11
    assert half.numerics.absolute > torch.finfo(torch.float16).smallest_normal


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_integer_and_a_floating_bias(dtype):
    """They are added where float32 is precise enough for the result, else in the graph."""
    calls = [c for c in static_w8a8(dtype, zero=7).calls() if c.call.op.name == "npu_quant_matmul"]
    merged = [c for c in calls if c.call.args["output_dtype"] == dtype and c.composition.addend is not None]
    assert bool(merged) == (dtype == torch.bfloat16)
    assert all(c.call.args["bias"].dtype == torch.float32 and c.numerics.absolute > 0 for c in merged)


def test_float32_results_come_from_the_accumulator_too():
    calls = static_w8a8(torch.float32, zero=7).check()
    scaled = [c for c in calls if "int32 result, scaled in float32 in the graph" in c.fixups]
    assert scaled and all(c.call.args["pertoken_scale"] is None for c in scaled)
    assert all(c.call.args["output_dtype"] == torch.int32 for c in scaled)


@pytest.mark.parametrize(
    ("requantize", "rule"),
    [
        (lambda y: y.round().clamp(-127, 127).to(torch.int8), "qmm.requantize.range"),
        (lambda y: y.round().clamp(-128, 126).to(torch.int8), "qmm.requantize.range"),
        (lambda y: y.round().clamp(0, 254).to(torch.uint8), "qmm.requantize.range"),
        (lambda y: (y.round() + 200).clamp(-128, 127).to(torch.int8), "qmm.requantize.zero_point"),
        (lambda y: (y.round() - 1).clamp(0, 255).to(torch.uint8), "qmm.requantize.zero_point"),
        (lambda y: y.relu().round().clamp(-128, 127).to(torch.int8), "qmm.requantize.relu"),
    ],
)
def test_quantized_results_that_the_operator_can_not_give(requantize, rule):
    site = static_w8a8(torch.float32, bias=None, after=lambda y: requantize(y * 10))
    assert rule in site.refusals()
    assert all(c.composition.requantize is None for c in site.check())


@pytest.mark.parametrize(
    "requantize",
    [
        lambda y: y.round().clamp(-128, 127).to(torch.int8),
        lambda y: (y.round() - 128).clamp(-128, 127).to(torch.int8),
        lambda y: (y.round() + 127).clamp(-128, 127).to(torch.int8),
        lambda y: y.round().clamp(0, 255).to(torch.uint8),
        lambda y: (y.round() + 255).clamp(0, 255).to(torch.uint8),
        lambda y: y.relu().round().clamp(0, 255).to(torch.uint8),
        lambda y: y.round().clamp(-128, 127),
    ],
)
@pytest.mark.parametrize("bias", [None, BIAS])
def test_quantized_results(requantize, bias):
    site = static_w8a8(torch.float32, bias=bias, after=lambda y: requantize(y * 10))
    assert any(c.composition.requantize is not None for c in site.check())


def test_a_quantized_result_with_a_scale_for_each_row():
    site = integer(lambda y, s, r: (y.float() * s * r).round().clamp(-128, 127).to(torch.int8), SCALE, rand(32, 1))
    assert "qmm.requantize.pertoken" in site.refusals(numerics="vendor")


@pytest.mark.parametrize(
    ("number", "rule"),
    [(2.0**-127, True), (2.0**-126, False), (2.0**126, False), (2.0**127, True), (float("inf"), True)],
)
def test_scales_that_a_word_can_not_hold(number, rule):
    scale = torch.full((N,), 1.0)
    scale[3] = number
    site = integer(lambda y, s: (y.float() * s).half(), scale)
    assert ("qmm.scale.value" in site.refusals(numerics="vendor")) == rule


def test_scales_that_float32_can_not_hold():
    site = integer(lambda y, s: y.float() * s * 2.0**-12, torch.full((N,), 2.0**-140))
    assert "qmm.scale.value" in site.refusals(numerics="vendor")
    assert "qmm.scale.value" not in integer(lambda y, s: y.float() * s, SCALE).refusals(numerics="vendor")


def test_a_bias_that_does_not_fit_the_accumulator():
    reach = 127 * 128 * K  # of codes in [-128, 127] and a weight's in [-127, 127]
    room = 2**31 - 1 - reach
    for bias, fits in ((room, True), (room + 1, False), (-room, True), (-room - 1, False)):
        added = torch.full((N,), float(bias), dtype=torch.float64)
        site = static_w8a8(torch.float16, bias=None)
        reading = site.reading
        product = compositions(reading.node, reading.contraction.product_dtype, reading.epilogue.steps)[0]
        p = Products(reading.activation, reading.weight).of(product)
        assert p.reach == 128 * 127 * K
        assert (accumulator_problem(p, Const(added), {}) is None) == fits, bias


def test_bounds_of_what_only_the_run_knows():
    """A scale may be subnormal, and then a product with it is flushed."""
    site = Site(lambda x, s, w: torch._int_mm(x, w).float() * s, draw(32, K), SCALE, CODES, known=1)
    call = next(c for c in site.check() if c.call.op.name == "npu_quant_matmul" and c.composition.length == 2)
    assert call.numerics.absolute == 2.0**31 * 2.0**-126 and call.numerics.relative == STEPS


def test_what_rounding_a_zero_point_may_change():
    """Weights near zero change by as much as the others: a part of x."""
    zero = torch.full((N,), 2049.0)
    site = Site(
        lambda x, w, s, z: x.float() @ ((w.float() - z) * s), randn(M, K), CODES, rand(N) * 0.01 + 0.001, zero, known=3
    )
    half = next(c for c in site.calls(allow=("numerics.float16",)) if c.call.args["x"].dtype == torch.float16)
    scale = (rand(N) * 0.01 + 0.001).double()
    assert half.numerics.of_x == pytest.approx(float(scale.max()), rel=1e-6)
    assert half.numerics.kind == "bounded"


def test_quantized_results_with_a_bias_that_does_not_fit():
    site = static_w8a8(
        torch.float32, bias=torch.full((N,), 1e6), after=lambda y: (y * 10).round().clamp(-128, 127).to(torch.int8)
    )
    assert "qmm.bias.range" in site.refusals()
    assert all(c.composition.requantize is None for c in site.calls())


def test_an_infinite_bias_on_a_chip_that_saturates():
    bias = BIAS.clone()
    bias[2] = -float("inf")
    site = static_w8a8(torch.float16, bias=bias)
    assert "qmm.bias.saturates" in site.refusals("ascend310p")
    assert "qmm.bias.saturates" not in static_w8a8(torch.float16).refusals("ascend310p")


@pytest.mark.parametrize("rows", [1, 5])
def test_one_scale_of_the_run_is_a_scale_for_each_row(rows):
    site = Site(
        lambda x, s, w: (x.float() * s) @ (w.float() * 0.01), draw(rows, K), torch.tensor([0.5]), CODES, known=1
    )
    calls = [c for c in site.check() if c.call.args.get("pertoken_scale") is not None]
    assert calls and all(c.call.args["pertoken_scale"].shape == (rows,) for c in calls)


@pytest.mark.parametrize(
    ("known", "options", "cast"),
    [
        (True, {}, True),
        (True, {"mode": "eager"}, True),
        (True, {"lowering": "aclnn"}, True),
        (True, {"lowering": "aclnn", "mode": "graph"}, True),
        (True, {"nz": "never"}, False),
        (False, {}, True),
        (False, {"mode": "eager"}, False),
        (False, {"lowering": "aclnn", "mode": "graph"}, False),
    ],
)
def test_when_a_weight_is_cast_to_nz(known, options, cast):
    """What only the run knows can be cast in a GE graph only."""
    site = weight_only(codes=CODES, scale=SCALE.half(), known=None if known else 0)
    layouts = list(
        weight_layouts(
            site.reading.weight, chip_named("ascend910b"), QMM, Options(target="ascend910b", **options), int4=False
        )
    )
    formats = [x.format for x in layouts]
    assert ("NZ" in formats) == cast
    assert layouts == sorted(layouts, key=lambda x: x.format == "NZ") or known  # last where it is done at every call
    for laid_out in layouts:
        assert laid_out.stored.shape == ((N, K) if laid_out.transposed else (K, N))
        stored = evaluate(laid_out.expr, site.values)
        assert torch.equal(stored.t() if laid_out.transposed else stored, CODES)


def test_sums_that_wrap_around():
    def added(number, known):
        full = torch.full((N,), number, dtype=torch.int32)
        return Site(
            lambda x, b, w: (torch._int_mm(x, w) + b).float(), draw(32, K), full, CODES, known=2 if known else 1
        )

    assert "qmm.bias.range" in added(2**31 - 1, known=True).refusals()
    assert "qmm.bias.range" not in added(2**20, known=True).refusals()
    # where the graph adds in int32 as well, what the run brings wraps alike
    assert added(2**20, known=False).refusals() == [] and added(2**20, known=False).check()
    # but not where the graph is a floating one
    zero = torch.tensor([3], dtype=torch.int32)
    site = Site(lambda x, z, w: (x.int() - z).float() @ (w.float() * 0.01), X, zero, CODES, known=1)
    assert "qmm.bias.runtime" in site.refusals() or not isinstance(site.reading.activation, Affine)


def test_scaled_integers_have_no_int32_result():
    """What the product of the codes has to be multiplied by is no part of an int32 result."""
    rows = torch.tensor([[2]] * M, dtype=torch.int32)
    for x_of, w_of in (
        (lambda x, r: x.int(), lambda w: w.int() * 2),
        (lambda x, r: x.int() * r, lambda w: w.int()),
        (lambda x, r: x.int(), lambda w: w.int()),
    ):
        site = Site(
            lambda x, r, w, x_of=x_of, w_of=w_of: x_of(x, r) @ w_of(w),
            X.clamp(-9, 9),
            rows,
            CODES.clamp(-9, 9),
            known=1,
        )
        site.check()


def test_a_fraction_of_a_zero_point_is_added_in_float32():
    site = Site(lambda x, w: ((x.float() - 0.25) * 0.5) @ (w.float() * 0.01), X, CODES, known=1)
    sums = -0.25 * CODES.double().sum(0)
    rest = (sums - sums.round()).abs().max() * 0.5 * 0.01
    call = next(
        c for c in site.check() if c.call.op.name == "npu_quant_matmul" and c.call.args["output_dtype"] == torch.int32
    )
    assert call.numerics.absolute == pytest.approx(STEPS * float(rest), rel=1e-3)
    assert call.numerics.kind == "bounded"


def test_a_fraction_of_a_zero_point_beside_what_only_the_run_knows():
    """What the float32 sum may lose has to be known."""
    x_of = lambda x: (x.float() - 0.25) * 0.5  # noqa: E731
    scales = Site(lambda x, s, w: x_of(x) @ (w.float() * s), X, SCALE, CODES, known=1)
    codes = Site(lambda x, w, s: x_of(x) @ (w.float() * s), X, CODES, SCALE, known=1)
    for site in (scales, codes):
        assert "qmm.activation.zero_point.fraction" in site.refusals()


def test_relative_bounds_add_up():
    """The roundings of weights, sums, parameters and x."""
    site = weight_only(torch.float32, codes=CODES)
    half = next(c for c in site.calls(allow=("numerics.float16",)) if c.call.args["x"].dtype == torch.float16)
    change = ((SCALE.half().double() - SCALE.double()).abs() / SCALE.double()).max()
    assert half.numerics.relative == pytest.approx(2.0**-10 + K * 2.0**-24 + float(change) + 2.0**-10, rel=1e-6)


def test_a_weight_that_reaches_the_largest_float16():
    codes, scale = CODES.clamp(-1, 1), torch.full((N,), 65504.0)
    x = randn(M, K).half() * 1e-3
    site = Site(lambda x, w, s: x @ (w.half() * s.half()), x, codes, scale, known=2)
    assert "wqmm.scale.product" not in site.refusals()


def test_notes_say_what_was_done():
    (call, *_) = weight_only(torch.bfloat16, codes=CODES, bias=BIAS.bfloat16()).calls()
    assert "bias cast to float32" in call.fixups
    (call, *_) = weight_only(torch.float32, codes=CODES, bias=BIAS).calls()
    assert not [f for f in call.fixups if "bias" in f]
    word = next(c for c in static_w8a8(torch.float16, bias=None).calls() if c.call.args["scale"].dtype == torch.int64)
    assert "bias rounded to int32" not in word.fixups
    plain = next(c for c in static_w8a8(torch.float32).calls() if c.call.args["output_dtype"] == torch.float32)
    assert "bias rounded to int32" not in plain.fixups


def test_infinite_biases_of_weight_only_sites():
    bias = BIAS.clone()
    bias[2] = -float("inf")
    assert "wqmm.bias.saturates" in weight_only(torch.float16, codes=CODES, bias=bias).refusals("ascend310p")
    assert "wqmm.bias.saturates" not in weight_only(torch.float16, codes=CODES, bias=BIAS).refusals("ascend310p")
    assert "wqmm.bias.saturates" not in weight_only(torch.float16, codes=CODES, bias=bias).refusals("ascend910b")


def test_why_an_activation_is_dequantized_in_the_graph():
    site = w8a8(lambda x, w, s: x.half() * 0.5, lambda w, s: (w.half() - 3) * s.half(), CODES, SCALE)
    plan = site.plan("cpu").plan
    assert plan.op == "npu_weight_quant_batchmatmul"
    assert [n for n in plan.notes if "stays in the graph: qmm.weight.zero_point" in n]
    plan = w8a8(lambda x, w, s: x.half() * 0.5, lambda w, s: w.half() * s.half(), CODES, SCALE).plan("cpu").plan
    assert plan.op == "npu_quant_matmul" and not plan.notes


# -- what the operator has no term for ---------------------------------------------------------------------------------


def w8a8(x_of, w_of, *inputs, known=2):
    return Site(lambda x, *more: x_of(x, *more) @ w_of(*more), X, *inputs, known=known)


@pytest.mark.parametrize(
    ("x_of", "w_of", "more", "rule"),
    [
        (lambda x, w, s: x.float(), lambda w, s: (w.float() - 3) * s.float(), SCALE, "qmm.weight.zero_point"),
        (
            lambda x, w, s: x.float(),
            lambda w, s: w.float() * s.float()[:, None],
            rand(K) + 0.01,
            "qmm.weight.k_scale",
        ),
        (
            lambda x, w, s: x.float(),
            lambda w, s: w.float() * s.float().repeat_interleave(K // 2, 0),
            rand(2, N) * 0.01 + 0.001,
            "qmm.weight.group",
        ),
        (
            lambda x, w, s: x.float() * s.float(),
            lambda w, s: w.float() * 0.5,
            rand(K) + 0.01,
            "qmm.activation.scale",
        ),
        (
            lambda x, w, s: x.float() - s.float(),
            lambda w, s: w.float() * 0.5,
            torch.arange(M).float()[:, None],
            "qmm.activation.zero_point",
        ),
    ],
)
def test_what_the_operator_has_no_term_for(x_of, w_of, more, rule):
    site = w8a8(x_of, w_of, CODES, more)
    assert rule in site.refusals()
    assert {c.call.op.name for c in site.check()} <= {"npu_weight_quant_batchmatmul"}


def test_zero_points_of_the_run_that_a_cast_may_spoil():
    """One that is rounded is far larger than any code; one that overflows is lost."""
    for source, dtype, survives in (
        (torch.uint8, torch.float16, True),
        (torch.int16, torch.float16, True),
        (torch.int32, torch.float16, False),
        (torch.int64, torch.float16, False),
        (torch.int64, torch.bfloat16, True),
        (torch.float16, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, True),
    ):
        zero = Ref(node_of(torch.zeros(N, dtype=source)))
        assert _zero_point_survives(zero, dtype) is survives, (source, dtype)


@pytest.mark.parametrize(
    ("dtype", "source", "taken"),
    [
        (torch.float16, torch.float16, True),
        (torch.float16, torch.float32, False),
        (torch.float16, torch.int64, False),
        (torch.bfloat16, torch.float32, True),
        (torch.bfloat16, torch.int64, True),  # float32 rounds it as the graph's own sum does
        (torch.bfloat16, torch.float64, False),
    ],
)
def test_a_bias_of_the_run_is_taken_in_the_operators_dtype(dtype, source, taken):
    """float16 beside float16, float32 beside bfloat16; what these do not hold is added behind."""
    site = weight_only(dtype, codes=CODES)
    (c,) = compositions(site.reading.node, dtype, ())
    c = dataclasses.replace(c, addend=Ref(node_of(torch.zeros(N, dtype=source))))
    problem = _bias_problem(c, dtype, chip_named("ascend910b"))
    assert (problem is None) is taken
    assert taken or problem.rule == "wqmm.bias.runtime"


def test_codes_that_are_int4_already_stay_the_stored_ones():
    for low, high in ((-8, 7), (-8, 0), (0, 7)):
        weight = weight_only(codes=draw(K, N, low=low, high=high)).reading.weight
        assert (weight.low, weight.high) == (low, high) and _as_int4(weight) is weight


def test_a_bias_that_float32_can_not_hold():
    bias = torch.full((N,), 20.0)
    site = integer(lambda y, s, b: (y.float() * s + b) * 3e37, SCALE, bias)
    assert "qmm.bias.range" in site.refusals(numerics="vendor")
    site = integer(lambda y, s, b: (y.float() * s + b) * 1e37, SCALE, bias)
    assert "qmm.bias.range" not in site.refusals(numerics="vendor")


# -- the choice --------------------------------------------------------------------------------------------------------


def test_the_longest_epilogue_wins():
    site = weight_only(torch.float16, codes=CODES, after=rand(N) + 0.5, bias=BIAS.half())
    plan = site.plan("ascend910b").plan
    assert plan.output is site.t.result
    assert plan.op == "npu_weight_quant_batchmatmul"


def test_why_a_weight_stays_in_nd():
    site = weight_only(torch.float16, codes=CODES)
    assert site.plan("ascend910b", nz="never").plan.nd_reason == "nz='never'"
    assert site.plan("ascend310p").plan.nd_reason == ""
    assert site.plan("ascend310p").plan.weight_format == "NZ"
    runtime = weight_only(torch.float16, known=0, codes=CODES, scale=SCALE.half())
    plan = runtime.plan("ascend910b").plan
    assert plan.weight_format == "NZ" or plan.nd_reason


def test_a_plan_that_waits_for_values_says_so():
    """It may become better once the weight is known; not where the user or the chip wants ND."""
    known, runtime = weight_only(codes=CODES), weight_only(known=0, codes=CODES, scale=SCALE.half())
    for site, target, options, waits in (
        (known, "ascend310p", {}, False),
        (known, "ascend910b", {"nz": "never"}, False),
        (runtime, "ascend910b", {"nz": "never"}, False),
        (runtime, "ascend910b", {}, True),
    ):
        plan = site.plan(target, **options).plan
        assert plan.awaits_values is waits, (target, options, plan.nd_reason)


def test_a_refusal_names_what_the_most_nearly_legal_call_breaks():
    """Of calls that break equally many rules the first, which is the one that planning prefers."""
    groups = weight_only(codes=CODES, scale=(rand(K // 4, N) + 0.01).repeat_interleave(4, 0))
    rows = integer(lambda y, r: y.float() * r, rand(32, 1))
    for site, target in ((groups, "ascend910b"), (rows, "ascend310p")):
        broken = [judge(c.call, chip_named(target), ()).rejects for c in site.calls(target)]
        assert len(set(broken)) > 1
        assert site.plan(target).rejects == min(broken, key=len)


def test_a_tensor_that_others_quantize_stays():
    """No plan takes in a tensor whose codes another operator makes, unless it ends there."""
    site = weight_only(torch.float16, codes=CODES, after=rand(N) + 0.5, bias=BIAS.half())
    product, scaled = site.reading.node, site.reading.epilogue.steps[0].node
    writes = writes_of(site.t.graph, site.t.values.mutated)
    for needed, output in (
        (set(), site.t.result),
        ({scaled}, scaled),
        ({product}, product),
        ({site.t.result}, site.t.result),
    ):
        options = Options(target="ascend910b")
        planned = plan_site(site.reading, options.chip, options, writes, Others(needed=needed))
        assert planned.plan.output is output


def test_what_a_refit_adds_to_the_bound():
    """Its largest error for each ``|x_k|``, scaled as the product is, and rounded with it."""
    site = weight_only(codes=CODES, after=rand(N) + 0.5)
    cost = Refit(sqnr=40.0, largest_error=0.01, largest=1.0, growth=1.5)
    fitted = dataclasses.replace(site.reading, weight=dataclasses.replace(site.reading.weight, refit=cost))
    writes = writes_of(site.t.graph, site.t.values.mutated)
    options = Options(target="ascend910b")
    plain, more = (plan_site(r, options.chip, options, writes).numerics for r in (site.reading, fitted))
    gain = float((rand(N) + 0.5).half().max())
    assert more.of_x == pytest.approx(plain.of_x + 0.01 * gain * (1 + plain.relative), rel=1e-9)
    assert more.kind == "bounded" and len(more.why) == len(plain.why) + 1


def test_why_nz_is_not_legal():
    """The rule of the call in FRACTAL_NZ, not one of another call."""
    site = weight_only(codes=CODES, scale=(rand(2, N) + 0.01).repeat_interleave(K // 2, 0))
    plan = site.plan("ascend910b").plan
    assert plan.weight_format == "ND" and plan.nd_reason.startswith("wqmm.nz.int8.group")
    assert not plan.awaits_values
    assert not [n for n in plan.notes if "what comes next" in n]  # nothing does


def test_a_quantize_behind_what_is_not_read():
    """Only where one follows is it said that it stays."""

    def site(rounds):
        def function(x, w, s):
            y = F.gelu(x @ (w.half() * s.half()))
            return (y * 10).round().clamp(-128, 127).to(torch.int8) if rounds else (y * 10).clamp(-128, 127) + 1

        return Site(function, randn(M, K).half(), CODES, SCALE, known=2)

    said = [[n for n in site(r).plan("ascend910b").plan.notes if "quantize that follows" in n] for r in (True, False)]
    assert len(said[0]) == 1 and "gelu" in said[0][0] and said[1] == []


def test_nothing_fits():
    site = integer(lambda y: y)
    planned = site.plan("ascend310p")
    assert (planned.plan is None) == bool(planned.rejects)


def test_a_write_in_between():
    def function(x, codes, scale):
        y = x @ (codes.half() * scale.half())
        x.add_(1.0)
        return y * 2.0

    t = Traced(function, randn(M, K).half(), CODES, SCALE, known=2)
    readings = list(find_sites(t.graph, t.values, t.dialects))
    chip, options = chip_named("cpu"), Options(target="cpu")
    planned = plan_site(readings[0], chip, options, writes_of(t.graph, t.values.mutated))
    assert planned.plan is None or planned.plan.output is readings[0].node


def test_leftovers_of_addmm_are_added_behind():
    """A bias that varies along the rows stays in the graph, with its multiples."""
    x, rows = randn(M, K).half(), rand(M, 1).half()

    def function(x, rows, codes, scale):
        return torch.addmm(rows, x, codes.half() * scale.half(), alpha=0.5, beta=3)

    site = Site(function, x, rows, CODES, SCALE, known=2)
    plan = site.plan("cpu").plan
    actual, expected = evaluate(plan.value, site.values), site.values[plan.output]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=1e-2, atol=1e-2)
    # the sum, which is left behind, rounds once more
    half = next(c for c in site.calls() if c.composition.length == 0)
    assert site.plan("cpu").numerics.relative == half.numerics.relative + 2.0**-11


def test_convolutions():
    """Their bias lies in the operator: no plan leaves it to another node."""
    x, kernel = randn(2, K, 3, 4).half(), CODES.t().reshape(N, K, 1, 1).contiguous()
    site = Site(
        lambda x, w, s, b: F.conv2d(x, w.half() * s.half(), b.half()),
        x,
        kernel,
        SCALE.reshape(N, 1, 1, 1),
        BIAS,
        known=3,
    )
    assert site.check("cpu")
    plan = site.plan("cpu").plan
    actual = evaluate(plan.value, site.values)
    torch.testing.assert_close(actual, site.values[plan.output], rtol=1e-2, atol=1e-2)


def test_weights_on_the_left():
    x = randn(K, M).half()
    site = Site(lambda x, w, s: (w.half() * s.half()) @ x, x, CODES.t().contiguous(), SCALE[:, None], known=2)
    (call, *_) = site.check("cpu")
    assert call.value is not None


def test_whole_zero_points_leave_nothing_to_add():
    for zero, whole in ((7.0, True), (0.5, False)):
        site = Site(lambda x, w, zero=zero: (x.float() - zero) @ (w.float() * 0.01), X, CODES, known=1)
        c = compositions(site.reading.node, site.reading.contraction.product_dtype, ())[0]
        p = Products(site.reading.activation, site.reading.weight).of(c)
        assert (p.addend is None) == whole and (p.lost == 0.0) == whole


def test_a_bias_too_large_for_the_word_stays_a_float():
    site = static_w8a8(torch.float16, bias=torch.full((N,), 6e4), x_scale=1e-4, w_scale=SCALE / 10)
    assert "qmm.bias.range" in site.refusals()
    floats = [c for c in site.calls() if c.composition.addend is not None and c.call.op.name == "npu_quant_matmul"]
    assert {c.call.args["pertoken_scale"] is None for c in floats} == {True, False}


def test_arguments_at_their_defaults_are_left_out():
    (call, *_) = weight_only(torch.float16, codes=CODES).calls()
    assert set(call.value.kwargs) <= {"transpose_weight"}


def test_why_a_chip_takes_no_nz():
    assert "in ND in graph mode" in weight_only(torch.float16, codes=CODES).plan("cpu").plan.nd_reason


def test_flattened():
    three, two = (Ref(node_of(torch.empty(shape))) for shape in ((2, 3, 4), (6, 4)))
    assert ex.shape_of(flattened(three)) == (6, 4) and flattened(two) is two


def test_rows():
    assert rows_of((2, 3, 4)) == 6 and rows_of((5, 4)) == 5 and rows_of((4,)) == 1


def test_batches_of_rows():
    x = randn(2, 3, K).half()
    site = Site(lambda x, w, s, b: F.linear(x, (w.half() * s.half()).t()) + b.half(), x, CODES, SCALE, BIAS, known=3)
    assert any("x flattened to 2-D" in c.fixups for c in site.check("cpu")) or site.reading.x is not None


def test_attention_of_two_quantized_operands():
    q, k = draw(2, M, K), draw(2, N, K)
    site = Site(lambda q, k: (q.half() * 0.02) @ (k.half() * 0.01).transpose(-1, -2), q, k, known=0)
    assert site.check("cpu")
    assert "wqmm.weight.batched" in site.refusals("cpu")
    rows = Site(
        lambda q, k, r: (q.half() * r) @ (k.half() * 0.01).transpose(-1, -2), q, k, rand(2, M, 1).half(), known=0
    )
    assert "qmm.batched.rows" in rows.refusals("cpu")
    zero = Site(lambda q, k: (q.half() - 3) @ (k.half() * 0.01).transpose(-1, -2), q, k, known=0)
    assert "qmm.activation.zero_point" in zero.refusals("cpu")


def fused_calls(e):
    """The quantized matmuls in an expression."""
    if isinstance(e, ex.Call):
        if e.target is torch.ops.quantpass.quant_matmul.default:
            yield e
        for a in e.args:
            yield from fused_calls(a)


@pytest.mark.parametrize(("target", "saturates"), [("ascend310p", True), ("ascend910b", False), ("cpu", False)])
def test_only_a_chip_that_saturates_says_so_and_only_of_float16(target, saturates):
    said = set()
    for dtype in (torch.float16, torch.float32):
        site = integer(lambda acc, s, d=dtype: (acc.float() * s).to(d), SCALE, known=2)
        for c in site.calls(target, numerics="vendor"):
            said |= {(call.dtype, call.kwargs.get("saturate", False)) for call in fused_calls(c.value)}
    assert {d for d, saturated in said if saturated} == ({torch.float16} if saturates else set())
    assert torch.float16 in {d for d, _ in said}
