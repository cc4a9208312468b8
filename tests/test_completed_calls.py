"""The model's own ``npu_quant_matmul`` where the graph quantizes by hand what it multiplies or returns: one site, completed."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch.nn import functional as F

import quantpass as qp
from quantpass.graph.dump import dump
from quantpass.graph.schema import op_name
from tests.oracle import judge, traced

K, N, M = 64, 32, 24
G = torch.Generator().manual_seed(0)
W = torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=G)
SECOND = W[:, :N].contiguous()
S = torch.rand(N, generator=G) * 1e-3 + 1e-4
B = torch.randint(-9999, 9999, (N,), dtype=torch.int32, generator=G)
SMOOTH = torch.linspace(0.5, 2, K).half()
X = torch.randn(M, K, generator=G).half()


@pytest.fixture(autouse=True)
def npu():
    qp.emulate_npu()
    return torch.ops.npu


def rows(x):
    s = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return (x / s).round().clamp(-128, 127).to(torch.int8), s.squeeze(-1)


def by_operator(x, **options):
    return torch.ops.npu.npu_dynamic_quant(x, **options)


def static(x):
    return (x / 0.03).round().clamp(-128, 127).to(torch.int8)


def matmul(q, scale, out=torch.float16, w=None, **options):
    return torch.ops.npu.npu_quant_matmul(q, (W if w is None else w).t(), scale, output_dtype=out, **options)


def word(scale=S, offset=None):
    offset = torch.tensor([offset]) if isinstance(offset, float) else offset
    return torch.ops.npu.npu_trans_quant_param(scale, offset)


def behind(y, low=-128, high=127, step=0.25):
    return (y / step).round().clamp(low, high).to(torch.int8)


def fused(function, x=X, **options):
    gm = traced(function, x)
    return gm, qp.fuse(gm, **{"target": "ascend910b", "numerics": "vendor", **options})


def operators(gm):
    return [op_name(n) for n in gm.graph.nodes if n.op == "call_function" and "getitem" not in op_name(n)]


def calls(gm):
    """Without what prepares the weight."""
    return [name.removeprefix("quantpass.") for name in operators(gm) if "format_cast" not in name]


def by_hand(x):
    q, s = rows(x)
    return matmul(q, S, pertoken_scale=s)


def between(x):
    return behind(matmul(static(x), word(), bias=B))


def test_a_quantization_by_hand_becomes_an_operator():
    gm, report = fused(by_hand)
    (site,) = report.sites
    assert site.fused and site.op == "npu.npu_quant_matmul"
    assert site.plan.fixups[0] == "completes a call of the model's own"
    assert site.numerics.of_step > 0
    assert_expected_inline(
        dump(gm),
        """\
%x_1: f16[24, 64] = input
%quantpass_scale: f32[32] = constant quantpass_scale
%dynamic_quant: (i8[24, 64], f32[24]) = quantpass.dynamic_quant(%x_1)
%result_1: f32[24] = getitem(%dynamic_quant, 1)
%result: i8[24, 64] = getitem(%dynamic_quant, 0)
%_tensor_constant0_1: i8[32, 64] = constant _tensor_constant0_1
%format_cast: i8[32, 64] = quantpass.format_cast(%_tensor_constant0_1, 29)
%quant_matmul: f16[24, 32] = quantpass.quant_matmul(%result, %format_cast, %quantpass_scale, pertoken_scale=%result_1, output_dtype=float16, transpose_x2=True)
return %quant_matmul""",
    )


def test_a_quantize_behind_is_the_operators_own_result():
    gm, report = fused(between)
    assert report.fused == report.total == 1
    assert_expected_inline(
        dump(gm),
        """\
%x_1: f16[24, 64] = input
%quantpass_inverse_scale: f16[1] = constant quantpass_inverse_scale
%quantpass_scale_word: i64[32] = constant quantpass_scale_word
%quantpass_bias: i32[32] = constant quantpass_bias
%quantize: i8[24, 64] = quantpass.quantize(%x_1, %quantpass_inverse_scale)
%_tensor_constant1_1: i8[32, 64] = constant _tensor_constant1_1
%format_cast: i8[32, 64] = quantpass.format_cast(%_tensor_constant1_1, 29)
%quant_matmul: i8[24, 32] = quantpass.quant_matmul(%quantize, %format_cast, %quantpass_scale_word, bias=%quantpass_bias, output_dtype=int8, transpose_x2=True)
return %quant_matmul""",
    )


@pytest.mark.parametrize("packed", ["in the graph", "before"])
def test_words_are_read_wherever_they_come_from(packed):
    """One that was packed when the model was loaded says its scale and offset as well."""
    stored = word(S, 3.0)

    def f(x):
        by = stored if packed == "before" else word(S, 3.0)
        return matmul(static(x), by, torch.int8, bias=B)

    assert calls(fused(f)[0]) == ["quantize", "quant_matmul"]
    assert judge(traced(f, X), (X,), target="ascend910b", numerics="vendor").verdict == "fused"


def test_strict_numerics_keep_the_graphs_codes_and_take_in_what_follows():
    gm, report = fused(between, numerics="strict")
    assert [n for n in operators(gm) if n.startswith("quantpass")] == [
        "quantpass.format_cast",
        "quantpass.quant_matmul",
    ]
    assert "aten.round" in operators(gm)  # of x
    (site,) = report.sites
    assert site.fused and site.numerics.of_step == 0
    (site,) = fused(by_hand, numerics="strict")[1].sites
    assert site.plan.fixups == ("called by the model itself",)
    assert "numerics='vendor' would have npu_dynamic_quant make them" in " ".join(site.plan.notes)


def int32(x):
    q, s = rows(x)
    return (matmul(q, torch.ones(1), torch.int32).float() * S * s[:, None]).half()


def with_bias(x):
    q, s = rows(x)
    return matmul(q, S, torch.float16, pertoken_scale=s, bias=torch.ones(N))


def chained(x):
    first = behind(matmul(static(x), word(), bias=B), step=0.02)
    return matmul(first, word(), w=SECOND)


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (by_hand, ["dynamic_quant", "quant_matmul"]),
        (int32, ["dynamic_quant", "quant_matmul"]),
        (with_bias, ["dynamic_quant", "quant_matmul"]),
        (between, ["quantize", "quant_matmul"]),
        (lambda x: matmul(static(x), word(), bias=B), ["quantize", "quant_matmul"]),
        (lambda x: matmul(static(x), word(offset=5.0), torch.int8), ["quantize", "quant_matmul"]),
    ],
)
def test_chains_are_what_an_expert_writes(f, expected):
    gm, report = fused(f)
    assert calls(gm) == expected
    assert report.fused == report.total == 1
    for numerics in ("strict", "vendor"):
        assert judge(traced(f, X), (X,), target="ascend910b", numerics=numerics).verdict == "fused"


def test_codes_go_from_one_call_of_the_model_to_the_next():
    gm, report = fused(chained)
    assert report.fused == report.total == 2
    assert [n for n in operators(gm) if n.startswith("aten") and n != "aten.t"] == []


def swapped(x):
    q, s = rows(x)
    return matmul(q, S, pertoken_scale=s.flip(0))


def narrow(x):
    s = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 63
    return matmul((x / s).round().clamp(-64, 63).to(torch.int8), S, pertoken_scale=s.squeeze(-1))


def rounding_mode(x):
    by = torch.ops.npu.npu_trans_quant_param(S, None, 1)
    return matmul(static(x), by)


def used_twice(x):
    y = matmul(static(x), word(), bias=B)
    return behind(y), y


def rows_behind(x):
    q, s = by_operator(x)
    return behind(matmul(q, S, pertoken_scale=s))


def offsets_by_column(x):
    return matmul(static(x), word(S, torch.linspace(0, 3, N)), torch.int8)


def by_batch(x):
    return matmul(static(x.reshape(4, 6, K)), word(), bias=B.reshape(1, 1, N).expand(4, 1, N))


@pytest.mark.parametrize("f", [swapped, narrow, rounding_mode, rows_behind, offsets_by_column, by_batch])
def test_what_the_operators_do_otherwise_stays_the_models(f):
    """A scale of other rows, another range, a word that was rounded, codes behind a scale for each row, offsets by column."""
    gm, report = fused(f)
    (site,) = report.sites
    assert site.fused and site.plan.fixups == ("called by the model itself",), site
    assert torch.equal(gm(X), traced(f, X)(X))


def test_a_result_that_is_read_twice_is_not_quantized_in_the_operator():
    gm, report = fused(used_twice, numerics="strict")
    (site,) = report.sites
    assert site.plan.fixups == ("called by the model itself",)
    assert "its value has 2 readers" in " ".join(site.plan.notes)
    assert all(torch.equal(a, b) for a, b in zip(gm(X), traced(used_twice, X)(X), strict=True))


def test_modules_of_quantpass_nn_are_completed_too():
    linear = torch.nn.Linear(K, N, dtype=torch.float16)
    module = qp.nn.LinearQuant.from_linear(linear, input_scale=0.03)
    program = torch.export.export(Between(module), (X,))
    report = qp.fuse(program, target="ascend910b", numerics="vendor")
    (site,) = report.sites
    assert site.plan.fixups[0] == "completes a call of the model's own"
    names = [op_name(n) for n in program.graph_module.graph.nodes if n.op == "call_function"]
    assert [n for n in names if n.startswith("aten") and "t." not in n and n != "aten.t"] == []


class Between(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return behind(self.module(static(x)))


def own(x):
    q, s = by_operator(x)
    return matmul(q, S, pertoken_scale=s)


def smoothed(x):
    q, s = by_operator(x, smooth_scales=SMOOTH)
    return matmul(q, S, pertoken_scale=s)


def dequantized(x):
    q, s = by_operator(x)
    return F.linear(q.float() * s[:, None], W.float() * S[:, None]).half()


def integer(x):
    q, s = by_operator(x)
    return (torch._int_mm(q, W.t()).float() * s[:, None] * S).half()


def shared(x):
    q, s = by_operator(x)
    return matmul(q, S, pertoken_scale=s) + matmul(q, 2 * S, pertoken_scale=s)


@pytest.mark.parametrize("f", [own, smoothed, dequantized, integer, shared, by_hand, int32])
def test_on_a_310p_rows_go_to_the_operator_that_quantizes_them_itself(f):
    gm, report = fused(f, target="ascend310p")
    assert report.fused == report.total == 1 + (f is shared)
    assert set(calls(gm)) == {"quant_matmul_dequant", *(["aten.add.Tensor"] if f is shared else [])}
    y, want = gm(X).double(), traced(f, X)(X).double()
    assert float((y - want).abs().max()) <= 0.02 * float(want.abs().max())
    assert judge(traced(f, X), (X,), target="ascend310p", numerics="vendor").verdict == "fused"
    refused = fused(f, target="ascend310p", numerics="strict")[1].sites
    assert all("requantize.strict" in {r.rule for r in s.rejects} for s in refused)


def test_the_smoothing_factor_of_the_models_call_is_kept():
    gm, _ = fused(smoothed, target="ascend310p")
    (call,) = gm.graph.find_nodes(op="call_function", target=torch.ops.quantpass.quant_matmul_dequant.default)
    assert torch.equal(getattr(gm, call.kwargs["smooth_scale"].target), SMOOTH)


def scale_of_another(x):
    q, _ = by_operator(x)
    return matmul(q, S, pertoken_scale=by_operator(2 * x)[1])


def scale_without_smoothing(x):
    q, _ = by_operator(x, smooth_scales=SMOOTH)
    return matmul(q, S, pertoken_scale=x.float().abs().amax(-1) / 127)


def whole(x):
    q, s = by_operator(x, quant_mode="pertensor")
    return F.linear(q.float() * s, W.float() * S[:, None]).half()


def from_outside(x, q, s):
    return matmul(q, S, pertoken_scale=s)


@pytest.mark.parametrize("f", [scale_of_another, scale_without_smoothing, whole, lambda x: from_outside(x, *OUTSIDE())])
def test_on_a_310p_codes_that_belong_to_another_scale_stay(f):
    _, report = fused(f, target="ascend310p")
    (site,) = report.sites
    assert not site.fused
    assert "requantize.strict" not in {r.rule for r in site.rejects}


def OUTSIDE():
    return torch.ones(M, K, dtype=torch.int8), torch.ones(M)


def test_on_other_chips_the_models_own_quantization_stays():
    gm, report = fused(own)
    assert report.sites[0].plan.fixups == ("called by the model itself",)
    assert "npu.npu_dynamic_quant" in operators(gm)


def test_torchair_gets_what_an_expert_writes(torchair):
    ops = qp.preview_ge(Wrapped(), (X,), target="ascend910b", process=torchair).ops
    assert [o for o in ops if o not in ("Data", "Const", "Reshape")] == ["DynamicQuant", "QuantBatchMatmulV3"]


class Wrapped(torch.nn.Module):
    def forward(self, x):
        return by_hand(x)
