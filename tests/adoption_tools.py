"""``qp.adopt`` on the real modules of the tools that are installed: ``python -m tests.adoption_tools``.

Each has to be exchanged whole, proved, and seen by the doors; and the stand-ins that the tests use have to hold the same
tensors as the tool's modules. What was looked at stands in ``docs/adopt.md``.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

import quantpass as qp
from tests import adoption_standins as standins
from tests.coverage.elsewhere import _filled
from tests.coverage.scheme import K, Mlp, N, rows

HALF, BF16 = torch.float16, torch.bfloat16


def gptq(bits: int, act_order: bool = False) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    layer = _filled(
        TorchLinear(bits=bits, group_size=32, sym=True, desc_act=act_order, in_features=K, out_features=N, bias=True)
    )
    if act_order:
        layer.g_idx.copy_(torch.randperm(K, generator=torch.Generator().manual_seed(5)).to(torch.int32) // 32)
    layer.optimized = True
    layer.post_init()
    return nn.Sequential(layer)


def gptqmodel_awq(bits: int) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    sizes = {"in_features": K, "out_features": N, "bias": True, "register_buffers": True}
    layer = _filled(AwqTorchLinear(bits=bits, group_size=32, sym=False, desc_act=False, **sizes))
    layer.post_init()
    return nn.Sequential(layer)


def autoawq() -> nn.Module:
    from awq.modules.linear.gemm import WQLinear_GEMM

    return nn.Sequential(_filled(WQLinear_GEMM(4, 32, K, N, True, "cpu")))


def bitsandbytes(called: bool = False) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(layer.weight.data.half(), requires_grad=False, has_fp16_weights=False).to("cpu")
    layer.bias = nn.Parameter(layer.bias.data.half(), requires_grad=False)
    model = nn.Sequential(layer).eval()
    if called:
        model(rows())
    return model


def modelopt(config: str, compressed: bool = False) -> nn.Module:
    import modelopt.torch.quantization as mtq

    model = nn.Sequential(nn.Linear(K, N, dtype=HALF)).eval()
    how = copy.deepcopy(getattr(mtq, config))
    model = mtq.quantize(model, how, lambda m: m(rows()))
    if compressed:
        mtq.compress(model)
    return model.requires_grad_(False)


def compressed_tensors(
    weights: dict[str, Any], activation: dict[str, Any] | None = None, state: str = "compressed", dtype: Any = HALF
) -> nn.Module:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model = Mlp(dtype).eval().requires_grad_(False)
    given = None if activation is None else QuantizationArgs(num_bits=8, **activation)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), input_activations=given)
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, quantization_status="frozen"))
    for linear in (model.up, model.down):
        scale, high = linear.weight_scale, 2 ** (weights["num_bits"] - 1) - 1
        scale.copy_((linear.weight.reshape(*scale.shape, -1).abs().amax(-1) / high).to(scale.dtype))
        if not weights.get("symmetric", True):
            linear.weight_zero_point.copy_(torch.randint(-3, 4, linear.weight_zero_point.shape))
        if hasattr(linear, "input_scale"):
            linear.input_scale.fill_(0.03)
            if activation and not activation.get("symmetric", True):
                linear.input_zero_point.fill_(3)
    if state != "frozen":
        ModelCompressor.from_pretrained_model(model).compress_model(model)
    if state == "decompressed":
        model(rows(dtype))
    return model


def quark(kind: str, activation: str | None = None, reorder: bool = True, dtype: Any = HALF, **how: Any) -> nn.Module:
    from quark.torch import ModelQuantizer
    from quark.torch.export.nn.modules.qparamslinear import QParamsLinear
    from quark.torch.quantization.config import config as quark_config

    def spec(kind: str, **how: Any) -> Any:
        how = {"symmetric": True, "scale_type": "float", "round_method": "half_even", "is_dynamic": False, **how}
        return getattr(quark_config, f"{kind}Spec")(**how).to_quantization_spec()

    given = None if activation is None else spec(activation, observer_method="min_max", symmetric="U" not in activation)
    layer = quark_config.QLayerConfig(weight=spec(kind, **how), input_tensors=given)
    model = nn.Sequential(nn.Linear(K, N, dtype=dtype)).eval().requires_grad_(False)
    model = ModelQuantizer(quark_config.QConfig(global_quant_config=layer)).quantize_model(model, [rows(dtype)])
    model = ModelQuantizer.freeze(model)
    return nn.Sequential(QParamsLinear.from_module(model[0], "quark", "reorder" if reorder else "order"))


INT8 = {"num_bits": 8, "strategy": "channel"}
INT4 = {"num_bits": 4, "strategy": "group", "group_size": 32}
TOKEN = {"strategy": "token", "dynamic": True}


def cases() -> Iterator[tuple[str, str, Callable[[], nn.Module], Callable[[], nn.Module] | None, torch.dtype]]:
    """Package, scheme, the tool's module, its stand-in (of which the first module is compared), dtype."""
    for bits in (2, 4, 8):
        standin = lambda b=bits: standins.TorchLinear(b)  # noqa: E731
        yield "GPTQModel", f"{bits} bits, TorchLinear", lambda b=bits: gptq(b), standin, HALF
    yield "GPTQModel", "4 bits, act-order", lambda: gptq(4, True), lambda: standins.TorchLinear(act_order=True), HALF
    for bits in (4, 8):
        standin = lambda b=bits: standins.AwqTorchLinear(b)  # noqa: E731
        yield "GPTQModel", f"AWQ {bits} bits", lambda b=bits: gptqmodel_awq(b), standin, HALF
    yield "autoawq", "GEMM packing, 4 bits", autoawq, standins.WQLinear_GEMM, HALF
    yield "bitsandbytes", "LLM.int8(), threshold 6", bitsandbytes, None, HALF
    yield "bitsandbytes", "LLM.int8(), threshold 6, after a call", lambda: bitsandbytes(True), None, HALF
    yield "nvidia-modelopt", "int8", lambda: modelopt("INT8_DEFAULT_CFG"), standins.QuantLinear, HALF
    yield "nvidia-modelopt", "int8 weights, compressed", lambda: modelopt("INT8_WEIGHT_ONLY_CFG", True), None, HALF
    smooth = lambda: standins.QuantLinear(smooth=True)  # noqa: E731
    yield "nvidia-modelopt", "SmoothQuant", lambda: modelopt("INT8_SMOOTHQUANT_CFG"), smooth, HALF
    linear = standins.QParamsLinear
    channel, groups = {"ch_axis": 0}, {"ch_axis": 1, "group_size": 32}
    for dtype in (HALF, BF16):
        for label, build, standin in (
            ("W8A16", lambda d: quark("Int8PerChannel", dtype=d, **channel), lambda d: linear(dtype=d)),
            (
                "W8A16 asymmetric",
                lambda d: quark("Int8PerChannel", dtype=d, symmetric=False, **channel),
                lambda d: linear(symmetric=False, dtype=d),
            ),
            (
                "W8A16 groups",
                lambda d: quark("Int8PerGroup", dtype=d, **groups),
                lambda d: linear("int8", "per_group", dtype=d),
            ),
            (
                "W4A16 groups",
                lambda d: quark("Int4PerGroup", dtype=d, **groups),
                lambda d: linear("int4", "per_group", dtype=d),
            ),
            (
                "W4A16 groups, asymmetric, in order",
                lambda d: quark("Uint4PerGroup", None, False, d, symmetric=False, **groups),
                lambda d: linear("uint4", "per_group", False, reorder=False, dtype=d),
            ),
            (
                "W4A16 per channel",
                lambda d: quark("Int4PerChannel", dtype=d, **channel),
                lambda d: linear("int4", dtype=d),
            ),
            (
                "W8A8 static",
                lambda d: quark("Int8PerChannel", "Int8PerTensor", dtype=d, **channel),
                lambda d: linear(activation="int8", dtype=d),
            ),
            (
                "W8A8 static, uint8",
                lambda d: quark("Int8PerTensor", "Uint8PerTensor", dtype=d, observer_method="min_max"),
                lambda d: linear("int8", "per_tensor", activation="uint8", dtype=d),
            ),
        ):
            name = f"{label}, {str(dtype)[6:]}"
            yield "amd-quark", name, lambda b=build, d=dtype: b(d), lambda s=standin, d=dtype: s(d), dtype
    for dtype in (HALF, BF16):
        for state in ("compressed", "frozen", "decompressed"):
            for name, weights, activation, standin in (
                ("W8A16", INT8, None, lambda d=dtype: standins.compressed(packed=True, dtype=d)),
                ("W4A16", INT4, None, lambda d=dtype: standins.compressed(4, "group", group=32, dtype=d)),
                (
                    "W4A16 asymmetric",
                    {**INT4, "symmetric": False},
                    None,
                    lambda d=dtype: standins.compressed(4, "group", False, 32, dtype=d),
                ),
                ("W8A8 dynamic", INT8, TOKEN, lambda d=dtype: standins.compressed(dtype=d)),
                (
                    "W8A8 static",
                    INT8,
                    {"strategy": "tensor", "dynamic": False},
                    lambda d=dtype: standins.compressed(activation=standins.args(strategy="tensor"), dtype=d),
                ),
            ):
                build = lambda w=weights, a=activation, s=state, d=dtype: compressed_tensors(w, a, s, d)  # noqa: E731
                label = f"{name}, {str(dtype)[6:]}, {state}"
                yield "compressed-tensors", label, build, standin if state == "compressed" else None, dtype


def look(build: Callable[[], nn.Module], standin: Callable[[], nn.Module] | None, dtype: torch.dtype) -> str:
    """What is wrong, or empty."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = build().eval()
    first = next(m for m in model.children())
    if standin is not None and (differ := _shapes(first) ^ _shapes(standin())):
        return f"the stand-in holds other tensors: {sorted(differ)}"
    adoption = qp.adopt(model, drop_outliers=True)
    if adoption.left or not adoption.exchanged:
        return str(adoption)
    loose = [str(a.proof) for a in adoption.exchanged if not a.proof.exact]
    report = qp.explain(model, (rows(dtype),), target="ascend910b", numerics="vendor")
    if loose or report.hidden or not report.total or report.fused < report.total:
        return f"{loose} {report}"
    adoption.release()
    return "" if next(m for m in model.children()) is first else "release() left a plain module"


def _shapes(module: nn.Module) -> set[tuple[str, str, tuple[int, ...]]]:
    held = {k: t for k, t in module.state_dict().items() if isinstance(t, torch.Tensor)}
    return {(k, str(t.dtype), tuple(t.shape)) for k, t in held.items()}


def main() -> int:
    """Look at every case whose tool is installed; returns how many went wrong."""
    logging.disable(logging.WARNING)
    wrong = 0
    for package, name, build, standin, dtype in cases():
        try:
            installed = version(package)
        except PackageNotFoundError:
            print(f"{package}, {name}: not installed")
            continue
        problem = look(build, standin, dtype)
        wrong += bool(problem)
        print(f"{package} {installed}, {name}: {problem or 'adopted, proved exactly, all fused for ascend910b'}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
