"""What is a weight and what an input: found whichever way PyTorch hands a graph over."""

import itertools

import pytest
import torch
from torch import nn
from torch._inductor import config
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import quantpass as qp
from tests.helpers import WeightOnly, assert_close


class Packed(nn.Module):
    """int4 codes, two to a byte: nothing can be read of it without values."""

    def __init__(self, k=64, n=96):
        super().__init__()
        g = torch.Generator().manual_seed(k + n)
        self.register_buffer("packed", torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=g))
        self.register_buffer("scale", torch.rand(n, 1, generator=g).half() * 0.01 + 1e-3)

    def forward(self, x):
        both = torch.stack([self.packed & 15, self.packed >> 4], -1).flatten(1)
        return nn.functional.linear(x, (both.to(x.dtype) - 8) * self.scale)


@pytest.fixture(params=[False, True], ids=["", "freezing"])
def either_way(request):
    """With Inductor's freezing off and on: it is of the whole process, and some tools set it."""
    with config.patch(freezing=request.param):
        yield


@config.patch(freezing=True)
@pytest.mark.parametrize("target", ["cpu", "ascend910b"])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("module", [Packed, WeightOnly, lambda: nn.Sequential(Packed(), Packed(96, 64))])
def test_weights_are_known_with_freezing(module, inner, target):
    model, x = module(), torch.randn(4, 64).half()
    torch._dynamo.reset()
    backend = qp.backend(target=target, inner=inner)
    with torch.no_grad():
        assert_close(torch.compile(model, backend=backend)(x), model(x))
    backend.report.require()
    assert {s.numerics.kind for s in backend.report.sites} == {"exact"}


@config.patch(freezing=True)
def test_a_weight_that_changes_with_freezing():
    model, x = Packed(), torch.randn(4, 64).half()
    torch._dynamo.reset()
    run = torch.compile(model, backend=qp.backend(target="ascend910b"))
    with torch.no_grad():
        for i in range(3):
            model.packed.data = torch.randint(0, 256, (96, 32), dtype=torch.uint8)
            assert_close(run(x), model(x))
            model.scale.data.mul_(i + 2)
            assert_close(run(x), model(x))
            model.scale = torch.rand(96, 1).half()
            assert_close(run(x), model(x))


@pytest.mark.usefixtures("either_way")
def test_explain_and_verify_say_the_same_with_freezing():
    model, x = Packed(), torch.randn(4, 64).half()
    (explained,) = qp.explain(model, (x,), target="ascend910b").sites
    (verified,) = qp.verify(model, (x,), target="ascend910b").report.sites
    assert str(explained.plan) == str(verified.plan)
    assert explained.numerics.kind == "exact"


@pytest.mark.usefixtures("either_way")
def test_an_input_is_never_taken_for_a_weight():
    class Given(nn.Module):
        def forward(self, x, given):
            codes, scale = given["codes"], given["scales"][0]
            return nn.functional.linear(x, codes.half() * scale)

    model, x, reports = Given(), torch.randn(4, 64).half(), []
    torch._dynamo.reset()
    run = torch.compile(model, backend=qp.backend(target="ascend910b", on_report=reports.append))
    with torch.no_grad():
        for _ in range(4):
            codes = torch.randint(-127, 128, (96, 64), dtype=torch.int8)
            given = {"codes": codes, "scales": [torch.rand(96, 1).half()]}
            assert_close(run(x, given), model(x, given))
    assert len(reports) == 1, "nothing was prepared from values that differ at each call"


# -- tensor subclasses, a frame for each -------------------------------------------------------------------------------

torchao = pytest.importorskip("torchao.quantization")


def int4():
    from torchao.quantization.granularity import PerGroup

    return torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


class Chain(nn.Module):
    def __init__(self, breaks=False):
        super().__init__()
        sizes = [64, 96, 160, 96, 64]
        self.layers = nn.ModuleList(
            nn.Linear(a, b, bias=i % 2 == 0) for i, (a, b) in enumerate(itertools.pairwise(sizes))
        )
        self.breaks = breaks

    def forward(self, x):
        for layer in self.layers:
            if self.breaks:
                torch._dynamo.graph_break()
            x = layer(x)
        return x


@pytest.mark.parametrize("tool", [torchao.Int8WeightOnlyConfig, int4])
@pytest.mark.parametrize("target", ["cpu", "ascend910b"])
@pytest.mark.parametrize("how", ["one by one", "with breaks", "one by one, dynamic"])
def test_linears_of_a_tensor_subclass_in_frames_of_their_own(tool, target, how):
    model = Chain(breaks=how == "with breaks").bfloat16().eval()
    torchao.quantize_(model, tool())
    torch._dynamo.reset()
    backend = qp.backend(target=target)
    if how == "with breaks":
        run = torch.compile(model, backend=backend)
    else:
        run = model
        for layer in model.layers:
            layer.compile(backend=backend, dynamic=True if "dynamic" in how else None)
    whole = Chain().bfloat16().eval()
    whole.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        for rows in (4, 7, 9, 1, 4):
            x = torch.randn(rows, 64).bfloat16()
            assert_close(run(x), whole(x))
    backend.report.require()
    assert {s.numerics.kind for s in backend.report.sites} == {"exact"}


@pytest.mark.parametrize("tool", [torchao.Int8WeightOnlyConfig, int4])
def test_subclass_linears_one_by_one_under_inductor(tool):
    model = Chain().bfloat16().eval()
    torchao.quantize_(model, tool())
    whole = Chain().bfloat16().eval()
    whole.load_state_dict(model.state_dict(), assign=True)
    torch._dynamo.reset()
    backend = qp.backend(target="ascend910b", inner="inductor")
    for layer in model.layers:
        layer.compile(backend=backend)
    with torch.no_grad():
        for rows in (4, 7):
            x = torch.randn(rows, 64).bfloat16()
            assert_close(model(x), whole(x))
    backend.report.require()


def codes_of(weight):
    """Of one of torchao's weights, whatever it is called by this torchao."""
    while is_traceable_wrapper_subclass(weight):
        parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
        weight = next(t for t in parts if is_traceable_wrapper_subclass(t) or t.dtype == torch.int8)
    return weight


def test_a_subclass_weight_quantized_again():
    layer, x = nn.Linear(64, 96).bfloat16().eval(), torch.randn(4, 64).bfloat16()
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    torch._dynamo.reset()
    layer.compile(backend=qp.backend(target="ascend910b"))
    with torch.no_grad():
        for _ in range(3):
            assert_close(layer(x), layer.forward(x))
            fresh = nn.Linear(64, 96).bfloat16()
            torchao.quantize_(fresh, torchao.Int8WeightOnlyConfig())
            layer.weight = fresh.weight
            assert_close(layer(x), layer.forward(x))
            codes_of(layer.weight).data = torch.randint(-127, 128, (96, 64), dtype=torch.int8)
            assert_close(layer(x), layer.forward(x))
