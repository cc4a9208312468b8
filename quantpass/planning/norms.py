"""RMSNorm in front of quantized activations, as the vendor's operators: where ``numerics="vendor"`` lets them round.

Only a norm whose result goes nowhere but into quantizations of fused sites is replaced. Where the residual sum stands
before it, the operator takes that in as well and its other readers get it from there; where each row is quantized
behind it, one operator does all three.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, Node

from quantpass.basics.boundary import guarded
from quantpass.basics.reject import Reject
from quantpass.basics.symbolic import same_shape
from quantpass.chips.checking import spec_of_tensor
from quantpass.chips.legality import judge
from quantpass.graph import expr as ex
from quantpass.graph.expr import Call, Expr, Ref
from quantpass.graph.records import Numerics, Plan
from quantpass.graph.user_streams import stream_reject
from quantpass.graph.writes import Writes, written_before
from quantpass.operators.dynamic_quant import DYNAMIC_QUANT
from quantpass.operators.operator import Operator, vendor_call
from quantpass.operators.quant_matmul_dequant import QUANT_MATMUL_DEQUANT
from quantpass.operators.quantize import QUANTIZE
from quantpass.operators.rms_norm import ADD_RMS_NORM, ADD_RMS_NORM_DYNAMIC_QUANT, RMS_NORM
from quantpass.patterns.norms import RmsNorm
from quantpass.patterns.sites import Reading
from quantpass.planning.choose import Planned
from quantpass.planning.options import Options

aten = torch.ops.aten

_QUANTIZERS = (DYNAMIC_QUANT, QUANTIZE, QUANT_MATMUL_DEQUANT)
"""Operators that quantize their first argument."""

_CODES, _SUM, _SCALE = 0, 2, 3
"""Results of ``npu_add_rms_norm_dynamic_quant``; the sum is the third of ``npu_add_rms_norm`` too."""

_SECOND_ORDER = 1 + 2.0**-5
"""What products of roundings add to their sum."""


@dataclass(frozen=True, slots=True)
class PlannedNorm:
    """A norm and the operator in its place.

    Attributes:
        norm: what was read.
        op: which operator.
        outputs: expressions for the norm's result (where that is left) and then for the sum, by the node that they
            replace.
        quantizations: the calls of plans whose results the operator gives too: of each, expressions by result.
        quantizers: all calls that quantize the norm's result.
        sites: which sites read it, by their place among the graph's.
        error: how far the operator's result and the graph's may be apart, relative.
        lost: likewise, beside that.
    """

    norm: RmsNorm
    op: Operator
    outputs: Mapping[Node, Expr]
    quantizations: tuple[tuple[Call, Mapping[int, Expr]], ...]
    quantizers: tuple[Call, ...]
    sites: frozenset[int]
    error: float
    lost: float

    @property
    def why(self) -> str:
        """What it means for the numbers, for reports."""
        return (
            f"RMSNorm by the operator ({self.op.vendor}): its result within {self.error:.2g} of the graph's, relative"
        )


def plan_norms(
    graph: Graph,
    planned: Sequence[tuple[Reading, Planned]],
    options: Options,
    writes: Writes,
    labels: dict[Node, str],
) -> tuple[PlannedNorm, ...]:
    """The norms of ``graph`` that become operators, given the plans of its sites; the graph is not touched."""
    if options.numerics != "vendor":
        return ()
    reads = _reads_of(planned)
    elsewhere = _read_elsewhere(graph, planned, reads)
    found: list[PlannedNorm] = []
    for x, quantized in reads.items():
        if x in elsewhere or x.graph is not graph:
            continue
        plan = partial(_planned, x, quantized, planned, options, writes, labels)
        made = guarded(plan, _nothing, f"planning the norm {x.name}")
        if made is not None:
            found.append(made)
    return tuple(found)


def with_norms(
    planned: Sequence[tuple[Reading, Planned]], norms: Sequence[PlannedNorm]
) -> list[tuple[Reading, Planned]]:
    """The sites with what the norms in front of them mean for their contracts."""
    found = list(planned)
    for norm in norms:
        for i in norm.sites:
            reading, site = found[i]
            assert site.plan is not None
            assert site.numerics is not None
            note = f"the RMSNorm in front becomes {norm.op.vendor}"
            plan = replace(site.plan, notes=(*site.plan.notes, note))
            found[i] = reading, replace(site, plan=plan, numerics=_with_norm(site.numerics, norm))
    return found


def _with_norm(n: Numerics, norm: PlannedNorm) -> Numerics:
    """A contract whose x is no longer the graph's: each of its elements, and with them a row's step, has moved."""
    return replace(
        n,
        kind="bounded",
        relative=n.relative + norm.error * (1 + n.relative),
        of_step=n.of_step * (1 + norm.error),
        of_w=n.of_w + norm.lost,
        why=(*n.why, norm.why),
    )


def _nothing(reject: Reject) -> None:
    del reject


# -- who reads what ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Quantized:
    """A tensor that the plan of site number ``site`` has ``call`` quantize."""

    site: int
    call: Call


def _reads_of(planned: Sequence[tuple[Reading, Planned]]) -> dict[Node, list[_Quantized]]:
    """The tensors that plans have an operator quantize."""
    found: dict[Node, list[_Quantized]] = {}
    for i, (_, site) in enumerate(planned):
        for call in _quantizers_in(site.plan):
            x = _quantized_by(call)
            if x is not None:
                found.setdefault(x, []).append(_Quantized(i, call))
    return found


def _quantizers_in(plan: Plan | None) -> Iterator[Call]:
    if plan is not None:
        parts = ex.parts_of((plan.value, plan.int8_codes))
        yield from (c for c in parts if isinstance(c, Call) and _quantized_by(c) is not None)


def _quantized_by(call: Call) -> Node | None:
    """The tensor that a call quantizes, where that is a node or a view of one."""
    if call.target not in [op.overload for op in _QUANTIZERS]:
        return None
    x = call.args[0]
    while isinstance(x, Call) and x.target is aten.reshape.default:
        x = x.args[0]
    return x.node if isinstance(x, Ref) else None


def _read_elsewhere(
    graph: Graph, planned: Sequence[tuple[Reading, Planned]], reads: Mapping[Node, Sequence[_Quantized]]
) -> set[Node]:
    """What the graph still reads when the plans are carried out, other than to quantize it."""
    plans = {site.plan.output: site.plan for _, site in planned if site.plan is not None}
    quantizers = {id(q.call) for found in reads.values() for q in found}
    kept = [n for n in graph.nodes if n.op == "output" or _has_effect(n)]
    read: set[Node] = set()
    seen: set[Node] = set(kept)
    while kept:
        node = kept.pop()
        plan = plans.get(node)
        inputs = node.all_input_nodes if plan is None else [*_nodes_read((plan.value, plan.int8_codes), quantizers)]
        read.update(inputs)
        through = [] if plan is None else [q for c in _quantizers_in(plan) if (q := _quantized_by(c)) is not None]
        new = {n for n in (*inputs, *through) if n not in seen}
        seen |= new
        kept.extend(new)
    return read


def _has_effect(node: Node) -> bool:
    return node.op == "call_function" and node.is_impure() and node.target is not aten._assert_tensor_metadata.default


def _nodes_read(e: Any, quantizers: set[int]) -> Iterator[Node]:
    """The nodes of an expression, but for what ``quantizers`` quantize."""
    todo, seen = [e], set()
    while todo:
        e = todo.pop()
        if id(e) in seen:
            continue
        seen.add(id(e))
        if isinstance(e, Call):
            todo.extend((*(e.args[1:] if id(e) in quantizers else e.args), *e.kwargs.values()))
        elif isinstance(e, list | tuple):
            todo.extend(e)
        else:
            yield from (n for leaf in ex.leaves_of(e) if (n := _node_of(leaf)) is not None)


def _node_of(leaf: Any) -> Node | None:
    if isinstance(leaf, Node):
        return leaf
    node: Node | None = getattr(leaf, "origin", None) or getattr(leaf, "node", None)
    return node


# -- planning one norm -------------------------------------------------------------------------------------------------


def _planned(
    x: Node,
    quantized: Sequence[_Quantized],
    planned: Sequence[tuple[Reading, Planned]],
    options: Options,
    writes: Writes,
    labels: dict[Node, str],
) -> PlannedNorm | None:
    """The operator in place of the norm whose result is ``x``; None where that is none, or no operator is legal."""
    reader = planned[quantized[0].site][0].activations
    norm = reader.norms.read(x) if reader is not None else None
    if norm is None or (norm.call is not None and _root_is_read(norm.call)):
        return None
    for op in _operators(norm, quantized):
        operands = norm.addends if op is not RMS_NORM else (norm.x,)
        assert operands is not None
        names = ("input",) if op is RMS_NORM else ("x1", "x2")
        described = {name: spec_of_tensor(n.meta["val"]) for name, n in zip(names, operands, strict=True)}
        described["gamma"] = spec_of_tensor(norm.gamma.tensor)
        call = vendor_call(op.vendor, {**described, "epsilon": norm.eps}, options.mode)
        if not judge(call, options.chip, options.allow).legal:
            continue
        args = (*map(Ref, operands), norm.gamma, norm.eps)
        made = Call(op.overload, args, {}, x.meta["val"].dtype, tuple(x.meta["val"].shape))
        found = _with_outputs(norm, op, made, quantized)
        if any(_is_barred(value, node, writes, labels) for node, value in found.outputs.items()):
            return None
        return found if not _is_barred(made, x, writes, labels) else None
    return None


def _operators(norm: RmsNorm, quantized: Sequence[_Quantized]) -> Iterator[Operator]:
    """The operators to try, those that do most first."""
    if norm.addends is not None and all(_is_of_rows(q.call, norm.output) for q in quantized):
        yield ADD_RMS_NORM_DYNAMIC_QUANT
    if norm.call is None:
        if norm.addends is not None:
            yield ADD_RMS_NORM
        yield RMS_NORM


def _is_of_rows(call: Call, x: Node) -> bool:
    """True for a symmetric quantization of each row of ``x``, as it is or as a matrix."""
    if call.target is not DYNAMIC_QUANT.overload or call.kwargs or len(call.args) != 1:
        return False
    shape = ex.shape_of(call.args[0])
    return len(shape) == 2 or same_shape(shape, tuple(x.meta["val"].shape))


def _root_is_read(call: Node) -> bool:
    """True where something asks the vendor's own operator for its inverse roots."""
    return any(u.target is not operator.getitem or u.args[1] not in (0, _SUM) for u in call.users)


def _with_outputs(norm: RmsNorm, op: Operator, made: Call, quantized: Sequence[_Quantized]) -> PlannedNorm:
    shape, dtype = made.shape, made.dtype
    outputs: dict[Node, Expr] = {}
    joined: list[tuple[Call, Mapping[int, Expr]]] = []
    if op is ADD_RMS_NORM_DYNAMIC_QUANT:
        codes = Call(operator.getitem, (made, _CODES), {}, torch.int8, shape)
        scale = Call(operator.getitem, (made, _SCALE), {}, torch.float32, shape[:-1])
        for q in quantized:
            both: tuple[Expr, Expr] = (codes, scale)
            if len(ex.shape_of(q.call.args[0])) != len(shape):
                both = (ex.reshape(codes, (-1, shape[-1])), ex.reshape(scale, (-1,)))
            joined.append((q.call, dict(enumerate(both))))
    else:
        outputs[norm.output] = Call(operator.getitem, (made, 0), {}, dtype, shape)
    if op is not RMS_NORM:
        outputs |= {node: Call(operator.getitem, (made, _SUM), {}, dtype, shape) for node in _sums(norm)}
    error, lost = _apart(norm)
    sites = frozenset(q.site for q in quantized)
    return PlannedNorm(norm, op, outputs, tuple(joined), tuple(q.call for q in quantized), sites, error, lost)


def _sums(norm: RmsNorm) -> list[Node]:
    """The nodes that hold the sum which the operator gives as well."""
    if norm.call is None:
        return [norm.x]
    return [u for u in norm.call.users if u.target is operator.getitem and u.args[1] == _SUM]


def _apart(norm: RmsNorm) -> tuple[float, float]:
    """How far an operator's result and the graph's may be apart, relative and beside that.

    An operator rounds twice to the dtype of x (what is normalised, and its product with gamma; or the sum is not
    rounded where the graph rounds it, which counts as much in each element and in the root), else to float32.
    """
    k, info = norm.output.meta["val"].shape[-1], torch.finfo(norm.output.meta["val"].dtype)
    own = info.eps + (k / 2 + 8) * torch.finfo(torch.float32).eps
    largest = float(norm.gamma.tensor.abs().max()) if norm.gamma.tensor.numel() else 0.0
    # Below the normal numbers an error is absolute: half a unit before gamma and half a unit behind it, on both sides.
    return (norm.error + own) * _SECOND_ORDER, info.smallest_normal * info.eps * (1 + largest)


def _is_barred(value: Expr, output: Node, writes: Writes, labels: dict[Node, str]) -> bool:
    """True where a write or a stream of the user's stands between what is read and what is replaced."""
    plan = Plan("", output, value, (), {}, "ND")
    return written_before(value, output, writes) is not None or stream_reject(plan, labels) is not None
