"""Legality of SwiGLU with a quantization behind it: ``npu_swiglu_quant``, ``npu_dequant_swiglu_quant``."""

from __future__ import annotations

from typing import Any

from quantpass.basics.torch_types import BF16, F16, F32, I8, I32, I64
from quantpass.chips.calls import OpCall, VendorOp, last_size
from quantpass.chips.companions import LastMultiple, Unavailable
from quantpass.chips.requirements import Absent, DtypeIn, Present, Rank, Requirement, SameShape, Shape, Size, Value
from quantpass.chips.rules import Rule, When, dtype_is, given


def _sizes(call: OpCall) -> dict[str, Any]:
    """The last dimension, its half, the rows of a matrix and the groups that they are shared out to."""
    x, groups = call.tensor("x"), call.tensor("group_index")
    found = last_size(call)
    if x is not None and x.shape:
        found = {"last": x.shape[-1], "half": x.shape[-1] // 2}
    if x is not None and x.rank == 2:
        found["tokens"] = x.shape[0]
    if groups is None:
        found["groups"] = 1
    elif groups.rank in (1, 2):
        found["groups"] = groups.shape[0]
    return found


SWIGLU_QUANT = VendorOp(
    "npu_swiglu_quant(Tensor x, *, Tensor? smooth_scales=None, Tensor? offsets=None, Tensor? group_index=None, "
    "bool activate_left=False, int quant_mode=0, int group_list_type=0, ScalarType? dst_type=None) -> (Tensor, Tensor)",
    _sizes,
    family="swiglu_quant",
)
DEQUANT_SWIGLU_QUANT = VendorOp(
    "npu_dequant_swiglu_quant(Tensor x, *, Tensor? weight_scale=None, Tensor? activation_scale=None, Tensor? bias=None, "
    "Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? group_index=None, bool activate_left=False, "
    "int quant_mode=0, int? dst_type=None, int? round_mode=None, int? activate_dim=None, int swiglu_mode=0, "
    "float clamp_limit=7.0, float glu_alpha=1.702, float glu_bias=1.0) -> (Tensor, Tensor)",
    _sizes,
    unjudged=("dst_type", "round_mode", "activate_dim"),
    family="dequant_swiglu_quant",
)

_DOC = {op: f"{op}.md" for op in (SWIGLU_QUANT, DEQUANT_SWIGLU_QUANT)}
_ACLNN = "aclnnDequantSwigluQuantV2.md"
GROUPED = given("group_index")
STATIC = When("quant_mode 0", lambda call: call.args.get("quant_mode") in (None, 0))
DYNAMIC = When("quant_mode 1", lambda call: call.args.get("quant_mode") == 1)
INTEGERS = dtype_is("x", I32)
FLOATS = When("float x", lambda call: not INTEGERS.test(call))
INT4 = When("dst_type quint4x2", lambda call: call.value("dst_type") == "quint4x2")
INTERLEAVED = When("swiglu_mode 1", lambda call: call.args.get("swiglu_mode") == 1)


def _is(*accepted: Any) -> Any:
    return lambda value, call: value in accepted


def _row(op: VendorOp, name: str, need: Requirement, what: str, evidence: str = "documented", **rest: Any) -> Rule:
    """A row that torch_npu's own page says."""
    return Rule(f"{op.family}.{name}", op, need, f"{_DOC[op]}: {what}", evidence, **rest)


def _aclnn(name: str, need: Requirement, what: str, **rest: Any) -> Rule:
    """A row of ``npu_dequant_swiglu_quant`` that aclnn's page says."""
    return Rule(f"dequant_swiglu_quant.{name}", DEQUANT_SWIGLU_QUANT, need, f"{_ACLNN}: {what}", **rest)


_MODE = Value("quant_mode", _is(0, 1), "quant_mode 0 (static) or 1 (dynamic)", lambda v, call: 1)

SWIGLU = (
    _row(SWIGLU_QUANT, "x.present", Present("x"), "x"),
    _row(SWIGLU_QUANT, "x.dtype", DtypeIn("x", (F16, BF16, F32)), "x"),
    _row(SWIGLU_QUANT, "x.rank", Rank("x", 2, 8), "x has more than one dimension"),
    _row(SWIGLU_QUANT, "last", Size("last", 2, 8192, 2), "the last dimension is even and at most 8192"),
    _row(SWIGLU_QUANT, "int4.last", LastMultiple("x", 4), "int4 asks for a last dimension that is a multiple of 4", when=INT4),
    _row(SWIGLU_QUANT, "smooth.dtype", DtypeIn("smooth_scales", (F32,)), "smooth_scales"),
    _row(SWIGLU_QUANT, "smooth.shape", Shape("smooth_scales", (("groups", "half"), ("groups",))), "smooth_scales is (groups, n) or (groups,)"),
    _row(SWIGLU_QUANT, "offsets.dtype", DtypeIn("offsets", (F32,)), "offsets", when=STATIC),
    _row(SWIGLU_QUANT, "offsets.shape", SameShape("offsets", "smooth_scales"), "offsets has the shape of smooth_scales", when=STATIC),
    _row(SWIGLU_QUANT, "offsets.none", Absent("offsets"), "offsets of a static quantization only", when=DYNAMIC),
    _row(SWIGLU_QUANT, "group.dtype", DtypeIn("group_index", (I32,)), "group_index"),
    _row(SWIGLU_QUANT, "group.rank", Rank("group_index", 1, 1), "group_index has one dimension"),
    _row(SWIGLU_QUANT, "mode", _MODE, "quant_mode"),
    _row(SWIGLU_QUANT, "group_list_type", Value("group_list_type", _is(0, 1), "group_list_type 0 (sums) or 1 (counts)", lambda v, call: 0), "group_list_type"),
    _row(SWIGLU_QUANT, "dst_type", Value("dst_type", _is(I8, "qint8", "quint4x2"), "dst_type int8 or quint4x2", lambda v, call: I8), "dst_type"),
)  # fmt: skip

_COMMON = (
    _row(DEQUANT_SWIGLU_QUANT, "x.present", Present("x"), "x"),
    _row(DEQUANT_SWIGLU_QUANT, "x.dtype", DtypeIn("x", (I32, F16, BF16)), "x"),
    _row(DEQUANT_SWIGLU_QUANT, "last", Size("last", 2, None, 2), "the last dimension is even"),
    _row(DEQUANT_SWIGLU_QUANT, "scale.dtype", DtypeIn("weight_scale", (F32,)), "weight_scale"),
    _row(DEQUANT_SWIGLU_QUANT, "activation.dtype", DtypeIn("activation_scale", (F32,)), "activation_scale"),
    _row(DEQUANT_SWIGLU_QUANT, "activation.present", Present("activation_scale"), "activation_scale where x is int32", when=INTEGERS),
    _row(DEQUANT_SWIGLU_QUANT, "floats.activation_scale", Absent("activation_scale"), "a float x is not dequantized", when=FLOATS),
    _row(DEQUANT_SWIGLU_QUANT, "floats.bias", Absent("bias"), "a float x is not dequantized", when=FLOATS),
    _row(DEQUANT_SWIGLU_QUANT, "group.dtype", DtypeIn("group_index", (I64,)), "group_index"),
    _row(DEQUANT_SWIGLU_QUANT, "group.offset", Absent("quant_offset"), "no quant_offset beside group_index", when=GROUPED),
    _row(DEQUANT_SWIGLU_QUANT, "mode", _MODE, "quant_mode"),
    _row(DEQUANT_SWIGLU_QUANT, "swiglu_mode", Value("swiglu_mode", _is(0, 1, 2), "swiglu_mode 0, 1 or 2", lambda v, call: 0), "swiglu_mode"),
    _aclnn("dynamic.offset", Absent("quant_offset"), "no quantOffset with a dynamic quantization", when=DYNAMIC),
    _aclnn("interleaved.left", Value("activate_left", lambda v, call: v is True, "activate_left True", lambda v, call: True, False), "swigluMode 1 asks for activateLeft", when=INTERLEAVED),
)  # fmt: skip

_ALLOWS = f"{_DOC[DEQUANT_SWIGLU_QUANT]} has it"

RULES_A2 = (
    *SWIGLU,
    *_COMMON,
    _row(DEQUANT_SWIGLU_QUANT, "x.rank", Rank("x", 2, 2), "x is (tokens, 2h)"),
    _row(DEQUANT_SWIGLU_QUANT, "scale.shape", Shape("weight_scale", (("groups", "last"),)), "weight_scale is (groups, 2h)"),
    _row(DEQUANT_SWIGLU_QUANT, "activation.shape", Shape("activation_scale", (("tokens", 1),)), "activation_scale is (tokens, 1)"),
    _row(DEQUANT_SWIGLU_QUANT, "bias.dtype", DtypeIn("bias", (I32,)), "bias"),
    _row(DEQUANT_SWIGLU_QUANT, "quant.dtype", DtypeIn("quant_scale", (F32, F16, BF16)), "quant_scale"),
    _row(DEQUANT_SWIGLU_QUANT, "quant.static", DtypeIn("quant_scale", (F32,)), "a static quant_scale is float32", when=STATIC),
    _row(DEQUANT_SWIGLU_QUANT, "group.rank", Rank("group_index", 1, 1), "group_index has one dimension"),
    _row(DEQUANT_SWIGLU_QUANT, "group.bias", Absent("bias"), "no bias beside group_index", when=GROUPED),
    _row(DEQUANT_SWIGLU_QUANT, "group.last", Size("last", 128, 2 * 10496, 128), "h is a multiple of 64 and at most 10496 beside group_index", when=GROUPED),
    _aclnn("x.half", DtypeIn("x", (I32, BF16)), "x on A2 and A3", contradicted=True, hint=f"{_DOC[DEQUANT_SWIGLU_QUANT]} has a float16 x"),
    _aclnn("group.present", Present("group_index"), "groupIndex has to be given on A2 and A3", contradicted=True, hint=f"{_DOC[DEQUANT_SWIGLU_QUANT]} leaves it out"),
    _aclnn("group.7232", Size("last", 2, 7232), "x's last dimension beside groupIndex on A2 and A3", when=GROUPED, contradicted=True, hint=f"{_DOC[DEQUANT_SWIGLU_QUANT]} says 20992"),
    _aclnn("scale.present", Present("weight_scale"), "weightScale of an int32 x", when=INTEGERS, contradicted=True, hint=f"{_DOC[DEQUANT_SWIGLU_QUANT]} only advises it"),
    _aclnn("scale.none", Absent("weight_scale"), "no weightScale beside a float x", when=FLOATS, contradicted=True, hint=_ALLOWS),
)  # fmt: skip

RULES_950 = (
    *SWIGLU,
    *_COMMON,
    _aclnn("x.rank", Rank("x", 2, 8), "x has 2 to 8 dimensions"),
    _aclnn("scale.present", Present("weight_scale"), "weightScale of an int32 x", when=INTEGERS),
    _aclnn("scale.none", Absent("weight_scale"), "no weightScale beside a float x", when=FLOATS),
    _aclnn("scale.shape", Shape("weight_scale", (("groups", "last"),)), "weightScale is (groups, 2h)", when=GROUPED),
    _aclnn("scale.one", Shape("weight_scale", (("last",), (1, "last"))), "weightScale is (2h,) or (1, 2h)", when=When("no group_index", lambda call: not GROUPED.test(call))),
    _aclnn("bias.dtype", DtypeIn("bias", (F32, F16, BF16, I32)), "bias"),
    _aclnn("bias.shape", Shape("bias", (("last",), ("groups", "last"))), "bias is (2h,) or (groups, 2h)"),
    _aclnn("quant.dtype", DtypeIn("quant_scale", (F32,)), "quantScale"),
    _aclnn("quant.static", Shape("quant_scale", ((1,),)), "a static quantScale is (1,)", when=STATIC),
    _aclnn("quant.dynamic", Shape("quant_scale", (("half",), ("groups", "half"))), "a dynamic quantScale is (h,) or (groups, h)", when=DYNAMIC),
    _aclnn("offset.shape", SameShape("quant_offset", "quant_scale"), "quantOffset has the shape of quantScale", when=STATIC),
    _aclnn("group.rank", Rank("group_index", 1, 2), "groupIndex is (groups,) or (groups, 2)"),
)  # fmt: skip

RULES_310P = tuple(
    _row(op, "unavailable", Unavailable("npu_swiglu and npu_quantize"), "supported products")
    for op in (SWIGLU_QUANT, DEQUANT_SWIGLU_QUANT)
)
