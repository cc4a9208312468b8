"""Quantized layers on a CPU: quantpass beside eager, float and torchao with Inductor, in one run.

A Linear (without bias) quantized by torchao, of one shape, at several M. Contenders, with equal threads:

* ``eager``: the quantized module as torchao runs it;
* ``torchao + Inductor``: ``torch.compile`` with freezing;
* ``float``: the unquantized module in Inductor, in the model's dtype (weights at twice to eight times the bytes);
* ``reference``: the kernels that define the fused operators;
* ``native``, ``native + Inductor``: PyTorch's own CPU kernels, the rest of the graph run as it is or compiled.

Runs are interleaved; a cell is the median of each contender's time over that of the best of the first three. Every
result is first compared with eager's. ``spread`` is how far the quartiles of the noisiest contender lie apart.

    python benchmarks/cpu_run.py [--quick] [--json FILE]
"""

import argparse
import copy
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup

import quantpass as qp

SCHEMES = {
    "W8A16": Int8WeightOnlyConfig,
    "W4A16 g128": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(128)),
    "W8A8 per token": Int8DynamicActivationInt8WeightConfig,
}
BASE = ("eager", "torchao + Inductor", "float")
OURS = ("reference", "native", "native + Inductor")
CLOSE = (0.999, 0.97)
"""The least cosine between a contender's result and eager's; that of the float model, which is another model."""


def contenders(layer, config, x):
    """A function of no arguments for each."""
    quantized = copy.deepcopy(layer)
    quantize_(quantized, config())

    def fused(**options):
        return torch.compile(quantized, backend=qp.backend(target="cpu", compare_weights="identity", **options))

    made = {
        "eager": quantized,
        "torchao + Inductor": torch.compile(copy.deepcopy(quantized), options={"freezing": True}),
        "float": torch.compile(layer),
        "reference": fused(lowering="reference"),
        "native": fused(lowering="native"),
        "native + Inductor": fused(lowering="native", inner="inductor"),
    }
    results = {}
    with torch.no_grad():
        for name, run in made.items():
            results[name] = run(x).double().flatten()
    for name, result in results.items():
        cosine = float(torch.nn.functional.cosine_similarity(result, results["eager"], dim=0))
        assert cosine > CLOSE[name == "float"], f"{name}: cosine {cosine:.4f} to eager"
    return made


def times(made, x, seconds):
    """Interleaved runs of each until the time is up; slow ones run at least three times."""
    taken = {name: [] for name in made}
    with torch.no_grad():
        for run in made.values():
            run(x)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(taken["eager"]) < 3:
            for name, run in made.items():
                start = time.perf_counter()
                run(x)
                taken[name].append(time.perf_counter() - start)
    return taken


def cell(k, n, m, dtype, scheme, seconds):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(k, n, bias=False)).to(dtype).eval().requires_grad_(False)
    x = torch.randn(m, k, dtype=dtype)
    taken = times(contenders(layer, SCHEMES[scheme], x), x, seconds)
    medians = {name: statistics.median(t) for name, t in taken.items()}
    best = min(medians[name] for name in BASE)
    quartiles = {name: statistics.quantiles(t, n=4) for name, t in taken.items()}
    return {
        "shape": f"({k}, {n})",
        "dtype": str(dtype).removeprefix("torch."),
        "scheme": scheme,
        "M": m,
        "best ms": best * 1e3,
        **{name: medians[name] / best for name in (*BASE, *OURS)},
        "spread": max((q[2] - q[0]) / q[1] for q in quartiles.values()),
    }


def machine():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor())
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model}, {capability}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape: does it work?")
    parser.add_argument("--json", help="also write the table here")
    options = parser.parse_args()
    shapes = [(256, 128)] if options.quick else [(4096, 4096), (4096, 11008)]
    sizes = (1, 8) if options.quick else (1, 16, 128, 512)
    dtypes = (torch.bfloat16,) if options.quick else (torch.bfloat16, torch.float32)
    rows = []
    for k, n in shapes:
        for dtype in dtypes:
            for scheme in SCHEMES:
                for m in sizes:
                    torch.compiler.reset()
                    rows.append(cell(k, n, m, dtype, scheme, 0.2 if options.quick else 3))
                    print(tabulate([rows[-1]], headers="keys" if len(rows) == 1 else (), floatfmt=".2f"), flush=True)
    print(f"\n{machine()}. Each contender's time over the best of the first three:\n")
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": machine(), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
