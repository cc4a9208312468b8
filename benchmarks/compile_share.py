"""What quantpass adds to what PyTorch does anyway: to ``torch.compile``, to capturing a model, to ``import torch``.

Four tables, in CPU time of one thread:

* the share of quantpass in a whole ``torch.compile`` of MiniLM's encoder and of a Llama with 12 layers (random weights,
  quantized by torchao): all that the backend does beside Dynamo, AOTAutograd and running the graph. The inner compiler
  is eager, which takes no time at all: beside any other the share is smaller;
* ``explain`` for one target and for three, beside bare ``torch.compile`` of the same model: with ``backend="eager"``
  (Dynamo alone) and ``"aot_eager"`` (the graph that has to be read), and of the same model on the meta device. The
  layers are those of a Llama with 1.1 billion weights. Extra memory is the peak of the process less what it held
  before;
* the pass on graphs in which nothing is quantized, for each node;
* ``import quantpass`` behind ``import torch``, in fresh processes.

    python -m benchmarks.compile_share               # six layers of 22 for explain
    python -m benchmarks.compile_share --layers 22
    python -m benchmarks.compile_share --quick       # small, once: does it work?
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from tabulate import tabulate
from torch import nn
from torch.fx import GraphModule
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)

import quantpass as qp
from benchmarks.machine import machine, memory
from quantpass.doors.compiled import CompiledGraph
from quantpass.graph import torch_internals
from quantpass.graph.torch_internals import StaticInputs, compile_with_aot
from quantpass.pipeline import fuse_graph
from quantpass.planning.options import Options

TARGET, TARGETS = "ascend910b", ("ascend310p", "ascend910b", "ascend950")
REPEATS = 3
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
"""The sizes of a layer of TinyLlama 1.1B, which has 22; a vocabulary would be read by an embedding alone."""

SCHEMES: dict[str, Callable[[], Any]] = {
    "W8A16": Int8WeightOnlyConfig,
    "W8A8 per token": Int8DynamicActivationInt8WeightConfig,
    "W4A16 g128": partial(IntxWeightOnlyConfig, weight_dtype=torch.int4, granularity=PerGroup(128)),
}


class Result(nn.Module):
    """A model of transformers with one tensor in and one out."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = getattr(self.model(tokens, use_cache=False), self.name)
        return found


def llama(layers: int, scheme: str | None, **sizes: int) -> nn.Module:
    torch.manual_seed(0)
    given = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "vocab_size": 512} | sizes
    config = transformers.LlamaConfig(num_hidden_layers=layers, max_position_embeddings=64, dtype="bfloat16", **given)
    return quantized(Result(transformers.LlamaForCausalLM(config), "logits"), scheme)


def minilm(layers: int, scheme: str | None) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12, "vocab_size": 512}
    config = transformers.BertConfig(num_hidden_layers=layers, **sizes)
    return quantized(Result(transformers.BertModel(config), "last_hidden_state"), scheme)


def quantized(model: nn.Module, scheme: str | None) -> nn.Module:
    model = model.eval().to(torch.bfloat16)
    if scheme is not None:
        quantize_(model, SCHEMES[scheme](), lambda m, name: isinstance(m, nn.Linear) and "lm_head" not in name)
    return model


def share(make: Callable[[], nn.Module]) -> tuple[float, float, int]:
    """CPU time of a whole ``torch.compile``, of quantpass in it, and how many matmuls it fused."""
    model, own = make(), [0.0]
    with (
        patch.object(CompiledGraph, "__init__", timed(CompiledGraph.__init__, own)),
        patch.object(torch_internals, "static_inputs", timed(torch_internals.static_inputs, own)),
    ):
        backend = qp.backend(target=TARGET)
        whole = first_call(model, backend)
    assert backend.report.fused == backend.report.total > 0, str(backend.report)
    return whole, own[0], backend.report.fused


def timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[0] += time.process_time() - start

    return run


def first_call(model: nn.Module, backend: Any) -> float:
    """CPU time of compiling ``model``: of the first call, less that of the second."""
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    first, second = (seconds(partial(compiled, tokens())) for _ in range(2))
    return first - second


def tokens() -> torch.Tensor:
    return torch.arange(14).view(2, 7)


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def explained(model: nn.Module, targets: tuple[str, ...]) -> dict[str, float]:
    """CPU time and extra memory of ``explain``."""
    torch.compiler.reset()
    Path("/proc/self/clear_refs").write_text("5")  # a new peak of resident memory; Linux says so
    before, start = memory("VmRSS"), time.process_time()
    report = qp.explain(model, (tokens(),), target=targets)
    spent = time.process_time() - start
    sites = [s for s in report.sites if s.target == TARGET]
    assert sites and all(s.fused and s.proved for s in sites), str(report)
    return {"seconds": spent, "extra": memory("VmHWM") - before, "sites": len(sites)}


def explained_on_meta(make: Callable[[], nn.Module], sites: int) -> float:
    """CPU time of ``explain`` of a model without data, as a large one may be looked at."""
    torch.compiler.reset()
    with torch.device("meta"):
        model, inputs = make(), (tokens(),)
    start = time.process_time()
    report = qp.explain(model, inputs, target=TARGET)
    spent = time.process_time() - start
    assert report.total == sites, str(report)
    return spent


def float_graph(make: Callable[[], nn.Module]) -> tuple[GraphModule, StaticInputs]:
    """The ATen graph of a float model, and its weights."""
    found: list[tuple[GraphModule, StaticInputs]] = []

    def look(aot: GraphModule, weights: StaticInputs, fake_inputs: list[Any]) -> Callable[..., Any]:
        del fake_inputs
        found.append((aot, weights))
        return aot

    torch.compiler.reset()
    torch.compile(make(), backend=lambda gm, inputs: compile_with_aot(gm, inputs, look))(tokens())
    (one,) = found
    return one


def in_float32(make: Callable[[], nn.Module]) -> nn.Module:
    return make().float()


def per_node(make: Callable[[], nn.Module], repeats: int) -> tuple[int, float]:
    """The nodes of a float model's graph, and the CPU time of the pass for each."""
    gm, weights = float_graph(make)
    pass_it = partial(fuse_graph, gm, weights.known, Options(target=TARGET), keep_text=False)
    assert not pass_it().sites  # the first one also fills the tables
    return len(gm.graph.nodes), statistics.median(seconds(pass_it) for _ in range(repeats)) / len(gm.graph.nodes)


IMPORTS = {
    "import quantpass behind import torch": ("import torch", "import quantpass"),
    "and qp.backend, behind what torch.compile imports": (
        "import torch, torch._dynamo, torch._functorch.aot_autograd, torch._inductor.decomposition",
        "import quantpass; quantpass.backend",
    ),
}


def import_time(first: str, then: str, repeats: int) -> float:
    """CPU time of one import behind another, in fresh processes."""
    code = f"import time; {first}; start = time.process_time(); {then}; print(time.process_time() - start)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(repeats)]
    return statistics.median(float(r.stdout.splitlines()[-1]) for r in runs)


def shares(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for name, make in {"MiniLM": minilm, "Llama": llama}.items():
        layers = 1 if quick else {"MiniLM": 6, "Llama": 12}[name]
        for scheme in SCHEMES:
            found = [share(partial(make, layers, scheme)) for _ in range(1 if quick else REPEATS)]
            whole, own = (statistics.median(f[i] for f in found) for i in (0, 1))
            ratios = [f[1] / f[0] for f in found]
            rows.append({"model": name, "layers": layers, "scheme": scheme, "sites": found[0][2], "whole": whole})
            rows[-1] |= {"own": own, "share": statistics.median(ratios), "spread": max(ratios) - min(ratios)}
    return rows


def explains(scheme: str, layers: int, **sizes: int) -> dict[str, Any]:
    model = llama(layers, scheme, **sizes)
    weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    several, one = explained(model, TARGETS), explained(model, (TARGET,))
    times = {"dynamo": first_call(model, "eager"), "aot": first_call(model, "aot_eager")}
    times |= {"one": one["seconds"], "several": several["seconds"]}
    times["meta"] = explained_on_meta(partial(llama, layers, scheme, **sizes), one["sites"])
    return {"scheme": scheme, "weights": weights, "sites": one["sites"], "extra": several["extra"], **times}


def explains_apart(scheme: str, layers: int) -> dict[str, Any]:
    """The same for the large sizes, in a process of its own: memory that was used before is no extra memory."""
    command = [sys.executable, "-m", "benchmarks.compile_share", "--layers", str(layers), "--scheme", scheme]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{scheme}:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models, once: does it work?")
    parser.add_argument("--layers", type=int, default=6, help="for explain: how many of the 22 layers")
    parser.add_argument("--only", choices=["share", "explain", "nodes", "import"], help="one of the tables")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--scheme", choices=SCHEMES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with torch.no_grad():
        share(partial(minilm, 1, "W8A16"))  # warms up: imports, caches
        if given.scheme:
            print(json.dumps(explains(given.scheme, given.layers, **LLAMA_1B)))
            return
        if given.only in (None, "share"):
            found["share"] = shares(given.quick)
            print(_shares(found["share"]), end="\n\n")
        if given.only in (None, "explain"):
            found["explain"] = [explains(s, 1) if given.quick else explains_apart(s, given.layers) for s in SCHEMES]
            print(_explains(found["explain"]), end="\n\n")
        if given.only in (None, "nodes"):
            models = {"MiniLM": partial(minilm, 6, None), "Llama": partial(llama, 12, None)}
            models |= {f"{name} in float32": partial(in_float32, make) for name, make in models.items()}
            found["nodes"] = {name: per_node(make, 1 if given.quick else 9) for name, make in models.items()}
            for name, (nodes, each) in found["nodes"].items():
                print(f"nothing quantized, {name}, {nodes} nodes: {each * 1e6:.1f} us a node")
    if given.only in (None, "import"):
        found["import"] = {what: import_time(*code, 1 if given.quick else 7) for what, code in IMPORTS.items()}
        for what, spent in found["import"].items():
            print(f"{what}: {spent * 1e3:.0f} ms")
    print(f"{machine()}, target {TARGET}")
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "target": TARGET, **found}, indent=1))


def _shares(rows: list[dict[str, Any]]) -> str:
    shown = [
        [
            f"{r['model']}, {r['layers']} layers",
            r["scheme"],
            r["sites"],
            f"{r['whole']:.2f} s",
            f"{r['own'] * 1e3:.0f} ms",
            f"{r['share']:.1%}",
            f"{r['spread']:.1%}",
        ]
        for r in rows
    ]
    headers = ["model", "quantized as", "sites", "torch.compile", "quantpass", "share", "spread"]
    return tabulate(shown, headers=headers, disable_numparse=True)


def _explains(rows: list[dict[str, Any]]) -> str:
    shown = [
        [
            r["scheme"],
            f"{r['weights'] / 1e6:.0f} million",
            r["sites"],
            f"{r['dynamo']:.1f} s",
            f"{r['aot']:.1f} s",
            f"{r['one']:.1f} s",
            f"{r['several']:.1f} s",
            f"{r['meta']:.1f} s",
            f"{r['extra'] / 2**20:.0f} MiB",
        ]
        for r in rows
    ]
    headers = [
        "quantized as",
        "weights",
        "sites",
        "eager",
        "aot_eager",
        "explain",
        "explain, 3 targets",
        "explain on meta",
        "extra memory",
    ]
    return tabulate(shown, headers=headers, disable_numparse=True)


if __name__ == "__main__":
    main()
