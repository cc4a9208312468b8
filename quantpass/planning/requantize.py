"""Letting the operators quantize activations by their own rule, in place of what the graph spells out.

``npu_dynamic_quant`` and ``npu_quantize`` give the graph's codes but for rounding: no code differs by more than one
(two where the graph computes in few bits), and how far a result may be off follows from that. A quantization that
means something else (another divisor, range or axis, a zero point that only the run knows) stays the graph's.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject
from quantpass.basics.tensor_spec import TensorSpec
from quantpass.chips.calls import OpCall
from quantpass.chips.legality import judge
from quantpass.chips.quant_matmul_dequant import QMMD
from quantpass.chips.rules import Chip
from quantpass.graph import expr as ex
from quantpass.graph.expr import Call, Const, Expr, Ref
from quantpass.graph.records import Weight
from quantpass.operators.dynamic_quant import DYNAMIC_QUANT
from quantpass.operators.quantize import QUANTIZE
from quantpass.patterns.activations import ActivationReader, NotRead, Quantization
from quantpass.patterns.affine import Affine
from quantpass.patterns.magnitudes import Magnitude
from quantpass.patterns.sites import Reading
from quantpass.patterns.smoothing import smoothed
from quantpass.planning.candidates import call_op, flattened
from quantpass.planning.options import Options

_DIVISOR = 127.0
"""Of ``npu_dynamic_quant``: a row's largest magnitude becomes this code."""

_NEAR = 0.5
"""How far a graph's divisor may be from that: 127.5 moves no code by more than half of one."""

_ARITHMETIC = _DIVISOR * 2.0**-21
"""How far the operators' own float32 steps may move a code before rounding."""

_SECOND_ORDER = 1 + 2.0**-6
"""What products of roundings add to their sum."""

_UNHEARD_OF = 2.0**-100
"""No activation is that small throughout a row; reports don't speak of it."""

_SAME = 1e-6
"""Divisors that differ by less, relative, are one that was rounded."""


@dataclass(frozen=True, slots=True)
class Requantized:
    """An activation's codes as an operator makes them.

    Attributes:
        x: what is quantized.
        codes: int8, in place of the activation's.
        scale: what they have to be multiplied by, ``(M,)`` or ``(1,)`` float32; None where the graph's own scale stays.
        how: how the graph makes its codes.
        reader: reads factors of the graph as scales.
        call: the vendor's call.
        apart: by how many codes the two may differ.
        steps: how far the two dequantized activations may be apart, in units of the graph's scale.
        absolute: likewise, beside that.
        ratio: what the graph's own scale is to be multiplied by, where it stays.
        refused: why the chip does not take the call; another operator may quantize by the same rule.
        given: the operator takes the graph's own scale.
        smooth: what the operator multiplies ``x`` by first, ``(K,)``.
        already: the model itself has an operator make the codes: only a matmul that takes ``x`` gains anything.
    """

    x: Expr
    codes: Expr
    scale: Expr | None
    how: Quantization
    reader: ActivationReader
    call: OpCall
    apart: int
    steps: float
    absolute: float = 0.0
    ratio: float = 1.0
    refused: Reject | None = None
    given: bool = False
    smooth: Const | None = None
    already: bool = False

    @property
    def why(self) -> str:
        """What it means for the numbers, for reports."""
        m, most = self.how.magnitude, "one" if self.apart == 1 else "two"
        found = f"re-quantized by the operator ({self.call.op}): codes differ by at most {most}"
        steady = 0.0 if m is None else m.steady_from
        return found if steady <= _UNHEARD_OF else f"{found}, in rows with magnitudes above {steady:.2g}"

    def with_the_graphs_scale(self) -> Requantized:
        """This where the graph's own scale is not corrected for what the operator's parameters were rounded by."""
        return replace(self, ratio=1.0, steps=float(self.apart))

    def in_place_of(self, factor: Expr) -> tuple[Requantized, float] | None:
        """Where ``factor`` is the graph's scale of the codes: this with that scale's roundings, and its multiple."""
        own, m = self.how.magnitude, self.reader.scale(factor)
        if own is None or m is None or (m.x, m.whole) != (own.x, own.whole) or not _same_floor(m, own):
            return None
        ratio = m.factor * self.how.divisor
        steps, absolute = self.steps + self.how.divisor * m.error, self.absolute + 1.02 * m.lost
        made = replace(self, steps=steps, absolute=absolute)
        return made, 1.0 if math.isclose(ratio, 1.0, rel_tol=_SAME) else ratio


def requantized(
    reading: Reading, chip: Chip, options: Options, int8_already: Collection[Node]
) -> Requantized | Reject | None:
    """A site's activation as an operator quantizes it; why none does, or None where that is not asked for.

    Args:
        reading: the site.
        chip: for which chip.
        options: only ``numerics="vendor"`` asks for it.
        int8_already: nodes whose codes an earlier plan makes anyway.
    """
    activation, weight, reader = reading.activation, reading.weight, reading.activations
    if options.numerics != "vendor" or not isinstance(activation, Affine) or reader is None:
        return None
    assert isinstance(weight, Weight)
    leaves = [leaf.node for leaf in ex.leaves_of(activation.codes) if isinstance(leaf, Ref)]
    if not leaves or any(leaf in int8_already for leaf in leaves):
        return None
    already = all(map(is_given, leaves))
    if already and QMMD not in chip.layouts:
        return None
    found = reader.read(activation.codes)
    if isinstance(found, NotRead):
        return None if already else refuse(found.rule, f"the activation: {found.reason}")
    matrix = len(ex.shape_of(weight.codes)) == 2
    refused: Requantized | Reject | None = None
    for q in _ways(found, reader, chip):
        x = flattened(Ref(q.x)) if matrix else ex.reshape(Ref(q.x), activation.shape)
        made = (_static if q.magnitude is None else _dynamic)(q, x, reader, options)
        if isinstance(made, Requantized):
            made = replace(made, already=already)
            verdict = judge(made.call, chip, options.allow)
            if verdict.legal:
                return made
            made = replace(made, refused=verdict.rejects[0])
        refused = refused if isinstance(refused, Requantized) or (already and isinstance(made, Reject)) else made
    return refused


def _ways(q: Quantization, reader: ActivationReader, chip: Chip) -> Iterator[Quantization]:
    """With a factor along K that the operator takes in, if there is one, and without; a norm's weight is the norm's."""
    with_factor, in_one = smoothed(reader, q), QMMD in chip.layouts
    if with_factor is not None and reader.norms.read(q.x) is None and _takes_factor(q, with_factor, in_one=in_one):
        yield with_factor
    yield q


def _takes_factor(q: Quantization, with_factor: Quantization, *, in_one: bool) -> bool:
    """True where an operator that is given the factor saves the graph a multiplication."""
    if q.kind == "static":
        return True
    accepted = (torch.float16,) if in_one else (torch.float16, torch.bfloat16)
    # An operator that is given the graph's scale saves nothing: the graph finds it from the product.
    saves = not in_one or q.kind == "token" or ex.dtype_of(Ref(q.x)) not in accepted
    return saves and ex.dtype_of(Ref(with_factor.x)) in accepted


def is_given(node: Node) -> bool:
    """True for codes that come from outside of the graph, or from one of the vendor's operators."""
    maker = node.args[0] if node.target is operator.getitem else node
    assert isinstance(maker, Node)
    own = maker.op == "call_function" and not str(maker.target).startswith(("npu.", "quantpass."))
    return not own and not node.meta["val"].dtype.is_floating_point


def _dynamic(q: Quantization, x: Expr, reader: ActivationReader, options: Options) -> Requantized | Reject:
    m = q.magnitude
    assert m is not None
    if abs(q.divisor - _DIVISOR) > _NEAR + _SAME * _DIVISOR:
        return refuse("requantize.divisor", f"the largest magnitude of the activation becomes {q.divisor:g}")
    problem = _range_problem(q) or (_zero_problem(q) if q.zero_point else None)
    if problem is not None:
        return problem
    apart = _apart(abs(q.divisor - _DIVISOR) + q.error)
    if isinstance(apart, Reject):
        return apart
    shape = ex.shape_of(x)
    mode, scales = ("pertoken", shape[:-1]) if q.kind == "token" else ("pertensor", (1,))
    smooth = None if q.smooth is None else Const(q.smooth.tensor, label="smooth_scales")
    arguments = {"x": x, "smooth_scales": smooth, "quant_mode": mode}
    both = call_op(DYNAMIC_QUANT, arguments, torch.int8, shape)
    codes = Call(operator.getitem, (both, 0), {}, torch.int8, shape)
    scale = Call(operator.getitem, (both, 1), {}, torch.float32, scales)
    # Each is off by half a step and what rounding adds; a step of the operator is at most this one of the graph.
    graph, own = max(0.5, q.divisor - q.high) + q.error, (0.5 + _ARITHMETIC) * q.divisor / _DIVISOR
    call = DYNAMIC_QUANT.described(arguments, options.mode, _spec)
    steps, lost = (graph + own) * _SECOND_ORDER, 1.02 * m.lost
    return Requantized(x, codes, scale, q, reader, call, apart, steps, lost, smooth=smooth)


def _static(q: Quantization, x: Expr, reader: ActivationReader, options: Options) -> Requantized | Reject:
    assert isinstance(q.rate, Const)
    problem = _range_problem(q) or (None if -128 <= q.zero_point <= 127 else _zero_problem(q))
    if problem is not None:
        return problem
    dtype = ex.dtype_of(x)
    exact = q.rate.tensor.double()
    rate = exact.to(dtype)  # the operator takes its parameters in the dtype of x
    moved = float((rate.double() / exact - 1).abs().max())
    if not moved <= torch.finfo(dtype).eps:
        least, most = float(exact.abs().min()), float(exact.abs().max())
        return refuse("requantize.scale", f"the activation is multiplied by {least:g} to {most:g} in {dtype}")
    apart = _apart(q.error + max(127 - q.zero_point, 128 + q.zero_point) * moved)
    if isinstance(apart, Reject):
        return apart
    arguments: dict[str, Expr] = {"x": x, "scale": ex.named(Const(rate), "inverse_scale")}
    if q.zero_point:
        arguments["offset"] = Const(torch.full_like(rate, float(q.zero_point)), label="zero_point")
    codes = call_op(QUANTIZE, arguments, torch.int8, ex.shape_of(x))
    call = QUANTIZE.described(arguments, options.mode, _spec)
    made = Requantized(x, codes, None, q, reader, call, apart, float(apart))
    if rate.numel() > 1 or moved <= 2.0**-20:
        return made
    # What the rounded rate makes of x is scaled back with it: half a step each, and the ends of int8 lie elsewhere.
    steps = 1 + q.error + (max(127 - q.zero_point, 128 + q.zero_point) + 1) * moved
    return replace(made, ratio=float(exact / rate.double()), steps=steps * _SECOND_ORDER)


def _spec(value: Any) -> Any:
    """A tensor as legality sees it."""
    return TensorSpec(ex.dtype_of(value), ex.shape_of(value)) if isinstance(value, Expr) else value


def _same_floor(a: Magnitude, b: Magnitude) -> bool:
    """True where codes are multiplied by what x was divided by, in rows of small magnitudes as well."""
    return all(math.isclose(x, y, rel_tol=_SAME) for x, y in ((a.floor, b.floor), (a.added, b.added)))


def _apart(moved: float) -> int | Reject:
    """By how many codes two roundings may differ whose arguments differ by ``moved``, and the operator's own steps."""
    apart = math.floor(moved + _ARITHMETIC) + 1
    if apart <= 2:
        return apart
    return refuse("requantize.rounding", f"the graph's own roundings move a code by up to {moved:.2g}")


def _range_problem(q: Quantization) -> Reject | None:
    if q.low <= -_DIVISOR and q.high == _DIVISOR:
        return None
    return refuse("requantize.range", f"the activation is quantized to [{q.low}, {q.high}] in terms of int8")


def _zero_problem(q: Quantization) -> Reject:
    return refuse("requantize.zero_point", f"the activation has the zero point {q.zero_point} in terms of int8")
