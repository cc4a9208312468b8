"""Fused matmuls that a graph already calls, the vendor's and quantpass's own: judged, and left as they are.

Where the graph quantizes by hand what such a call multiplies or returns, the call is completed: it is read and planned
like any other matmul, and the plan is taken if it has an operator do what the graph does by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from quantpass.basics.boundary import guarded
from quantpass.basics.reject import Reject
from quantpass.basics.tensor_spec import TensorSpec
from quantpass.chips.calls import OpCall, VendorOp
from quantpass.chips.checking import spec_of_tensor
from quantpass.chips.legality import Verdict, judge
from quantpass.graph.records import Numerics, Plan, Site, Weight
from quantpass.graph.schema import bind, op_name
from quantpass.operators import OPERATORS
from quantpass.operators.arguments import DTYPE_NUMBERS, NZ
from quantpass.operators.dynamic_quant import DYNAMIC_QUANT
from quantpass.operators.operator import Operator, vendor_call
from quantpass.operators.preparation import FORMAT_CAST
from quantpass.operators.quantize import QUANTIZE
from quantpass.patterns.sites import Reading, provenance
from quantpass.planning.choose import Planned, is_quantized_behind
from quantpass.planning.options import Options
from quantpass.planning.quant_matmul_dequant import has_it
from quantpass.planning.requantize import is_given, requantized

_MATMULS: Mapping[str, VendorOp] = MappingProxyType(
    {
        name: op.vendor
        for op in OPERATORS
        if op.vendor.weight
        for name in (f"npu::{op.vendor.name}", f"quantpass::{op.name}")
    }
)

_JUDGED: Mapping[str, Operator] = MappingProxyType(
    {f"quantpass::{op.name}": op for op in OPERATORS if op.vendor.weight or op in (DYNAMIC_QUANT, QUANTIZE)}
)
"""What the pass puts into graphs and chips have rules of; the others prepare tensors."""

_DTYPES = {number: dtype for dtype, number in DTYPE_NUMBERS.items()}

_OWN_CALL = "called by the model itself"
_COMPLETED = "completes a call of the model's own"


@dataclass(frozen=True, slots=True)
class Around:
    """What the graph does by hand around a call that stays as it is, and what would change that, for a refused one."""

    notes: tuple[str, ...] = ()
    rejects: tuple[Reject, ...] = ()


def is_own_call(site: Site) -> bool:
    """True where the fused operator was in the graph before the pass came."""
    return site.plan is not None and _OWN_CALL in site.plan.fixups


def own_calls(graph: Graph) -> list[Node]:
    """The calls of fused matmuls that are the model's, not ones that the pass has put there."""
    return [n for n in graph.nodes if is_own(n)]


def is_own(node: Node) -> bool:
    """True for such a call."""
    return _operator(node) is not None and "quantpass" not in node.meta


def may_be_completed(reading: Reading, options: Options) -> bool:
    """False where nothing is done by hand around a call of the model's own: it is not planned in vain."""
    if reading.contraction is None:
        return False
    node, x = reading.node, reading.contraction.lhs
    takes_x = has_it(options.chip)
    quantized = x.op == "call_function" and (takes_x or (options.numerics == "vendor" and not is_given(x)))
    return quantized or node.meta["val"].dtype == torch.int32 or is_quantized_behind(node)


def completed(call: Node, planned: Planned) -> Planned | None:
    """The plan for a call of the model's own where it leaves less to the graph; None where the call stays as it is."""
    plan, numerics = planned.plan, planned.numerics
    if plan is None or numerics is None:
        return None
    scales = plan.output is not call and call.meta["val"].dtype == torch.int32
    quantizes = plan.output is not call and plan.int8_codes is not None
    if not (scales or quantizes or numerics.of_step):
        return None
    return replace(planned, plan=replace(plan, fixups=(_COMPLETED, *plan.fixups)))


def _operator(node: Node) -> VendorOp | None:
    is_call = node.op == "call_function" and isinstance(node.target, OpOverload)
    return _MATMULS.get(node.target._schema.name) if is_call else None  # type: ignore[union-attr]


def already_fused(
    calls: Iterable[Node], options: Options, keys: Mapping[Node, Hashable], left: Mapping[Node, Around]
) -> Iterator[Site]:
    """A site for each call, ``fused`` where the chip takes it; the graph is not touched.

    ``left``: from :func:`left_around`.
    """
    for node in calls:
        op = _operator(node)
        assert op is not None
        judge_call = partial(_judged_site, node, op, options, left.get(node, Around()))
        unjudged = partial(_unjudged, node, op, options)
        yield replace(guarded(judge_call, unjudged, f"judging {node.name}"), key=keys[node])


def broken_calls(graph: Graph, options: Options) -> Iterator[str]:
    """What is illegal about the calls that the pass has put into a graph, as they stand there."""
    for node in graph.nodes:
        if "quantpass" not in node.meta or not isinstance(node.target, OpOverload):
            continue
        op = _JUDGED.get(node.target._schema.name)
        if op is None:
            continue
        call = _with_dtype(op.described(bind(node), options.mode, _as_stored))
        verdict = judge(call, options.chip, options.allow)
        yield from (f"{node.name} for {node.meta['quantpass']!r}: {reject}" for reject in verdict.rejects)


def _judged_site(node: Node, op: VendorOp, options: Options, left: Around) -> Site:
    return _site(node, _call(node, op, options, _described), options, left)


def _call(node: Node, op: VendorOp, options: Options, describe: Callable[[Any], Any]) -> OpCall:
    return _with_dtype(vendor_call(op, bind(node), options.mode, describe))


def _with_dtype(call: OpCall) -> OpCall:
    number = call.args.get("output_dtype")
    return call.replaced(output_dtype=_DTYPES[number]) if number in _DTYPES else call


def _unjudged(node: Node, op: VendorOp, options: Options, reject: Reject) -> Site:
    name, source = provenance(node)
    reading = f"a call of {op}"
    return Site(name, source, op_name(node), options.chip.name, False, None, (reject,), None, reading)


def _described(value: Any) -> Any:
    fake = value.meta.get("val") if isinstance(value, Node) else None
    return spec_of_tensor(fake) if isinstance(fake, torch.Tensor) else value


def _as_stored(value: Any) -> Any:
    """As quantpass's own operators take it: by flags, not by strides, and in FRACTAL_NZ where the graph casts it."""
    spec = _described(value)
    if not isinstance(spec, TensorSpec):
        return spec
    is_cast = isinstance(value, Node) and value.target is FORMAT_CAST.overload
    return TensorSpec(spec.dtype, spec.shape, "NZ" if is_cast and value.args[1] == NZ else "ND")


def _site(node: Node, call: OpCall, options: Options, left: Around) -> Site:
    verdict, call, weight_format = _judged(call, options)
    name, source = provenance(node)
    notes = [] if weight_format == "ND" else ["legal with the weight in FRACTAL_NZ, which the graph does not say"]
    notes.extend(left.notes)
    plan = Plan(call.op.name, node, None, (_OWN_CALL,), dict(call.args), weight_format, tuple(notes))
    return Site(
        name=name,
        source=source,
        op=op_name(node),
        target=options.chip.name,
        fused=verdict.legal,
        plan=plan if verdict.legal else None,
        rejects=verdict.rejects if verdict.legal else (*verdict.rejects, *left.rejects),
        numerics=Numerics("exact") if verdict.legal else None,
        reading=f"a call of {call.op}",
    )


def left_around(reading: Reading, planned: Planned, options: Options, int8_already: Collection[Node]) -> Around:
    """What there is around a call of the model's own that is not completed, and why it stays so.

    Args:
        reading: the call.
        planned: what was found for it.
        options: settings.
        int8_already: nodes whose codes an earlier plan makes anyway.
    """
    if reading.contraction is None:
        return Around()
    notes = (*_codes_by_hand(reading, options, int8_already), *_quantized_behind(reading, planned))
    return Around(notes, tuple(r for r in planned.rejects if r.rule == "requantize.strict"))


def _codes_by_hand(reading: Reading, options: Options, int8_already: Collection[Node]) -> Iterator[str]:
    assert reading.contraction is not None
    x = reading.contraction.lhs
    if x.op != "call_function" or is_given(x) or not isinstance(reading.weight, Weight):
        return
    made = requantized(reading, options.chip, replace(options, numerics="vendor"), int8_already)
    if made is None:
        return  # an operator makes them
    if isinstance(made, Reject):
        why = f"{made.rule}: {made.fact}"
    elif made.refused is not None:
        why = f"{made.refused.rule}: {made.refused.fact}"
    elif options.numerics == "vendor":
        why = "requantize.factor: the scale of the codes is no factor of what is fused"
    else:
        why = f"numerics='vendor' would have {made.call.op} make them"
    yield f"the graph makes the codes of x1 ({x.name}): {why}"


def _quantized_behind(reading: Reading, planned: Planned) -> Iterator[str]:
    node = reading.node
    if not node.meta["val"].dtype.is_floating_point or not is_quantized_behind(node):
        return
    notes = () if planned.plan is None else planned.plan.notes
    told = [*(f"{r.rule}: {r.fact}" for r in planned.rejects if r.rule.startswith("qmm.requantize.")), *notes]
    left, not_part = "what comes next stays in the graph: ", "the quantize that follows is not part of the matmul: "
    known = (
        t.removeprefix(left).removeprefix(not_part) for t in told if t.startswith(("qmm.requantize.", left, not_part))
    )
    yield not_part + next(known, "the operator takes no such quantize in")


def _judged(call: OpCall, options: Options) -> tuple[Verdict, OpCall, str]:
    """The verdict on the call; a weight's format is not part of a graph, so either may make it legal."""
    verdict = judge(call, options.chip, options.allow)
    weight = call.tensor(call.op.weight)
    if verdict.legal or weight is None:
        return verdict, call, "ND"
    in_nz = TensorSpec(weight.dtype, weight.shape, "NZ", weight.transposed)
    other = call.replaced(**{call.op.weight: in_nz})
    found = judge(other, options.chip, options.allow)
    return (found, other, "NZ") if found.legal else (verdict, call, "ND")
