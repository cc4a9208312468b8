"""Schemes of the tools that the tests install: torchao, PT2E, PyTorch itself, and code written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from tests.coverage.scheme import K, Mlp, N, Scheme, rows

HALF, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def schemes() -> Iterator[Scheme]:
    """Every scheme of this file."""
    yield from _torchao()
    yield from _pt2e()
    yield from _aten()
    yield from _by_hand()
    yield from _vendor()


# -- torchao -------------------------------------------------------------------------------------------------------


def _torchao() -> Iterator[Scheme]:
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8StaticActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
        PerRow,
        PerTensor,
        quantize_,
    )
    from torchao.quantization.quant_primitives import MappingType

    static = torch.tensor([[[0.02]]])
    zero = torch.tensor([[[3]]], dtype=torch.int8)
    groups, asym = PerGroup(32), MappingType.ASYMMETRIC
    both = [PerTensor(), PerRow()]
    int4 = {"weight_dtype": torch.int4, "weight_granularity": groups}
    configs: list[tuple[str, Any, bool]] = [
        ("int8 weight-only, per row", lambda: Int8WeightOnlyConfig(), True),
        ("int8 weight-only, per tensor", lambda: Int8WeightOnlyConfig(granularity=PerTensor()), True),
        ("int8 weight-only, groups of 32", lambda: Int8WeightOnlyConfig(granularity=groups), True),
        ("intx int8, per axis", lambda: IntxWeightOnlyConfig(weight_dtype=torch.int8), True),
        (
            "intx int8, groups of 32, asymmetric",
            lambda: IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=groups, mapping_type=asym),
            True,
        ),
        (
            "intx int4, groups of 32",
            lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups),
            True,
        ),
        (
            "intx int4, groups of 32, asymmetric",
            lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups, mapping_type=asym),
            True,
        ),
        ("W8A8 dynamic, per row", lambda: Int8DynamicActivationInt8WeightConfig(), True),
        ("W8A8 dynamic, activation per tensor", lambda: Int8DynamicActivationInt8WeightConfig(granularity=both), True),
        (
            "W8A8 dynamic, activation asymmetric per row",
            lambda: Int8DynamicActivationInt8WeightConfig(act_mapping_type=asym),
            True,
        ),
        (
            "W8A8 static",
            lambda: Int8StaticActivationInt8WeightConfig(act_quant_scale=static, granularity=both),
            True,
        ),
        (
            "W8A8 static, asymmetric",
            lambda: Int8StaticActivationInt8WeightConfig(
                act_quant_scale=static, act_quant_zero_point=zero, granularity=both, act_mapping_type=asym
            ),
            True,
        ),
        ("int8 activation per token, int4 weight", lambda: Int8DynamicActivationIntxWeightConfig(**int4), True),
        (
            "int8 activation per token, int8 weight",
            lambda: Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0)),
            True,
        ),
    ]
    for name, config, maps in configs:
        for dtype in (HALF, BF16):

            def build(config: Any = config, dtype: torch.dtype = dtype) -> Any:
                model = Mlp(dtype).eval()
                quantize_(model, config())
                return model, (rows(dtype),)

            yield Scheme("torchao", "torchao", f"{name}, {_short(dtype)}", build, maps)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pt2e() -> Iterator[Scheme]:
    def converted(quantizer: Any, fold: bool = True) -> Any:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        x = rows(F32)
        prepared = prepare_pt2e(torch.export.export(Mlp(F32).eval(), (x,), strict=True).module(), quantizer)
        prepared(x)
        return convert_pt2e(prepared, fold_quantize=fold), (x,)

    def x86(*, dynamic: bool = False) -> Any:
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86_inductor

        config = x86_inductor.get_default_x86_inductor_quantization_config(is_dynamic=dynamic)
        return x86_inductor.X86InductorQuantizer().set_global(config)

    def xnnpack(**config: Any) -> Any:
        from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

        return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(**config))

    yield Scheme("PT2E", "torchao", "x86 quantizer, static", lambda: converted(x86()))
    yield Scheme("PT2E", "torchao", "x86 quantizer, weights quantized in the graph", lambda: converted(x86(), False))
    yield Scheme("PT2E", "torchao", "x86 quantizer, dynamic", lambda: converted(x86(dynamic=True)))
    yield Scheme("PT2E", "torchao", "xnnpack quantizer, per channel", lambda: converted(xnnpack(is_per_channel=True)))
    yield Scheme("PT2E", "torchao", "xnnpack quantizer, per tensor", lambda: converted(xnnpack()))
    yield Scheme(
        "PT2E",
        "torchao",
        "xnnpack quantizer, dynamic",
        lambda: converted(xnnpack(is_per_channel=True, is_dynamic=True)),
    )


# -- operators of PyTorch ------------------------------------------------------------------------------------------


class _Weights(nn.Module):
    def __init__(self, dtype: torch.dtype, bits: int = 8) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(bits)
        high = 2 ** (bits - 1)
        self.w = nn.Parameter(torch.randint(-high, high, (N, K), dtype=torch.int8, generator=g), requires_grad=False)
        self.s = nn.Parameter((torch.rand(N, 1, generator=g) * 0.01 + 1e-3).to(dtype), requires_grad=False)
        self.groups = nn.Parameter((torch.rand(N, 2, generator=g) * 0.01 + 1e-3).to(dtype), requires_grad=False)
        self.of_k = nn.Parameter((torch.rand(K, generator=g) * 0.01 + 1e-3).to(dtype), requires_grad=False)
        self.z = nn.Parameter(torch.randint(-4, 5, (N, 1), generator=g).to(dtype), requires_grad=False)
        self.b = nn.Parameter(torch.randn(N, generator=g).to(dtype), requires_grad=False)
        self.plain = nn.Parameter((torch.randn(N, K, generator=g) * 0.05).to(dtype), requires_grad=False)


def _module(dtype: torch.dtype, forward: Any, bits: int = 8) -> Any:
    class Written(_Weights):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return forward(self, x)

    return Written(dtype, bits).eval(), (rows(dtype),)


def _aten() -> Iterator[Scheme]:
    aten = torch.ops.aten

    def add(name: str, dtype: torch.dtype, forward: Any, maps: bool = True, bits: int = 8) -> Scheme:
        return Scheme("PyTorch", "torch", name, lambda: _module(dtype, forward, bits), maps)

    def flat(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, K)

    def codes(x: torch.Tensor, scale: float = 0.03) -> torch.Tensor:
        return torch.clamp(torch.round(x / scale), -128, 127).to(torch.int8)

    yield add("_weight_int8pack_mm", BF16, lambda m, x: aten._weight_int8pack_mm(flat(x), m.w, m.s.flatten()))
    yield add(
        "_int_mm, scaled after", BF16, lambda m, x: torch._int_mm(flat(codes(x)), m.w.t()) * m.s.flatten().float()
    )
    yield Scheme("PyTorch", "torch", "_weight_int4pack_mm_for_cpu", _int4pack)
    yield Scheme("PyTorch", "torch", "_dyn_quant_matmul_4bit", _dyn_quant, maps=False)
    yield add(
        "fake_quantize, per tensor and per channel",
        F32,
        lambda m, x: linear(
            torch.fake_quantize_per_tensor_affine(x, 0.03, 3, 0, 255),
            torch.fake_quantize_per_channel_affine(
                m.plain, m.s.flatten().float(), torch.zeros(N, dtype=torch.int32), 0, -128, 127
            ),
            m.b,
        ),
    )


def _int4pack() -> Any:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            g = torch.Generator().manual_seed(4)
            codes = torch.randint(0, 16, (N, K), dtype=torch.int32, generator=g)
            self.register_buffer("w", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2))
            self.register_buffer("sz", (torch.rand(K // 32, N, 2, generator=g) * 0.01 + 1e-3).to(BF16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x.reshape(-1, K), self.w, 32, self.sz)

    return Packed().eval(), (rows(BF16),)


def _dyn_quant() -> Any:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
            scales = torch.rand(N * K // 32)
            self.register_buffer("w", torch.ops.aten._dyn_quant_pack_4bit_weight(codes, scales, None, 32, K, N))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten._dyn_quant_matmul_4bit(x.reshape(-1, K), self.w, 32, K, N)

    return Packed().eval(), (rows(F32),)


# -- by hand -------------------------------------------------------------------------------------------------------


def _by_hand() -> Iterator[Scheme]:
    def add(name: str, forward: Any, dtype: torch.dtype = HALF, maps: bool = True, bits: int = 8) -> Scheme:
        return Scheme("by hand", "torch", name, lambda: _module(dtype, forward, bits), maps)

    def dq(m: Any) -> torch.Tensor:
        return m.w.to(m.s.dtype) * m.s

    def grouped(m: Any) -> torch.Tensor:
        return (m.w.to(m.s.dtype).view(N, 2, K // 2) * m.groups[..., None]).view(N, K)

    def qdq(x: torch.Tensor, zero: int = 0) -> torch.Tensor:
        return (torch.clamp(torch.round(x / 0.03) + zero, -128, 127).to(torch.int8).to(x.dtype) - zero) * 0.03

    def per_token(x: torch.Tensor) -> torch.Tensor:
        s = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        return torch.clamp(torch.round(x / s), -128, 127).to(torch.int8).to(x.dtype) * s

    def heads(x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(torch.round(x / 0.03), -128, 127).to(torch.int8).to(x.dtype) * 0.03

    yield add("scale before the matmul", lambda m, x: linear(x, dq(m), m.b))
    yield add("scale after the matmul", lambda m, x: (x @ m.w.to(x.dtype).t()) * m.s.flatten() + m.b, BF16)
    yield add("zero point", lambda m, x: linear(x, (m.w.to(x.dtype) - m.z) * m.s, m.b))
    yield add("groups of 32", lambda m, x: linear(x, grouped(m), m.b))
    yield add("int4 in int8, groups of 32", lambda m, x: linear(x, grouped(m), m.b), bits=4)
    yield add("scale along K", lambda m, x: linear(x, m.w.to(x.dtype) * m.of_k, m.b))
    yield add("weight on the left", lambda m, x: (dq(m) @ x.transpose(1, 2)).transpose(1, 2))
    yield add("1x1 convolution", lambda m, x: torch.conv1d(x.transpose(1, 2), dq(m)[..., None], m.b), BF16)
    yield add("pieces of one weight", lambda m, x: torch.cat([linear(x, p) for p in dq(m).chunk(2)], dim=-1))
    yield add("static activation", lambda m, x: linear(qdq(x), dq(m), m.b))
    yield add("static asymmetric activation", lambda m, x: linear(qdq(x, 5), dq(m), m.b))
    yield add("static activation, float32", lambda m, x: linear(qdq(x), dq(m), m.b), F32)
    yield add("activation per token", lambda m, x: linear(per_token(x), dq(m), m.b))
    yield add("quantized attention product", lambda m, x: heads(x) @ heads(x).transpose(1, 2), HALF)
    yield add(
        "experts, a matrix for each",
        lambda m, x: torch.bmm(x, (m.w.view(2, N // 2, K).to(x.dtype) * m.s.view(2, -1, 1)).transpose(1, 2)),
        maps=False,
    )


# -- the vendor's own quantize operators ---------------------------------------------------------------------------


def _vendor() -> Iterator[Scheme]:
    import quantpass as qp

    def add(name: str, forward: Any, dtype: torch.dtype = HALF) -> Scheme:
        def build() -> Any:
            qp.emulate_npu()
            return _module(dtype, forward)

        return Scheme("torch_npu", "torch", name, build)

    def anti_quant(m: Any, x: torch.Tensor) -> torch.Tensor:
        codes = m.w.t().contiguous()
        return x @ torch.ops.npu.npu_anti_quant(codes, m.s.flatten().float(), offset=m.z.flatten().float())

    def dynamic(m: Any, x: torch.Tensor) -> torch.Tensor:
        codes, scale = torch.ops.npu.npu_dynamic_quant(x)
        return linear(codes.to(x.dtype) * scale[..., None].to(x.dtype), m.w.to(x.dtype) * m.s, m.b)

    def static(m: Any, x: torch.Tensor) -> torch.Tensor:
        scale = torch.full((1,), 0.03)
        codes = torch.ops.npu.npu_quantize(x, scale, None, torch.qint8, -1, True)
        return linear(codes.to(x.dtype) * 0.03, m.w.to(x.dtype) * m.s, m.b)

    yield add("npu_anti_quant, then matmul", anti_quant)
    yield add("npu_dynamic_quant, dequantized", dynamic)
    yield add("npu_quantize, dequantized", static)
