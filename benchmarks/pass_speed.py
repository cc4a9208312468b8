"""Graph in to graph out: quantpass beside Inductor's own quantization fusion passes, on the same graphs, in one run.

Each graph is a chain of statically quantized Linears (PT2E's operators, ReLU between them): 50, 200 and 800 sites.
Inductor's side is what ``freezing`` runs: every pattern pass of ``torch._inductor.fx_passes.freezing_patterns``.
quantpass's side is reading, proving each weight by value, planning for Ascend 910B and rewriting. The weights are
small, so that the passes are timed and not the arithmetic on weights. quantpass is checked to have fused every site,
and Inductor up to PyTorch 2.13; 2.14 dropped most of its quantization patterns, so that what is timed there is the
search by those that are left. The last line says which of the two it was.

    python benchmarks/pass_speed.py
"""

import copy
import statistics
import time

import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed
from tabulate import tabulate
from torch._dynamo.utils import counters
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import freezing_patterns, quantization
from torch.fx.experimental.proxy_tensor import make_fx

from quantpass.graph.torch_internals import attribute_values
from quantpass.pipeline import fuse_graph
from quantpass.planning.options import Options

SITES = (50, 200, 800)
WIDTH = 32
FUSES = hasattr(quantization, "_register_qlinear_weight_prepack")
"""Whether this Inductor has patterns for quantized Linears: up to PyTorch 2.13."""
REPEATS = 5


class Chain(torch.nn.Module):
    """``sites`` Linears, each quantized per channel, between static per-tensor activation quantizations."""

    def __init__(self, sites):
        super().__init__()
        for i in range(sites):
            self.register_buffer(f"w{i}", torch.randint(-127, 128, (WIDTH, WIDTH), dtype=torch.int8))
            self.register_buffer(f"s{i}", torch.rand(WIDTH) * 0.01 + 1e-3)
            self.register_buffer(f"z{i}", torch.zeros(WIDTH, dtype=torch.int64))
            self.register_buffer(f"b{i}", torch.randn(WIDTH))
        self.sites = sites

    def forward(self, x):
        qd = torch.ops.quantized_decomposed
        for i in range(self.sites):
            x = qd.quantize_per_tensor(x, 0.02, 128, 0, 255, torch.uint8)
            x = qd.dequantize_per_tensor(x, 0.02, 128, 0, 255, torch.uint8)
            w = getattr(self, f"w{i}")
            w = qd.dequantize_per_channel(w, getattr(self, f"s{i}"), getattr(self, f"z{i}"), 0, -128, 127, torch.int8)
            x = torch.relu(torch.nn.functional.linear(x, w, getattr(self, f"b{i}")))
        return x


def graph(sites):
    model, x = Chain(sites), torch.randn(8, WIDTH)
    with torch.no_grad():
        return make_fx(
            model, decomposition_table=select_decomp_table(), tracing_mode="fake", _allow_non_fake_inputs=True
        )(x)


def time_inductor(gm, sites):
    counters.clear()
    start = time.perf_counter()
    for patterns in freezing_patterns.pass_patterns:
        patterns.apply(gm.graph)
    gm.graph.lint()
    gm.recompile()
    seconds = time.perf_counter() - start
    fused = counters["inductor"]["qlinear_weight_prepack_matcher_count"]
    assert fused == sites or (fused == 0 and not FUSES), f"Inductor fused {fused} of {sites} sites"
    return seconds


def time_quantpass(gm, sites):
    leaves = attribute_values(gm)
    start = time.perf_counter()
    outcome = fuse_graph(gm, leaves, Options(target="ascend910b"), keep_text=False)
    seconds = time.perf_counter() - start
    fused = sum(s.fused for s in outcome.sites)
    assert fused == sites, f"quantpass fused {fused} of {sites} sites"
    return seconds


def anchor():
    """What quantpass is timed beside: Inductor of which PyTorch, and what it does with these graphs."""
    does = "fuses every site" if FUSES else "has no patterns for quantized Linears: only its search is timed"
    return f"beside Inductor of PyTorch {torch.__version__}, which {does}"


def main():
    freezing_patterns.lazy_init()
    rows, per_site = [], {}
    for sites in SITES:
        source = graph(sites)
        nodes = len(source.graph.nodes)
        pairs = []
        for repeat in range(REPEATS + 1):
            pair = (time_quantpass(copy.deepcopy(source), sites), time_inductor(copy.deepcopy(source), sites))
            if repeat:  # the first pair warms up
                pairs.append(pair)
        ours, theirs = (statistics.median(p[i] for p in pairs) for i in (0, 1))
        ratio = statistics.median(p[0] / p[1] for p in pairs)
        per_site[sites] = ours / sites
        rows.append(
            [
                sites,
                nodes,
                f"{ours * 1e3:.0f} ms",
                f"{theirs * 1e3:.0f} ms",
                f"{ratio:.2f}",
                f"{ours / sites * 1e3:.3f} ms",
            ]
        )
    headers = ["sites", "nodes", "quantpass", "inductor", "ratio", "quantpass per site"]
    print(tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True))
    growth = per_site[SITES[-1]] / per_site[SITES[0]]
    print(f"\ntime per site at {SITES[-1]} sites / at {SITES[0]} sites: {growth:.2f} (1.00 is linear)")
    print(anchor())


if __name__ == "__main__":
    main()
