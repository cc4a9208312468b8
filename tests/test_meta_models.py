"""Models whose weights hold no data: explained by their shapes, and marked as such."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import quantpass as qp
from quantpass.graph.torch_internals import FakeTensorMode
from quantpass.graph.torch_versions import isolates
from tests.helpers import IntegerW8A8, StaticW8A8, WeightOnly

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).half()


class Packed(nn.Module):
    """int4 codes in int32 words of which nothing can be said without their values."""

    def __init__(self, n=96, k=64):
        super().__init__()
        self.register_buffer("words", torch.randint(-(2**31), 2**31 - 1, (n, k // 8), dtype=torch.int32))
        self.register_buffer("scale", torch.rand(n, 1).half() * 0.01)

    def forward(self, x):
        codes = (self.words[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32, device=x.device)) & 15
        return nn.functional.linear(x, (codes.flatten(1).to(x.dtype) - 8) * self.scale)


MODELS = [WeightOnly, lambda: WeightOnly(zero_point=True), StaticW8A8, Packed]


class Computing(TorchDispatchMode):
    """Notes every operator that runs on data."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        real = [t for t in torch.utils._pytree.tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
        if any(t.device.type != "meta" and type(t) is torch.Tensor and t.numel() > 64 for t in real):
            self.ran.append(str(func))
        return result


def assert_conditional(report, sites=1):
    assert report.total == sites
    assert all("values not read" in s.reading for s in report.sites)
    assert all("values not read" in "".join(s.plan.notes) for s in report.sites if s.fused)
    assert all("no data" in r.hint for s in report.sites if not s.fused for r in s.rejects if r.rule[:5] == "read.")
    assert sum("weights not read" in note for note in report.notes) == 1
    assert "are conditional" in str(report)
    assert any("conditional" in note for note in report.as_dict()["notes"])


@pytest.mark.parametrize("target", ["cpu", "ascend910b"])
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("inputs", ["meta", "cpu"])
def test_a_model_on_the_meta_device(make, target, inputs):
    model = make().to("meta")
    assert_conditional(qp.explain(model, (X.to(inputs),), target=target))


def test_nothing_is_computed():
    model = nn.Sequential(WeightOnly(), WeightOnly(k=96, n=64)).to("meta")
    program = torch.export.export(model, (X.to("meta"),))
    x = X.to("meta")
    with Computing() as computing:
        qp.explain(program, target="ascend910b")
        qp.explain(model, (x,), target="ascend910b")
    assert not computing.ran


@pytest.mark.parametrize("target", ["cpu", "ascend910b"])
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("module", [False, True])
def test_a_program_exported_from_the_meta_device(make, target, module):
    program = torch.export.export(make().to("meta"), (X.to("meta"),))
    assert_conditional(qp.explain(program.module() if module else program, target=target))


@pytest.mark.parametrize("make", MODELS)
def test_fake_models_and_programs(make):
    with FakeTensorMode():
        model, x = make(), torch.randn(4, 64).half()
        program = torch.export.export(model, (x,))
        if not isolates():
            assert_conditional(qp.explain(program, target="ascend910b"))
            with pytest.raises(ValueError, match=r"before 2\.13 compiles no model of fake tensors"):
                qp.explain(model, (x,), target="ascend910b")
            return
        inside = [qp.explain(model, (x,), target="ascend910b"), qp.explain(program, target="ascend910b")]
    outside = [qp.explain(program, target="ascend910b")]
    if make is not Packed:  # whose constants are fake only where the mode is on
        outside.append(qp.explain(model, (x,), target="ascend910b"))
    for report in (*inside, *outside):
        assert_conditional(report)
    verdicts = {tuple((s.fused, str(s.plan), str(s.numerics)) for s in r.sites) for r in (*inside, *outside)}
    assert len(verdicts) == 1


def test_a_model_with_some_of_its_weights():
    model = nn.Sequential(WeightOnly(), WeightOnly(k=96, n=64).to("meta"))
    program = torch.export.export(nn.Sequential(WeightOnly(), WeightOnly(k=96, n=64)), (X,))
    for name, p in model[1].named_parameters():
        program.state_dict[f"1.{name}"] = p
    report = qp.explain(program, target="ascend910b")
    assert ["values not read" in s.reading for s in report.sites] == [False, True]
    # A scale in the operator's own dtype reaches it unaltered, whatever its values are.
    assert [s.numerics.kind for s in report.sites] == ["exact", "exact"]


def test_a_real_model_is_not_conditional():
    report = qp.explain(WeightOnly(), (X,), target="ascend910b")
    assert not report.notes
    assert "not read" not in str(report)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("target", ["cpu", "ascend910b"])
def test_compiling_without_data(make, target):
    model = make().to("meta")
    torch._dynamo.reset()
    backend = qp.backend(target=target)
    with torch.no_grad():
        y = torch.compile(model, backend=backend)(X.to("meta"))
    assert (y.device.type, y.shape) == ("meta", (4, 96))
    assert_conditional(backend.report)
    if not isolates():
        return  # PyTorch compiles no model of fake tensors
    torch._dynamo.reset()
    with FakeTensorMode(), torch.no_grad():
        model, x = make(), torch.randn(4, 64).half()
        assert torch.compile(model, backend=qp.backend(target=target))(x).shape == (4, 96)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("target", ["cpu", "ascend910b"])
def test_fusing_without_data(make, target):
    program = torch.export.export(make().to("meta"), (X.to("meta"),))
    assert_conditional(qp.fuse(program, target=target))
    assert program.module()(X.to("meta")).shape == (4, 96)


@pytest.mark.parametrize("make", MODELS)
def test_verifying_needs_data(make):
    model, x = make().to("meta"), X.to("meta")
    with pytest.raises(ValueError, match="hold no data"):
        qp.verify(model, (x,), target="cpu")
    with pytest.raises(ValueError, match=r"hold no data.*quantpass\.explain"):
        qp.verify(torch.export.export(model, (x,)), (x,), target="cpu")
    with FakeTensorMode():
        fake = make()
    with pytest.raises(ValueError, match="a fake tensor"):
        qp.verify(fake, (X,), target="cpu")


def test_integer_matmuls():
    model = IntegerW8A8().to("meta")
    assert_conditional(qp.explain(model, (torch.randn(2, 7, 64, device="meta"),), target="ascend910b"))


def test_a_deep_model_quantized_by_a_tool():
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4096, 4096, device="meta"), nn.SiLU()) for _ in range(60)))
    model = model.bfloat16().eval()  # 1.9 GiB of weights, were they there
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert_conditional(qp.explain(model, (torch.randn(4, 4096).bfloat16(),), target="ascend910b"), sites=60)
