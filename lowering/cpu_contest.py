"""Which product is fastest here: measured once for each shape, and remembered in a file.

What is measured is the quickest of a few interleaved runs on the weight itself: other work only ever adds time. The
answer depends on the processor, the number of threads and PyTorch's version, which it is remembered by.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from quantpass.basics.user_cache import user_cache
from quantpass.lowering.cpu_products import INTEGER_PRODUCTS, Product, StaticWeight, Tensors

logger = logging.getLogger("quantpass")

_ROUNDS = 8
_TRIALS = 3
_HOPELESS = 3.0
"""A product this much slower than the best in its first trials runs no more."""

_UNKNOWN_ROWS = (1, 16, 128)
"""What is measured where M is known at run time only; the best geometric mean wins."""

_TINY = 1 << 14
"""For a weight of this many elements the first product is taken: what others would gain is less than a call costs."""

_MEMORY_FOR_ONE = 1 / 16
"""A weight is dequantized once only where this share of the memory that is left holds the result."""

_BUSY = "|busy"
"""Marks what was measured while other work ran: it holds as long as that does, then it is measured anew."""

_FAR = 2.0**-6
"""A floating product whose cosine distance to the first one's is larger is not the same product."""


def fastest(
    products: Sequence[Product], weight: StaticWeight, shape: tuple[int, int], dtype: torch.dtype, m: int | None
) -> tuple[Product, Tensors] | None:
    """The fastest of ``products`` for x of ``(m, K)`` in ``dtype``, with what it prepared; None where none takes it.

    Args:
        products: the first is what the others are compared with.
        weight: the weight to multiply by.
        shape: its ``(K, N)``.
        dtype: that of x.
        m: rows of x; None where they are known at run time only.
    """
    k, n = shape
    dense = 4 * k * n <= _MEMORY_FOR_ONE * available_memory()
    able = [p for p in products if p.takes(weight, dtype) and (p not in INTEGER_PRODUCTS or is_exact(p.name))]
    able = [p for p in able if dense or not p.dense]
    if not able:
        return None
    if k * n <= _TINY:
        return able[0], able[0].prepare(weight, dtype)
    key, busy, remembered = _key(able, shape, dtype, m), _is_busy(), _remembered()
    name = remembered.get(key) or (remembered.get(key + _BUSY, "") if busy else "")
    known = {p.name: p for p in able}.get(name)
    if known is None and len(able) > 1:
        best, prepared = _measured(able, weight, k, dtype, (m,) if m is not None else _UNKNOWN_ROWS)
        _remember(key + _BUSY if busy else key, best.name)
        return best, prepared
    chosen = known or able[0]
    return chosen, chosen.prepare(weight, dtype)


@cache
def is_exact(name: str) -> bool:
    """Whether an integer product gives the exact sums on this processor.

    Some add pairs of products in 16 bits, and saturate: extreme codes show it.
    """
    (product,) = (p for p in INTEGER_PRODUCTS if p.name == name)
    signs = torch.where(torch.arange(64 * 64).reshape(64, 64) % 3 == 0, 127, -128).to(torch.int8)
    worst, best = torch.full((64, 64), -128, dtype=torch.int8), torch.full((64, 64), 127, dtype=torch.int8)
    for codes in (signs, worst, best):
        prepared = product.prepare(StaticWeight(codes, False), torch.int8)
        for x in (signs, worst, best):
            if not torch.equal(product.run(x, *prepared).double(), x.double() @ codes.double()):
                return False
    return True


def _measured(
    products: Sequence[Product], weight: StaticWeight, k: int, dtype: torch.dtype, rows: tuple[int, ...]
) -> tuple[Product, Tensors]:
    inputs = [_activations(m, k, dtype) for m in rows]
    kept: list[tuple[Product, Tensors, list[list[float]]]] = []
    first: torch.Tensor | None = None
    for product in products:
        prepared = product.prepare(weight, dtype)
        result = product.run(inputs[0], *prepared).double()  # also warms up
        if weight.bias is not None and not product.adds_bias:
            result += weight.bias.double().reshape(-1)
        first = result if first is None else first
        if not _same(result, first, exact=dtype == torch.int8):
            logger.warning(
                "the CPU product %r is not used: its sums are not those of %r", product.name, products[0].name
            )
            continue
        times = [[_time(product, x, prepared) for _ in range(_TRIALS)] for x in inputs]
        kept.append((product, prepared, times))
        floor = min(_mean(t) for _, _, t in kept)
        kept = [c for c in kept if _mean(c[2]) <= _HOPELESS * floor]
    for _ in range(_ROUNDS - _TRIALS):
        for product, prepared, times in kept:
            for x, taken in zip(inputs, times, strict=True):
                taken.append(_time(product, x, prepared))
    best, prepared, _ = min(kept, key=lambda c: _mean(c[2]))
    return best, prepared


def _activations(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.int8:
        return torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
    return torch.randn(m, k, generator=generator).to(dtype)


def _same(a: torch.Tensor, b: torch.Tensor, *, exact: bool) -> bool:
    if exact:
        return torch.equal(a, b.to(torch.float32).double()) or torch.equal(a, b)
    finite = a.isfinite() & b.isfinite()  # where one dtype overflows, another may not
    a, b = a[finite], b[finite]
    size = float(a.norm() * b.norm())
    return size == 0 or float((a * b).sum()) / size > 1 - _FAR


def _time(product: Product, x: torch.Tensor, prepared: Tensors) -> float:
    start = time.perf_counter()
    product.run(x, *prepared)
    return time.perf_counter() - start


def _mean(times: Sequence[Sequence[float]]) -> float:
    """Geometric mean over shapes of the quickest run of each."""
    return math.exp(statistics.fmean(math.log(max(min(t), 1e-9)) for t in times))


def _key(products: Sequence[Product], shape: tuple[int, int], dtype: torch.dtype, m: int | None) -> str:
    what = (*shape, str(dtype), "any" if m is None else _bucket(m), *(p.name for p in products))
    return "|".join(map(str, (*_here(), torch.get_num_threads(), *what)))


def _is_busy() -> bool:
    """True where more work wants to run than there are processors: whichever product is slowed down most, loses."""
    with suppress(OSError, AttributeError):  # a system that does not say
        return os.getloadavg()[0] > (os.cpu_count() or 1)
    return False


def _bucket(m: int) -> int:
    """M up to the next power of two: the same product wins for shapes that are alike."""
    return 1 << max(m - 1, 0).bit_length()


@cache
def _here() -> tuple[str, ...]:
    model = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return torch.__version__, model or platform.processor(), torch.backends.cpu.get_cpu_capability()


def available_memory() -> float:
    """Bytes that can be had without swapping; infinite where the system doesn't say."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    return math.inf


def _file() -> Path:
    return user_cache() / "cpu-products.json"


def _remembered() -> dict[str, str]:
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(key: str, name: str) -> None:
    """Add an answer; where the folder can't be written, the next process measures again."""
    path = _file()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = json.dumps({**_remembered(), key: name}, indent=0, sort_keys=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(whole)
        beside.replace(path)
