"""A report as plain data: what ``as_dict`` and ``to_json`` give. The schema is docs/report_schema.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from quantpass.basics.tensor_spec import TensorSpec
from quantpass.basics.torch_types import dtype_name
from quantpass.graph.records import Plan, Site, WeightFormat

SCHEMA = 1
"""The version of the schema: one more where something is taken away or means something else."""


def site_data(s: Site) -> dict[str, Any]:
    """One site."""
    return {
        "name": s.name,
        "source": s.source,
        "matmul": s.op,
        "target": s.target,
        "reading": s.reading,
        "proved": s.proved,
        "fused": s.fused,
        "compilations": list(s.compilations or (s.fused,)),
        "weight": None if s.weight is None else asdict(s.weight),
        "operators_removed": s.operators,
        "plan": None if s.plan is None else _plan(s.plan),
        "numerics": None if s.numerics is None else _finite({**asdict(s.numerics), "why": list(s.numerics.why)}),
        "offers": [
            {"allow": list(o.allow), "sqnr": o.sqnr if o.sqnr < math.inf else None, "sampled": o.sampled}
            for o in s.offers
        ],
        "rejects": [asdict(r) for r in s.rejects],
    }


def _plan(plan: Plan) -> dict[str, Any]:
    return {
        "op": plan.op,
        "call": {name: _value(value) for name, value in plan.call.items() if value is not None},
        "weight_format": plan.weight_format,
        "fixups": list(plan.fixups),
        "notes": list(plan.notes),
        "refit": None if plan.refit is None else _finite(asdict(plan.refit)),
    }


def _value(value: Any) -> Any:
    """An argument of a call: a tensor as its description, a number as a number, the rest as text."""
    if isinstance(value, TensorSpec):
        sizes = [_value(s) for s in value.shape]
        return {"dtype": value.dtype_name, "shape": sizes, "format": value.format, "transposed": value.transposed}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_value(v) for v in value]
    return dtype_name(value) or str(value)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: None stands for it."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def format_data(f: WeightFormat) -> dict[str, Any]:
    """One weight."""
    return {field.name: getattr(f, field.name) for field in fields(f) if field.name != "key"}


def coverage_data(sites: Sequence[Site], targets: Sequence[str]) -> dict[str, Any]:
    """How many sites there are and are fused, by target."""
    of = {t: [s for s in sites if s.target == t] for t in targets}
    return {t: {"fused": sum(s.fused for s in found), "total": len(found)} for t, found in of.items()}
