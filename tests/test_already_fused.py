"""Models that call fused operators themselves: nothing is rewritten, every call gets a verdict."""

import importlib.util
from pathlib import Path

import pytest
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


class Around(nn.Module):
    """A call between quantizations: of x by hand or by an operator, of the result or not."""

    def __init__(self, by_hand, requantizes, rows=True):
        super().__init__()
        self.by_hand, self.requantizes, self.rows = by_hand, requantizes, rows
        self.register_buffer("weight", torch.ones(N, K, dtype=torch.int8))
        self.register_buffer("scale", torch.full((N,), 1e-3))

    def forward(self, x):
        if self.by_hand:
            s = x.float().abs().amax(-1, keepdim=True) / 127
            q, s = (x / s).round().clamp(-128, 127).to(torch.int8), s.squeeze(-1)
        else:
            q, s = torch.ops.npu.npu_dynamic_quant(x)
        scale = self.scale if self.rows else torch.ops.npu.npu_trans_quant_param(self.scale)
        rows = {"pertoken_scale": s} if self.rows else {}
        y = torch.ops.npu.npu_quant_matmul(q, self.weight.t(), scale, output_dtype=torch.float16, **rows)
        return (y / 0.5).round().clamp(-128, 127).to(torch.int8) if self.requantizes else y


@pytest.mark.parametrize("requantizes", [False, True])
@pytest.mark.parametrize("by_hand", [False, True])
def test_what_the_graph_quantizes_around_a_call_is_said(by_hand, requantizes):
    """Where nothing can take it in: the codes are asked of no operator, and beside a scale for each row it gives none."""
    qp.emulate_npu()
    program = torch.export.export(Around(by_hand, requantizes), (Y,))
    (site,) = qp.explain(program, target="ascend910b", numerics="strict").sites
    assert site.fused
    notes = " ".join(site.plan.notes)
    would = "the graph makes the codes of x1 (to_1): numerics='vendor' would have npu_dynamic_quant make them"
    assert (would in notes) == by_hand
    assert ("qmm.requantize.pertoken: the result is quantized and x has a scale for each row" in notes) == requantizes


def test_the_reason_is_said_where_no_operator_makes_the_codes():
    qp.emulate_npu()

    class Narrow(Around):
        def forward(self, x):
            s = x.float().abs().amax(-1, keepdim=True) / 7
            q = (x / s).round().clamp(-8, 7).to(torch.int8)
            return torch.ops.npu.npu_quant_matmul(
                q, self.weight.t(), self.scale, output_dtype=5, pertoken_scale=s[:, 0]
            )

    program = torch.export.export(Narrow(True, False), (Y,))
    (site,) = qp.explain(program, target="ascend910b", numerics="vendor").sites
    assert "requantize.divisor: the largest magnitude of the activation becomes 7" in " ".join(site.plan.notes)


class Completed(nn.Module):
    """The operator's codes and scale, and a matmul written out: dequantized, or of the integers."""

    def __init__(self, integer):
        super().__init__()
        self.integer = integer
        g = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=g))
        self.register_buffer("scale", torch.rand(N, generator=g) * 1e-3 + 1e-4)

    def forward(self, x):
        q, s = torch.ops.npu.npu_dynamic_quant(x)
        if self.integer:
            y = torch._int_mm(q, self.weight.t()).float() * s.unsqueeze(-1) * self.scale
        else:
            w = self.weight.float() * self.scale.unsqueeze(-1)
            y = nn.functional.linear(q.float() * s.unsqueeze(-1), w)
        return y.half()


@pytest.mark.parametrize("numerics", ["strict", "vendor"])
def test_codes_of_the_models_own_quantization_are_multiplied_by_an_operator(numerics):
    qp.emulate_npu()
    x = Y.repeat(6, 1)
    for integer in (False, True):
        model = Completed(integer)
        program = torch.export.export(model, (x,))
        (site,) = qp.explain(program, target="ascend910b", numerics=numerics).sites
        assert site.fused and site.numerics.of_step == 0
        assert not any("quantizes the activation itself" in note for note in site.plan.notes)
        report = qp.fuse(program, target="ascend910b", numerics=numerics)
        assert report.fused == 1
        y, want = program.module()(x).double(), model(x).double()
        assert float((y - want).abs().max()) <= 2.0**-9 * float(want.abs().max())


def own(bits, granularity="channel", op="quant"):
    linear = nn.Linear(K, N, dtype=torch.float16)
    if op == "weight":
        size = 64 if granularity == "group" else 0
        module = qp.nn.LinearWeightQuant.from_linear(linear, bits=bits, granularity=granularity, group_size=size)
        return module, torch.randn(4, K).half()
    module = qp.nn.LinearQuant.from_linear(linear, input_scale=0.01, bits=bits, granularity=granularity)
    x = torch.randint(-8, 8, (4, K), dtype=torch.int8)
    return module, torch.ops.quantpass.pack_int4(x) if bits == 4 else x


@pytest.mark.parametrize("op", ["quant", "weight"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_modules_of_quantpass_nn_are_matmuls_with_a_verdict(op, bits, granularity):
    """The operator's transposition flag describes the same call as the vendor's strided view."""
    module, x = own(bits, granularity, op)
    report = qp.explain(module, (x,), target=["ascend310p", "ascend910b", "cpu"])
    assert report.total == 3
    assert report.sites[0].op == f"quantpass.{'weight_' * (op == 'weight')}quant_matmul"
    on_310p, on_910b, on_cpu = report.sites
    assert on_910b.fused
    assert on_cpu.fused
    weight = on_910b.plan.call["x2" if op == "quant" else "weight"]
    assert weight.transposed
    assert weight.shape[-1] == N
    assert on_310p.fused == (bits == 8)
    if bits == 4:
        assert any(r.rule.startswith(f"{'w' * (op == 'weight')}qmm.310p.dtypes") for r in on_310p.rejects)


def test_a_group_that_a_chip_refuses_is_told_of_a_module_too():
    module, x = own(8, "group", "weight")
    report = qp.explain(module, (x,), target=["ascend310p", "ascend910b"])
    assert [s.fused for s in report.sites] == [False, True]
    assert "wqmm.310p.group" in {r.rule for r in report.sites[0].rejects}


def test_what_the_pass_put_into_a_graph_is_not_the_models_own_call():
    from tests.helpers import WeightOnly

    called = qp.nn.LinearWeightQuant.from_linear(nn.Linear(N, 64, dtype=torch.float16))
    program = torch.export.export(nn.Sequential(WeightOnly(K, N), called), (Y,))
    first, again = (qp.fuse(program, target="cpu", lowering="reference") for _ in range(2))
    assert [s.plan.fixups == ("called by the model itself",) for s in first.sites] == [False, True]
    assert [s.plan.fixups for s in again.sites] == [("called by the model itself",)]


Y = torch.randn(4, K, generator=torch.Generator().manual_seed(2)).half()


def example(name):
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples_reports_show_their_matmuls(capsys):
    example("linear_quant").compiled()
    printed = capsys.readouterr().out
    assert "ascend310p: 1 of 1 quantized matmuls fused" in printed
    assert "a call of npu_quant_matmul" in printed
    example("linear_weight_quant").compiled()
    printed = capsys.readouterr().out
    assert "ascend910b: 1 of 1 quantized matmuls fused" in printed
    assert "a call of npu_weight_quant_batchmatmul" in printed
