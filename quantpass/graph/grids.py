"""Tensors that are constant along parts of their dimensions, without the copies that broadcasting would make.

A scale of ``(N, groups, 1)`` that meets codes of ``(N, groups, g)`` and is then viewed as ``(N, K)`` stays one number a
group: a dimension is a list of parts, and along some of them nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Parts = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """A value of shape ``[prod(p) for p in parts]``.

    Attributes:
        tensor: a dimension for each part of each dimension, of size 1 where the value does not vary along it.
        parts: sizes of the parts of each dimension, outer first; ``(1,)`` for a dimension of size 1.
    """

    tensor: torch.Tensor
    parts: tuple[Parts, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(p) for p in self.parts)

    def dense(self) -> torch.Tensor:
        """The value with every element of its own."""
        return self.tensor.expand([size for p in self.parts for size in p]).reshape(self.shape)

    def permuted(self, order: Sequence[int]) -> Grid:
        """The value with its dimensions in another order."""
        starts, at = [], 0
        for p in self.parts:
            starts.append(range(at, at + len(p)))
            at += len(p)
        return Grid(self.tensor.permute([i for d in order for i in starts[d]]), tuple(self.parts[d] for d in order))

    def expanded(self, shape: Sequence[int]) -> Grid:
        """The value repeated along dimensions of size 1, and along new leading ones."""
        new = len(shape) - len(self.parts)
        sizes = [1] * new + [*self.tensor.shape]
        parts = tuple((size,) for size in shape[:new])
        own = tuple(p if math.prod(p) == size else (size,) for p, size in zip(self.parts, shape[new:], strict=True))
        return Grid(self.tensor.reshape(sizes), parts + own)

    def reshaped(self, shape: Sequence[int]) -> Grid:
        """The value in another shape, row-major order kept."""
        own = [(size, held) for size, held in zip(self._sizes(), self.tensor.shape, strict=True) if size > 1]
        cuts = _refined([*_strides([size for size, _ in own]), *_strides(shape)], math.prod(shape))
        if cuts is None:
            return dense(self.dense().reshape(tuple(shape)))
        sizes = list(cuts)
        held: list[int] = []
        parts: list[Parts] = []
        for size, has in own:
            held.extend(1 if has == 1 else s for s in _taken(sizes, size))
        lay: list[int] = []
        sizes, kept = list(cuts), iter(held)
        for size in shape:
            part = tuple(_taken(sizes, size)) or (1,)
            parts.append(part)
            lay.extend([1] if size == 1 else [next(kept) for _ in part])
        return Grid(self.tensor.reshape(lay), tuple(parts))

    def _sizes(self) -> list[int]:
        return [size for p in self.parts for size in p]


def dense(tensor: torch.Tensor) -> Grid:
    """A tensor as it is."""
    return Grid(tensor, tuple((size,) for size in tensor.shape))


def constant(tensor: torch.Tensor, shape: Sequence[int]) -> Grid:
    """One number everywhere."""
    return Grid(tensor.reshape((1,) * len(shape)), tuple((size,) for size in shape))


def pointwise(call: Callable[[list[torch.Tensor]], torch.Tensor], grids: Sequence[Grid]) -> Grid:
    """``call``, which computes each element from those in the same place, with broadcasting.

    ``call`` is given the operands' tensors, of one rank.
    """
    rank = max((len(g.parts) for g in grids), default=0)
    parts: list[Parts] = []
    for d in range(-rank, 0):
        there = [g.parts[d] for g in grids if len(g.parts) >= -d and g.parts[d] != (1,)]
        found = _common(there)
        if found is None:
            return pointwise(call, [dense(g.dense()) for g in grids])
        parts.append(found)
    result = call([_split(g, parts) for g in grids])
    return Grid(result, tuple(parts))


def _common(there: list[Parts]) -> Parts | None:
    if not there:
        return (1,)
    if all(p == there[0] for p in there):
        return there[0]
    found = _refined([s for p in there for s in _strides(p)], math.prod(there[0]))
    return None if found is None else tuple(found)


def _split(grid: Grid, parts: list[Parts]) -> torch.Tensor:
    """The tensor of ``grid`` with the dimensions of ``parts``."""
    if list(grid.parts) == parts or not grid.parts:
        return grid.tensor  # a tensor without dimensions stays one: dtypes are promoted otherwise with it
    sizes: list[int] = []
    new, at = len(parts) - len(grid.parts), 0
    for d, part in enumerate(parts):
        if d < new:
            sizes.extend([1] * len(part))
            continue
        own = grid.parts[d - new]
        held = grid.tensor.shape[at : at + len(own)]
        at += len(own)
        if own == (1,):
            sizes.extend([1] * len(part))
            continue
        rest = list(part)
        for size, has in zip(own, held, strict=True):
            sizes.extend(1 if has == 1 else s for s in _taken(rest, size))
    return grid.tensor.reshape(sizes)


def _strides(sizes: Sequence[int]) -> list[int]:
    """How many elements one step along each dimension skips."""
    found, stride = [], 1
    for size in reversed(sizes):
        found.append(stride)
        stride *= size
    return found


def _refined(strides: Sequence[int], total: int) -> list[int] | None:
    """The sizes of the coarsest parts, greater than one, that all steps are steps of; None where there are none."""
    sizes, before = [], total
    for stride in sorted({s for s in strides if s < total} | {1}, reverse=True):
        if before % stride:
            return None
        if before != stride:
            sizes.append(before // stride)
        before = stride
    return sizes


def _taken(sizes: list[int], total: int) -> list[int]:
    """Take from the front of ``sizes`` what makes up ``total``."""
    found, product = [], 1
    while product < total:
        found.append(sizes.pop(0))
        product *= found[-1]
    return found
