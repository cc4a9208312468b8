"""Dynamic W8A8 on a 310P: ``npu_quant_matmul_dequant`` quantizes each row itself (``numerics="vendor"``)."""

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import quantpass as qp
from quantpass.graph.dump import dump
from quantpass.graph.schema import op_name
from tests.oracle import HALF_UNIT, traced

K, N = 64, 32


def randn(*shape, seed=0, dtype=torch.float16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Rows(nn.Module):
    """A Linear of rows that are quantized, each with its own scale.

    ``form``: ``"dequantized"`` (a floating matmul) or ``"integer"`` (a matmul of codes, scaled behind).
    """

    def __init__(self, form="integer", n=N, k=K, bias=False, divisor=127.0, low=-128, floor=1e-5):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.form, self.divisor, self.low, self.floor = form, divisor, low, floor
        self.codes = nn.Buffer(torch.randint(-127, 128, (n, k), generator=g, dtype=torch.int8))
        self.scales = nn.Buffer(torch.rand(n, generator=g) * 1e-2 + 1e-3)
        self.bias = nn.Buffer(torch.randn(n, generator=g)) if bias else None

    def quantized(self, x):
        s = x.float().abs().amax(-1, keepdim=True).clamp(min=self.floor) / self.divisor
        return torch.round(x.float() / s).clamp(self.low, 127).to(torch.int8), s

    def forward(self, x):
        q, s = self.quantized(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.form == "dequantized":
            return F.linear((q * s).to(x.dtype), (self.codes * self.scales[:, None]).to(x.dtype), bias)
        acc = torch._int_mm(q.reshape(-1, q.shape[-1]), self.codes.t()).reshape(*x.shape[:-1], len(self.codes))
        y = (acc.float() * s * self.scales).to(x.dtype)
        return y if bias is None else y + bias

    def exact(self, x):
        """The formula in exact arithmetic on the graph's codes; its magnitudes; each row's step; sums of weights."""
        (q, s), w = self.quantized(x), self.codes.double() * self.scales.double()[:, None]
        real = q.double() * s.double()
        b = torch.zeros(len(w)) if self.bias is None else self.bias.to(x.dtype)
        return real @ w.t() + b, real.abs() @ w.abs().t() + b.double().abs(), s.double(), w.abs().sum(1)


def fused(function, x, **options):
    gm = traced(function, x)
    return gm, qp.fuse(gm, **{"target": "ascend310p", "numerics": "vendor", **options})


def operators(gm):
    names = [op_name(n).removeprefix("quantpass.") for n in gm.graph.nodes if n.op == "call_function"]
    return [n.removeprefix("aten.") for n in names if n not in ("aten.view", "aten.reshape")]


def within_the_bound(function, x, report, y):
    (site,) = report.sites
    n, unit = site.numerics, HALF_UNIT[x.dtype]
    want, magnitude, step, weights = function.exact(x)
    bound = (n.relative + unit) * magnitude + n.absolute + (n.of_step * step + n.of_w) * weights
    largest = torch.finfo(x.dtype).max  # where the operator saturates
    apart = (y.double() - want.clamp(-largest, largest)).abs()
    assert bool((apart <= bound * (1 + 2.0**-6)).all()), float((apart / bound).max())


# -- one operator ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dequantized", "integer"])
def test_nothing_is_left_of_the_quantization(form):
    gm, report = fused(Rows(form), randn(24, K))
    assert operators(gm) == ["quant_matmul_dequant"]
    assert_expected_inline(
        dump(fused(Rows(), randn(24, K))[0]),
        """\
%arg0_1: f16[24, 64] = input
%quantpass_scale: f32[32] = constant quantpass_scale
%_tensor_constant0_1: i8[32, 64] = constant _tensor_constant0_1
%quant_matmul_dequant: f16[24, 32] = quantpass.quant_matmul_dequant(%arg0_1, %_tensor_constant0_1, %quantpass_scale, saturate=True)
return %quant_matmul_dequant""",
    )
    (site,) = report.sites
    assert site.numerics.why[0].startswith("re-quantized by the operator (npu_quant_matmul_dequant): codes differ by")
    assert "quantized by npu_quant_matmul_dequant" in site.plan.fixups
    (other,) = [note for note in site.plan.notes if "npu_quant_matmul is not taken" in note]
    assert "qmm.310p.pertoken" in other


def test_a_bias_is_added_behind_it():
    gm, report = fused(Rows(bias=True), randn(2, 12, K))
    assert_expected_inline(
        dump(gm),
        """\
%arg0_1: f16[2, 12, 64] = input
%quantpass_scale: f32[32] = constant quantpass_scale
%quantpass_bias: f16[32] = constant quantpass_bias
%view_2: f16[24, 64] = aten.view(%arg0_1, [-1, 64])
%_tensor_constant1_1: i8[32, 64] = constant _tensor_constant1_1
%quant_matmul_dequant: f16[24, 32] = quantpass.quant_matmul_dequant(%view_2, %_tensor_constant1_1, %quantpass_scale, saturate=True)
%add_1: f16[24, 32] = aten.add.Tensor(%quant_matmul_dequant, %quantpass_bias)
%view_3: f16[2, 12, 32] = aten.view(%add_1, [2, 12, 32])
return %view_3""",
    )
    assert "the bias is added behind the operator, which takes none" in report.sites[0].plan.notes


@pytest.mark.parametrize("largest", [15.9, 17.0, float("inf")])
def test_a_bias_that_is_large_stays_the_graphs(largest):
    """A product above 65504 is that number on the chip: what a large bias takes from it is not known."""
    function = Rows("dequantized", bias=True)
    function.bias[3] = -largest
    gm, report = fused(lambda x: function(x), randn(24, K))
    assert report.fused == 1 and operators(gm)[-1] == "add.Tensor"
    assert ("_to_copy" in operators(gm)) == (largest > 16)


def test_sizes_that_are_no_multiples_of_16_are_padded():
    gm, report = fused(Rows(n=40, k=90), randn(24, 90))
    assert_expected_inline(
        dump(gm),
        """\
%arg0_1: f16[24, 90] = input
%quantpass_weight: i8[48, 96] = constant quantpass_weight
%quantpass_scale: f32[48] = constant quantpass_scale
%constant_pad_nd: f16[24, 96] = aten.constant_pad_nd(%arg0_1, [0, 6])
%quant_matmul_dequant: f16[24, 48] = quantpass.quant_matmul_dequant(%constant_pad_nd, %quantpass_weight, %quantpass_scale, saturate=True)
%slice_1: f16[24, 40] = aten.slice.Tensor(%quant_matmul_dequant, 1, 0, 40)
%clone: f16[24, 40] = aten.clone(%slice_1, memory_format=torch.contiguous_format)
return %clone""",
    )
    assert "weight padded with zeros to (48, 96)" in report.sites[0].plan.fixups


def test_padding_changes_nothing():
    """A row's largest magnitude is that of its own elements, and zeros add nothing."""
    x, own = randn(24, 90), Rows(n=40, k=90)
    padded = Rows(n=48, k=96)
    padded.codes, padded.scales = F.pad(own.codes, (0, 6, 0, 8)), F.pad(own.scales, (0, 8), value=1.0)
    wide = F.pad(x, (0, 6))
    assert torch.equal(fused(own, x)[0](x), fused(padded, wide)[0](wide)[:, :40])


def test_matmuls_that_share_a_padded_activation_share_the_padding():
    one, two = Rows(k=90), Rows(k=90, n=48)
    gm, report = fused(lambda x: (one(x), two(x)), randn(24, 90))
    assert report.fused == 2
    assert operators(gm).count("constant_pad_nd") == 1
    assert operators(gm).count("quant_matmul_dequant") == 2


@pytest.mark.parametrize("x", [randn(24, K), randn(2, 3, 4, K), randn(1, K)], ids=lambda x: str(tuple(x.shape)))
def test_leading_dimensions(x):
    function = Rows("dequantized", bias=True)
    gm, report = fused(function, x)
    y = gm(x)
    assert y.shape == (*x.shape[:-1], N) and operators(gm) == ["quant_matmul_dequant", "add.Tensor"]
    within_the_bound(function, x, report, y)


def test_a_number_of_rows_that_only_the_run_knows():
    backend = qp.backend(target="ascend310p", numerics="vendor")
    compiled, model = torch.compile(Rows(), backend=backend, dynamic=True), Rows()
    with torch.no_grad():
        for m in (24, 40, 17):
            x = randn(m, K, seed=m)
            y = compiled(x)
            assert y.shape == (m, N) and float((y - model(x)).abs().max()) < 0.1
    assert backend.report.fused == backend.report.total == 1
    assert "npu_quant_matmul_dequant" in backend.report.sites[0].plan.op


@pytest.mark.parametrize("lowering", ["reference", "aclnn"])
def test_the_vendors_operator_computes_the_same(lowering):
    qp.emulate_npu()
    backend = qp.backend(target="ascend310p", numerics="vendor", lowering=lowering)
    x = randn(24, K)
    with torch.no_grad():
        y = torch.compile(Rows(), backend=backend)(x)
    assert torch.equal(y, fused(Rows(), x)[0](x))
    assert backend.report.fused == 1


# -- one edit away -----------------------------------------------------------------------------------------------------


class Whole(Rows):
    """One scale for all of x."""

    def quantized(self, x):
        s = x.float().abs().amax().clamp(min=self.floor) / self.divisor
        return torch.round(x.float() / s).clamp(self.low, 127).to(torch.int8), s

    def exact(self, x):
        y, magnitude, s, w = super().exact(x)
        return y, magnitude, s.reshape(1, 1), w


@pytest.mark.parametrize("form", ["dequantized", "integer"])
def test_one_scale_for_all_rows_is_the_graphs(form):
    function, x = Whole(form, bias=True), randn(2, 12, K)
    gm, report = fused(function, x)
    within_the_bound(function, x, report, gm(x))
    gm, _ = fused(Whole(form), randn(24, K))
    assert_expected_inline(
        dump(fused(Whole(), randn(24, K))[0]),
        """\
%arg0_1: f16[24, 64] = input
%quantpass_scale: f32[32] = constant quantpass_scale
%_to_copy: f32[24, 64] = aten._to_copy(%arg0_1, dtype=float32)
%abs_1: f32[24, 64] = aten.abs(%_to_copy)
%amax: f32[] = aten.amax(%abs_1)
%clamp: f32[] = aten.clamp(%amax, 1e-05)
%div: f32[] = aten.div.Tensor(%clamp, 127.0)
%view_2: f32[1] = aten.view(%div, [1])
%_tensor_constant0_1: i8[32, 64] = constant _tensor_constant0_1
%quant_matmul_dequant: f16[24, 32] = quantpass.quant_matmul_dequant(%arg0_1, %_tensor_constant0_1, %quantpass_scale, x_scale=%view_2, quant_mode='pertensor', saturate=True)
return %quant_matmul_dequant""",
    )
    assert operators(gm).count("quant_matmul_dequant") == 1


ROWS = Rows()


def asymmetric(x):
    own = ROWS
    low, high = x.float().amin(-1, keepdim=True), x.float().amax(-1, keepdim=True)
    s = (high - low) / 255
    z = torch.round(-128 - low / s)
    q = (torch.round(x.float() / s) + z).clamp(-128, 127).to(torch.int8)
    return F.linear(((q.float() - z) * s).to(x.dtype), (own.codes * own.scales[:, None]).to(x.dtype))


def groups(x):
    own = ROWS
    q, s = own.quantized(x)
    w = (own.codes.reshape(N, 2, -1) * torch.stack([own.scales, 2 * own.scales], 1)[..., None]).reshape(N, K)
    return F.linear((q * s).to(x.dtype), w.to(x.dtype))


def another_factor_of_rows(x):
    own = ROWS
    q, s = own.quantized(x)
    return (torch._int_mm(q, own.codes.t()).float() * s.sigmoid() * own.scales).to(x.dtype)


@pytest.mark.parametrize(
    ("function", "x", "options", "rule"),
    [
        (Rows(), randn(24, K, dtype=torch.bfloat16), {}, "numerics.float16"),
        (Rows(), randn(24, K, dtype=torch.float32), {}, "numerics.float16"),
        (Rows(n=7), randn(24, K), {}, "qmmd.n.multiple"),
        (Rows(k=7), randn(24, 7), {}, "qmmd.k.multiple"),
        (Rows(), randn(0, K), {}, "qmmd.empty"),
        (Rows(), randn(24, K), {"numerics": "strict"}, "requantize.strict"),
        (Rows(), randn(24, K), {"target": "ascend910b"}, None),
        (Rows(divisor=120), randn(24, K), {}, None),
        (Rows(low=-64), randn(24, K), {}, None),
        (asymmetric, randn(24, K), {}, None),
        (groups, randn(24, K), {}, None),
        (another_factor_of_rows, randn(24, K), {}, None),
    ],
)
def test_one_edit_away_there_is_another_form_or_a_reason(function, x, options, rule):
    gm, report = fused(function, x, **options)
    (site,) = report.sites
    assert "quant_matmul_dequant" not in operators(gm)
    said = [*(r.rule for r in site.rejects), *(site.plan.notes if site.plan else ())]
    assert said or site.fused
    if rule is not None:
        assert not site.fused and any(r.startswith(rule) for r in said), said


def test_strict_numerics_say_what_vendor_numerics_would_do():
    _, report = fused(Rows("integer"), randn(24, K), numerics="strict")
    (said,) = [r for r in report.sites[0].rejects if r.rule == "requantize.strict"]
    assert said.fact.startswith("npu_quant_matmul_dequant") and "numerics='vendor'" in said.hint
    _, report = fused(groups, randn(24, K), numerics="strict")
    assert "requantize.strict" not in {r.rule for r in report.sites[0].rejects}


def test_the_calls_that_the_documents_contradict_are_taken_where_they_are_allowed():
    gm, _ = fused(Rows(), randn(24, K), allow=("qmm.310p.pertoken", "dynamic_quant.310p"))
    assert {"dynamic_quant", "quant_matmul"} <= set(operators(gm))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["dequantized", "integer"])
def test_another_dtype_with_permission(form, dtype):
    function, x = Rows(form), randn(24, K, dtype=dtype)
    gm, report = fused(function, x, allow=("numerics.float16",))
    assert operators(gm) == ["_to_copy", "quant_matmul_dequant", "_to_copy"]
    within_the_bound(function, x, report, gm(x)) if form == "integer" else None
    assert "computed in float16, which overflows above 65504" in report.sites[0].numerics.why


# -- numbers -----------------------------------------------------------------------------------------------------------


@example(m=33, n=40, k=40, form="dequantized", bias=False, divisor=127.0, low=-128, floor=1e-12, spread=1.0, seed=263)
@settings(max_examples=60, deadline=None)
@given(
    m=st.sampled_from([1, 2, 17, 33]),
    n=st.sampled_from([16, 32, 40, 56]),
    k=st.sampled_from([16, 40, 64, 272]),
    form=st.sampled_from(["dequantized", "integer"]),
    bias=st.booleans(),
    divisor=st.sampled_from([127.0, 127.5]),
    low=st.sampled_from([-128, -127]),
    floor=st.sampled_from([1e-12, 1e-5, 0.5]),
    spread=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 1000),
)
def test_results_are_within_the_stated_bound(m, n, k, form, bias, divisor, low, floor, spread, seed):
    function = Rows("dequantized" if m < 17 else form, n, k, bias, divisor, low, floor)
    x = (randn(m, k, seed=seed).float() * 10 ** (randn(m, 1, seed=seed + 1).float() * spread).clamp(1e-4, 10)).half()
    gm, report = fused(function, x)
    assert report.fused == 1 and operators(gm).count("quant_matmul_dequant") == 1
    within_the_bound(function, x, report, gm(x))


def test_rows_of_zeros_and_rows_that_are_not_finite():
    x = randn(24, K)
    x[3] = 0
    x[5, 7], x[9, 0] = float("inf"), float("nan")
    gm, _ = fused(Rows(floor=1e-5), x)
    y = gm(x)
    assert not bool(y[3].any())
    usual = torch.ones(24, dtype=torch.bool)
    usual[[5, 9]] = False
    assert bool(y[usual].isfinite().all())
    assert torch.equal(y[usual], gm(x[:].clone().index_fill_(0, torch.tensor([5, 9]), 1.0))[usual])


# -- GE ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "x", "around"),
    [
        (Rows(), randn(24, K), []),
        (Rows("dequantized", bias=True), randn(2, 12, K), ["Add", "Reshape", "Reshape"]),
        (Rows(n=40, k=90), randn(24, 90), ["PadV3", "StridedSliceV2", "Identity"]),
    ],
)
def test_ge(function, x, around, torchair):
    preview = qp.preview_ge(function, (x,), target="ascend310p", process=torchair)
    assert sorted(preview.ops) == sorted(["QuantMatmulDequant", *around])
    ((y,),) = preview.run()
    assert torch.equal(y, preview.graphs[0].outputs[0])
