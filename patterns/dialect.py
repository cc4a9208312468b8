"""A dialect: one tool's own operators, and how to read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantpass.graph.schema import Reader

Readers = Mapping[Any, Reader]
"""Operator (an overload, or its name such as ``"quanto::qbytes_mm"``) to reader. A reader's keyword parameters are all
arguments of the operator's schema, ``input`` written as ``input_``."""


@dataclass(frozen=True, slots=True, eq=False)
class Dialect:
    """What a tool adds to plain ATen.

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
    """

    name: str
    dequantizers: Readers = field(default_factory=dict)
    recentre: Readers = field(default_factory=dict)
    integers: Readers = field(default_factory=dict)
    contractions: Readers = field(default_factory=dict)
    steps: Readers = field(default_factory=dict)
