"""How graphs spell things: tables of operator readers, gathered in one object.

A dialect of a tool is a flat file beside this one with a function or two that return readers; :func:`default_dialects`
lists them. Nothing is registered by importing a module.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from quantpass.patterns import affine, contractions, epilogues, integers, movement, quantized_decomposed

from quantpass.schema import ReaderTable


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


@cache
def default_dialects() -> Dialects:
    """The dialects that quantpass knows."""
    return Dialects(
        movements=movement.movement_table(),
        integers=integers.bounds_table(),
        arithmetic=affine.arithmetic_table(),
        dequantizers=ReaderTable(quantized_decomposed.dequantizers(), leading=2),
        recentre=ReaderTable(quantized_decomposed.recentre(), leading=1),
        contractions=contractions.contraction_table(),
        steps=epilogues.arithmetic_steps().merged(quantized_decomposed.quantize_steps()),
    )
