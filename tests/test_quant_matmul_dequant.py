"""``npu_quant_matmul_dequant``: float16 rows quantized inside the operator, on a 310P."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import quantpass as qp
from quantpass import TensorSpec as T
from quantpass.graph.dump import dump
from quantpass.lowering.aclnn import lower_to_aclnn

M, K, N = 8, 64, 32
OPS = torch.ops.quantpass
GENERATOR = torch.Generator().manual_seed(0)
X = (torch.randn(M, K, generator=GENERATOR) * 3).half()
WEIGHT = torch.randint(-128, 128, (N, K), generator=GENERATOR, dtype=torch.int8)
SCALE = torch.rand(N, generator=GENERATOR) * 0.01 + 1e-3
SMOOTH = (torch.rand(K, generator=GENERATOR) + 0.5).half()
ROWS = torch.rand(M, generator=GENERATOR) * 0.05 + 0.01
FORMS = {
    "dynamic": {},
    "dynamic, smooth": {"smooth_scale": SMOOTH},
    "a scale for each row": {"x_scale": ROWS},
    "one scale, smooth": {"x_scale": ROWS[:1], "smooth_scale": SMOOTH, "quant_mode": "pertensor"},
}


@pytest.fixture(scope="module", autouse=True)
def npu_on_cpu():
    qp.emulate_npu()


@pytest.mark.parametrize("form", FORMS)
def test_formula(form):
    """In float64, on the codes that float32 gives where no quotient is near a tie."""
    given = FORMS[form]
    t = X.double() * given.get("smooth_scale", torch.ones(K)).double()
    scale = given["x_scale"].double().reshape(-1, 1) if "x_scale" in given else t.abs().amax(1, keepdim=True) / 127
    quotient = t / scale
    assert float(((quotient.abs() % 1) - 0.5).abs().min()) > 1e-5, "no ties in this test"
    exact = (quotient.round().clamp(-128, 127) @ WEIGHT.double().t()) * SCALE.double() * scale
    result = OPS.quant_matmul_dequant(X, WEIGHT, SCALE, **given)
    assert result.dtype == torch.float16
    assert float(((result.double() - exact).abs() / exact.abs().clamp(min=1e-2)).max()) < 2.0**-10


def test_rows_of_zeros_and_large_results():
    zeros = X * torch.tensor([0.0, *[1.0] * (M - 1)]).half().reshape(-1, 1)
    assert not OPS.quant_matmul_dequant(zeros, WEIGHT, SCALE)[0].any()
    large = OPS.quant_matmul_dequant(X, WEIGHT, SCALE * 1e4)
    limited = OPS.quant_matmul_dequant(X, WEIGHT, SCALE * 1e4, saturate=True)
    assert torch.isinf(large).any()
    assert float(limited.abs().max()) == 65504


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"x": X.float()}, "qmmd.x"),
        ({"x": X.reshape(2, 4, K)}, "qmmd.x"),
        ({"quantized_weight": WEIGHT.t().contiguous()}, "qmmd.weight"),
        ({"weight_scale": SCALE[:1]}, "qmmd.scale"),
        ({"x_scale": ROWS[:1]}, "qmmd.x_scale.token"),
        ({"x_scale": ROWS, "quant_mode": "pertensor"}, "qmmd.x_scale.tensor"),
        ({"smooth_scale": SMOOTH.float()}, "qmmd.smooth"),
        ({"quant_mode": "pergroup"}, "qmmd.mode"),
        ({"quant_mode": "pertensor"}, "qmmd.dynamic"),
    ],
)
def test_what_the_kernel_refuses(changes, rule):
    arguments = {"x": X, "quantized_weight": WEIGHT, "weight_scale": SCALE, **changes}
    with pytest.raises(ValueError, match=rf"\[{rule}\]"):
        OPS.quant_matmul_dequant(**arguments)


def test_traced_with_symbolic_rows():
    def f(x):
        return OPS.quant_matmul_dequant(x, WEIGHT, SCALE) + 1

    compiled = torch.compile(f, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(X), f(X))
    assert torch.equal(compiled(X[:3]), f(X[:3]))


@pytest.mark.parametrize("form", FORMS)
def test_the_vendors_call_on_a_cpu(form):
    given = FORMS[form]
    vendors = torch.ops.npu.npu_quant_matmul_dequant(X, WEIGHT, SCALE, **given)
    assert torch.equal(vendors, OPS.quant_matmul_dequant(X, WEIGHT, SCALE, **given, saturate=True))


def test_the_vendors_call_takes_no_bias():
    with pytest.raises(ValueError, match=r"\[qmmd.bias\]"):
        torch.ops.npu.npu_quant_matmul_dequant(X, WEIGHT, SCALE, bias=torch.zeros(N, dtype=torch.int32))


def test_lowered_to_the_vendors_call():
    gm = make_fx(lambda x, s: OPS.quant_matmul_dequant(x, WEIGHT, SCALE, smooth_scale=s, saturate=True))(X, SMOOTH)
    before = gm(X, SMOOTH)
    assert lower_to_aclnn(gm) == 1
    assert torch.equal(gm(X, SMOOTH), before)
    assert "npu_quant_matmul_dequant(%x_1, %_tensor_constant0, %_tensor_constant1, smooth_scale=%s_1)" in dump(gm)


@pytest.mark.parametrize("form", FORMS)
def test_ge(form, torchair):
    """The same GE operator, with the same attributes, as torchair makes of the vendor's call; and what it computes."""
    given = FORMS[form]
    names, extra = ("x_scale", "smooth_scale"), {k: v for k, v in given.items() if k == "quant_mode"}
    tensors = [given[n] for n in names if n in given]

    def called(op, flags):
        def f(x, w, s, *rest):
            return op(x, w, s, **dict(zip([n for n in names if n in given], rest, strict=True)), **extra, **flags)

        return qp.preview_ge(f, (X, WEIGHT, SCALE, *tensors), target="ascend310p", fuse=False, process=torchair)

    mine = called(OPS.quant_matmul_dequant, {"saturate": True})
    vendors = called(torch.ops.npu.npu_quant_matmul_dequant, {})
    assert mine.ops == ["QuantMatmulDequant"]
    assert str(mine) == str(vendors)
    ((computed,),) = mine.run()
    assert torch.equal(computed, mine.graphs[0].outputs[0])


LEGAL = {"x": T("float16", (16, 512)), "quantized_weight": T("int8", (128, 512)), "weight_scale": T("float32", (128,))}


def ask(target="ascend310p", **changes):
    return qp.check_op("npu_quant_matmul_dequant", target=target, **{**LEGAL, **changes})


@pytest.mark.parametrize(
    ("changes", "rule", "nearest"),
    [
        ({}, None, None),
        ({"smooth_scale": T("float16", (512,))}, None, None),
        ({"x_scale": T("float32", (1,)), "quant_mode": "pertensor"}, None, None),
        ({"x": T("bfloat16", (16, 512))}, "qmmd.x.dtype", {"x": T("float16", (16, 512))}),
        ({"quantized_weight": T("int8", (128, 512), "NZ")}, "qmmd.weight.layout", {"quantized_weight": LEGAL["quantized_weight"]}),
        ({"quantized_weight": T("int8", (120, 512)), "weight_scale": T("float32", (120,))}, "qmmd.n.multiple", None),
        ({"bias": T("int32", (128,))}, "qmmd.bias", {"bias": None}),
        ({"quant_mode": "pertensor"}, "qmmd.dynamic", {"quant_mode": "pertoken"}),
        ({"target": "ascend910b"}, "qmmd.unavailable", None),
        ({"target": "ascend950"}, "qmmd.unavailable", None),
    ],
)  # fmt: skip
def test_where_it_is_legal(changes, rule, nearest):
    verdict = ask(**changes)
    assert [r.rule for r in verdict.rejects] == ([] if rule is None else [rule])
    assert verdict.nearest == nearest


def test_a_models_own_call_has_a_verdict():
    def f(x):
        return torch.ops.npu.npu_quant_matmul_dequant(x, WEIGHT, SCALE)

    report = qp.explain(f, (X,), target=["ascend310p", "ascend910b"])
    assert [(s.target, s.fused) for s in report.sites] == [("ascend310p", True), ("ascend910b", False)]
    assert "QMMD ND, exact" in str(report)
