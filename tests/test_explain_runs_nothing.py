"""``explain`` captures a model and does not run it, unless Python has to decide what comes next."""

import pytest
import torch
from torch import nn

import quantpass as qp
from tests.helpers import StaticW8A8, WeightOnly

X = torch.randn(4, 64).half()


@pytest.fixture
def counted():
    """An operator that counts how often it runs on data."""
    library = torch.library.Library("quantpass_counted", "FRAGMENT")
    runs = []

    def same(x):
        runs.append(tuple(x.shape))
        return x.clone()

    library.define("same(Tensor x) -> Tensor")
    library.impl("same", same, "CPU")
    library.impl("same", torch.empty_like, "Meta")
    yield runs
    library._destroy()


class Counted(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.ops.quantpass_counted.same(self.layer(torch.ops.quantpass_counted.same(x)))


class TwoGraphs(Counted):
    def __init__(self):
        super().__init__(WeightOnly())
        self.second = WeightOnly(k=96, n=64)

    def forward(self, x):
        y = super().forward(x)
        return self.second(y) if y.sum() > -1e9 else y


@pytest.mark.parametrize("make", [WeightOnly, StaticW8A8])
def test_one_graph_is_not_run(make, counted):
    model = Counted(make()).eval()
    report = qp.explain(model, (X,), target="ascend910b")
    assert (report.fused, report.total) == (1, 1)
    assert not counted
    model(X)
    assert len(counted) == 2  # it counts


def test_hooks_see_nothing(counted):
    model, seen = WeightOnly().eval(), []
    model.register_forward_hook(lambda module, given, result: seen.append(result))
    report = qp.explain(model, (X,), target="ascend910b")
    assert report.fused == 1
    assert not seen and not counted


def test_random_numbers_are_not_drawn():
    model = nn.Sequential(WeightOnly(), nn.Dropout(0.5))
    before = torch.get_rng_state()
    qp.explain(model, (X,), target="ascend910b")
    assert torch.equal(torch.get_rng_state(), before)


def test_several_graphs_are_run_once(counted):
    report = qp.explain(TwoGraphs().eval(), (X,), target="ascend910b")
    assert (report.fused, report.total) == (2, 2), report
    assert counted == [(4, 64), (4, 96)]


def test_what_is_wrong_with_a_model_is_said_as_before():
    with pytest.raises(RuntimeError, match=r"shape|size"):
        qp.explain(WeightOnly().eval(), (torch.randn(4, 63).half(),), target="ascend910b")
