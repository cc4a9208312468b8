"""Legality of RMSNorm with a static quantization behind it: ``npu_rms_norm_quant``, ``npu_add_rms_norm_quant``."""

from __future__ import annotations

from typing import Any

from quantpass.basics.torch_types import BF16, F16, F32, I8, I32
from quantpass.chips.calls import OpCall, VendorOp
from quantpass.chips.companions import LastMultiple, Unavailable
from quantpass.chips.dtype_table import DtypeTable, Row
from quantpass.chips.requirements import (
    NotEmpty,
    Present,
    Rank,
    Requirement,
    SameDtype,
    SameShape,
    Shape,
    Size,
    Value,
)
from quantpass.chips.rules import Rule, When

RMS_NORM_QUANT = VendorOp(
    "npu_rms_norm_quant(Tensor x, Tensor gamma, Tensor beta, Tensor scale, Tensor offset, float epsilon=1e-06, *, "
    "int? dst_dtype=None) -> Tensor",
    family="rms_norm_quant",
)


def _added(call: OpCall) -> dict[str, Any]:
    x1 = call.tensor("x1")
    return {} if x1 is None or not x1.shape else {"last": x1.shape[-1]}


ADD_RMS_NORM_QUANT = VendorOp(
    "npu_add_rms_norm_quant(Tensor x1, Tensor x2, Tensor gamma, Tensor scales1, Tensor? zero_points1, Tensor? beta=None, "
    "Tensor? scales2=None, Tensor? zero_points2=None, *, int axis=-1, float epsilon=1e-06, bool div_mode=True, "
    "int? dst_type=None) -> (Tensor, Tensor, Tensor)",
    _added,
    unjudged=("dst_type",),
    family="add_rms_norm_quant",
)

_NORM, _ADDED = "npu_rms_norm_quant.md", "npu_add_rms_norm_quant.md"
_ACLNN = "aclnnAddRmsNormQuantV2.md"
NO = (None,)


def _is(*accepted: Any) -> Any:
    return lambda value, call: value in accepted


def _norm_rule(name: str, need: Requirement, what: str, evidence: str = "documented", **rest: Any) -> Rule:
    return Rule(f"rms_norm_quant.{name}", RMS_NORM_QUANT, need, f"{_NORM}: {what}", evidence, **rest)


def _added_rule(name: str, need: Requirement, what: str, evidence: str = "documented", **rest: Any) -> Rule:
    return Rule(f"add_rms_norm_quant.{name}", ADD_RMS_NORM_QUANT, need, f"{_ADDED}: {what}", evidence, **rest)


# -- npu_rms_norm_quant --------------------------------------------------------------------------------------------

_NORM_COLUMNS = ("x", "gamma", "beta", "scale", "offset")
INT4 = When("dst_dtype quint4x2", lambda call: call.value("dst_dtype") == "quint4x2")


def _norm_row(x: str, scale: str, *offset: str) -> Row:
    return Row(((x,), (x,), (x,), (scale,), offset))


def _norm(*rows: Row) -> tuple[Rule, ...]:
    """``npu_rms_norm_quant`` on a chip, by its table of dtypes."""
    return (
        *(_norm_rule(f"{a}.present", Present(a), a) for a in _NORM_COLUMNS),
        _norm_rule("dtypes", DtypeTable(_NORM_COLUMNS, rows), "tables of dtypes"),
        _norm_rule("x.rank", Rank("x", 1, 8), "x has 1 to 8 dimensions"),
        _norm_rule("empty", NotEmpty(("x", "gamma")), "no empty tensors"),
        _norm_rule("gamma.shape", Shape("gamma", (("last",), (1, "last"))), "gamma is (n,) or (1, n)"),
        _norm_rule("beta.shape", Shape("beta", (("last",), (1, "last"))), "beta is (n,) or (1, n)"),
        _norm_rule("scale.shape", Shape("scale", ((1,),)), "scale is (1,)"),
        _norm_rule("offset.shape", SameShape("offset", "scale"), "offset has the shape of scale"),
        _norm_rule("dst_dtype", Value("dst_dtype", _is(I8, "qint8", "quint4x2"), "dst_dtype int8 or quint4x2", lambda v, call: I8), "dst_dtype",
                   hint="its 8-bit floats are outside what quantpass knows"),
        _norm_rule("int4.last", LastMultiple("x", 8), "quint4x2 packs eight along the last dimension", when=INT4),
    )  # fmt: skip


_HALF, _BFLOAT = _norm_row(F16, F16, I8), _norm_row(BF16, BF16, I8)

# -- npu_add_rms_norm_quant ----------------------------------------------------------------------------------------

_ADDED_COLUMNS = ("x1", "scales1", "zero_points1", "scales2", "zero_points2", "beta")
_PER_COLUMN = ("gamma", "beta", "scales1", "zero_points1", "scales2", "zero_points2")


def _added_row(x: str, scale: str, offset: str, beta: str = "") -> Row:
    return Row(((x,), (scale,), (offset, None), (scale, None), (offset, None), (beta or x, None)))


def _added_norm(*rows: Row) -> tuple[Rule, ...]:
    """``npu_add_rms_norm_quant`` on a chip, by its table of dtypes; quantpass judges norms over the last dimension."""
    return (
        *(_added_rule(f"{a}.present", Present(a), a) for a in ("x1", "x2", "gamma", "scales1")),
        _added_rule("dtypes", DtypeTable(_ADDED_COLUMNS, rows), f"tables of dtypes; {_ACLNN}", modes=("eager",)),
        _added_rule("x1.rank", Rank("x1", 1, 8), "x1 has 1 to 8 dimensions"),
        _added_rule("x2.dtype", SameDtype("x2", "x1"), "x2 has the dtype of x1"),
        _added_rule("x2.shape", SameShape("x2", "x1"), "x2 has the shape of x1"),
        _added_rule("gamma.dtype", SameDtype("gamma", "x1"), "gamma has the dtype of x1"),
        *(_added_rule(f"{a}.shape", Shape(a, (("last",),)), f"{a} has the shape of gamma", "documented, inferred") for a in _PER_COLUMN),
        _added_rule("axis", Value("axis", _is(-1), "axis -1", lambda v, call: -1), "axis"),
        _added_rule("graph", Unavailable("npu_add_rms_norm and npu_quantize in a graph"), "no converter in torch_npu 2.13.0", "probed", modes=("graph",)),
    )  # fmt: skip


_DIVIDES = Rule(
    "add_rms_norm_quant.div_mode",
    ADD_RMS_NORM_QUANT,
    Value("div_mode", lambda v, call: v is True, "div_mode True", lambda v, call: True),
    f"{_ACLNN}: divMode on A2, A3 and the Atlas inference series",
    contradicted=True,
    hint=f"{_ADDED} has both",
)

RULES_A2 = (
    *_norm(_HALF, _BFLOAT),
    *_added_norm(_added_row(F16, F32, I32), _added_row(BF16, BF16, BF16)),
    _DIVIDES,
)

RULES_310P = (
    *_norm(_HALF),
    _norm_rule("310p.last", Size("last", 16), "the last dimension has at least 32 bytes"),
    *_added_norm(_added_row(F16, F32, I32)),
    _DIVIDES,
    _added_rule("310p.last", Size("last", 32), "the last dimension has at least 32 elements"),
)

RULES_950 = (
    *_norm(
        *(_norm_row(x, x, I8, x) for x in (F16, BF16)),
        _norm_row(F32, F32, F32),
        *(_norm_row(x, F32, I32, F32) for x in (F16, BF16)),
    ),
    *_added_norm(
        *(_added_row(x, F32, I32) for x in (F16, BF16)),
        *(_added_row(x, x, x) for x in (F16, BF16, F32)),
        *(_added_row(x, F32, F32, F32) for x in (F16, BF16)),
    ),
)
