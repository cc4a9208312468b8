"""Ways of tools to quantize of which the pass sees nothing, and what to do about each.

``python -m tests.coverage.unread`` looks again where the tools are installed: a row that is read by now has to go, and
the report has to name the module that hides its weight.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from tests.coverage.elsewhere import _filled
from tests.coverage.scheme import K, Mlp, N, rows

BF16 = torch.bfloat16

HEAD = """## What of these tools is not read

Where a tool unpacks its weight, or multiplies, outside of the graphs that Dynamo captures, no graph holds a quantized
matmul. `qp.explain` and `qp.verify` then name the tool's modules under "Quantized weights that no graph shows" (they
look at what modules hold: codes and scales, or a float weight with the parameters of its quantization), with Dynamo's
reasons for the breaks, and `report.require(fused=1.0)` fails. A weight that one graph dequantizes and another one
multiplies is refused as `read.weight.returned`, by `qp.backend` too. [`qp.adopt`](adopt.md) exchanges the modules of
most of them: none of their sites is fused before, all are fused after. `python -m tests.coverage.unread` looks at each
row again where its tool is installed.
"""


@dataclass(frozen=True)
class Unread:
    """``seen`` is what the pass finds, ``instead`` what to do; ``version`` is the one that was looked at."""

    tool: str
    package: str
    version: str
    name: str
    seen: str
    instead: str
    build: Callable[[], tuple[Any, tuple[torch.Tensor, ...]]]


def _gptq(bits: int) -> Any:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    layer = _filled(
        TorchLinear(bits=bits, group_size=32, sym=True, desc_act=False, in_features=K, out_features=N, bias=True)
    )
    layer.optimized = True
    layer.post_init()
    return layer.eval(), (rows(),)


def _bitsandbytes() -> Any:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(layer.weight.data.half(), requires_grad=False, has_fp16_weights=False).to("cpu")
    layer.bias = nn.Parameter(layer.bias.data.half(), requires_grad=False)
    layer(rows())
    return layer.eval(), (rows(),)


def _compressed_tensors(dynamic: bool) -> Any:
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )

    model = Mlp(BF16).eval()
    weights = QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True)
    activations = QuantizationArgs(num_bits=8, type="int", strategy="token", symmetric=True, dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations if dynamic else None)
    config = QuantizationConfig(config_groups={"all": scheme}, quantization_status=QuantizationStatus.FROZEN)
    apply_quantization_config(model, config)
    for linear in (model.up, model.down):
        linear.weight_scale.data = (linear.weight.abs().amax(1, keepdim=True) / 127).to(linear.weight_scale.dtype)
    return model, (rows(BF16),)


def _dynamic_modules() -> Any:
    return torch.ao.quantization.quantize_dynamic(Mlp(torch.float32).eval(), {nn.Linear}), (rows(torch.float32),)


def unread() -> list[Unread]:
    """Every row of the page's second table."""
    gptq = "the forward asks a tensor for its inference mode while it unpacks: a graph break before the matmul"
    bnb = "the outlier path selects columns by value: graph breaks, or `int8_mixed_scaled_mm`, refused as `read.matmul`"
    tensors = "the wrapped forward breaks the graph between the weight's quantization and the matmul"
    whole = "codes and matmul are in one packed module that PyTorch can't trace"
    own = "`qp.adopt(model)`: the row *adopted* above"
    return [
        *(
            Unread("GPTQModel", "GPTQModel", "7.7.0", f"{bits} bits, TorchLinear", gptq, own, lambda b=bits: _gptq(b))
            for bits in (2, 4, 8)
        ),
        Unread(
            "bitsandbytes",
            "bitsandbytes",
            "0.50.2",
            "LLM.int8(), threshold 6 (the default of transformers' load_in_8bit)",
            bnb,
            "`threshold=0` (in transformers: `llm_int8_threshold=0.0`), which drops the outlier path, or "
            "`qp.adopt(model, drop_outliers=True)`, which does too",
            _bitsandbytes,
        ),
        *(
            Unread("compressed-tensors", "compressed-tensors", "0.20.0", name, tensors, own, partial(_compressed_tensors, d))
            for name, d in (("int8 weights, its own forward", False), ("W8A8 dynamic, its own forward", True))
        ),
        Unread(
            "torch.ao",
            "torch",
            "2.13.0",
            "quantize_dynamic's modules",
            whole,
            "PT2E or torchao's `quantize_`",
            _dynamic_modules,
        ),
    ]  # fmt: skip


def section() -> str:
    """The text of the second part of ``docs/coverage.md``."""
    cells = [[u.tool, u.version, u.name, u.seen, u.instead] for u in unread()]
    headers = ["tool", "version", "scheme", "what is seen", "what to do"]
    return f"{HEAD}\n{tabulate(cells, headers, tablefmt='github')}\n"


def look(row: Unread) -> str | None:
    """What is wrong with a row today, where its tool is installed; None where it still holds."""
    import quantpass as qp

    torch._dynamo.reset()
    model, args = row.build()
    report = qp.explain(model, args, target="ascend910b")
    if report.fused:
        return f"{report.fused} of {report.total} sites are fused by now"
    named = any(type(m).__name__ in line for m in model.modules() for line in report.hidden)
    refused = report.total > 0  # by a line of its own: the tool's operator, which is not read
    return None if named or refused else "the report does not name the module"


def main() -> int:
    """Look at every row whose tool is installed; returns how many no longer hold."""
    wrong = 0
    for row in unread():
        try:
            installed = version(row.package).partition("+")[0]
        except PackageNotFoundError:
            print(f"{row.tool}, {row.name}: not installed")
            continue
        problem = look(row)
        wrong += problem is not None
        print(f"{row.tool} {installed}, {row.name}: {problem or 'as the page says'}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
