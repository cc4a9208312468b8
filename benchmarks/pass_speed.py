"""Graph in to graph out: quantpass beside Inductor's own quantization fusion passes, on the same graphs, in one run.

Each graph is a chain of Linears with small weights, so that the passes are timed and not the arithmetic on weights:

* ``static``: PT2E's operators (static activations, weights per channel) with a ReLU between, which Inductor fuses too;
* ``mixed``: those, weight-only int8, int4 groups in int8 and activations per token, in turns. Inductor has no patterns
  for most of them, so that quantpass is timed alone.

Inductor's side is what ``freezing`` runs: every pattern pass of ``torch._inductor.fx_passes.freezing_patterns``.
quantpass's side is reading, proving each weight by value, planning for Ascend 910B and rewriting. quantpass is checked
to have fused every site, and Inductor up to PyTorch 2.13; 2.14 dropped most of its quantization patterns, so that what
is timed there is the search by those that are left. The last line says which of the two it was.

``FX alone`` is what PyTorch itself takes for a graph like quantpass's result, whatever decides on it: each new node
made once and taken out again, ``lint`` and ``recompile``. Runs are interleaved, in time of the processor and with
Python's garbage collector on; numbers are medians, and ``spread`` is how far the quartiles of the ratio lie apart.

    python -m benchmarks.pass_speed [--quick] [--json FILE]
"""

import argparse
import copy
import json
import math
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed
from tabulate import tabulate
from torch._dynamo.utils import counters
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import freezing_patterns, quantization
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.machine import machine
from quantpass.graph.torch_internals import attribute_values
from quantpass.pipeline import fuse_graph
from quantpass.planning.options import Options

SITES = (50, 200, 800, 3200)
WIDTH = 64
GROUP = 32
FUSES = hasattr(quantization, "_register_qlinear_weight_prepack")
"""Whether this Inductor has patterns for quantized Linears: up to PyTorch 2.13."""


class Chain(torch.nn.Module):
    """``sites`` quantized Linears with a ReLU behind each, ``kinds`` in turns."""

    def __init__(self, sites, kinds):
        super().__init__()
        self.kinds = [kinds[i % len(kinds)] for i in range(sites)]
        for i in range(sites):
            self.register_buffer(f"w{i}", torch.randint(-7, 8, (WIDTH, WIDTH), dtype=torch.int8))
            self.register_buffer(f"s{i}", torch.rand(WIDTH) * 0.01 + 1e-3)
            self.register_buffer(f"g{i}", torch.rand(WIDTH, WIDTH // GROUP, 1) * 0.01 + 1e-3)
            self.register_buffer(f"z{i}", torch.zeros(WIDTH, dtype=torch.int64))
            self.register_buffer(f"b{i}", torch.randn(WIDTH))

    def forward(self, x):
        for i, kind in enumerate(self.kinds):
            x = kind(x, SimpleNamespace(**{name: getattr(self, f"{name}{i}") for name in "wsgzb"}))
        return x


def static(x, layer):
    """PT2E: one scale and zero point for all activations."""
    qd = torch.ops.quantized_decomposed
    x = qd.quantize_per_tensor(x, 0.02, 128, 0, 255, torch.uint8)
    x = qd.dequantize_per_tensor(x, 0.02, 128, 0, 255, torch.uint8)
    w = qd.dequantize_per_channel(layer.w, layer.s, layer.z, 0, -128, 127, torch.int8)
    return torch.relu(torch.nn.functional.linear(x, w, layer.b))


def weight_only(x, layer):
    """int8 per channel, spelled with plain operators, in bfloat16."""
    w = layer.w.bfloat16() * layer.s.bfloat16()[:, None]
    return torch.relu(torch.nn.functional.linear(x.bfloat16(), w)).float()


def groups(x, layer):
    """int4 codes with a scale for each group along K."""
    w = (layer.w.reshape(WIDTH, -1, GROUP).bfloat16() * layer.g.bfloat16()).reshape(WIDTH, WIDTH)
    return torch.relu(torch.nn.functional.linear(x.bfloat16(), w)).float()


def per_token(x, layer):
    """A scale for each row, chosen when the graph runs."""
    x = x.bfloat16()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    codes = (x / scale).round().clamp(-128, 127).to(torch.int8)
    w = layer.w.bfloat16() * layer.s.bfloat16()[:, None]
    return torch.relu(torch.nn.functional.linear(codes.bfloat16() * scale, w)).float()


MIXED = (static, weight_only, groups, per_token)


def graph(sites, kinds=(static,)):
    """The chain as an ATen graph."""
    model, x = Chain(sites, kinds), torch.randn(8, WIDTH)
    table = select_decomp_table() if kinds == (static,) else {}
    with torch.no_grad():
        return make_fx(model, decomposition_table=table, tracing_mode="fake", _allow_non_fake_inputs=True)(x)


def time_inductor(gm, sites):
    counters.clear()
    start = time.process_time()
    for patterns in freezing_patterns.pass_patterns:
        patterns.apply(gm.graph)
    gm.graph.lint()
    gm.recompile()
    seconds = time.process_time() - start
    fused = counters["inductor"]["qlinear_weight_prepack_matcher_count"]
    assert fused == sites or (fused == 0 and not FUSES), f"Inductor fused {fused} of {sites} sites"
    return seconds


def time_quantpass(gm, sites):
    leaves = attribute_values(gm)
    start = time.process_time()
    outcome = fuse_graph(gm, leaves, Options(target="ascend910b"), keep_text=False)
    seconds = time.process_time() - start
    fused = sum(s.fused for s in outcome.sites)
    assert fused == sites, f"quantpass fused {fused} of {sites} sites"
    return seconds


def time_fx(gm):
    """What PyTorch takes for the new nodes of a fused graph, and for checking it and generating its code."""
    fused = [n for n in gm.graph.nodes if "quantpass" in n.meta]
    assert fused
    start = time.process_time()
    copies = []
    for n in fused:
        with gm.graph.inserting_after(n):
            copies.append(gm.graph.create_node(n.op, n.target, n.args, n.kwargs, n.name))
    for n in reversed(copies):
        gm.graph.erase_node(n)
    gm.graph.lint()
    gm.recompile()
    return time.process_time() - start


def anchor():
    """What quantpass is timed beside: Inductor of which PyTorch, and what it does with these graphs."""
    does = "fuses every site" if FUSES else "has no patterns for quantized Linears: only its search is timed"
    return f"beside Inductor of PyTorch {torch.__version__}, which {does}"


def spread(numbers):
    """How far the quartiles lie apart, of the median."""
    if len(numbers) < 3:
        return math.nan
    low, middle, high = statistics.quantiles(numbers, n=4)
    return (high - low) / middle


def measure(sites, kinds, repeats):
    """One row: the medians for a chain of so many sites."""
    source, runs = graph(sites, kinds), []
    for _ in range(repeats):
        ours = copy.deepcopy(source)
        run = {"quantpass": time_quantpass(ours, sites), "FX alone": time_fx(ours)}
        if kinds == (static,):
            run["Inductor"] = time_inductor(copy.deepcopy(source), sites)
            run["quantpass / Inductor"] = run["quantpass"] / run["Inductor"]
        runs.append(run)
    row = {"chain": "static" if kinds == (static,) else "mixed", "sites": sites, "nodes": len(source.graph.nodes)}
    row |= {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return row | {"spread": spread([run.get("quantpass / Inductor", run["quantpass"]) for run in runs])}


def growth(rows):
    """The exponent of the time in the number of sites, by least squares; 1 is linear."""
    points = [(math.log(r["sites"]), math.log(r["quantpass"])) for r in rows]
    x, y = (statistics.fmean(p[i] for p in points) for i in (0, 1))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def shown(row):
    """A row in milliseconds, those of quantpass and of FX for each site as well."""
    out = {name: row[name] for name in ("chain", "sites", "nodes")}
    out |= {name: f"{row[name] * 1e3:.0f} ms" for name in ("quantpass", "Inductor", "FX alone") if name in row}
    ratio = row.get("quantpass / Inductor")
    out["ratio"] = "" if ratio is None else f"{ratio:.2f}"
    out["spread"] = "" if math.isnan(row["spread"]) else f"{row['spread']:.0%}"
    return out | {"quantpass per site": f"{row['quantpass'] / row['sites'] * 1e3:.2f} ms"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sites, few runs: does it work?")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    freezing_patterns.lazy_init()
    rows = []
    for kinds in ((static,), MIXED):
        measure(4, kinds, 1)  # warms up
        for sites in (4, 8) if options.quick else SITES:
            rows.append(measure(sites, kinds, 1 if options.quick else max(1, min(9, 2400 // sites))))
            print(*shown(rows[-1]).values(), file=sys.stderr)
    print(tabulate([shown(r) for r in rows], headers="keys", disable_numparse=True))
    for chain in ("static", "mixed"):
        exponent = growth([r for r in rows if r["chain"] == chain])
        print(f"\n{chain}: time grows with the number of sites to the power of {exponent:.2f} (1 is linear)", end="")
    print(f"\n{anchor()}\n{machine()}, processor time")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "anchor": anchor(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
