"""Schemes of tools that the tests do not install: their graphs are stored under ``captures/`` by ``store.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tests.coverage.scheme import K, Mlp, N, Scheme, rows

HALF, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def schemes() -> Iterator[Scheme]:
    """Every scheme of this file."""
    yield from _quanto()
    yield from _bitsandbytes()
    yield from _hqq()
    yield from _packed()
    yield from _compressed_tensors()
    yield from _nncf()
    yield from _brevitas()
    yield from _adopted()


def _quanto() -> Iterator[Scheme]:
    def build(bits: str, activations: bool, dtype: torch.dtype) -> Any:
        from optimum import quanto

        model = Mlp(dtype).eval()
        quanto.quantize(
            model, weights=getattr(quanto, f"qint{bits}"), activations=quanto.qint8 if activations else None
        )
        if activations:
            with torch.no_grad(), quanto.Calibration():
                model(rows(dtype))
        quanto.freeze(model)
        return model, (rows(dtype),)

    for bits in ("8", "4", "2"):
        yield Scheme("quanto", "optimum-quanto", f"qint{bits} weights", lambda b=bits: build(b, False, HALF))
    yield Scheme("quanto", "optimum-quanto", "qint8 weights and activations", lambda: build("8", True, HALF))


def _bitsandbytes() -> Iterator[Scheme]:
    def int8() -> Any:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(layer.weight.data.half(), requires_grad=False, has_fp16_weights=False).to(
            "cpu"
        )
        layer.bias = nn.Parameter(layer.bias.data.half(), requires_grad=False)
        layer(rows())
        return layer.eval(), (rows(),)

    def nf4() -> Any:
        import bitsandbytes as bnb

        return bnb.nn.Linear4bit(K, N, quant_type="nf4", compute_dtype=BF16).to("cpu").eval(), (rows(BF16),)

    yield Scheme("bitsandbytes", "bitsandbytes", "LLM.int8()", int8)
    yield Scheme("bitsandbytes", "bitsandbytes", "NF4", nf4, maps=False)


def _hqq() -> Iterator[Scheme]:
    def build(bits: int, axis: int) -> Any:
        from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

        HQQLinear.set_backend(HQQBackend.PYTORCH)
        layer = nn.Linear(K, N)
        config = BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)
        return HQQLinear(layer, config, compute_dtype=HALF, device="cpu").eval(), (rows(),)

    for bits in (8, 4, 3, 2):
        yield Scheme("HQQ", "hqq", f"{bits} bits, groups of 32 along K", lambda b=bits: build(b, 1))
    yield Scheme("HQQ", "hqq", "4 bits, groups along N", lambda: build(4, 0), maps=False)


def _filled(module: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(3)
    for name, buffer in module.named_buffers():
        if name in ("qweight", "qzeros"):
            buffer.copy_(torch.randint(-(2**31), 2**31 - 1, buffer.shape, generator=g).to(torch.int32))
        elif name == "scales":
            buffer.copy_((torch.rand(buffer.shape, generator=g) * 0.01 + 1e-3).to(buffer.dtype))
        elif name == "bias":
            buffer.copy_(torch.randn(buffer.shape, generator=g).to(buffer.dtype))
    return module


def _packed() -> Iterator[Scheme]:
    def auto_round(module: str, bits: int) -> Any:
        import importlib

        linear = importlib.import_module(f"auto_round_extension.torch.{module}").QuantLinear
        layer = _filled(linear(bits, 32, K, N, True))
        layer.post_init()
        return layer.eval(), (rows(),)

    def awq() -> Any:
        from awq.modules.linear.gemm import WQLinear_GEMM
        from awq.utils.packing_utils import dequantize_gemm

        packed = _filled(WQLinear_GEMM(4, 32, K, N, True, "cpu"))

        class Awq(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for name, buffer in packed.named_buffers():
                    self.register_buffer(name, buffer)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x @ dequantize_gemm(self.qweight, self.qzeros, self.scales, 4, 32) + self.bias

        return Awq().eval(), (rows(),)

    def gptq(act_order: bool) -> Any:
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear

        layer = _filled(
            TorchLinear(bits=3, group_size=32, sym=True, desc_act=act_order, in_features=K, out_features=N, bias=True)
        )
        if act_order:
            layer.g_idx.copy_(torch.randperm(K, generator=torch.Generator().manual_seed(5)).to(torch.int32) // 32)
        layer.optimized = True
        layer.post_init()
        return layer.eval(), (rows(),)

    for module in ("qlinear_torch", "qlinear_torch_zp"):
        for bits in (4, 8):
            yield Scheme(
                "auto-round", "auto-round", f"{module}, {bits} bits", lambda m=module, b=bits: auto_round(m, b)
            )
    yield Scheme("AWQ", "autoawq", "GEMM packing, 4 bits", awq)
    yield Scheme("GPTQModel", "GPTQModel", "3 bits", lambda: gptq(False))
    yield Scheme("GPTQModel", "GPTQModel", "3 bits, in order of activation size", lambda: gptq(True))


def _compressed_tensors() -> Iterator[Scheme]:
    def build(bits: int, groups: int) -> Any:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

        half = 2 ** (bits - 1)
        codes = torch.randint(-half, half, (N, K), generator=torch.Generator().manual_seed(bits)).to(torch.int8)

        class Packed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("packed", pack_to_int32(codes, bits))
                self.register_buffer("scale", torch.rand(N, groups).to(BF16))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                w = unpack_from_int32(self.packed, bits, torch.Size((N, K))).to(x.dtype)
                w = (w.view(N, groups, K // groups) * self.scale[..., None]).view(N, K)
                return x @ w.t()

        return Packed().eval(), (rows(BF16),)

    yield Scheme("compressed-tensors", "compressed-tensors", "int4 packed, groups of 32", lambda: build(4, 2))
    yield Scheme("compressed-tensors", "compressed-tensors", "int4 packed, per channel", lambda: build(4, 1))


def _nncf() -> Iterator[Scheme]:
    def build(**mode: Any) -> Any:
        import nncf

        model = torch.export.export(Mlp().eval(), (rows(),)).module()
        return nncf.compress_weights(model, **mode), (rows(),)

    def symmetric() -> Any:
        import nncf

        return build(mode=nncf.CompressWeightsMode.INT8_SYM)

    yield Scheme("NNCF", "nncf", "int8 weights, asymmetric", build)
    yield Scheme("NNCF", "nncf", "int8 weights, symmetric", symmetric)


def _brevitas() -> Iterator[Scheme]:
    def build() -> Any:
        import brevitas.nn as qnn
        from brevitas.export.inference import quant_inference_mode
        from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

        layer = qnn.QuantLinear(
            K, N, bias=True, weight_quant=Int8WeightPerChannelFloat, input_quant=Int8ActPerTensorFloat
        )
        layer.train()
        for _ in range(3):
            layer(rows(F32))
        layer.eval()
        with torch.no_grad():
            layer(rows(F32))

        class Inference(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.layer(x)

        model = Inference().eval()
        context = quant_inference_mode(model)
        context.__enter__()
        with torch.no_grad():
            model(rows(F32))
        return model, (rows(F32),)

    yield Scheme("brevitas", "brevitas", "W8A8 per tensor, inference mode", build)


def _adopted() -> Iterator[Scheme]:
    """Modules that hide their weights, exchanged by ``qp.adopt``: the rows of :mod:`tests.coverage.unread`, and more."""

    def build(function: str, *given: Any) -> Any:
        import quantpass as qp
        from tests import adoption_tools

        model = getattr(adoption_tools, function)(*given).eval()
        adoption = qp.adopt(model, drop_outliers=True)
        assert adoption.exchanged and not adoption.left, str(adoption)
        return model, (rows(),)

    int8, int4 = {"num_bits": 8, "strategy": "channel"}, {"num_bits": 4, "strategy": "group", "group_size": 32}
    token, static = {"strategy": "token", "dynamic": True}, {"strategy": "tensor", "dynamic": False}
    for tool, package, name, *how in (
        *(("GPTQModel", "GPTQModel", f"{bits} bits, TorchLinear", "gptq", bits) for bits in (2, 4, 8)),
        ("GPTQModel", "GPTQModel", "4 bits, in order of activation size", "gptq", 4, True),
        ("GPTQModel", "GPTQModel", "AWQ, 8 bits", "gptqmodel_awq", 8),
        ("AWQ", "autoawq", "WQLinear_GEMM, 4 bits", "autoawq"),
        ("bitsandbytes", "bitsandbytes", "LLM.int8(), threshold 6, outliers dropped", "bitsandbytes"),
        ("compressed-tensors", "compressed-tensors", "int8 weights", "compressed_tensors", int8),
        ("compressed-tensors", "compressed-tensors", "int4 weights, groups of 32", "compressed_tensors", int4),
        ("compressed-tensors", "compressed-tensors", "W8A8 dynamic", "compressed_tensors", int8, token),
        ("compressed-tensors", "compressed-tensors", "W8A8 static", "compressed_tensors", int8, static),
        ("modelopt", "nvidia-modelopt", "W8A8 static", "modelopt", "INT8_DEFAULT_CFG"),
        ("modelopt", "nvidia-modelopt", "int8 weights, compressed", "modelopt", "INT8_WEIGHT_ONLY_CFG", True),
    ):
        yield Scheme(tool, package, f"{name}, adopted", lambda how=how: build(*how))
