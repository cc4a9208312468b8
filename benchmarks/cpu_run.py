"""Quantized layers on a CPU: quantpass beside eager, float and torchao with Inductor, in one run.

A Linear (without bias) quantized by torchao, of one shape, at several M, and a whole sentence encoder
(all-MiniLM-L6-v2, M sentences of 32 tokens). Contenders, with equal threads:

* ``eager``: the quantized module as torchao runs it;
* ``torchao + Inductor``: ``torch.compile`` with freezing;
* ``float``: the unquantized module in Inductor, in the model's dtype (weights at twice to eight times the bytes);
* ``reference``: the kernels that define the fused operators;
* ``native``, ``native + Inductor``: PyTorch's own CPU kernels, the rest of the graph run as it is or compiled.

Which kernels quantpass takes is measured anew in each run of this script. Runs are interleaved; a cell is the median of
each contender's time over that of the best of the first three. Every result is first compared with eager's. ``spread``
is how far the quartiles of the noisiest contender lie apart: a difference that is smaller says nothing. ``bandwidth``
is the time in which this machine reads the quantized weight from memory, over the same best.

    python -m benchmarks.cpu_run [--quick] [--threads N] [--cpu-time] [--only TEXT] [--json FILE]

``--cpu-time`` counts the time of the processor, not of the clock, where other work runs beside it; with one thread.
"""

import argparse
import copy
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from tabulate import tabulate
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup, PerRow, PerTensor

import quantpass as qp
from benchmarks.machine import machine


def static(dtype):
    """One scale for all activations, which are drawn from the normal distribution here."""
    scale = torch.tensor([[4.0 / 127]], dtype=dtype)
    return Int8StaticActivationInt8WeightConfig(act_quant_scale=scale, granularity=[PerTensor(), PerRow()])


SCHEMES = {
    "W8A16": lambda _: Int8WeightOnlyConfig(),
    "W4A16 g128": lambda _: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(128)),
    "W8A8 static": static,
    "W8A8 per token": lambda _: Int8DynamicActivationInt8WeightConfig(),
}
BYTES = {"W4A16 g128": 0.5}
"""Of one weight; 1 where it is not said."""

BASE = ("eager", "torchao + Inductor", "float")
OURS = ("reference", "native", "native + Inductor")
CLOSE = (0.99, 0.9)
"""The least cosine between a contender's result and eager's; that of the float model, which is another model."""


def contenders(model, config, args):
    """A function of no arguments for each."""
    quantized = copy.deepcopy(model)
    quantize_(quantized, config)

    def fused(**options):
        return torch.compile(quantized, backend=qp.backend(target="cpu", compare_weights="identity", **options))

    made = {
        "eager": quantized,
        "torchao + Inductor": torch.compile(copy.deepcopy(quantized), options={"freezing": True}),
        "float": torch.compile(model),
        "reference": fused(lowering="reference"),
        "native": fused(lowering="native"),
        "native + Inductor": fused(lowering="native", inner="inductor"),
    }
    results = {}
    with torch.no_grad():
        for name, run in made.items():
            results[name] = run(*args).double().flatten()
    for name, result in results.items():
        cosine = float(torch.nn.functional.cosine_similarity(result, results["eager"], dim=0))
        assert cosine > CLOSE[name == "float"], f"{name}: cosine {cosine:.4f} to eager"
    return made


def times(made, args, seconds, clock):
    """Interleaved runs of each until the time is up; slow ones run at least three times."""
    taken = {name: [] for name in made}
    with torch.no_grad():
        for run in made.values():
            run(*args)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(taken["eager"]) < 3:
            for name, run in made.items():
                start = clock()
                run(*args)
                taken[name].append(clock() - start)
    return taken


def bandwidth(clock):
    """Bytes a second that a sum over 256 MiB reads, the quickest of five."""
    data = torch.ones(1 << 26)

    def once():
        start = clock()
        data.sum()
        return clock() - start

    return data.nbytes / min(once() for _ in range(5))


def row(what, dtype, scheme, m, made, args, seconds, clock):
    taken = times(made, args, seconds, clock)
    medians = {name: statistics.median(t) for name, t in taken.items()}
    best = min(medians[name] for name in BASE)
    quartiles = {name: statistics.quantiles(t, n=4) for name, t in taken.items()}
    return {
        "of": what,
        "dtype": str(dtype).removeprefix("torch."),
        "scheme": scheme,
        "M": m,
        "best ms": best * 1e3,
        **{name: medians[name] / best for name in (*BASE, *OURS)},
        "spread": max((q[2] - q[0]) / q[1] for q in quartiles.values()),
    }


def linear(k, n, m, dtype, scheme, seconds, clock):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(k, n, bias=False)).to(dtype).eval().requires_grad_(False)
    x = (torch.randn(m, k, dtype=dtype),)
    made = contenders(layer, SCHEMES[scheme](dtype), x)
    cell = row(f"({k}, {n})", dtype, scheme, m, made, x, seconds, clock)
    read = k * n * BYTES.get(scheme, 1) / bandwidth(clock)
    return {**cell, "bandwidth": read * 1e3 / cell["best ms"]}


class Encoder(nn.Module):
    """The last hidden states of token ids."""

    def __init__(self, dtype):
        super().__init__()
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
        self.model = importlib.import_module("minilm").load(dtype)

    def forward(self, ids):
        return self.model(ids)[0]


def encoder(m, dtype, scheme, seconds, clock):
    torch.manual_seed(0)
    ids = (torch.randint(1000, 20000, (m, 32)),)
    made = contenders(Encoder(dtype).requires_grad_(False), SCHEMES[scheme](dtype), ids)
    return {**row("MiniLM", dtype, scheme, m, made, ids, seconds, clock), "bandwidth": None}


def cells(quick, seconds, clock):
    """What is measured, each with the function that measures it."""
    shapes = [(256, 128)] if quick else [(4096, 4096), (4096, 11008)]
    sizes = (1, 8) if quick else (1, 16, 128, 512)
    dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32)
    for dtype in dtypes:
        for scheme in SCHEMES:
            for m in () if quick or scheme == "W8A8 static" else (1, 16):  # its scale is not the encoder's
                yield f"MiniLM {scheme} {dtype} M={m}", partial(encoder, m, dtype, scheme, seconds, clock)
            for k, n in shapes:
                for m in sizes:
                    yield f"({k}, {n}) {scheme} {dtype} M={m}", partial(linear, k, n, m, dtype, scheme, seconds, clock)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape: does it work?")
    parser.add_argument("--threads", type=int, help="of each contender; as PyTorch chooses where not given")
    parser.add_argument("--cpu-time", action="store_true", help="time of the processor; needs --threads 1")
    parser.add_argument("--only", default="", help="cells whose name holds this, as '(4096, 4096) W8A16'")
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.cpu_time and torch.get_num_threads() != 1:
        parser.error("--cpu-time adds up the time of all threads: give --threads 1 too")
    clock = time.process_time if options.cpu_time else time.perf_counter
    rows = []
    with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, XDG_CACHE_HOME=cache):
        for name, measure in cells(options.quick, 0.2 if options.quick else 3, clock):
            if options.only in name:
                torch.compiler.reset()
                rows.append(measure())
                print(tabulate([rows[-1]], headers="keys" if len(rows) == 1 else (), floatfmt=".2f"), flush=True)
                if options.json:
                    options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    print(f"\n{machine()}. Each contender's time over the best of the first three:\n")
    print(tabulate(rows, headers="keys", floatfmt=".2f"))


if __name__ == "__main__":
    main()
