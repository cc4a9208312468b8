"""Fused matmuls that a graph already calls, the vendor's and quantpass's own: left as they are, and judged."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
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
from quantpass.chips.quant_matmul import QMM
from quantpass.graph.records import Numerics, Plan, Site
from quantpass.graph.schema import bind, op_name
from quantpass.operators import OPERATORS
from quantpass.operators.arguments import DTYPE_NUMBERS, NZ
from quantpass.operators.dynamic_quant import DYNAMIC_QUANT
from quantpass.operators.operator import Operator, vendor_call
from quantpass.operators.preparation import FORMAT_CAST
from quantpass.operators.quantize import QUANTIZE
from quantpass.patterns.sites import provenance
from quantpass.planning.choose import is_quantized_behind
from quantpass.planning.options import Options
from quantpass.planning.requantize import is_given

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


def is_own_call(site: Site) -> bool:
    """True where the fused operator was in the graph before the pass came."""
    return site.plan is not None and _OWN_CALL in site.plan.fixups


def own_calls(graph: Graph) -> list[Node]:
    """The calls of fused matmuls that are the model's, not ones that the pass has put there."""
    return [n for n in graph.nodes if _operator(n) is not None and "quantpass" not in n.meta]


def _operator(node: Node) -> VendorOp | None:
    is_call = node.op == "call_function" and isinstance(node.target, OpOverload)
    return _MATMULS.get(node.target._schema.name) if is_call else None  # type: ignore[union-attr]


def already_fused(calls: Iterable[Node], options: Options, keys: Mapping[Node, Hashable]) -> Iterator[Site]:
    """A site for each call, ``fused`` where the chip takes it; the graph is not touched."""
    for node in calls:
        op = _operator(node)
        assert op is not None
        judge_call, unjudged = partial(_judged_site, node, op, options), partial(_unjudged, node, op, options)
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


def _judged_site(node: Node, op: VendorOp, options: Options) -> Site:
    return _site(node, _call(node, op, options, _described), options)


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


def _site(node: Node, call: OpCall, options: Options) -> Site:
    verdict, call, weight_format = _judged(call, options)
    name, source = provenance(node)
    notes = [] if weight_format == "ND" else ["legal with the weight in FRACTAL_NZ, which the graph does not say"]
    notes.extend(_left_around(node, call))
    plan = Plan(call.op.name, node, None, (_OWN_CALL,), dict(call.args), weight_format, tuple(notes))
    return Site(
        name=name,
        source=source,
        op=op_name(node),
        target=options.chip.name,
        fused=verdict.legal,
        plan=plan if verdict.legal else None,
        rejects=verdict.rejects,
        numerics=Numerics("exact") if verdict.legal else None,
        reading=f"a call of {call.op}",
    )


def _left_around(node: Node, call: OpCall) -> Iterator[str]:
    """What the graph does around the model's own call, and an operator would do if the model asked for it."""
    if call.op is not QMM:
        return
    bound = bind(node)
    x = bound["x1"]
    if isinstance(x, Node) and x.op == "call_function" and not is_given(x):
        yield (
            f"the graph makes the codes of x1 ({x.name}), and a call of the model's own is left as it is: call "
            "npu_dynamic_quant or npu_quantize in the model, or leave the matmul to quantpass as well"
        )
    if node.meta["val"].dtype.is_floating_point and is_quantized_behind(node):
        yield "the quantize that follows is not part of the matmul: " + (
            "a call of the model's own is left as it is; ask it for output_dtype=torch.int8 with an offset"
            if bound["pertoken_scale"] is None
            else "the operator gives no codes where x has a scale for each row"
        )


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
