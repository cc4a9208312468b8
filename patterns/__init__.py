"""How graphs spell things: tables of operator readers, gathered in one object.

A dialect of a tool is a flat file beside this one with a function ``dialect()`` that returns a
:class:`~quantpass.patterns.dialect.Dialect`; :data:`KNOWN` lists them. Nothing is registered by importing a module.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from quantpass.graph.schema import ReaderTable
from quantpass.patterns import (
    arithmetic,
    ascend,
    aten_packed,
    bitsandbytes,
    contractions,
    epilogues,
    fake_quantize,
    integers,
    movement,
    quantized_decomposed,
    quanto,
    quark,
    torchao_affine,
)
from quantpass.patterns.dialect import Dialect

__all__ = ["Dialect", "Dialects", "default_dialects"]

KNOWN = (
    aten_packed.dialect,
    fake_quantize.dialect,
    quantized_decomposed.dialect,
    torchao_affine.dialect,
    quanto.dialect,
    quark.dialect,
    bitsandbytes.dialect,
    ascend.dialect,
)
"""The tools that quantpass knows."""


@dataclass(frozen=True, slots=True)
class Dialects:
    """Every table that reading a graph uses.

    Attributes:
        movements: views, transposes, copies.
        integers: what bounds integer-valued nodes.
        arithmetic: what dequantizations are spelled with.
        dequantizers: named operators that return a dequantized value.
        recentre: named quantize operators that can give int8 codes instead of uint8 ones.
        contractions: matmuls.
        steps: what follows a matmul.
    """

    movements: ReaderTable
    integers: ReaderTable
    arithmetic: ReaderTable
    dequantizers: ReaderTable
    recentre: ReaderTable
    contractions: ReaderTable
    steps: ReaderTable

    @property
    def tables(self) -> tuple[ReaderTable, ...]:
        """All of them."""
        return (
            *(self.movements, self.integers, self.arithmetic, self.dequantizers, self.recentre),
            *(self.contractions, self.steps),
        )


@cache
def default_dialects(more: tuple[Dialect, ...] = ()) -> Dialects:
    """Plain ATen, the dialects that quantpass knows, and ``more``.

    Raises:
        ValueError: two dialects read the same operator.
        TypeError: a reader does not name every argument of its operator.
    """
    dialects = [*(dialect() for dialect in KNOWN), *more]
    return Dialects(
        movements=movement.movement_table(),
        integers=integers.bounds_table().merged(*(d.integers for d in dialects)),
        arithmetic=arithmetic.arithmetic_table(),
        dequantizers=ReaderTable({}, leading=2).merged(*(d.dequantizers for d in dialects)),
        recentre=ReaderTable({}, leading=1).merged(*(d.recentre for d in dialects)),
        contractions=ReaderTable(contractions.contractions(), leading=1).merged(*(d.contractions for d in dialects)),
        steps=epilogues.arithmetic_steps().merged(*(d.steps for d in dialects)),
    )
