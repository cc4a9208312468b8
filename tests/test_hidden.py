"""Quantized weights that no graph shows: named, and not passed over by ``require``.

The modules here hold what those of the tools hold, under the same names, and hide it from Dynamo in the same way.
"""

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import quantpass as qp
from quantpass.doors.cli import main
from quantpass.graph.hidden_weights import holders
from tests.helpers import StaticW8A8, WeightOnly, compiled

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).half()


class Gptq(nn.Module):
    """gptqmodel's TorchLinear: int32 words of codes, unpacked behind a graph break; ``bits`` of 2, 4 or 8."""

    def __init__(self, bits=4, k=64, n=64, group=32, cached=False):
        super().__init__()
        g = torch.Generator().manual_seed(bits)
        self.bits, self.group, per_word = bits, group, 32 // bits
        word = (k // per_word, n)
        self.register_buffer("qweight", torch.randint(-(2**31), 2**31 - 1, word, dtype=torch.int32, generator=g))
        self.register_buffer("scales", torch.rand(k // group, n, generator=g).half() * 0.01)
        self.register_buffer("g_idx", torch.arange(k, dtype=torch.int32) // group)

    def dequantized(self):
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)
        codes = (self.qweight.unsqueeze(1) >> shifts.view(1, -1, 1)) & (2**self.bits - 1)
        return (codes.flatten(0, 1) - 2 ** (self.bits - 1)).half() * self.scales.repeat_interleave(self.group, 0)

    def forward(self, x):
        w = self.dequantized()
        torch._dynamo.graph_break()
        return x @ w


class Gathered(Gptq):
    """The scales are looked up in a graph, by the group of each row; the codes are in none."""

    @torch._dynamo.disable
    def codes(self):
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)
        words = (self.qweight.unsqueeze(1) >> shifts.view(1, -1, 1)) & (2**self.bits - 1)
        return (words.flatten(0, 1) - 2 ** (self.bits - 1)).half()

    def forward(self, x):
        scales = self.scales[self.g_idx.long()]
        return x @ (self.codes() * scales)


class OutOfSight(Gptq):
    """The same, unpacked where Dynamo does not look."""

    @torch._dynamo.disable
    def dequantized(self):
        return super().dequantized()

    def forward(self, x):
        return x @ self.dequantized()


class Linear8bitLt(nn.Module):
    """bitsandbytes: an int8 parameter whose scales are attributes of the tensor; the matmul breaks the graph."""

    class Int8Params(nn.Parameter):
        pass

    def __init__(self):
        super().__init__()
        self.weight = self.Int8Params(torch.randint(-127, 128, (64, 64), dtype=torch.int8), requires_grad=False)
        self.weight.CB, self.weight.SCB = self.weight.data, torch.rand(64) * 0.01

    def forward(self, x):
        return self.multiplied(x)

    @torch._dynamo.disable
    def multiplied(self, x):
        return nn.functional.linear(x, (self.weight.CB * self.weight.SCB[:, None]).half())


class KeptInState(Linear8bitLt):
    """bitsandbytes after its first call: codes and scales have moved into an object beside the parameter."""

    class State:
        pass

    def __init__(self):
        super().__init__()
        self.state = self.State()
        self.state.CB, self.state.SCB = self.weight.CB, self.weight.SCB
        del self.weight.CB, self.weight.SCB

    @torch._dynamo.disable
    def multiplied(self, x):
        return nn.functional.linear(x, (self.state.CB * self.state.SCB[:, None]).half())


class Quantizer(nn.Module):
    """modelopt's TensorQuantizer: all it holds is the largest magnitude."""

    def __init__(self):
        super().__init__()
        self.register_buffer("_amax", torch.tensor(3.0))

    @torch._dynamo.disable
    def forward(self, w):
        return (w / self._amax * 127).round().clamp(-127, 127) * self._amax / 127


class FakeQuantized(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64).half(), requires_grad=False)
        self.weight_quantizer = Quantizer()

    def forward(self, x):
        return nn.functional.linear(x, self.weight_quantizer(self.weight))


class Wrapped(nn.Linear):
    """compressed-tensors: a float Linear whose forward is replaced, scales and zero points beside the weight."""

    def __init__(self):
        super().__init__(64, 64, dtype=torch.float16)
        self.requires_grad_(False)
        self.register_buffer("weight_scale", torch.rand(64, 1).half() * 0.01)
        self.register_buffer("weight_zero_point", torch.zeros(64, 1, dtype=torch.int8))

    @torch._dynamo.disable
    def quantized(self):
        return ((self.weight / self.weight_scale).round().clamp(-128, 127)) * self.weight_scale

    def forward(self, x):
        return nn.functional.linear(x, self.quantized(), self.bias)


def legacy():
    """torch.ao's dynamically quantized Linear keeps its weight in an object of TorchScript's."""
    model = nn.Sequential(nn.Linear(64, 64))
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8), X.float()


HIDING = {
    "GPTQ 2 bits": lambda: (Gptq(2), X),
    "GPTQ 4 bits": lambda: (Gptq(4), X),
    "GPTQ 8 bits": lambda: (Gptq(8), X),
    "GPTQ unpacked elsewhere": lambda: (OutOfSight(), X),
    "GPTQ scales looked up": lambda: (Gathered(), X),
    "LLM.int8": lambda: (Linear8bitLt(), X),
    "LLM.int8 after a call": lambda: (KeptInState(), X),
    "fake quantizer": lambda: (FakeQuantized(), X),
    "wrapped forward": lambda: (Wrapped(), X),
    "legacy dynamic": legacy,
}


@pytest.mark.parametrize("name", HIDING)
@pytest.mark.parametrize("beside", [False, True])
def test_a_hidden_quantized_matmul_is_named_and_required(name, beside):
    """Alone, and beside a layer that is fused: a share of what is seen is no share of the model."""
    torch._dynamo.reset()
    layer, x = HIDING[name]()
    model = (
        nn.Sequential(layer, WeightOnly(64, 32, dtype=torch.float16)) if beside and name != "legacy dynamic" else layer
    )
    report = qp.explain(model, (x,), target="ascend910b")
    assert report.fused == (1 if model is not layer else 0)
    assert {r.rule for s in report.sites for r in s.rejects} <= {"read.weight.returned"}
    module = next(m for m in layer.modules() if type(m).__name__ in " ".join(report.hidden))
    assert any(f"1 {type(module).__name__}" in sign for sign in report.hidden), report.hidden
    assert "docs/coverage.md" in " ".join(report.hidden)
    assert "Quantized weights that no graph shows" in str(report)
    for fused in (None, 1.0, 0.5):
        with pytest.raises(AssertionError, match="quantized weights that no graph shows"):
            report.require(fused=fused)
    report.require(fused=0.0)
    report.require(fused=report.fused)
    assert report.as_dict()["hidden"] == list(report.hidden)
    assert qp.verify(model, (x,), target="ascend910b").report.hidden == report.hidden


def test_how_many_which_and_why():
    model = nn.Sequential(*(OutOfSight() for _ in range(3)), WeightOnly(64, 64))
    (sign,) = qp.explain(model, (X,), target="ascend910b").hidden
    assert sign.startswith("3 OutOfSight of tests hold quantized weights")
    assert "first: 0" in sign
    assert "Dynamo broke the graph: " in sign


def test_a_backend_sees_a_dequantized_weight_leave_a_graph():
    """It has no model to look at, but one graph computes a weight that another one takes."""
    _, report = compiled(Gptq(4), X, target="ascend910b")
    assert (report.fused, report.total) == (0, 1)
    with pytest.raises(AssertionError, match=r"read\.weight\.returned"):
        report.require()


def test_the_same_module_without_a_break_is_seen():
    class Whole(Gptq):
        def forward(self, x):
            return x @ self.dequantized()

    report = qp.explain(Whole(4), (X,), target="ascend910b")
    assert report.total == 1
    assert report.hidden == ()


def test_weights_of_torchao_in_and_out_of_sight():
    quantization = pytest.importorskip("torchao.quantization")

    class Away(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        @torch._dynamo.disable
        def forward(self, x):
            return self.inner(x)

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).half()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    seen = qp.explain(model, (X,), target="ascend910b")
    assert (seen.fused, seen.total, seen.hidden) == (2, 2, ())
    seen.require(fused=1.0)
    model[1] = Away(model[1])
    half = qp.explain(model, (X,), target="ascend910b")
    assert (half.fused, half.total) == (1, 1)
    kind = type(model[0].weight).__name__  # which torchao's versions name differently
    assert f"Linear with {kind} of torchao" in half.hidden[0]
    assert "first: 1.inner" in half.hidden[0]
    with pytest.raises(AssertionError, match=kind):
        half.require()


def test_a_weight_that_is_changed_at_run_time_has_its_line_and_is_not_hidden():
    class Adapted(WeightOnly):
        def forward(self, x, b):
            w = self.codes.to(x.dtype) * self.scale
            return nn.functional.linear(x, w + b @ b.t()[:64, :64], self.bias)

    model = Adapted(64, 64)
    report = qp.explain(model, (X, torch.randn(64, 2).half()), target="ascend910b")
    assert (report.fused, report.total) == (0, 1)
    assert report.hidden == ()


def test_a_hidden_layer_before_a_seen_one_is_still_hidden():
    """What the second layer multiplies was computed by the first one, which no graph shows."""
    model = nn.Sequential(OutOfSight(), nn.Tanh(), WeightOnly(64, 64), nn.Tanh(), OutOfSight())
    report = qp.explain(model, (X,), target="ascend910b")
    assert (report.fused, report.total) == (1, 1)
    assert report.hidden[0].startswith("2 OutOfSight")


class Floats(nn.Module):
    """A float model with what looks a little like quantization."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(64, 64), nn.BatchNorm1d(64)
        self.logit_scale = nn.Parameter(torch.ones(4, 1, 1), requires_grad=False)
        self.layer_scale = nn.Parameter(torch.ones(64), requires_grad=False)
        self.register_buffer("relative_position_index", torch.zeros(49, 49, dtype=torch.int32))
        self.register_buffer("position_ids", torch.arange(64)[None])
        self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool))

    def forward(self, x):
        return self.norm(self.linear(x)) * self.layer_scale * self.logit_scale[0, 0]


@pytest.mark.parametrize("break_graph", [False, True])
def test_a_float_model_meets_any_share(break_graph):
    class Broken(Floats):
        def forward(self, x):
            y = super().forward(x)
            if break_graph:
                torch._dynamo.graph_break()
            return torch.softmax(y, -1)

    model = Broken().eval().requires_grad_(False)
    assert list(holders(model)) == []
    report = qp.explain(model, (X.float(),))
    assert (report.total, report.hidden) == (0, ())
    with pytest.raises(AssertionError, match="0 of 0 quantized matmuls are fused, 1 were required"):
        report.require()
    report.require(fused=1.0)
    report.require(fused=0.3)
    with pytest.raises(AssertionError, match="0 of 0 quantized matmuls are fused, 1 were required"):
        report.require(fused=1)
    _, of_backend = compiled(model, X.float(), target="ascend910b")
    of_backend.require(fused=1.0)


def test_a_quantized_embedding_is_no_hidden_matmul():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.randint(-127, 128, (100, 64), dtype=torch.int8), requires_grad=False)
            self.scale = nn.Parameter(torch.rand(100, 1), requires_grad=False)

        def forward(self, i):
            return nn.functional.embedding(i, self.codes.float() * self.scale)

    report = qp.explain(Table(), (torch.tensor([1, 2]),), target="ascend910b")
    assert report.hidden == ()
    report.require(fused=1.0)


def test_fused_and_refused_layers_are_not_hidden():
    model = nn.Sequential(WeightOnly(64, 64), StaticW8A8(64, 64), WeightOnly(64, 64, dtype=torch.float16))
    report = qp.explain(model, (X,), target=["ascend310p", "ascend910b"])
    assert report.hidden == ()
    assert len(list(holders(model))) == 3
    report = qp.explain(WeightOnly(dtype=torch.float32), (X.float(),), target="ascend910b")
    assert (report.fused, report.total, report.hidden) == (0, 1, ())


@pytest.mark.parametrize("share", [1.5, -0.1, float("nan")])
def test_a_share_is_between_nothing_and_all(share):
    report = qp.explain(WeightOnly(), (X,), target="ascend910b")
    with pytest.raises(ValueError, match="a share is between"):
        report.require(fused=share)


def test_one_site_and_all_sites():
    report = qp.explain(WeightOnly(dtype=torch.float32), (X.float(),), target=["ascend910b", "cpu"])
    assert (report.fused, report.total) == (1, 2)
    report.require(fused=1)
    report.require(fused=0.5)
    for fused in (1.0, 0.6, 2, None):
        with pytest.raises(AssertionError, match="1 of 2 quantized matmuls are fused"):
            report.require(fused=fused)


@pytest.mark.parametrize(("factory", "code"), [("floats", 1), ("hidden", 1), ("seen", 0)])
def test_require_all_on_the_command_line(factory, code, tmp_path, monkeypatch):
    (tmp_path / "hiding.py").write_text(
        "from tests.test_hidden import *\n"
        "def floats(): return Floats().eval().requires_grad_(False), (X.float(),)\n"
        "def hidden(): return OutOfSight(), (X,)\n"
        "def seen(): return WeightOnly(), (X,)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    run = CliRunner().invoke(main, ["explain", f"hiding:{factory}", "-t", "ascend910b", "--require-all"])
    assert run.exit_code == code, run.output
