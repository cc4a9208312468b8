"""A dialect: one tool's own operators, and how to read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from quantpass.graph.decode import decoders
from quantpass.graph.schema import ReaderTable

if TYPE_CHECKING:
    from quantpass.graph.expr import Recentred
    from quantpass.graph.row_rules import Formula, Needs
    from quantpass.patterns.activations import Quantizer
    from quantpass.patterns.affine import Affine, NotAffine
    from quantpass.patterns.contractions import Contraction, NoContraction
    from quantpass.patterns.epilogues import Step
    from quantpass.patterns.integers import Bounds
    from quantpass.patterns.magnitudes import ChosenScale, QuantizedRows

R = TypeVar("R")

Readers: TypeAlias = Mapping[Any, Callable[..., R]]
"""Operator (an overload, or its name such as ``"quanto::qbytes_mm"``) to reader. A reader's keyword parameters are all
arguments of the operator's schema, ``input`` written as ``input_``."""


@dataclass(frozen=True, slots=True, eq=False)
class Dialect:
    """What a tool adds to plain ATen; of an operator that both read, the tool's reader is asked.

    Attributes:
        name: the tool.
        dequantizers: operators that return ``scale * (codes - zero_point)``. Readers take
            ``(reader, node, **arguments)`` with an :class:`~quantpass.patterns.affine.AffineReader` and return an
            ``Affine`` or ``NotAffine``. Of an operator with several results the first one is read.
        recentre: quantize operators that can give int8 codes instead of uint8 ones. Readers take
            ``(node, **arguments)`` and return a :class:`~quantpass.graph.expr.Recentred` or None.
        integers: operators that return bounded integers. Readers take ``(reader, node, **arguments)`` with an
            :class:`~quantpass.patterns.integers.IntegerReader` and return ``Bounds`` or None.
        contractions: matmuls. Readers take ``(node, **arguments)`` and return a
            :class:`~quantpass.patterns.contractions.Contraction` or ``NoContraction``.
        steps: what can follow a matmul. Readers take ``(reader, value, node, **arguments)`` and return a
            :class:`~quantpass.patterns.epilogues.Step` or None.
        quantizers: operators that quantize a tensor. Readers take ``(**arguments)`` and return a
            :class:`~quantpass.patterns.activations.Quantizer` or None.
        scales: operators that choose a scale and a zero point for a tensor. Readers take ``(**arguments)`` and return
            a :class:`~quantpass.patterns.magnitudes.ChosenScale` or None.
        quantized_rows: operators that find a scale for each row and quantize by it: the first result is the codes, the
            second the scales. Readers take ``(node, **arguments)`` and return a
            :class:`~quantpass.patterns.magnitudes.QuantizedRows` or None.
        rows: what operators do to rows, so that large weights are read in blocks. Readers take
            ``(node, dim, **arguments)``, with the dimension of the result along which rows lie, and return for each
            operand along which of its dimensions they lie (None: it is needed whole), or None for "may mix rows"; or a
            :class:`~quantpass.graph.row_rules.Formula`, which also says what the operator computes.
    """

    name: str
    dequantizers: Readers[Affine | NotAffine] = field(default_factory=dict)
    recentre: Readers[Recentred | None] = field(default_factory=dict)
    integers: Readers[Bounds | None] = field(default_factory=dict)
    contractions: Readers[Contraction | NoContraction | None] = field(default_factory=dict)
    steps: Readers[Step | None] = field(default_factory=dict)
    quantizers: Readers[Quantizer | None] = field(default_factory=dict)
    scales: Readers[ChosenScale | None] = field(default_factory=dict)
    quantized_rows: Readers[QuantizedRows | None] = field(default_factory=dict)
    rows: Readers[Needs | Formula | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Dialects:
    """Every table that reading a graph uses, beside the decoders of plain ATen (:mod:`quantpass.graph.decode`).

    Attributes: those of :class:`Dialect`, of all tools together; ``contractions`` with ATen's.
    """

    dequantizers: ReaderTable[Affine | NotAffine]
    recentre: ReaderTable[Recentred | None]
    integers: ReaderTable[Bounds | None]
    contractions: ReaderTable[Contraction | NoContraction | None]
    steps: ReaderTable[Step | None]
    quantizers: ReaderTable[Quantizer | None]
    scales: ReaderTable[ChosenScale | None]
    quantized_rows: ReaderTable[QuantizedRows | None]
    rows: ReaderTable[Needs | Formula | None]

    def make_codes(self, target: Any) -> bool:
        """True for a tool's operator that returns integers, their scales, or a dequantized value."""
        values = (self.dequantizers, self.integers, self.recentre)
        tables = (*values, self.quantizers, self.scales, self.quantized_rows)
        return any(table.get(target) is not None for table in tables)

    def know(self, target: Any) -> bool:
        """True for an operator that something is known of."""
        named = (self.dequantizers, self.recentre, self.integers, self.contractions, self.steps)
        tables = (*named, self.quantizers, self.scales, self.quantized_rows, decoders())
        return any(table.get(target) is not None for table in tables)
