"""Factors along K in front of a quantization (SmoothQuant), which the operators take in."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch.fx import Node

from quantpass.basics.symbolic import same_shape
from quantpass.graph import expr as ex
from quantpass.graph.expr import Const
from quantpass.graph.instructions import Multiply, ways
from quantpass.patterns.activations import ActivationReader, Quantization, may_round
from quantpass.patterns.steps import Operand, dtype_of, shape_of, step_of


def smoothed(activations: ActivationReader, q: Quantization) -> Quantization | None:
    """A quantization of what a known factor along K was taken of; None where there is none."""
    step = step_of(activations.reader, q.x)
    if not isinstance(step, Multiply) or q.smooth is not None:
        return None
    shape = shape_of(q.x)
    for way in ways(step):
        assert isinstance(way, Multiply)
        inside = same_shape(shape_of(way.source), shape)
        rate = activations.rate(way.other, shape, inverted=step.inverted) if inside else None
        x = activations.magnitudes.origin(way.source)
        if not isinstance(rate, Const) or rate.tensor.numel() != shape[-1] or x is None:
            continue
        if not dtype_of(x).is_floating_point:
            continue
        found = _smoothed_rows(q, x, rate) if q.rate is None else _smoothed_rate(q, x, rate, way.other)
        if found is not None:
            return found
    return None


def _smoothed_rows(q: Quantization, x: Node, rate: Const) -> Quantization | None:
    """A dynamic quantization with its factor. The graph rounds each product, the operator takes the factor in the dtype
    of x: both move the scale, too.
    """
    m, own = q.magnitude, torch.finfo(dtype_of(q.x))
    assert m is not None
    smooth = rate.tensor.to(dtype_of(x))
    if not bool((smooth.abs() >= torch.finfo(dtype_of(x)).tiny).all()):
        return None
    moved = own.eps / 2 + float((smooth.double() / rate.tensor - 1).abs().max())
    if not math.isfinite(moved):
        return None
    lost = m.lost + own.smallest_normal * own.eps / 2
    error = q.error + 2 * q.divisor * moved
    return replace(q, x=x, error=error, magnitude=replace(m, lost=lost), smooth=Const(smooth))


def _smoothed_rate(q: Quantization, x: Node, rate: Const, factor: Operand) -> Quantization | None:
    """A static quantization with its factor in the rate. The graph rounds each product, and maybe the factor first."""
    assert isinstance(q.rate, Const)
    own, largest = torch.finfo(dtype_of(q.x)), max(127 - q.zero_point, 128 + q.zero_point)
    both = ex.mul(q.rate, rate)
    if not isinstance(both, Const) or not bool(torch.isfinite(both.tensor).all()):
        return None
    roundings = 2 if may_round(factor, dtype_of(q.x)) else 1
    lost = float(q.rate.tensor.abs().max()) * own.smallest_normal * own.eps / 2
    return replace(q, x=x, rate=both, error=q.error + roundings * largest * own.eps / 2 + lost)
