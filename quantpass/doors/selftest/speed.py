"""How long a quantized linear takes as it is, and fused: a few shapes, the same compiler before and after."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from quantpass.doors.backend import backend
from quantpass.doors.npu import npu_backend

ON_DEVICE = ((1, 4096, 4096), (16, 4096, 4096), (256, 4096, 4096), (1, 4096, 11008))
HERE = ((1, 128, 128), (16, 128, 128))
_RUNS, _WARM = 20, 3


@dataclass(frozen=True, slots=True)
class Time:
    """One shape.

    Attributes:
        model: how it is quantized.
        m, k, n: rows, inputs and outputs.
        before: milliseconds of one run as the model is, median; None where it failed.
        after: fused.
        said: what was raised.
    """

    model: str
    m: int
    k: int
    n: int
    before: float | None
    after: float | None
    said: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class _WeightOnly(torch.nn.Module):
    name = "int8 weight-only"

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        self.codes = torch.nn.Parameter(codes, requires_grad=False)
        self.scale = torch.nn.Parameter((torch.rand(n, 1) * 1e-3).half(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.codes.to(x.dtype) * self.scale)


class _Static(_WeightOnly):
    name = "int8 static activations"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = (x * 32).round().clamp(-128, 127)
        return super().forward((codes.to(torch.int8).to(x.dtype)) / 32)


def times(chip: str, device: str) -> Iterator[Time]:
    """Time each shape; on a device compiled by torchair both times, else eager and with quantpass's CPU kernels."""
    for kind in (_WeightOnly, _Static):
        for m, k, n in ON_DEVICE if device == "npu" else HERE:
            try:
                before, after = _timed(kind(k, n).eval().to(device), torch.randn(m, k).half().to(device), chip, device)
            except Exception as error:
                yield Time(kind.name, m, k, n, None, None, f"{type(error).__name__}: {error}"[:500])
            else:
                yield Time(kind.name, m, k, n, before, after)


def _timed(model: torch.nn.Module, x: torch.Tensor, chip: str, device: str) -> tuple[float, float]:
    plain: Callable[..., Any] = model
    fused: Any = backend(target=chip, compare_weights="identity")
    if device == "npu":
        import torchair

        plain = torch.compile(model, backend=torchair.get_npu_backend(), dynamic=False)
        fused = npu_backend(target=chip)
    with torch.no_grad():
        before = _median(lambda: plain(x), device)
        torch.compiler.reset()
        compiled = torch.compile(model, backend=fused, dynamic=False)
        return before, _median(lambda: compiled(x), device)


def _median(run: Callable[[], Any], device: str) -> float:
    wait = getattr(torch, device).synchronize
    found = []
    for _ in range(_WARM + _RUNS):
        started = time.perf_counter()
        run()
        wait()
        found.append(1000 * (time.perf_counter() - started))
    return round(statistics.median(found[_WARM:]), 4)
