"""How many GE operators a quantized block has: as it is, fused, and as an expert writes it by hand.

``python benchmarks/operators.py`` previews the graphs that torchair compiles; it needs torch_npu's wheel
(``QUANTPASS_TORCH_NPU``) and torchao, no device. Data, Const and Reshape are not counted: they compute nothing.
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import quantpass as qp
from quantpass.lowering.standin_process import TorchairProcess

NOT_COUNTED = ("Reshape",)
CHIPS = ("ascend310p", "ascend910b")
M, K = 32, 128


class Mlp(nn.Module):
    """Two Linears and a ReLU; by hand: a quantization and a matmul, twice, and Relu.

    In place of a quantization for each row a 310P has a matmul that quantizes, and an Add for the bias.
    """

    name, by_hand, with_bias_behind = "MLP", 5, 5

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, 2 * K), nn.Linear(2 * K, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


class Attention(nn.Module):
    """The projections of an attention block around something that mixes tokens.

    By hand: one quantization for q, k and v, three matmuls, Add, Mul and the Cast that torchair puts behind it in place
    of attention, a quantization and a matmul. On a 310P with a scale for each row: no quantization, and four Adds.
    """

    name, by_hand, with_bias_behind = "attention projections", 9, 11

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(K, K) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o((self.q(x) + self.k(x)) * self.v(x))


class RowsByHand(nn.Module):
    """A quantization for each row as it is written by hand, and an integer matmul; one operator on a 310P."""

    name, by_hand, with_bias_behind = "a Linear, written out", 2, 1

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Buffer(torch.randint(-127, 128, (K, K), dtype=torch.int8))
        self.scale = nn.Buffer(torch.rand(K) * 1e-2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-5) / 127
        q = (x / s).round().clamp(-128, 127).to(torch.int8)
        return (torch._int_mm(q, self.codes.t()).float() * s * self.scale).to(x.dtype)


def dynamic(model: nn.Module) -> None:
    """torchao, W8A8, a scale for each token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())


def static(model: nn.Module) -> None:
    """torchao, W8A8, a static scale."""
    from torchao.quantization import Int8StaticActivationInt8WeightConfig, PerRow, PerTensor, quantize_

    scale = torch.tensor([[0.02]])
    quantize_(model, Int8StaticActivationInt8WeightConfig(act_quant_scale=scale, granularity=[PerTensor(), PerRow()]))


def as_it_is(model: nn.Module) -> None:
    """Quantized by its author."""
    del model


@dataclass(frozen=True)
class Case:
    """A block, how it is quantized, and its dtype."""

    block: Callable[[], nn.Module]
    quantize: Callable[[nn.Module], None]
    dtype: torch.dtype = torch.bfloat16

    @property
    def scheme(self) -> str:
        return (self.quantize.__doc__ or "").rstrip(".")


CASES = (
    Case(Mlp, dynamic),
    Case(Mlp, dynamic, torch.float16),
    Case(Mlp, static),
    Case(Mlp, static, torch.float16),
    Case(Attention, dynamic),
    Case(Attention, dynamic, torch.float16),
    Case(Attention, static),
    Case(Attention, static, torch.float16),
    Case(RowsByHand, as_it_is),
    Case(RowsByHand, as_it_is, torch.float16),
)


@dataclass(frozen=True)
class Counted:
    """The operators of one case on one chip."""

    case: Case
    chip: str
    plain: Counter[str]
    fused: Counter[str]

    @property
    def by_hand(self) -> int:
        in_one = self.chip == "ascend310p" and self.case.quantize is not static  # npu_quant_matmul_dequant
        block = self.case.block
        return block.with_bias_behind if in_one else block.by_hand  # type: ignore[attr-defined,no-any-return]

    @property
    def row(self) -> str:
        operators = ", ".join(f"{name} {n}" if n > 1 else name for name, n in sorted(self.fused.items()))
        cells = (self.case.block.name, self.case.scheme, str(self.case.dtype)[6:], self.chip)  # type: ignore[attr-defined]
        return f"| {' | '.join(cells)} | {self.plain.total()} | {self.fused.total()} | {self.by_hand} | {operators} |"


def counted(
    cases: tuple[Case, ...] = CASES, chips: tuple[str, ...] = CHIPS, process: TorchairProcess | None = None
) -> Iterator[Counted]:
    """Preview every case on every chip that takes its dtype."""
    for case in cases:
        for chip in chips:
            if chip == "ascend310p" and case.dtype == torch.bfloat16:
                continue
            torch.manual_seed(0)
            model = case.block().to(case.dtype).eval()
            case.quantize(model)
            x = torch.randn(M, K).to(case.dtype)
            previews = [qp.preview_ge(model, (x,), target=chip, fuse=fuse, process=process) for fuse in (False, True)]
            yield Counted(case, chip, *(Counter(op for op in p.ops if op not in NOT_COUNTED) for p in previews))


@dataclass(frozen=True)
class LayerCount:
    """The operators of a decoder layer in one form, ``Reshape`` among them."""

    name: str
    ops: Counter[str]

    @property
    def row(self) -> str:
        names = ("RmsNorm", "AddRmsNorm", "DynamicQuant", "AddRmsNormDynamicQuant", "QuantBatchMatmulV3")
        fused = ", ".join(f"{name} {self.ops[name]}" for name in names if self.ops[name])
        return f"| {self.name} | {self.ops.total()} | {self.ops['Reshape']} | {fused} |"


def decoder_layer() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A decoder layer of transformers' Llama in bfloat16, and inputs."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = LlamaDecoderLayer(config, 0)

        def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.layer(x, position_embeddings=(cos, sin))
            return found

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        vocab_size=128,
        attn_implementation="sdpa",
    )
    x = torch.randn(1, M, 128).to(torch.bfloat16)
    return Layer().to(torch.bfloat16).eval(), (x, *LlamaRotaryEmbedding(config)(x, torch.arange(M)[None]))


def layer_counts(process: TorchairProcess | None = None) -> Iterator[LayerCount]:
    """A decoder layer in float, quantized, and fused with both numerics."""
    model, args = decoder_layer()

    def count(name: str, **options: Any) -> LayerCount:
        return LayerCount(
            name, Counter(qp.preview_ge(model, args, target="ascend910b", process=process, **options).ops)
        )

    with torch.no_grad():
        yield count("float", fuse=False)
        dynamic(model)
        yield count("quantized", fuse=False)
        yield count('fused, `numerics="strict"`', numerics="strict")
        yield count('fused, `numerics="vendor"`')


HEAD = """# Operators of a quantized block

How many GE operators torchair compiles for a quantized block: as its tool spells it, fused by `qp.preview_ge` with
its defaults (`numerics="vendor"`), and as an expert writes it with the vendor's operators. Data, Const and Reshape are
not counted. Made by `python benchmarks/operators.py > docs/operators.md`; a test compares the rows.

A 310P has no `npu_dynamic_quant` by its documents. Its `npu_quant_matmul_dequant` quantizes each row of float16 itself
and takes no bias, which is added behind it.

| block | quantized by | dtype | chip | plain | fused | by hand | operators of the fused graph |
|---|---|---|---|---|---|---|---|"""


LAYER = """
## A decoder layer

A layer of transformers' Llama, bfloat16, quantized by torchao as W8A8 with a scale for each token, on an `ascend910b`.
Every operator counts here, Reshape too. Its norms become operators where those may round as they do; the norm of the
residual sum takes in the sum and the quantization.

SwiGLU stays Swish and Mul, with the Cast that torchair puts behind a Mul: `npu_swiglu_quant` has no converter in
torchair; `npu_dequant_swiglu_quant` has one (`ge_converter/custom/npu_dequant_swiglu_quant.py`), but documents disagree
about it on A2 and A3 without `group_index` (rule `dequant_swiglu_quant.group.present`), and it takes gate and up as the
halves of one tensor, as `npu_swiglu` does: two matmuls would be joined by a ConcatV2 or share a copy of both weights.

| form | operators | of them Reshape | norms, quantizations, matmuls |
|---|---|---|---|"""


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    logging.getLogger("torchao").setLevel(logging.ERROR)
    print(HEAD)
    with TorchairProcess() as process:
        for found in counted(process=process):
            print(found.row)
        print(LAYER)
        for form in layer_counts(process):
            print(form.row)


if __name__ == "__main__":
    main()
