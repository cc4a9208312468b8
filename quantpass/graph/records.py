"""The records that travel through the pass.

One convention holds everywhere: ``real = (codes - zero_point) * scale``. The vendor's own conventions differ
from operator to operator; they are applied in :mod:`quantpass.planning.conventions` and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from quantpass.basics.reject import Reject

if TYPE_CHECKING:
    from torch.fx import Node

    from quantpass.graph.expr import Expr


@dataclass(frozen=True, slots=True)
class Numerics:
    """How far a fused site may be from what the graph says.

    ``exact``: every parameter reaches the operator unaltered, except for the operator's own formats (the FP19 scale
    word); what remains is the operator's own arithmetic and the rounding of the output dtype.
    ``bounded``: a parameter had to be rounded on the way; ``why`` names each change.

    With ``S = sum_k |x_k * w_kn| + |bias_n|`` and ``graph`` = the graph's formula in exact arithmetic on the same
    codes, ``|fused - graph| <= relative * S + of_x * sum_k |x_k| + absolute + half a unit of the output dtype``. For an
    int8 output the bound is on the codes, before rounding to the nearest.

    ``of_x`` is there where a weight's zero point was rounded, or the weight re-fitted: weights near zero change by as
    much as the others.

    Where an operator quantizes x by its own rule, ``(of_step * step + of_w) * sum_k |w_kn|`` is added to the bound,
    with ``step`` what one code of x stands for in the graph (in its row), and S that of the graph's codes.
    """

    kind: str
    relative: float = 0.0
    absolute: float = 0.0
    why: tuple[str, ...] = ()
    of_x: float = 0.0
    of_step: float = 0.0
    of_w: float = 0.0

    def __str__(self) -> str:
        if self.kind == "exact":
            return "exact"
        return f"bounded ({'; '.join(self.why)})"


@dataclass(frozen=True, slots=True)
class Refit:
    """What re-fitting a weight in another form costs, measured on each element of it.

    Attributes:
        sqnr: ``10 log10(sum w^2 / sum (fitted - w)^2)`` of the worst column, in dB; infinite where nothing changed.
        largest_error: the largest ``|fitted - w|``.
        largest: the largest ``|w|``.
        growth: the largest ``sum_k |fitted| / sum_k |w|`` of a column.
        columns: how many columns say so, where that is not all of them, else 0; for offers only.
    """

    sqnr: float
    largest_error: float
    largest: float
    growth: float = 1.0
    columns: int = 0

    def __str__(self) -> str:
        return (
            f"SQNR {self.sqnr:.1f} dB in the worst column, largest error {self.largest_error:.3g} beside weights of up "
            f"to {self.largest:.3g}"
        )


@dataclass(frozen=True, slots=True)
class Offer:
    """What would make a refused site legal: ``allow`` as it would have to be, and the least SQNR of a re-fit, in dB.

    ``sampled``: not all columns were fitted, and another may have less.
    """

    allow: tuple[str, ...]
    sqnr: float = math.inf
    sampled: bool = False


@dataclass(frozen=True, slots=True)
class Weight:
    """The static operand of a matmul, read as ``scale * (codes - zero_point)``.

    Attributes:
        codes: int8 values. Storage is ``(K, N)``, or ``(N, K)`` where ``transposed``.
        transposed: how ``codes`` are stored.
        k: size of the reduced dimension.
        n: size of the output dimension.
        scale: floating, shape ``(1,)``, ``(N,)`` or, with groups, ``(K / group_size, N)``.
        zero_point: same shape as ``scale``, in units of codes; None where it is zero.
        group_size: how many rows of K share a scale; 0 where all do.
        low: smallest code the weight holds (or could hold, where its values are not known).
        high: largest code.
        proved: True where the graph's own value was evaluated and compared with this reading.
        k_order: the rows of ``codes`` are those of the operand in this order, ``(K,)`` int64; None for their own.
        k_scale: the rows are to be multiplied by this as well, ``(K,)`` float64, at most 1; None for none.
        quantized: False for a matrix of small integers that nothing shows to be a quantized weight.
        refit: what it cost, where this is no reading but a re-fit of the graph's weight.

    ``codes`` with more than two dimensions is an operand that is computed when the graph runs, a matrix for each batch.
    """

    codes: Expr
    transposed: bool
    k: int
    n: int
    scale: Expr
    zero_point: Expr | None
    group_size: int
    low: int
    high: int
    proved: bool
    k_order: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    quantized: bool = True
    refit: Refit | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The fused operator chosen for a site and what must happen around it.

    Attributes:
        op: vendor operator name, ``"npu_weight_quant_batchmatmul"`` or ``"npu_quant_matmul"``.
        output: the node of the graph that the fused expression replaces.
        value: the expression that replaces it. The report's copy of a plan has none: it holds the prepared tensors.
        fixups: what was done to make the call legal, in words.
        call: the operator call as descriptions of its arguments, as legality saw it.
        weight_format: ``"ND"`` or ``"NZ"``.
        notes: what else is worth knowing (what stayed outside, what was assumed).
        int8_codes: where ``value`` is a uint8 tensor made from int8 codes, those codes: the next site reads them.
        int8_shift: how much greater than those the codes of ``value`` are.
        nd_reason: where the weight stays in ND, why.
        awaits_values: the weight would be put in FRACTAL_NZ once, if its values were known when compiling.
        refit: where the weight was re-fitted, what that cost.
    """

    op: str
    output: Node
    value: Expr | None
    fixups: tuple[str, ...]
    call: dict[str, Any]
    weight_format: str
    notes: tuple[str, ...] = ()
    int8_codes: Expr | None = None
    int8_shift: int = 0
    nd_reason: str = ""
    awaits_values: bool = False
    refit: Refit | None = None

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self.call.items() if value is not None)
        return f"{self.op}({arguments})"


FLOATS = "matmuls of floats, none of them quantized: "
"""What the note of a graph without quantized matmuls begins with; reports show it where no graph has one."""

PREPARED = "prepared"
"""What the key of a weight begins with that the pass made."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """A line of the format ledger: how one weight is stored for the fused operators.

    Attributes:
        tensor: the graph's name of it.
        sites: the fused sites that read it.
        dtype: its element type.
        shape: its stored shape; -1 for a size that only the run knows, and then both numbers of bytes are 0.
        format: ``"NZ"`` (FRACTAL_NZ) or ``"ND"``.
        bytes_before: its size in ND.
        bytes_after: its size in ``format``, padding included.
        how: ``"in place"`` (the parameter itself was cast), ``"already"`` (it was cast before), ``"prepared"`` (a
            tensor that the pass made), ``"copied"`` (the parameter is left alone), ``"at every call"`` (its values are
            not known when compiling), ``"planned"`` (there is no NPU here: a CPU tensor has one format), or ``""``
            for ND.
        aliases: other inputs of the graph that are the same tensor (tied weights); they change with it.
        why: why it stayed in ND, or why it was copied.
        key: what tells this weight from every other one of the process; None where nothing does.
        copies: how many tensors there are of it: a prepared one for each compilation of its graph.
    """

    tensor: str
    sites: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    format: str
    bytes_before: int
    bytes_after: int
    how: str = ""
    aliases: tuple[str, ...] = ()
    why: str = ""
    key: Hashable = field(default=None, repr=False, compare=False)
    copies: int = 1

    @property
    def is_prepared(self) -> bool:
        """True for a tensor that the pass made: each compilation has its own."""
        return isinstance(self.key, tuple) and self.key[0] == PREPARED


@dataclass(frozen=True, slots=True)
class WeightUse:
    """What a site reads of its weight each time that it runs.

    Attributes:
        k: size of the reduced dimension; -1 where only the run knows it.
        n: size of the output dimension, likewise.
        stored: bytes of the codes that the fused operator reads (of those that the graph has, where not fused).
        floats: bytes of the float weight that the graph makes of its codes; 0 where it makes none.
        float_dtype: its element type, or an empty string.
    """

    k: int
    n: int
    stored: int
    floats: int
    float_dtype: str = ""


@dataclass(frozen=True, slots=True)
class Site:
    """One matmul with a quantized operand, and the verdict on it for one target.

    Attributes:
        name: module path where known (``encoder.layer.0.attention.self.query``), else the node's name.
        source: ``file:line`` of the user's code, or an empty string.
        op: the matmul in the graph, e.g. ``"aten.mm"``.
        target: the chip (or ``"cpu"``) that the verdict is for.
        fused: True where a plan was found (and, outside ``explain``, carried out).
        plan: the :class:`Plan`, or None.
        rejects: why not, where not fused.
        numerics: the :class:`Numerics` contract of the fused site, or None.
        reading: what was read of the operands, in words.
        proved: True where the weight, as the operator computes with it, was compared with the graph's own value.
        key: what tells this matmul from every other one of the process, however often it is compiled; None where
            nothing does.
        compilations: where several compilations are one site in a report, whether each of them was fused.
        offers: what the user could allow to have a refused site fused.
        weight: what is read of the weight at each run; None where it is no single matrix, or not read.
        operators: how many operators the graph has less once the site is fused.
    """

    name: str
    source: str
    op: str
    target: str
    fused: bool
    plan: Plan | None
    rejects: tuple[Reject, ...]
    numerics: Numerics | None
    reading: str = ""
    proved: bool = False
    before: str = field(default="", repr=False)
    after: str = field(default="", repr=False)
    key: Hashable = field(default=None, repr=False, compare=False)
    compilations: tuple[bool, ...] = ()
    offers: tuple[Offer, ...] = ()
    weight: WeightUse | None = None
    operators: int = 0

    def __repr__(self) -> str:
        how = str(self.plan) if self.fused and self.plan is not None else ", ".join(r.rule for r in self.rejects)
        return f"<quantpass.Site {self.name} for {self.target}: {'fused' if self.fused else 'not fused'}, {how}>"
