"""Fused matmuls that a graph already calls, the vendor's and quantpass's own: left as they are, and judged."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from quantpass.basics.boundary import guarded
from quantpass.basics.reject import Reject
from quantpass.basics.tensor_spec import TensorSpec
from quantpass.chips.calls import QMM, WQMM, OpCall
from quantpass.chips.checking import logical, spec_of_tensor
from quantpass.chips.legality import Verdict, judge
from quantpass.graph.records import Numerics, Plan, Site
from quantpass.graph.schema import bind, op_name
from quantpass.operators.ir import DTYPE_NUMBERS, NZ
from quantpass.patterns.sites import provenance
from quantpass.planning.options import Options

_OPERATORS = {
    "npu::npu_quant_matmul": QMM,
    "npu::npu_weight_quant_batchmatmul": WQMM,
    "quantpass::quant_matmul": QMM,
    "quantpass::weight_quant_matmul": WQMM,
}

_OWN_FLAGS = frozenset(("transpose_x1", "transpose_x2", "transpose_x", "transpose_weight", "template", "saturate"))
"""What quantpass's operators say by flags, and the vendor's by strides or by the chip."""

_DTYPES = {number: dtype for dtype, number in DTYPE_NUMBERS.items()}

_WEIGHT = {QMM: "x2", WQMM: "weight"}


_OWN_CALL = "called by the model itself"


def is_own_call(site: Site) -> bool:
    """True where the fused operator was in the graph before the pass came."""
    return site.plan is not None and _OWN_CALL in site.plan.fixups


def own_calls(graph: Graph) -> list[Node]:
    """The calls of fused matmuls that are the model's, not ones that the pass has put there."""
    return [n for n in graph.nodes if _operator(n) is not None and "quantpass" not in n.meta]


def _operator(node: Node) -> str | None:
    is_call = node.op == "call_function" and isinstance(node.target, OpOverload)
    return _OPERATORS.get(node.target._schema.name) if is_call else None  # type: ignore[union-attr]


def already_fused(calls: Iterable[Node], options: Options, keys: Mapping[Node, Hashable]) -> Iterator[Site]:
    """A site for each call, ``fused`` where the chip takes it; the graph is not touched."""
    for node in calls:
        op = _operator(node)
        assert op is not None
        judge_call, unjudged = partial(_judged_site, node, op, options), partial(_unjudged, node, op, options)
        yield replace(guarded(judge_call, unjudged, f"judging {node.name}"), key=keys[node])


def broken_calls(graph: Graph, options: Options) -> Iterator[str]:
    """What is illegal about the fused calls that the pass has put into a graph, as they stand there."""
    for node in graph.nodes:
        op = _operator(node)
        if op is None or "quantpass" not in node.meta:
            continue
        call = OpCall(op, options.mode, _arguments(node))
        weight, given = call.tensor(_WEIGHT[op]), bind(node)[_WEIGHT[op]]
        if weight is not None and _is_cast_to_nz(given):
            call = call.replaced(**{_WEIGHT[op]: TensorSpec(weight.dtype, weight.shape, "NZ", weight.transposed)})
        verdict = judge(call, options.chip, options.allow)
        yield from (f"{node.name} for {node.meta['quantpass']!r}: {reject}" for reject in verdict.rejects)


def _is_cast_to_nz(node: Any) -> bool:
    cast = isinstance(node, Node) and node.target is torch.ops.quantpass.format_cast.default
    return cast and bool(node.args[1] == NZ)


def _judged_site(node: Node, op: str, options: Options) -> Site:
    return _site(node, OpCall(op, options.mode, _arguments(node)), options)


def _unjudged(node: Node, op: str, options: Options, reject: Reject) -> Site:
    name, source = provenance(node)
    reading = f"a call of {op}"
    return Site(name, source, op_name(node), options.chip.name, False, None, (reject,), None, reading)


def _arguments(node: Node) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    bound = bind(node)
    swapped = {name for name in bound if bound.get(f"transpose_{name}") is True}
    for name, value in bound.items():
        fake = value.meta.get("val") if isinstance(value, Node) else None
        spec = spec_of_tensor(fake) if isinstance(fake, torch.Tensor) else None
        if name not in _OWN_FLAGS:
            arguments[name] = value if spec is None else logical(spec) if name in swapped else spec
    number = arguments.get("output_dtype")
    if isinstance(number, int):
        arguments["output_dtype"] = _DTYPES.get(number, number)
    return arguments


def _site(node: Node, call: OpCall, options: Options) -> Site:
    verdict, call, weight_format = _judged(call, options)
    name, source = provenance(node)
    notes = () if weight_format == "ND" else ("legal with the weight in FRACTAL_NZ, which the graph does not say",)
    plan = Plan(call.op, node, None, (_OWN_CALL,), dict(call.args), weight_format, notes)
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


def _judged(call: OpCall, options: Options) -> tuple[Verdict, OpCall, str]:
    """The verdict on the call; a weight's format is not part of a graph, so either may make it legal."""
    verdict = judge(call, options.chip, options.allow)
    weight = call.tensor(_WEIGHT[call.op])
    if verdict.legal or weight is None:
        return verdict, call, "ND"
    in_nz = TensorSpec(weight.dtype, weight.shape, "NZ", weight.transposed)
    other = call.replaced(**{_WEIGHT[call.op]: in_nz})
    found = judge(other, options.chip, options.allow)
    return (found, other, "NZ") if found.legal else (verdict, call, "ND")
