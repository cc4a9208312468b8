"""Graphs as deep as real models are long: reading, planning and rewriting do not recurse along the graph."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantpass as qp

DEEP = 500
K, N = 64, 32


def _quantized(w):
    return torch.clamp(torch.round(w / 0.05), -128, 127).to(torch.int8)


BEFORE = {
    "residual": lambda y: y + torch.relu(y) * 0.001,
    "add": lambda y: y + 0.001,
    "mul": lambda y: y * 0.9999,
    "view": lambda y: y.view(2, 2, K).view(4, K),
    "transpose": lambda y: y.t().t(),
    "clamp": lambda y: y.clamp(-9, 9),
    "cast": lambda y: y.float().half(),
    "round": lambda y: torch.round(y) * 1.0,
}
ON_CODES = {
    "view": lambda q: q.view(2, 2, K).view(4, K),
    "transpose": lambda q: q.t().contiguous().t(),
    "clamp": lambda q: q.clamp(-100, 100),
}
ON_WEIGHT = {
    "mul": lambda w: w * 1.0,
    "transpose": lambda w: w.t().contiguous().t(),
    "view": lambda w: w.view(N, 2, K // 2).view(N, K),
}
AFTER = {
    "mul": lambda y: y * 1.0,
    "add": lambda y: y + 0.0,
    "view": lambda y: y.view(4, 2, N // 2).view(4, N),
    "relu": torch.relu,
}


class Deep(nn.Module):
    """A quantized Linear with ``DEEP`` equal operations at one place of it."""

    def __init__(self, place, step):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.register_buffer("codes", torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=rng))
        self.register_buffer("scale", (torch.rand(N, 1, generator=rng) * 1e-3 + 2e-4).half())
        self.place, self.step = place, step

    def _repeated(self, place, value):
        for _ in range(DEEP if place == self.place else 0):
            value = self.step(value)
        return value

    def forward(self, x):
        x = self._repeated("before", x)
        if self.place == "codes":
            x = self._repeated("codes", _quantized(x)).half() * 0.05
        w = self._repeated("weight", self.codes.half() * self.scale)
        return self._repeated("after", F.linear(x, w))


CASES = [
    (place, name)
    for place, steps in (("before", BEFORE), ("codes", ON_CODES), ("weight", ON_WEIGHT), ("after", AFTER))
    for name in steps
]


@pytest.mark.parametrize(("place", "name"), CASES)
def test_a_deep_graph_is_fused_and_keeps_its_numbers(place, name):
    step = {"before": BEFORE, "codes": ON_CODES, "weight": ON_WEIGHT, "after": AFTER}[place][name]
    model, x = Deep(place, step).eval(), torch.randn(4, K).half()
    program = torch.export.export(model, (x,))
    report = qp.fuse(program, target="ascend910b")
    assert (report.fused, report.total) == (1, 1), str(report)
    torch.testing.assert_close(program.module()(x), model(x), rtol=4e-3, atol=2e-3)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):
        return x + torch.relu(self.conv(x)) * 1e-3


class Cnn(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.Sequential(*(Residual() for _ in range(blocks)))
        self.register_buffer("codes", torch.randint(-127, 128, (10, 32), dtype=torch.int8))

    def forward(self, x):
        return F.linear(self.blocks(x).flatten(1), self.codes.float() * 0.01)


@pytest.mark.slow
def test_a_cnn_of_500_residual_blocks_compiles():
    model, x = Cnn(500).eval(), torch.randn(2, 2, 4, 4)
    backend = qp.backend(target="cpu")
    with torch.no_grad():
        y = torch.compile(model, backend=backend)(x)
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)
    assert (backend.report.fused, backend.report.total) == (1, 1)
