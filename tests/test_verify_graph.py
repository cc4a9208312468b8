"""The verifier behind the rewrite says what is wrong with a graph, whoever spoiled it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantpass as qp
from quantpass import pipeline
from quantpass.graph.torch_internals import contiguous_fake, fake_mode_of
from quantpass.planning.options import Options
from quantpass.verify_graph import VERIFY, GraphVerificationError, verify_graph
from tests.oracle import traced

ops = torch.ops.quantpass
OPTIONS = Options(target="ascend910b")


class Static(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randint(-127, 128, (32, 64), dtype=torch.int8))

    def forward(self, x):
        q = torch.clamp(torch.round(x / 0.05), -128, 127).to(torch.int8)
        return F.linear(q.half() * 0.05, self.codes.half() * 0.01)


class DynamicallyQuantized(Static):
    def forward(self, x):
        scale = x.float().abs().amax(-1, keepdim=True) / 127
        q = torch.clamp(torch.round(x.float() / scale), -128, 127).to(torch.int8)
        return F.linear((q.float() * scale).half(), self.codes.half() * 0.01)


@pytest.fixture
def fused():
    gm = traced(Static(), torch.randn(4, 64).half())
    assert qp.fuse(gm, target="ascend910b").fused == 1
    (node,) = gm.graph.find_nodes(op="call_function", target=ops.quant_matmul.default)
    return gm, node


def spoilt(gm):
    with pytest.raises(GraphVerificationError) as caught:
        verify_graph(gm, OPTIONS)
    return str(caught.value)


def as_shape(node, shape, dtype):
    val = node.meta["val"]
    return contiguous_fake(fake_mode_of([val]), shape, dtype, val.device)


def test_a_rewritten_graph_passes(fused):
    verify_graph(fused[0], OPTIONS)


def test_a_wrong_dtype(fused):
    gm, node = fused
    node.meta["val"] = as_shape(node, node.meta["val"].shape, torch.float32)
    assert "claimed to be torch.float32 [4, 32]" in spoilt(gm)


def test_a_wrong_shape(fused):
    gm, node = fused
    node.meta["val"] = as_shape(node, (32, 4), torch.float16)
    assert "its operator gives torch.float16 [4, 32]" in spoilt(gm)


def test_wrong_strides(fused):
    gm, node = fused
    node.meta["val"] = as_shape(node, (32, 4), torch.float16).t()
    assert "with strides [1, 4]" in spoilt(gm)


@pytest.fixture
def codes_and_scales():
    """A fused graph in which ``npu_dynamic_quant`` gives two tensors, and its node."""
    gm = traced(DynamicallyQuantized(), torch.randn(4, 64).half())
    assert qp.fuse(gm, target="ascend910b", numerics="vendor").fused == 1
    (node,) = gm.graph.find_nodes(op="call_function", target=ops.dynamic_quant.default)
    verify_graph(gm, OPTIONS)
    return gm, node


def test_one_of_several_results(codes_and_scales):
    gm, node = codes_and_scales
    codes, scales = node.meta["val"]
    node.meta["val"] = (codes, as_shape(next(iter(node.users)), tuple(scales.shape), torch.float16))
    assert "claimed to be (torch.int8 [4, 64] with strides [64, 1] on cpu, torch.float16 [4]" in spoilt(gm)
    node.meta["val"] = (codes,)
    assert "claimed to be (torch.int8" in spoilt(gm)


def test_a_result_that_is_taken_for_another_one(codes_and_scales):
    gm, node = codes_and_scales
    codes, scales = sorted(node.users, key=lambda n: n.args[1])
    scales.meta["val"] = codes.meta["val"]
    assert "claimed to be torch.int8 [4, 64]" in spoilt(gm)


def test_an_operator_that_nobody_reads(fused):
    gm, node = fused
    with gm.graph.inserting_after(node):
        extra = gm.graph.call_function(torch.ops.aten.neg.default, (node,))
    extra.meta.update({"val": node.meta["val"], "quantpass": "linear"})
    assert "read by nobody" in spoilt(gm)


def test_an_operator_without_a_site(fused):
    gm, node = fused
    node.meta["quantpass"] = ""
    assert "which site" in spoilt(gm)


def test_an_illegal_call(fused):
    """A per-token scale with a float16 result takes a float32 scale, not the word that is there."""
    gm, node = fused
    with gm.graph.inserting_before(node):
        rows = gm.graph.call_function(
            torch.ops.aten.full.default, ([4], 1.0), {"dtype": torch.float32, "device": torch.device("cpu")}
        )
    rows.meta["val"] = as_shape(node, (4,), torch.float32)
    node.kwargs = {**node.kwargs, "pertoken_scale": rows}
    assert "dtypes" in spoilt(gm)


@pytest.mark.parametrize(
    ("model", "chip", "target", "rule"),
    [
        (DynamicallyQuantized, "ascend910b", ops.dynamic_quant, "dynamic_quant.input"),
        (Static, "ascend910b", ops.quantize, "quantize.scales.multiply"),
        (DynamicallyQuantized, "ascend310p", ops.quant_matmul_dequant, "qmmd.x.dtype"),
    ],
)
def test_an_illegal_quantization(model, chip, target, rule):
    """What stands beside the matmuls is judged as they are."""
    gm = traced(model(), torch.randn(4, 64).half())
    options = Options(target=chip, numerics="vendor")
    assert qp.fuse(gm, target=chip, numerics="vendor").fused == 1
    (node,) = gm.graph.find_nodes(op="call_function", target=target.default)
    verify_graph(gm, options)
    x = node.args[0]
    with gm.graph.inserting_before(node):
        wide = gm.graph.call_function(torch.ops.aten._to_copy.default, (x,), {"dtype": torch.float32})
    wide.meta["val"] = as_shape(x, x.meta["val"].shape, torch.float32)
    node.replace_input_with(x, wide)
    with pytest.raises(GraphVerificationError, match=rule):
        verify_graph(gm, options)


def test_an_operator_that_asks_for_a_size_of_the_run():
    """Whether the rows that are chosen lie one behind the other only the run knows: that is no fault of the rewrite."""
    import torch.ao.quantization.fx._decomposed

    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    codes = torch.ones(1, 1, dtype=torch.int8)

    def f(x):
        chosen = x[(x[:, 0] > 0).nonzero().squeeze(-1)]
        return quantize(F.linear(chosen, codes.half() * 0.01), 0.1, 0, -128, 127, torch.int8)

    gm = traced(f, torch.ones(3, 1).half(), sizes="symbolic")
    assert qp.fuse(gm, target="ascend310p").fused == 1
    verify_graph(gm, Options(target="ascend310p"))


def test_an_operator_that_refuses_its_arguments(fused):
    gm, node = fused
    node.args = (node.args[0], node.args[2], node.args[2])
    assert "refused by its operator" in spoilt(gm)


def test_it_runs_where_it_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(pipeline, "verify_graph", lambda gm, options: asked.append(options.chip.name))
    qp.fuse(traced(Static(), torch.randn(4, 64).half()), target="ascend310p")
    monkeypatch.delenv(VERIFY)  # as users run it
    qp.fuse(traced(Static(), torch.randn(4, 64).half()), target="ascend310p")
    assert asked == ["ascend310p"]
