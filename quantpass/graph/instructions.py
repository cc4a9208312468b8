"""What ATen's operators do to the elements of a tensor, in a handful of instructions.

A value is followed through a graph by what happens to its elements, and many operators do the same to them. Each is
decoded in one place (:mod:`quantpass.graph.decode`), with all of its arguments; whoever follows values (as codes and
scales, as integers between bounds, as steps after a matmul, as one number) interprets these few instructions.

What an instruction does not say is in the node's ``meta["val"]``: the shape, dtype and device of the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch.fx import Node

Operand: TypeAlias = Node | int | float


@dataclass(frozen=True, slots=True)
class Move:
    """The elements of ``source`` in another place, all of them and none changed.

    ``kind`` is ``"same"`` (element order and shape kept), ``"reshape"`` (row-major order kept), ``"permute"``
    (``order`` says which source dimension each result dimension is) or ``"expand"`` (size-1 dimensions repeated).
    ``sizes`` is the new shape where the operator was given one.
    """

    kind: Literal["same", "reshape", "permute", "expand"]
    source: Node
    order: tuple[int, ...] = ()
    sizes: tuple[Operand, ...] | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the elements of ``source``."""

    source: Operand


@dataclass(frozen=True, slots=True)
class Multiply:
    """``source * other``, or ``source / other`` where ``inverted``."""

    source: Operand
    other: Operand
    inverted: bool = False


@dataclass(frozen=True, slots=True)
class Add:
    """``source + multiple * other``."""

    source: Operand
    other: Operand
    multiple: int | float = 1


@dataclass(frozen=True, slots=True)
class Cast:
    """``source`` in another dtype, on another device, or just copied; dtype None keeps it."""

    source: Operand
    dtype: torch.dtype | None


@dataclass(frozen=True, slots=True)
class Clamp:
    """``source`` between ``low`` and ``high``; with ``exchangeable`` the one bound there is clamped just the same."""

    source: Operand
    low: Operand | None
    high: Operand | None
    exchangeable: bool = False


@dataclass(frozen=True, slots=True)
class Round:
    """``source`` rounded to an integer: the nearest (of two the even one), or the next one in a direction."""

    source: Operand
    to: Literal["nearest", "down", "up", "zero"]


Instruction: TypeAlias = Move | Part | Multiply | Add | Cast | Clamp | Round


def ways(instruction: Instruction) -> tuple[Instruction, ...]:
    """``instruction``, and what it is with its operands exchanged where that computes the same."""
    match instruction:
        case Multiply(a, b, inverted=False):
            return instruction, Multiply(b, a)
        case Add(a, b, 1):
            return instruction, Add(b, a)
        case Clamp(a, None, b, exchangeable=True) if b is not None:
            return instruction, Clamp(b, None, a)
        case Clamp(a, b, None, exchangeable=True) if b is not None:
            return instruction, Clamp(b, a, None)
    return (instruction,)
