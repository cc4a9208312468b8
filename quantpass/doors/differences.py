"""How far one value is from another: in the units of its own dtype, as a signal, and where it saturates."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from quantpass.graph.records import Numerics

EDGES = (0.0, 0.5, 1.0, 2.0, 4.0, 16.0)
"""Ends of the histogram's bins, in units; one more bin holds what is above them."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a fused value is from the graph's.

    Attributes:
        name: the site, or ``output 0`` for a result of the model.
        numerics: the site's contract; None for a result.
        largest: largest absolute difference; for integer values in steps of one code.
        relative: ``largest`` over the largest magnitude of the graph's value.
        cosine: cosine similarity of the two values, flattened.
        mean: mean absolute difference.
        units: largest difference in units of the last place of the graph's value (of its mean magnitude, where that is
            larger: a sum that cancels has no more digits than its terms); for integers in codes.
        mean_units: the mean, likewise.
        sqnr: ``10 log10(sum graph^2 / sum (fused - graph)^2)``, in dB; infinite where nothing differs.
        histogram: how many elements differ by 0 units, and up to 0.5, 1, 2, 4, 16, and by more.
        saturated: the share of the fused elements at either end of an integer dtype, or infinite.
    """

    name: str
    numerics: Numerics | None
    largest: float
    relative: float
    cosine: float
    mean: float = 0.0
    units: float = 0.0
    mean_units: float = 0.0
    sqnr: float = math.inf
    histogram: tuple[int, ...] = ()
    saturated: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data; what is not finite is None."""
        data = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}
        return {**data, "numerics": None if self.numerics is None else str(self.numerics)}


def difference(name: str, numerics: Numerics | None, ours: torch.Tensor, theirs: torch.Tensor) -> Difference:
    """How far ``ours`` is from ``theirs``, both of one shape."""
    a, b = ours.double().flatten(), theirs.double().flatten()
    if not a.numel():
        return Difference(name, numerics, 0.0, 0.0, 1.0)
    same = (a == b) | (a.isnan() & b.isnan())  # equal infinities are no difference
    apart = torch.where(same, 0.0, (a - b).abs())
    finite = b[b.isfinite()].abs()
    largest, scale = float(apart.max()), float(finite.max()) if finite.numel() else 0.0
    relative = 0.0 if largest == 0 else largest / scale if scale else float("inf")
    cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0)) if largest else 1.0
    units = apart / _last_place(b, finite, theirs.dtype)
    return Difference(
        name,
        numerics,
        largest,
        relative,
        cosine,
        mean=float(apart.mean()),
        units=float(units.max()),
        mean_units=float(units.mean()),
        sqnr=_sqnr(b, apart),
        histogram=_histogram(units),
        saturated=_saturated(ours),
    )


def _last_place(value: torch.Tensor, finite: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the last bit of each element stands for, in ``dtype``."""
    if not dtype.is_floating_point:
        return torch.ones_like(value)
    info = torch.finfo(dtype)
    typical = float(finite.mean()) if finite.numel() else 0.0
    size = torch.where(value.isfinite(), value.abs(), typical).clamp(min=max(typical, info.smallest_normal))
    return info.eps * torch.exp2(torch.floor(torch.log2(size)))


def _sqnr(value: torch.Tensor, apart: torch.Tensor) -> float:
    noise, signal = float(apart.square().sum()), float(value.square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(noise) else -math.inf


def _histogram(units: torch.Tensor) -> tuple[int, ...]:
    bins = torch.bucketize(units, torch.tensor(EDGES, dtype=units.dtype))
    return tuple(torch.bincount(bins, minlength=len(EDGES) + 1).tolist())


def _saturated(value: torch.Tensor) -> float:
    if value.dtype.is_floating_point:
        return float(value.isinf().double().mean())
    info = torch.iinfo(value.dtype)
    return float(((value == info.min) | (value == info.max)).double().mean())
