"""The quantization schemes of the two module documents: the vendor's module, and a plain quantized Linear.

Both hold the same integers and scales. ``module`` names the class in ``torch_npu.contrib.module`` (and in
``quantpass.nn``), ``settings`` its arguments, ``tensors`` what is assigned to its variables, ``plain`` the same
computation in PyTorch's own operators; None where quantpass has no plan that makes the operator of it, and where the
module of ``quantpass.nn`` stands in.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

M, K, N = 16, 128, 64
A2_A3 = ("ascend910b", "ascend910_93")
ALL = ("ascend310p", *A2_A3)


@dataclass(frozen=True)
class Scheme:
    name: str
    module: str
    settings: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    x: torch.Tensor
    plain: Callable[[], nn.Module] | None
    chips: tuple[str, ...] = ALL
    options: dict[str, Any] = field(default_factory=dict)

    def filled(self, package):
        """The module of ``package`` with the tensors in its variables."""
        module = getattr(package, self.module)(K, N, **self.settings)
        for name, tensor in self.tensors.items():
            getattr(module, name).data = tensor.clone()
        return module


class PlainWeightQuant(nn.Module):
    """``linear(x, (codes + offset) * scale, bias)``, groups along K where the scale has several columns."""

    def __init__(self, codes, scale, offset=None, bias=None, quantize=None):
        super().__init__()
        self.codes, self.scale = nn.Parameter(codes, requires_grad=False), nn.Parameter(scale, requires_grad=False)
        self.offset = None if offset is None else nn.Parameter(offset, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.quantize = quantize

    def forward(self, x):
        groups = self.scale.shape[1] if self.scale.dim() == 2 else 1
        w = self.codes.to(x.dtype).unflatten(1, (groups, -1))
        scale, offset = (None if t is None else t.reshape(-1, groups, 1) for t in (self.scale, self.offset))
        w = (w if offset is None else w + offset) * scale
        return nn.functional.linear(x, w.flatten(1), None if self.bias is None else self.bias.to(x.dtype))


class PlainQuant(nn.Module):
    """An integer matmul of int8 codes, its result scaled, and perhaps quantized again."""

    def __init__(self, codes, scale, out, bias=None, offset=None, pertoken=None):
        super().__init__()
        self.codes, self.scale = nn.Parameter(codes, requires_grad=False), nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.pertoken = None if pertoken is None else nn.Parameter(pertoken, requires_grad=False)
        self.out, self.offset = out, offset

    def forward(self, x):
        acc = torch._int_mm(x, self.codes.t())
        if self.bias is not None and self.bias.dtype == torch.int32:
            acc = acc + self.bias
        if self.out == torch.int32:
            return acc
        y = acc.float() * self.scale
        if self.pertoken is not None:
            y = y * self.pertoken.unsqueeze(1)
        if self.bias is not None and self.bias.is_floating_point():
            y = y + self.bias
        if self.out != torch.int8:
            return y.to(self.out)
        return torch.clamp(torch.round(y) + self.offset, -128, 127).to(torch.int8)


def _codes(generator, low=-127, high=128):
    return torch.randint(low, high, (N, K), generator=generator, dtype=torch.int8)


def weight_quant_schemes():
    g = torch.Generator().manual_seed(0)
    for dtype, chips in ((torch.float16, ALL), (torch.bfloat16, A2_A3)):
        name = str(dtype).removeprefix("torch.")
        x = torch.randn(M, K, generator=g).to(dtype)
        codes = _codes(g)
        scale = (torch.rand(N, generator=g) * 0.01 + 1e-3).to(dtype)
        offset = torch.randint(-9, 10, (N,), generator=g).to(dtype)
        bias = torch.randn(N, generator=g).to(dtype).to(torch.float16 if dtype == torch.float16 else torch.float32)
        yield Scheme(
            f"{name} x int8 per channel",
            "LinearWeightQuant",
            {"bias": False},
            {"weight": codes, "antiquant_scale": scale},
            x,
            lambda c=codes, s=scale: PlainWeightQuant(c, s),
            chips,
        )
        yield Scheme(
            f"{name} x int8 per channel, offset, bias",
            "LinearWeightQuant",
            {"bias": True, "antiquant_offset": True},
            {"weight": codes, "antiquant_scale": scale, "antiquant_offset": offset, "bias": bias},
            x,
            lambda c=codes, s=scale, o=offset, b=bias: PlainWeightQuant(c, s, o, b),
            chips,
        )
        yield Scheme(
            f"{name} x int8 per channel, 2-D scale",
            "LinearWeightQuant",
            {"bias": False},
            {"weight": codes, "antiquant_scale": scale.reshape(N, 1)},
            x,
            lambda c=codes, s=scale: PlainWeightQuant(c, s.reshape(N, 1)),
            chips,
        )
        yield Scheme(
            f"{name} x int8 per tensor",
            "LinearWeightQuant",
            {"bias": False},
            {"weight": codes, "antiquant_scale": scale[:1]},
            x,
            lambda c=codes, s=scale: PlainWeightQuant(c, s[:1]),
            A2_A3,
        )
        grouped = (torch.rand(N, K // 32, generator=g) * 0.01 + 1e-3).to(dtype)
        yield Scheme(
            f"{name} x int8 per group",
            "LinearWeightQuant",
            {"bias": False, "antiquant_group_size": 32},
            {"weight": codes, "antiquant_scale": grouped},
            x,
            lambda c=codes, s=grouped: PlainWeightQuant(c, s),
            A2_A3,
        )
        int4 = _codes(g, -8, 8)
        packed = torch.ops.quantpass.pack_int4(int4)
        yield Scheme(
            f"{name} x int4 per channel",
            "LinearWeightQuant",
            {"bias": False},
            {"weight": packed, "antiquant_scale": scale},
            x,
            lambda c=int4, s=scale: PlainWeightQuant(c, s),
            A2_A3,
        )
        wide = (torch.rand(N, K // 64, generator=g) * 0.01 + 1e-3).to(dtype)
        yield Scheme(
            f"{name} x int4 per group",
            "LinearWeightQuant",
            {"bias": False, "antiquant_group_size": 64},
            {"weight": packed, "antiquant_scale": wide},
            x,
            lambda c=int4, s=wide: PlainWeightQuant(c, s),
            A2_A3,
        )


def quant_schemes():
    g = torch.Generator().manual_seed(1)
    x = torch.randint(-127, 128, (M, K), generator=g, dtype=torch.int8)
    codes = _codes(g)
    scale = torch.rand(N, generator=g) * 1e-4 + 1e-5
    bias = torch.randint(-1000, 1000, (N,), generator=g, dtype=torch.int32)
    float_bias = torch.randn(N, generator=g)
    pertoken = torch.rand(M, generator=g) + 0.5

    def scheme(name, settings, tensors, out, chips=ALL, **plain):
        scales = plain.pop("scale", scale)
        return Scheme(
            name,
            "LinearQuant",
            {"bias": "bias" in tensors, "output_dtype": out, **settings},
            {"weight": codes, "scale": scales, **tensors},
            x,
            lambda: PlainQuant(codes, scales, out, **plain),
            chips,
        )

    yield scheme("int8 to float16", {}, {}, torch.float16)
    yield scheme("int8 to float16, bias", {}, {"bias": bias}, torch.float16, bias=bias)
    offset = torch.full((1,), 3.0)
    yield scheme("int8 to int8, offset", {"offset": True}, {"offset": offset}, torch.int8, offset=3, scale=scale * 50)
    yield scheme("int8 to bfloat16", {}, {}, torch.bfloat16, A2_A3)
    yield scheme("int8 to bfloat16, float bias", {}, {"bias": float_bias}, torch.bfloat16, A2_A3, bias=float_bias)
    for out in (torch.bfloat16, torch.float16):
        yield scheme(
            f"int8 to {str(out).removeprefix('torch.')}, scale per token",
            {"pertoken_scale": True},
            {"pertoken_scale": pertoken},
            out,
            A2_A3,
            pertoken=pertoken,
        )
    yield scheme("int8 to int32", {}, {}, torch.int32, A2_A3)


def hand_written_schemes():
    g = torch.Generator().manual_seed(2)
    ops = torch.ops.quantpass
    x = torch.randn(M, K, generator=g).half()
    word = ops.trans_quant_param(torch.rand(N, generator=g) * 50 + 1, torch.full((1,), -3.0))
    scale = (torch.rand(N, generator=g) * 0.01 + 1e-3).half()
    yield Scheme(
        "float16 x int8 to int8",
        "LinearWeightQuant",
        {"bias": False, "quant_scale": True},
        {"weight": _codes(g), "antiquant_scale": scale, "quant_scale": word},
        x,
        None,
        A2_A3,
    )
    codes = torch.randint(-8, 8, (M, K), generator=g, dtype=torch.int8)
    float_scale = torch.rand(N, generator=g) * 1e-2
    for bias in (None, torch.randint(-99, 99, (N,), generator=g, dtype=torch.int32)):
        yield Scheme(
            f"int4 x int4 to float16{'' if bias is None else ', bias'}",
            "LinearQuant",
            {"bias": bias is not None, "output_dtype": torch.float16},
            {
                "weight": ops.pack_int4(_codes(g, -8, 8)),
                "scale": float_scale,
                **({} if bias is None else {"bias": bias}),
            },
            ops.pack_int4(codes),
            None,
            A2_A3,
        )


def all_schemes():
    return [*weight_quant_schemes(), *quant_schemes(), *hand_written_schemes()]
