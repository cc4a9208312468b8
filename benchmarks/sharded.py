"""What a rank spends on its shard: the MLP of a Llama layer, in one process and in two that PyTorch shards it over.

Each rank compiles for Ascend 910B at the same time as the other. Printed is, for one process and for each rank of two,
the CPU time of all that quantpass does, the memory that it takes beside what it keeps, and the bytes of weights that it
prepares. Capturing the model is not counted: each rank captures all of its own graph.

    python -m benchmarks.sharded
    python -m benchmarks.sharded --quick    # small: does it work?
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import quantpass as qp
from benchmarks.machine import machine, memory
from quantpass.doors.compiled import CompiledGraph

HIDDEN, INNER, GROUP, LAYERS = 4096, 11008, 32, 3
TARGET = "ascend910b"


class Quantized(nn.Linear):
    """PyTorch shards no other class."""

    low, high = -127, 128

    def __init__(self, k: int, n: int) -> None:
        nn.Module.__init__(self)
        codes = torch.randint(self.low, self.high, (n, k), dtype=torch.int8)
        self.codes = nn.Parameter(codes, requires_grad=False)
        scale = torch.rand(self.scales(n, k)) * 0.01 + 1e-3
        self.scale = nn.Parameter(scale.bfloat16(), requires_grad=False)

    @staticmethod
    def scales(n: int, k: int) -> tuple[int, int]:
        del k
        return n, 1

    def weight_of(self, x: torch.Tensor) -> torch.Tensor:
        return self.codes.to(x.dtype) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight_of(x))


class InGroups(Quantized):
    """Codes of 4 bits, a scale for each group along K."""

    low, high = -8, 8

    @staticmethod
    def scales(n: int, k: int) -> tuple[int, int]:
        return n, k // GROUP

    def weight_of(self, x: torch.Tensor) -> torch.Tensor:
        return (self.codes.unflatten(1, (-1, GROUP)).to(x.dtype) * self.scale.unsqueeze(-1)).flatten(1)


KINDS = {"W8A16": Quantized, "W4A16 g32": InGroups}


class Mlp(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, kind: type[Quantized], hidden: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = kind(hidden, inner), kind(hidden, inner), kind(inner, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return found


class Columns(ColwiseParallel):
    """Each rank has some of the outputs."""

    def _partition_linear_fn(self, _: str, module: nn.Module, mesh: Any) -> None:
        _distribute(module, mesh, 0)


class Rows(RowwiseParallel):
    """Each rank has some of the inputs; the results are added."""

    def _partition_linear_fn(self, _: str, module: nn.Module, mesh: Any) -> None:
        _distribute(module, mesh, 1)


def _distribute(module: nn.Module, mesh: Any, dim: int) -> None:
    for name, tensor in list(module.named_parameters()):
        where = Shard(dim) if tensor.shape[dim] > 1 else Replicate()  # one scale for a row of the weight
        placed = distribute_tensor(tensor, mesh, [where], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(placed, requires_grad=False))


def measure(kind: str, hidden: int, inner: int, layers: int, ranks: int) -> dict[str, Any]:
    """What this rank spends."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.no_grad():
        _compiled(kind, 2 * GROUP, 4 * GROUP, 1, ranks)  # warms up: imports, caches
        return _compiled(kind, hidden, inner, layers, ranks)


def _compiled(kind: str, hidden: int, inner: int, layers: int, ranks: int) -> dict[str, Any]:
    model = nn.Sequential(*(Mlp(KINDS[kind], hidden, inner) for _ in range(layers)))
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        for mlp in model:
            parallelize_module(mlp, mesh, {"gate": Columns(), "up": Columns(), "down": Rows()})
    found: dict[str, Any] = {}
    build = CompiledGraph.__init__

    def measured(self: CompiledGraph, *args: Any) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # a new peak of resident memory; Linux says so
        before, start = memory("VmRSS"), time.process_time()
        build(self, *args)
        found["seconds"], peak = time.process_time() - start, memory("VmHWM")
        found["prepared"] = sum(t.nbytes for v in vars(self)["_variants"] for t in v.constants)
        found["extra"] = max(0, peak - before - found["prepared"])

    backend = qp.backend(target=TARGET)
    with patch.object(CompiledGraph, "__init__", measured):
        torch.compile(model, backend=backend)(torch.randn(4, hidden, dtype=torch.bfloat16))
    report = backend.report
    assert report.fused == report.total == 3 * layers, str(report)
    assert all(s.proved for s in report.sites)
    return found


def _rank(given: argparse.Namespace) -> None:
    """One process of several; prints what it spent."""
    rank, ranks, kind, *sizes, meeting = given.rank
    if int(ranks) > 1:
        dist.init_process_group("gloo", f"file://{meeting}", rank=int(rank), world_size=int(ranks))
    print(json.dumps(measure(kind, *map(int, sizes), int(ranks))))
    if int(ranks) > 1:
        dist.barrier()
        dist.destroy_process_group()


def spent(kind: str, hidden: int, inner: int, layers: int, ranks: int) -> list[dict[str, Any]]:
    """What each of ``ranks`` processes spends."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = [str(s) for s in (hidden, inner, layers)]
        commands = [
            [
                sys.executable,
                "-m",
                "benchmarks.sharded",
                "--rank",
                str(r),
                str(ranks),
                kind,
                *sizes,
                f"{folder}/meeting",
            ]
            for r in range(ranks)
        ]
        processes = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
        results = [p.communicate(timeout=600) for p in processes]
    for p, (_, error) in zip(processes, results, strict=True):
        if p.returncode:
            sys.exit(error)
    return [json.loads(out.splitlines()[-1]) for out, _ in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small weights: does it work?")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rank", nargs=7, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        _rank(given)
        return
    sizes, repeats = ((256, 512, 1), 1) if given.quick else ((HIDDEN, INNER, LAYERS), given.repeats)
    rows = []
    for kind in KINDS:
        alone = [spent(kind, *sizes, 1) for _ in range(repeats)]
        both = [spent(kind, *sizes, 2) for _ in range(repeats)]
        processes = {"one process": [a[0] for a in alone]}
        processes |= {f"rank {r} of 2": [b[r] for b in both] for r in range(2)}
        whole = statistics.median(a[0]["seconds"] for a in alone)
        for name, found in processes.items():
            seconds = statistics.median(f["seconds"] for f in found)
            mebibytes = [f"{max(f[what] for f in found) / 2**20:.1f} MiB" for what in ("extra", "prepared")]
            rows.append([kind, name, f"{seconds:.2f} s", f"{seconds / whole:.2f}", *mebibytes])
    headers = ["quantized as", "process", "CPU time", "of one process", "extra memory", "prepared"]
    print(tabulate(rows, headers=headers, disable_numparse=True))
    print(f"\n{sizes[2]} MLPs of ({sizes[0]}, {sizes[1]}); {machine()}, target {TARGET}")


if __name__ == "__main__":
    main()
