"""What a site reads of its weight each time that it runs, fused and not."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from quantpass.basics.tensor_spec import TensorSpec
from quantpass.chips.checking import OPERATORS
from quantpass.graph import expr as ex
from quantpass.graph.records import Plan, Weight, WeightUse
from quantpass.patterns.sites import Reading


def weight_use(reading: Reading, plan: Plan | None) -> WeightUse | None:
    """The bytes behind one site; None where its weight is not read, or is a matrix for each batch."""
    weight, c = reading.weight, reading.contraction
    if not isinstance(weight, Weight) or c is None or len(ex.shape_of(weight.codes)) != 2:
        return None
    given: torch.Tensor = c.rhs.meta["val"]
    floats = given.dtype.is_floating_point
    stored = _stored(plan)
    if stored is None:
        stored = _known(weight.k * weight.n)
    return WeightUse(
        _known(weight.k, -1),
        _known(weight.n, -1),
        stored,
        _known(weight.k * weight.n * given.dtype.itemsize) if floats else 0,
        str(given.dtype).removeprefix("torch.") if floats else "",
    )


def _stored(plan: Plan | None) -> int | None:
    """Bytes of the weight that the fused call takes."""
    spec = plan.call.get(OPERATORS[plan.op].weight) if plan is not None else None
    if not isinstance(spec, TensorSpec):
        return None
    return _known(prod(spec.shape) * spec.dtype.itemsize)


def _known(size: Any, otherwise: int = 0) -> int:
    """A size that may be symbolic, as a number."""
    return int(size) if isinstance(size, int) else otherwise
