"""What several test files need: quantized modules to compile, and a way to compile them."""

import torch
from torch import nn

import quantpass as qp
from quantpass.chips import DOCUMENTED

CHIPS = DOCUMENTED


class WeightOnly(nn.Module):
    """``linear(x, (codes - zero_point) * scale, bias)``, spelled by hand."""

    def __init__(self, k=64, n=96, dtype=torch.float16, bias=True, zero_point=False, scale_shape="channel"):
        super().__init__()
        g = torch.Generator().manual_seed(k * 1000 + n)
        self.codes = nn.Parameter(torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=g), requires_grad=False)
        shape = {"channel": (n, 1), "tensor": (1,)}[scale_shape]
        self.scale = nn.Parameter((torch.rand(shape, generator=g) * 0.01 + 1e-3).to(dtype), requires_grad=False)
        zero = torch.randint(-5, 6, (n, 1), generator=g).to(dtype) if zero_point else None
        self.register_buffer("zero", zero)
        self.bias = nn.Parameter(torch.randn(n, generator=g).to(dtype), requires_grad=False) if bias else None

    def forward(self, x):
        w = self.codes.to(x.dtype)
        if self.zero is not None:
            w = w - self.zero
        return nn.functional.linear(x, w * self.scale, self.bias)


class StaticW8A8(nn.Module):
    """Activation quantized with one static scale, weight per channel, both dequantized before the matmul."""

    def __init__(self, k=64, n=96, dtype=torch.float16, bias=True, scale=0.03, zero_point=0, unsigned=False):
        super().__init__()
        g = torch.Generator().manual_seed(k * 1000 + n)
        self.codes = nn.Parameter(torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=g), requires_grad=False)
        self.scale = nn.Parameter((torch.rand(n, 1, generator=g) * 0.01 + 1e-3).to(dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(n, generator=g).to(dtype), requires_grad=False) if bias else None
        self.x_scale, self.x_zero = scale, zero_point
        self.low, self.high, self.container = (0, 255, torch.uint8) if unsigned else (-128, 127, torch.int8)

    def quantized(self, x):
        q = torch.clamp(torch.round(x / self.x_scale) + self.x_zero, self.low, self.high)
        return q.to(self.container)

    def forward(self, x):
        real = (self.quantized(x).to(x.dtype) - self.x_zero) * self.x_scale
        return nn.functional.linear(real, self.codes.to(x.dtype) * self.scale, self.bias)


class IntegerW8A8(nn.Module):
    """``_int_mm`` of quantized operands, scaled afterwards, with a scale for each row where ``dynamic``."""

    def __init__(self, k=64, n=96, dtype=torch.bfloat16, dynamic=True):
        super().__init__()
        g = torch.Generator().manual_seed(k * 1000 + n)
        self.codes = nn.Parameter(torch.randint(-127, 128, (k, n), dtype=torch.int8, generator=g), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(n, generator=g) * 0.01 + 1e-3, requires_grad=False)
        self.dtype, self.dynamic = dtype, dynamic

    def forward(self, x):
        rows = x.flatten(0, -2).float()
        s = rows.abs().amax(-1, keepdim=True) / 127 if self.dynamic else 0.03
        q = torch.clamp(torch.round(rows / s), -128, 127).to(torch.int8)
        y = torch._int_mm(q, self.codes).float() * self.scale * s
        return y.to(self.dtype).unflatten(0, x.shape[:-1])


def compiled(model, *args, target="cpu", dynamic=None, **options):
    """Compile ``model`` with quantpass and run it: ``(output, report)``."""
    torch._dynamo.reset()
    backend = qp.backend(target=target, **options)
    with torch.no_grad():
        output = torch.compile(model, backend=backend, dynamic=dynamic)(*args)
    return output, backend.report


def rules(report):
    """The rule ids of every refusal."""
    return {r.rule for s in report.sites if not s.fused for r in s.rejects}


def closeness(dtype):
    """Relative tolerance for results that differ in a few roundings of ``dtype``."""
    return {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5}[dtype]


def assert_close(actual, expected, dtype=None):
    dtype = dtype or expected.dtype
    scale = expected.double().abs().mean()
    worst = (actual.double() - expected.double()).abs().max()
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert worst <= 4 * closeness(dtype) * scale, f"off by {worst / scale:.2g} of the mean size"
