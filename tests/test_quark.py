"""AMD Quark's operator, through a stand-in of the same schema and arithmetic: the tool itself is not installed here."""

import pytest
import torch
from torch import nn

import quantpass as qp
from tests.helpers import assert_close, compiled

N, K = 24, 64
SCHEMA = (
    "scaled_fake_quantize(str quant_dtype, Tensor inputs, Tensor scale, Tensor zero_point, SymInt axis, "
    "SymInt group_size, float quant_min, float quant_max, SymInt round_mode, str qscheme, str mx_element_dtype) -> Tensor"
)
HALF_EVEN = 8


@pytest.fixture(scope="module", autouse=True)
def operator():
    """The operator as amd-quark 0.13 defines it on a CPU; removed again afterwards."""
    with torch.library._scoped_library("quark", "DEF") as library:
        library.define(SCHEMA)
        torch.library.impl(library, "scaled_fake_quantize", "CompositeExplicitAutograd")(fake_quantize)
        torch.library.register_fake("quark::scaled_fake_quantize", lambda *a: torch.empty_like(a[1]), lib=library)
        yield torch.ops.quark.scaled_fake_quantize


def fake_quantize(dtype, x, scale, zero, axis, group, low, high, mode, scheme, mx):
    value, low, high = x.float(), int(low), int(high)
    if scheme == "per_group":
        value, axis = value.reshape(-1, group), 0
        scale, zero = scale.reshape(-1), zero.reshape(-1)
    if scheme == "per_tensor":
        done = torch.fake_quantize_per_tensor_affine(value, scale.float(), zero.int(), low, high)
    else:
        unsqueezed = (None,) * axis + (...,) + (None,) * (value.ndim - axis - 1)
        s, z = scale.float()[unsqueezed].clamp(min=torch.finfo(torch.float32).tiny), zero[unsqueezed]
        done = (torch.clamp(torch.round(value * (1.0 / s)) + z, low, high) - z) * s
    return done.reshape(x.shape).to(x.dtype)


class Linear(nn.Module):
    """A Linear whose weight, and where given whose input, passes the operator."""

    def __init__(self, dtype=torch.float16, x=None, **changed):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(N, K, generator=g).to(dtype) * 0.1, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(N, generator=g).to(dtype), requires_grad=False)
        arguments = {
            "quant_dtype": "int8", "axis": 0, "group_size": 1, "low": -128.0, "high": 127.0, "mode": HALF_EVEN,
            "scheme": "per_channel", "mx": "None", "scale": torch.rand(N, generator=g) * 1e-3 + 1e-3,
            "zero": torch.zeros(N, dtype=torch.int32), **changed,
        }  # fmt: skip
        self.register_buffer("scale", arguments.pop("scale"))
        self.register_buffer("zero", arguments.pop("zero"))
        self.register_buffer("x_scale", torch.tensor([0.03]))
        self.register_buffer("x_zero", torch.tensor([3], dtype=torch.int32))
        self.arguments, self.x = arguments, x

    def forward(self, x):
        a = self.arguments
        rest = (a["axis"], a["group_size"], a["low"], a["high"], a["mode"], a["scheme"], a["mx"])
        op = torch.ops.quark.scaled_fake_quantize
        w = op(a["quant_dtype"], self.weight, self.scale, self.zero, *rest)
        if self.x is not None:
            x = op("int8", x, self.x_scale, self.x_zero, 1, 1, -128.0, 127.0, HALF_EVEN, self.x, "None")
        return nn.functional.linear(x, w, self.bias)


ROWS = torch.randn(5, K, generator=torch.Generator().manual_seed(1))
TENSOR = {"scheme": "per_tensor", "scale": torch.tensor([2e-3]), "zero": torch.tensor([0], dtype=torch.int32)}
READ = {
    "per channel": {},
    "per tensor": TENSOR,
    "int4": {"quant_dtype": "int4", "low": -8.0, "high": 7.0, "scale": torch.rand(N) * 1e-2 + 2e-2},
    "uint8 around 128": {
        "quant_dtype": "uint8", "low": 0.0, "high": 255.0, "zero": torch.full((N,), 128, dtype=torch.int32)
    },
    "zero points": {"zero": torch.randint(-9, 9, (N,), dtype=torch.int32)},
    "another group size": {"group_size": 32},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", READ)
def test_weights(name, dtype):
    model = Linear(dtype, **READ[name])
    actual, report = compiled(model, ROWS.to(dtype))
    report.require(fused=1)
    assert (report.sites[0].plan.call["weight"].dtype == torch.int32) == (name == "int4")
    assert_close(actual, model(ROWS.to(dtype)))


def test_weights_and_activations():
    model = Linear(x="per_tensor")
    actual, report = compiled(model, ROWS.half(), target="ascend910b")
    report.require(fused=1)
    assert report.sites[0].plan.op == "npu_quant_matmul"
    assert_close(actual, model(ROWS.half()))


REFUSED = {
    "groups": {"scheme": "per_group", "group_size": 32, "scale": torch.rand(2 * N) * 1e-3 + 1e-3,
               "zero": torch.zeros(2 * N, dtype=torch.int32)},
    "another rounding": {"mode": 2},
    "floats": {"quant_dtype": "fp8_e4m3"},
    "int16": {"quant_dtype": "int16", "low": -32768.0, "high": 32767.0},
    "elements": {"mx": "int8"},
    "fractions": {"low": -127.5},
    "a subnormal scale": {"scale": torch.full((N,), 1e-40)},
    "a negative scale": {"scale": torch.full((N,), -1e-3)},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused(name):
    report = qp.explain(Linear(**REFUSED[name]), (ROWS.half(),), target="ascend910b")
    assert (report.fused, report.total) == (0, 1)
    assert "scaled_fake_quantize" in report.sites[0].rejects[0].fact
    assert report.sites[0].rejects[0].hint
