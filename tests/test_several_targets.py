"""``explain`` for several targets: the graph is read once, and each target gets the verdicts that it gets alone."""

import pytest
import torch
from torch import nn

import quantpass as qp
from quantpass import pipeline
from quantpass.planning import permissions

TARGETS = ["ascend310p", "ascend910b", "cpu"]
K, N, GROUP = 64, 48, 32


class Weights(nn.Module):
    """Two Linears in float32, which no NPU takes as they are: int8 in groups, which one chip would have re-fitted."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, n, k in (("a", N, K), ("b", K, N * GROUP)):
            codes = torch.randint(-127, 128, (n, k // GROUP, GROUP), dtype=torch.int8, generator=generator)
            scale = torch.rand(n, k // GROUP, 1, generator=generator) * 0.01 + 1e-3
            self.register_buffer(name, codes)
            self.register_buffer(f"{name}_scale", scale.to(self.dtype))

    def weight(self, name):
        return (getattr(self, name).to(self.dtype) * getattr(self, f"{name}_scale")).flatten(1)

    def forward(self, x):
        x = nn.functional.linear(x, self.weight("a"))
        return nn.functional.linear(x.repeat(1, GROUP), self.weight("b"))


class InHalf(Weights):
    dtype = torch.float16


class Rows(InHalf):
    """Rows of x quantized as they come."""

    def forward(self, x):
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 127
        codes = (x / scale).round().clamp(-128, 127)
        weight = self.weight("a")[:, :K].abs()
        return nn.functional.linear(codes * scale, weight), super().forward(x)


def _input(model):
    return (torch.randn(8, K, generator=torch.Generator().manual_seed(1)).to(model.dtype),)


def _sites(report, target):
    return [s for s in report.as_dict()["sites"] if s["target"] == target]


CASES = [
    (Weights, {}),
    (Weights, {"allow": ("weights.refit:10",)}),
    (InHalf, {"allow": ("weights.refit:10",)}),
    (Rows, {}),
    (Rows, {"numerics": "vendor"}),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_each_target_gets_what_it_gets_alone(kind, options):
    model = kind()
    together = qp.explain(model, _input(model), target=TARGETS, **options)
    for target in TARGETS:
        alone = qp.explain(model, _input(model), target=target, **options)
        assert _sites(alone, target)
        assert _sites(together, target) == _sites(alone, target)


def _calls(monkeypatch, owner, name):
    """Count the calls of a function, which is carried out all the same."""
    calls, function = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: (calls.append(name), function(*a, **k))[1])
    return calls


def test_the_graph_is_read_once_and_a_weight_fitted_once(monkeypatch):
    model = Weights()
    reads, fits = _calls(monkeypatch, pipeline, "find_sites"), _calls(monkeypatch, permissions, "refit")
    report = qp.explain(model, _input(model), target=TARGETS)
    refused = {s.target for s in report.sites if not s.fused}
    assert {"ascend310p", "ascend910b"} <= refused, report
    assert len(reads) == 1
    assert len(fits) == 2


def test_a_site_that_can_not_be_planned_for_one_target_is_planned_for_the_others(monkeypatch):
    monkeypatch.delenv("QUANTPASS_RAISE", raising=False)
    plan = pipeline.plan_as_allowed

    def fails_on_one(reading, chip, *args):
        if chip.name == "ascend910b":
            raise RuntimeError("no bench sits")
        return plan(reading, chip, *args)

    monkeypatch.setattr(pipeline, "plan_as_allowed", fails_on_one)
    report = qp.explain(InHalf(), _input(InHalf), target=["ascend950", "ascend910b", "cpu"])
    failed = {s.target for s in report.sites if any(r.rule == "read.failed" for r in s.rejects)}
    assert failed == {"ascend910b"}
    assert {s.target for s in report.sites} == {"ascend950", "ascend910b", "cpu"}
