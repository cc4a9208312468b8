"""Reading, proving and preparing one weight of real size: how long and how much memory, beside running the layer once.

For each spelling, in a process of its own: ``qp.fuse`` of an exported Linear against one eager run of the unfused layer
on 4 rows, which dequantizes the weight once. Both take turns, in CPU time of one thread; the ratio is the median. Extra
memory is the peak of the process while it fuses, less what it held before and less the tensors that were prepared.

    python -m benchmarks.real_weights                   # (4096, 11008), every spelling
    python -m benchmarks.real_weights --only lm_head    # (128256, 8192)
    python -m benchmarks.real_weights --quick           # small, once: does it work?
    python -m benchmarks.real_weights --model 7b        # every Linear of a Llama with 7 billion weights, in int4
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import quantpass as qp
from benchmarks.machine import machine, memory

N, K = 4096, 11008
ROWS, GROUP = 4, 128
REPEATS = 5
BF16 = torch.bfloat16


class Written(nn.Module):
    """A Linear whose weight ``weight()`` computes from buffers."""

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight())

    forward = linear

    def hold(self, **tensors: torch.Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=dtype)


def scales(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return (torch.rand(*shape) * 1e-2 + 1e-3).to(dtype)


class PerChannel(Written):
    """``codes.to(bf16) * scale``."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.hold(codes=integers(-127, 128, n, k), scale=scales(n, 1))

    def weight(self) -> torch.Tensor:
        return self.codes.to(BF16) * self.scale


class Groups(Written):
    """``(codes.view(n, groups, g) - zero) * scale``."""

    low, high = -128, 128

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        shape = (n, k // GROUP, 1)
        zero = integers(-8, 8, *shape).to(BF16)
        self.hold(codes=integers(self.low, self.high, n, k), scale=scales(*shape), zero=zero)
        self.shape = (n, k // GROUP, GROUP)

    def weight(self) -> torch.Tensor:
        return ((self.codes.view(self.shape).to(BF16) - self.zero) * self.scale).view(self.shape[0], -1)


class Nibbles(Written):
    """Two codes of K in a byte, a scale and a zero point for each group."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.hold(packed=integers(0, 256, n, k // 2, dtype=torch.uint8), scale=scales(n, k // GROUP, 1))
        self.hold(zero=integers(4, 12, n, k // GROUP, 1).to(BF16))
        self.shape = (n, k // GROUP, GROUP)

    def weight(self) -> torch.Tensor:
        codes = torch.stack([self.packed & 15, self.packed >> 4], dim=-1).view(self.shape)
        return ((codes.to(BF16) - self.zero) * self.scale).view(self.shape[0], -1)


class Gptq(Written):
    """Eight codes of K in an int32, ``(K / 8, N)``; a scale and a packed zero point for each group, by ``g_idx``."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        words = {"low": -(2**31), "high": 2**31, "dtype": torch.int32}
        self.hold(qweight=integers(words["low"], words["high"], k // 8, n, dtype=torch.int32))
        self.hold(qzeros=integers(words["low"], words["high"], k // GROUP, n // 8, dtype=torch.int32))
        self.hold(scales=scales(k // GROUP, n), g_idx=torch.arange(k, dtype=torch.int32) // GROUP)
        self.hold(wf=torch.arange(0, 32, 4, dtype=torch.int32))

    def weight(self) -> torch.Tensor:
        zeros = (self.qzeros.unsqueeze(2).expand(-1, -1, 8) >> self.wf.view(1, 1, 8)).to(torch.int8) & 15
        zeros = zeros.reshape(self.scales.shape)
        codes = (self.qweight.unsqueeze(1).expand(-1, 8, -1) >> self.wf.view(1, 8, 1)).to(torch.int8) & 15
        codes = codes.reshape(-1, codes.shape[2])
        index = self.g_idx.long()
        return (self.scales[index] * (codes - zeros[index])).t()


class GptqInOrder(Gptq):
    """The same with ``desc_act=True``: rows of K are in groups by their activations' size, which lie anywhere."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__(n, k)
        self.g_idx = self.g_idx[torch.randperm(k)]


class Awq(Written):
    """Eight codes of N in an int32, ``(K, N / 8)``, in AutoAWQ's order."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.hold(qweight=integers(-(2**31), 2**31, k, n // 8, dtype=torch.int32))
        self.hold(qzeros=integers(-(2**31), 2**31, k // GROUP, n // 8, dtype=torch.int32))
        self.hold(scales=scales(k // GROUP, n), shifts=torch.arange(0, 32, 4, dtype=torch.int32))
        order = torch.arange(n).view(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(-1)
        self.hold(order=order)

    def unpacked(self, words: torch.Tensor) -> torch.Tensor:
        codes = (words[:, :, None] >> self.shifts[None, None, :]).to(torch.int8).view(words.shape[0], -1)
        return codes[:, self.order] & 15

    def weight(self) -> torch.Tensor:
        codes, zeros = self.unpacked(self.qweight), self.unpacked(self.qzeros)
        scale, zero = (t.repeat_interleave(GROUP, dim=0) for t in (self.scales, zeros))
        return ((codes - zero) * scale).t()


class Static(PerChannel):
    """W8A8: int8 per channel, and x quantized with one scale."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear((x / 0.03).round().clamp(-128, 127).to(torch.int8).to(BF16) * 0.03)


class Dynamic(PerChannel):
    """W8A8: int8 per channel, and x quantized row by row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        return self.linear((x / scale).round().clamp(-128, 127).to(torch.int8).to(BF16) * scale)


def torchao_model(config: Callable[[], Any]) -> Callable[[int, int], nn.Module]:
    def build(n: int, k: int) -> nn.Module:
        from torchao.quantization import quantize_

        model = nn.Sequential(nn.Linear(k, n, bias=False, dtype=BF16))
        quantize_(model, config())
        return model

    return build


def _int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int8_groups() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup

    return Int8WeightOnlyConfig(granularity=PerGroup(GROUP))


def _int4_groups() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))


def _dynamic() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


class Int4Groups(Groups):
    """The same with codes of 4 bits."""

    low, high = -8, 8


SPELLINGS: dict[str, Callable[[int, int], nn.Module]] = {
    "int8 per channel, by hand": PerChannel,
    "int8 per channel, torchao": torchao_model(_int8),
    "int8 groups, by hand": Groups,
    "int8 groups, torchao": torchao_model(_int8_groups),
    "int4 groups in int8, by hand": Int4Groups,
    "int4 groups, torchao": torchao_model(_int4_groups),
    "int4 groups in bytes, by hand": Nibbles,
    "int4 groups, GPTQ": Gptq,
    "int4 groups, GPTQ, desc_act": GptqInOrder,
    "int4 groups, AWQ": Awq,
    "W8A8 static, by hand": Static,
    "W8A8 per token, by hand": Dynamic,
    "W8A8 per token, torchao": torchao_model(_dynamic),
}
LM_HEAD = "lm_head, int8 per channel"
"""For the CPU: the NPU's operators take no more than 65535 columns."""


def measure(name: str, n: int, k: int, repeats: int, target: str) -> dict[str, Any]:
    """One spelling, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    target = "cpu" if name == LM_HEAD else target
    build = SPELLINGS[name if name != LM_HEAD else "int8 per channel, by hand"]
    model, x = build(n, k).eval(), torch.randn(ROWS, k, dtype=BF16)
    runs, fuses, extra = [], [], 0
    with torch.no_grad():
        small = torch.randn(ROWS, 2 * GROUP, dtype=BF16)  # warms up: imports, caches
        _fused(torch.export.export(build(64, 2 * GROUP).eval(), (small,)).run_decompositions({}), target)
        model(x)
        for _ in range(repeats):
            program = torch.export.export(model, (x,)).run_decompositions({})
            runs.append(_seconds(lambda: model(x)))
            held = {t.untyped_storage().data_ptr() for t in _tensors(program)}
            before = _reset_peak()
            fuses.append(_seconds(partial(_fused, program, target)))
            peak = memory("VmHWM")
            prepared = sum(t.nbytes for t in _tensors(program) if t.untyped_storage().data_ptr() not in held)
            extra = max(extra, peak - before - prepared)
            runs.append(_seconds(lambda: model(x)))
    run, fuse = statistics.median(runs), statistics.median(fuses)
    spread = (max(fuses) - min(fuses)) / fuse
    return {
        "name": name,
        "n": n,
        "k": k,
        "run": run,
        "fuse": fuse,
        "ratio": fuse / run,
        "extra": extra,
        "spread": spread,
    }


SEVEN_BILLION = ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),)
"""``(N, K)`` of the Linears in a layer of Llama 2 7B, which has :data:`LAYERS` of these."""
LAYERS = 32


class Layer(nn.Module):
    """The Linears of one layer, side by side: what they are for does not matter to reading them."""

    def __init__(self, build: Callable[[int, int], nn.Module], shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.linears, self.inputs = nn.ModuleList(build(n, k) for n, k in shapes), [k for _, k in shapes]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(linear(x[:, :k]) for linear, k in zip(self.linears, self.inputs, strict=True))


def measure_model(name: str, layers: int, target: str, shapes: Sequence[tuple[int, int]] = SEVEN_BILLION) -> str:
    """``qp.fuse`` of ``layers`` layers, one after the other, each with random weights of its own in its own memory.

    What is timed is reading, proving, planning and preparing; making the weights and exporting a layer is not. A layer
    is let go before the next one is made, so that this runs where a whole model would not fit.
    """
    elapsed, spent, weights, sites, largest = 0.0, 0.0, 0, 0, 0
    with torch.no_grad():
        x = torch.randn(ROWS, max(k for _, k in shapes), dtype=BF16)
        for _ in range(layers):
            program = torch.export.export(Layer(SPELLINGS[name], shapes).eval(), (x,)).run_decompositions({})
            held = {t.untyped_storage().data_ptr() for t in _tensors(program)}
            before, start = _reset_peak(), (time.perf_counter(), time.process_time())
            report = qp.fuse(program, target=target, lowering="reference")
            elapsed += time.perf_counter() - start[0]
            spent += time.process_time() - start[1]
            prepared = sum(t.nbytes for t in _tensors(program) if t.untyped_storage().data_ptr() not in held)
            largest = max(largest, memory("VmHWM") - before - prepared)
            assert all(s.fused and s.proved for s in report.sites), str(report)
            sites, weights = sites + report.fused, weights + sum(n * k for n, k in shapes)
            print(f"{sites} Linears: {spent:.1f} s of CPU time, {elapsed:.1f} s", file=sys.stderr)
    whole = f"; {LAYERS} layers would be {spent * LAYERS / layers:.0f} s of CPU time" if layers != LAYERS else ""
    return (
        f"{name}: {sites} Linears with {weights / 1e9:.2f} billion weights in {layers} of {LAYERS} layers: "
        f"{spent:.1f} s of CPU time, {elapsed:.1f} s elapsed, {largest / 2**20:.0f} MiB beside its weights{whole}"
    )


def _fused(program: Any, target: str) -> None:
    report = qp.fuse(program, target=target, lowering="reference")
    (site,) = report.sites
    assert site.fused and site.proved, str(report)


def _seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _tensors(program: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for t in (*program.state_dict.values(), *program.constants.values()):
        if isinstance(t, torch.Tensor):
            names = t.__tensor_flatten__()[0] if hasattr(t, "__tensor_flatten__") else ()
            found.extend(getattr(t, name) for name in names) if names else found.append(t)
    return found


def _reset_peak() -> int:
    """Start a new peak of resident memory and return what is resident; Linux says so."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small weights, once: does it work?")
    parser.add_argument("--only", default="", help="only spellings whose name holds this")
    parser.add_argument("--model", choices=["7b"], help="the Linears of a whole model, by --spelling, in this process")
    parser.add_argument("--spelling", default="int4 groups, torchao", choices=SPELLINGS, help="for --model")
    parser.add_argument("--layers", type=int, default=LAYERS, help="for --model: only so many of its layers")
    parser.add_argument("--target", default="ascend910b")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS, metavar=("NAME", "N", "K", "REPEATS"))
    given = parser.parse_args()
    if given.one:
        name, n, k, repeats = given.one
        print(json.dumps(measure(name, int(n), int(k), int(repeats), given.target)))
        return
    if given.model:
        print(measure_model(given.spelling, given.layers, given.target))
        print(f"{machine()}, target {given.target}")
        return
    rows = []
    for name in [*SPELLINGS, LM_HEAD]:
        if given.only not in name:
            continue
        n, k = (128256, 8192) if name == LM_HEAD else (N, K)
        repeats = REPEATS if name != LM_HEAD else 2
        if given.quick:
            n, k, repeats = 256, 512, 1
            rows.append(measure(name, n, k, repeats, given.target))
            continue
        command = [
            sys.executable,
            "-m",
            "benchmarks.real_weights",
            "--target",
            given.target,
            "--one",
            name,
            str(n),
            str(k),
            str(repeats),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}:\n{done.stderr}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(_line(rows[-1]), file=sys.stderr)
    headers = ["spelling", "weight", "unfused run", "fuse", "fuse / run", "spread", "extra memory"]
    print(tabulate([_row(r) for r in rows], headers=headers, disable_numparse=True))
    print(f"\n{machine()}, target {given.target}")
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "target": given.target, "rows": rows}, indent=1))


def _row(r: dict[str, Any]) -> list[str]:
    return [
        r["name"],
        f"({r['n']}, {r['k']})",
        f"{r['run'] * 1e3:.0f} ms",
        f"{r['fuse'] * 1e3:.0f} ms",
        f"{r['ratio']:.1f}",
        f"{r['spread']:.0%}",
        f"{r['extra'] / 2**20:.0f} MiB",
    ]


def _line(r: dict[str, Any]) -> str:
    return "  ".join(_row(r))


if __name__ == "__main__":
    main()
