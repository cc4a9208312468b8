"""A fused program or graph module holds its weights itself: nothing loaded afterwards makes it half new."""

import copy

import pytest
import torch
from torch import nn

import quantpass as qp
from tests.helpers import StaticW8A8, WeightOnly, assert_close

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).half()
TARGETS = ["cpu", "ascend310p", "ascend910b"]


class Between(nn.Module):
    """A quantized matmul between layers that are not."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64).half()
        self.linear = WeightOnly(zero_point=True)

    def forward(self, x):
        return self.linear(self.norm(x))


class Tied(nn.Module):
    """The table is read as floats too."""

    def __init__(self):
        super().__init__()
        self.linear = WeightOnly(bias=False)

    def forward(self, x):
        table = self.linear.codes.half() * self.linear.scale
        return nn.functional.linear(x, table) + nn.functional.embedding(torch.tensor([1]), table).sum()


MODELS = [WeightOnly, lambda: WeightOnly(zero_point=True), StaticW8A8, Between, Tied]


def other_than(model):
    """The same model with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for t in (*other.parameters(), *other.buffers()):
            t.copy_(-t if t.dtype == torch.int8 else t * 2)
    return other


def fused(model, target, how):
    """A module that runs the fused graph, and what it was fused from."""
    program = torch.export.export(model, (X,))
    if how == "graph module":
        gm = program.module()
        qp.fuse(gm, target=target).require()
        return gm
    qp.fuse(program, target=target).require()
    program._validate()
    return copy.deepcopy(program).module() if how == "copied program" else program.module()


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("how", ["program", "copied program", "graph module"])
def test_a_checkpoint_loaded_into_a_fused_graph_is_refused_whole(make, target, how):
    model = make()
    run = fused(model, target, how)
    before, other = run(X), other_than(model)
    assert_close(before, model(X), torch.bfloat16)
    for options in ({}, {"strict": False}, {"assign": True}, {"strict": False, "assign": True}):
        with pytest.raises(RuntimeError, match="fuse it again"):
            run.load_state_dict(other.state_dict(), **options)
        assert torch.equal(run(X), before)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("how", ["program", "graph module"])
def test_the_model_that_it_came_from_may_change(make, target, how):
    """An exported program shares its tensors with the model; a fused one does not share those it computes with."""
    model = make()
    run = fused(model, target, how)
    before = run(X)
    linear = getattr(model, "linear", model)
    linear.load_state_dict(other_than(linear).state_dict())
    assert torch.equal(run(X), before)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_saved_program(make, target, tmp_path):
    model = make()
    program = torch.export.export(model, (X,))
    qp.fuse(program, target=target)
    torch.export.save(program, tmp_path / "p.pt2")
    run = torch.export.load(tmp_path / "p.pt2").module()
    assert torch.equal(run(X), program.module()(X))
    before = run(X)
    with pytest.raises(RuntimeError):
        run.load_state_dict(other_than(model).state_dict())
    linear = {k: v for k, v in other_than(model).state_dict().items() if "norm" not in k}
    run.load_state_dict(linear, strict=False)
    if not isinstance(model, Between):
        assert torch.equal(run(X), before)


@pytest.mark.parametrize("how", ["program", "graph module"])
def test_what_is_not_fused_stays_loadable(how):
    model = Between()
    run = fused(model, "ascend910b", how)
    assert set(run.state_dict()) == {"norm.weight", "norm.bias"}
    norm = {k: v * 2 for k, v in model.state_dict().items() if k.startswith("norm")}
    run.load_state_dict(norm)
    model.load_state_dict(norm, strict=False)
    assert_close(run(X), model(X))


def test_no_weight_is_kept_twice():
    model = WeightOnly(k=64, n=512)
    program = torch.export.export(model, (X,))
    size = sum(t.nbytes for t in model.state_dict().values())
    qp.fuse(program, target="cpu", lowering="reference").require()
    assert not program.state_dict
    assert sum(t.nbytes for t in program.constants.values()) <= 1.1 * size


def test_a_program_made_of_another_leaves_that_as_it_was():
    model = WeightOnly()
    program = torch.export.export(model, (X,))
    second = program.run_decompositions({})
    qp.fuse(second, target="cpu").require()
    assert_close(program.module()(X), model(X))
    program.module().load_state_dict(model.state_dict())


def test_a_fused_graph_inside_a_model():
    model, whole = WeightOnly(), nn.Module()
    whole.block = fused(model, "cpu", "graph module")
    with pytest.raises(RuntimeError, match=r"block\."):
        whole.load_state_dict({f"block.{k}": v for k, v in model.state_dict().items()}, strict=False)


def test_a_graph_without_a_fused_site_stays_as_it_was():
    model = WeightOnly(dtype=torch.float32)
    program = torch.export.export(model, (X.float(),))
    assert qp.fuse(program, target="ascend310p").fused == 0
    run, other = program.module(), other_than(model)
    run.load_state_dict(other.state_dict())
    assert torch.equal(run(X.float()), other(X.float()))


def test_fusing_twice():
    program = torch.export.export(nn.Sequential(WeightOnly(), WeightOnly(k=96, n=64)), (X,))
    qp.fuse(program, target="cpu").require()
    qp.fuse(program, target="cpu")
    with pytest.raises(RuntimeError, match="fuse it again"):
        program.module().load_state_dict(nn.Sequential(WeightOnly(), WeightOnly(k=96, n=64)).state_dict())
