"""How graphs spell things: tables of operator readers, gathered in one object.

A dialect of a tool is a flat file beside this one with a function ``dialect()`` that returns a
:class:`~quantpass.patterns.dialect.Dialect`; :data:`KNOWN` lists them. Nothing is registered by importing a module.
"""

from __future__ import annotations

from functools import cache

from quantpass.graph.schema import ReaderTable
from quantpass.patterns import (
    ascend,
    aten_packed,
    bitsandbytes,
    contractions,
    fake_quantize,
    quantized_decomposed,
    quanto,
    quark,
    torchao_affine,
)
from quantpass.patterns.contractions import Contraction, NoContraction, Own
from quantpass.patterns.dialect import Dialect, Dialects, R, Readers

__all__ = ["Contraction", "Dialect", "Dialects", "NoContraction", "Own", "default_dialects"]

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


@cache
def default_dialects(more: tuple[Dialect, ...] = ()) -> Dialects:
    """Plain ATen, the dialects that quantpass knows, and ``more``.

    Raises:
        ValueError: two dialects read the same operator.
        TypeError: a reader does not name every argument of its operator.
    """
    dialects = [*(dialect() for dialect in KNOWN), *more]
    return Dialects(
        dequantizers=_table(2, *(d.dequantizers for d in dialects)),
        recentre=_table(1, *(d.recentre for d in dialects)),
        integers=_table(2, *(d.integers for d in dialects)),
        contractions=_table(1, contractions.contractions(), *(d.contractions for d in dialects)),
        steps=_table(3, *(d.steps for d in dialects)),
        quantizers=_table(0, *(d.quantizers for d in dialects)),
        scales=_table(0, *(d.scales for d in dialects)),
        quantized_rows=_table(1, *(d.quantized_rows for d in dialects)),
        rows=_table(2, *(d.rows for d in dialects)),
    )


def _table(leading: int, *readers: Readers[R]) -> ReaderTable[R]:
    return ReaderTable[R]({}, leading).merged(*readers)
