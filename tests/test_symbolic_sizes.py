"""Sizes that only the run knows: counts of selected rows, repeated rows, dynamic dimensions. Nothing guards on them."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantpass as qp

K, N = 64, 32


def _symmetric(h, t):
    return (torch.round(h.float() / t).clamp(-128, 127).to(torch.int8).float() * t).half()


def _asymmetric_token(h):
    low, high = h.float().amin(-1, keepdim=True), h.float().amax(-1, keepdim=True)
    t = (high - low) / 255 + 1e-5
    zero = torch.clamp(torch.round(-low / t) - 128, -128, 127)
    q = torch.clamp(torch.round(h.float() / t) + zero, -128, 127).to(torch.int8)
    return ((q.float() - zero) * t).half()


def _static(h):
    return torch.round(h / 0.05).clamp(-128, 127).to(torch.int8).half() * 0.05


ACTIVATIONS = {
    "float": lambda h: h,
    "token": lambda h: _symmetric(h, h.abs().amax(-1, keepdim=True).float() / 127 + 1e-5),
    "tensor": lambda h: _symmetric(h, h.abs().amax().float() / 127 + 1e-5),
    "static": _static,
    "asymmetric": lambda h: (torch.clamp(torch.round(h / 0.05) + 3, -128, 127).to(torch.int8).half() - 3) * 0.05,
    "asymmetric token": _asymmetric_token,
}
MATMULS = {
    "linear": lambda h, w: F.linear(h, w),
    "mm": lambda h, w: h @ w.t(),
    "rank 3": lambda h, w: F.linear(h.unsqueeze(0), w),
    "expanded": lambda h, w: F.linear(h.unsqueeze(1).expand(-1, 3, -1), w),
    "bmm": lambda h, w: torch.bmm(h.unsqueeze(0), w.t().unsqueeze(0)),
    "bias": lambda h, w: F.linear(h, w, torch.ones(N).half()),
    "requantize": lambda h, w: torch.round(F.linear(h, w) / 0.1).clamp(-128, 127).to(torch.int8),
    "residual": lambda h, w: F.linear(h, w) + h[:, :N],
    "weight on the left": lambda h, w: (w @ h.t()).t(),
    "batches of vectors": lambda h, w: w @ h.unsqueeze(-1),
    "attention": lambda h, w: _static(h) @ _static(h).t() @ F.linear(h, w),
    "batched attention": lambda h, w: _static(h).unsqueeze(0) @ _static(h).t().unsqueeze(0) @ F.linear(h, w),
    "convolution": lambda h, w: F.conv1d(h.unsqueeze(-1), w.unsqueeze(-1)),
}
SELECTIONS = {
    "nonzero": lambda x: x[(x[:, 0] > 0).nonzero().squeeze(-1)],
    "repeat": lambda x: torch.repeat_interleave(x, (x[:, 0] > 0).long(), dim=0),
    "dynamic": lambda x: x,
}


class Selected(nn.Module):
    def __init__(self, selection, activation, matmul):
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        self.register_buffer("codes", torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=rng))
        self.register_buffer("scale", (torch.rand(N, 1, generator=rng) * 1e-3 + 2e-4).half())
        self.selection, self.activation, self.matmul = selection, activation, matmul

    def forward(self, x):
        h = SELECTIONS[self.selection](x)
        return MATMULS[self.matmul](ACTIVATIONS[self.activation](h), self.codes.half() * self.scale)


def right(found, wanted):
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    step = 1.0 if wanted.dtype == torch.int8 else 0.01 * largest + 1e-3
    torch.testing.assert_close(found.float(), wanted.float(), rtol=0, atol=step)


CASES = list(itertools.product(SELECTIONS, ACTIVATIONS, MATMULS))
QUICK = [(s, a, m) for s, a, m in CASES if a in ("float", "token") and s != "repeat"]


@pytest.fixture(autouse=True)
def seeded():
    """A selection of no rows is a case of its own."""
    torch.manual_seed(0)


def check_exported(case, target):
    model, x = Selected(*case).eval(), torch.randn(6, K).half()
    shapes = ({0: torch.export.Dim.DYNAMIC},) if case[0] == "dynamic" else None
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)
    report = qp.fuse(program, target=target)
    assert report.total, "a quantized matmul without a verdict"
    module = program.module()
    for rows in (6, 9):
        x = torch.randn(rows if case[0] == "dynamic" else 6, K).half()
        right(module(x), model(x))


@pytest.mark.parametrize("case", QUICK, ids="-".join)
def test_exported(case):
    check_exported(case, "ascend910b")


@pytest.mark.parametrize("matmul", ["linear", "convolution"])
def test_exported_for_native_kernels(matmul):
    """What a kernel is made of is traced with the graph's own sizes."""
    check_exported(("dynamic", "token", matmul), "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "ascend310p", "ascend910b"])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_exported_for_every_target(case, target):
    check_exported(case, target)


@pytest.mark.parametrize("case", QUICK[::3], ids="-".join)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiled(case):
    torch._dynamo.reset()  # one function for all cases: its limit of recompilations is not what is tested
    model, backend = Selected(*case).eval(), qp.backend(target="ascend310p")
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=case[0] == "dynamic" or None)
    with torch.no_grad():
        for rows in (6, 9):
            x = torch.randn(rows, K).half()
            right(compiled(x), model(x))
    assert backend.report.total


def test_a_mixture_of_experts_whose_rows_are_counted_when_it_runs():
    model = Selected("nonzero", "token", "linear").eval()
    program = torch.export.export(model, (torch.randn(6, K).half(),), strict=False)
    report = qp.fuse(program, target="ascend910b")
    assert (report.fused, report.total) == (1, 1), str(report)
    for x in (torch.randn(6, K).half(), -torch.rand(6, K).half()):  # the second selects no row at all
        right(program.module()(x), model(x))
