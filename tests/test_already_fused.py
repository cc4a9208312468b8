"""Models that call the vendor's operators themselves: nothing is rewritten, every call gets a verdict."""

import torch
from torch import nn

import quantpass as qp

K, N = 512, 128


class Called(nn.Module):
    """``npu_quant_matmul`` as a user writes it."""

    def __init__(self, bias_dtype=torch.int32):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randint(-128, 128, (N, K), dtype=torch.int8, generator=g))
        self.register_buffer("scale", torch.full((N,), 1e-3))
        self.register_buffer("bias", torch.zeros(N, dtype=bias_dtype))

    def forward(self, x):
        word = torch.ops.npu.npu_trans_quant_param(self.scale)
        return torch.ops.npu.npu_quant_matmul(x, self.weight.t(), word, bias=self.bias, output_dtype=5)


X = torch.randint(-128, 128, (16, K), dtype=torch.int8, generator=torch.Generator().manual_seed(1))


def test_a_legal_call_is_left_alone_and_counted():
    qp.emulate_npu()
    torch._dynamo.reset()
    backend = qp.backend(target="ascend910b")
    with torch.no_grad():
        y = torch.compile(Called(), backend=backend)(X)
        assert torch.equal(y, Called()(X))
    (site,) = backend.report.sites
    assert site.fused
    assert site.plan.fixups == ("called by the model itself",)
    assert site.plan.call["output_dtype"] == torch.float16
    assert site.plan.call["x2"].transposed
    before, after = backend.report.graphs[0]
    assert before == after
    backend.report.require()


def test_a_format_that_the_graph_does_not_say_is_assumed_and_said():
    qp.emulate_npu()
    (site,) = qp.explain(Called(), (X,), target="ascend310p").sites
    assert site.fused
    assert site.plan.weight_format == "NZ"
    assert "FRACTAL_NZ" in site.plan.notes[0]


def test_a_call_that_a_chip_refuses_is_found_before_the_device_does():
    qp.emulate_npu()
    program = torch.export.export(Called(torch.float16), (X,))
    report = qp.explain(program, target=["ascend310p", "ascend910b"])
    assert [s.fused for s in report.sites] == [False, False]
    assert any("bias" in r.fact for r in report.sites[0].rejects)
