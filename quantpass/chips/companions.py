"""Legality of the operators around the two matmuls: parameter packing, quantize, dequantize, format casts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantpass.basics.symbolic import statically_true
from quantpass.basics.tensor_spec import TensorSpec
from quantpass.basics.torch_types import BF16, F16, F32, I8, I32
from quantpass.chips.calls import OpCall, VendorOp, last_size
from quantpass.chips.requirements import (
    Absent,
    DtypeIn,
    Finding,
    Layout,
    NotEmpty,
    Present,
    Rank,
    SameDtype,
    SameShape,
    Shape,
    Size,
    Value,
)
from quantpass.chips.rules import Rule, When

TQP = VendorOp("npu_trans_quant_param(Tensor scale, Tensor? offset=None, int? round_mode=0) -> Tensor")
INT4PACK = VendorOp("npu_convert_weight_to_int4pack(Tensor weight, int inner_k_tiles=0) -> Tensor")
FORMAT_CAST = VendorOp(
    "npu_format_cast(Tensor input, int acl_format, *, int? customize_dtype=None, int? input_dtype=None) -> Tensor",
    unjudged=("input_dtype",),
)


def _dynamic_sizes(call: OpCall) -> dict[str, Any]:
    """The last dimension, and how many groups of rows have smoothing scales of their own."""
    groups = call.tensor("group_index")
    return last_size(call) | ({"groups": groups.shape[0]} if groups is not None and groups.rank == 1 else {})


DYNAMIC_QUANT = VendorOp(
    "npu_dynamic_quant(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, int? dst_type=None, "
    'str quant_mode="pertoken", float dst_type_max=0.) -> (Tensor, Tensor)',
    _dynamic_sizes,
    unjudged=("dst_type_max",),
)
ANTI_QUANT = VendorOp(
    "npu_anti_quant(Tensor x, Tensor scale, *, Tensor? offset=None, int? dst_dtype=None, int? src_dtype=None) "
    "-> Tensor",
    unjudged=("src_dtype",),
)
QUANTIZE = VendorOp(
    "npu_quantize(Tensor input, Tensor scales, Tensor? zero_points, int dtype, int axis=1, bool div_mode=True) "
    "-> Tensor"
)

GRAPH = ("graph",)
_NZ, _ND = 29, 2


@dataclass(frozen=True, slots=True)
class ScaleAndOffset:
    """Shapes of ``npu_trans_quant_param``: 1-D sizes that are equal or 1, or equal ``(1, n)``."""

    @property
    def want(self) -> str:
        return "scale (n,), (1,) or (1, n), and an offset whose 1-D size is equal or 1, or that is equal in 2-D"

    def check(self, call: OpCall) -> list[Finding]:
        scale, offset = call.tensor("scale"), call.tensor("offset")
        if scale is None:
            return []
        if scale.rank not in (1, 2) or (scale.rank == 2 and statically_true(scale.shape[0] == 1) is False):
            sizes = scale.shape[0] if scale.shape else 1
            return [
                Finding(f"scale has shape {scale.shape}", self.want, {"scale": TensorSpec(scale.dtype_name, (sizes,))})
            ]
        if offset is None:
            return []
        fact = f"scale has shape {scale.shape} and offset has shape {offset.shape}"
        fix = {"offset": TensorSpec(offset.dtype_name, scale.shape)}
        if scale.rank != offset.rank:
            return [Finding(fact, self.want, fix)]
        equal = all(statically_true(a == b) is not False for a, b in zip(scale.shape, offset.shape, strict=True))
        one = scale.rank == 1 and 1 in (scale.shape[0], offset.shape[0])
        return [] if equal or one else [Finding(fact, self.want, fix)]


@dataclass(frozen=True, slots=True)
class LastMultiple:
    """The last dimension of a tensor is a multiple of ``of``."""

    arg: str
    of: int

    @property
    def want(self) -> str:
        return f"{self.arg} with a last dimension that is a multiple of {self.of}"

    def check(self, call: OpCall) -> list[Finding]:
        spec = call.tensor(self.arg)
        if spec is None or not spec.shape:
            return []
        last = spec.shape[-1]
        holds = statically_true(last % self.of == 0)
        if holds is True:
            return []
        if holds is None:
            return [Finding(f"{self.arg}'s last dimension {last} % {self.of} == 0", self.want, undecided=True)]
        fix = {self.arg: TensorSpec(spec.dtype_name, (*spec.shape[:-1], -(-last // self.of) * self.of))}
        return [Finding(f"{self.arg} has shape {spec.shape}", self.want, fix)]


@dataclass(frozen=True, slots=True)
class Unavailable:
    """The operator does not exist on the chip, or in the mode."""

    where: str

    @property
    def want(self) -> str:
        return f"another operator: {self.where}"

    def check(self, call: OpCall) -> list[Finding]:
        return [Finding(f"{call.op} in {call.mode} mode", self.want)]


@dataclass(frozen=True, slots=True)
class AlongAxis:
    """Parameters of ``npu_quantize`` that multiplies: for the last axis, or with ``axis=-2`` for the one before it."""

    arg: str

    @property
    def want(self) -> str:
        return f"{self.arg} of shape (1,), (size of the axis,), or as many dimensions as input with 1 in all others"

    def check(self, call: OpCall) -> list[Finding]:
        x, given = call.tensor("input"), call.tensor(self.arg)
        at = -2 if call.args.get("axis") == -2 else -1
        if x is None or given is None or x.rank < -at:
            return []
        size = x.shape[at]
        whole = (1,) * (x.rank + at) + (size,) + (1,) * (-at - 1)
        forms = [(1,), (size,), *([whole, (1,) * x.rank] if x.rank > 1 else [])]
        verdicts = [_matches(given.shape, form) for form in forms]
        if any(v is True for v in verdicts):
            return []
        fact = f"{self.arg} has shape {given.shape} for axis {at} of input {x.shape}"
        if any(v is None for v in verdicts):
            return [Finding(fact, self.want, undecided=True)]
        return [Finding(fact, self.want, {self.arg: TensorSpec(given.dtype_name, (size,))})]


def _matches(shape: tuple[Any, ...], form: tuple[Any, ...]) -> bool | None:
    if len(shape) != len(form):
        return False
    verdicts = [statically_true(a == b) for a, b in zip(shape, form, strict=True)]
    return False if False in verdicts else None if None in verdicts else True


def _is_int4(arg: str) -> When:
    def test(call: OpCall) -> bool:
        return bool(call.value(arg) == "quint4x2")

    return When(f"{arg} quint4x2", test)


def _one_of(*accepted: Any) -> Any:
    return lambda value, call: value in accepted


CUSTOMIZED = When("customize_dtype given", lambda call: call.args.get("customize_dtype") is not None)
_GROUPED = When("group_index given", lambda call: call.args.get("group_index") is not None)
DIVIDES = When("div_mode=True", lambda call: call.args.get("div_mode") in (None, True))
MULTIPLIES = When("div_mode=False", lambda call: call.args.get("div_mode") is False)
_Q = "npu_quantize.md"

_COMMON = (
    Rule("tqp.scale.present", TQP, Present("scale"), "npu_trans_quant_param.md: scale"),
    Rule("tqp.scale.dtype", TQP, DtypeIn("scale", (F32,)), "npu_trans_quant_param.md: scale is float32", "documented",
         hint="a scale that is int64 already has been converted: don't convert it twice"),
    Rule("tqp.offset.dtype", TQP, DtypeIn("offset", (F32,)), "npu_trans_quant_param.md: offset is float32"),
    Rule("tqp.empty", TQP, NotEmpty(("scale", "offset")), "npu_trans_quant_param.md: no empty tensors"),
    Rule("tqp.shapes", TQP, ScaleAndOffset(), "aclnn_trans_quant_param_v2.cpp:63-108", "documented, code, probed",
         hint="the document's (g, 1) and (g, n) for grouped matmuls are rejected by the operator"),
    Rule("tqp.contiguous", TQP, Layout("scale", transposed=False), "npu_trans_quant_param.md: contiguous tensors"),
    Rule("tqp.round_mode", TQP, Value("round_mode", _one_of(0, 1), "round_mode 0 or 1", lambda v, call: 0),
         "npu_trans_quant_param.md: round_mode", "documented, code"),
    Rule("format_cast.input.present", FORMAT_CAST, Present("input"), "npu_format_cast.md: input"),
    Rule("format_cast.rank", FORMAT_CAST, Rank("input", 2, 6), "FormatCastKernelNpu.cpp:45-56", "code",
         when=When("acl_format 29", lambda call: call.args.get("acl_format") == _NZ), hint="a vector silently stays in ND"),
    Rule("format_cast.format", FORMAT_CAST, Value("acl_format", _one_of(_ND, _NZ), "acl_format 2 (ND) or 29 (FRACTAL_NZ)", lambda v, call: _NZ),
         "npu_format_cast.md: acl_format", "documented", hint="other formats are outside what quantpass knows"),
    Rule("format_cast.graph", FORMAT_CAST, Unavailable("cast the parameter before compiling"), "no fake kernel, no converter in torch_npu 2.13.0", "probed", modes=GRAPH,
         hint="quantpass plans the cast in the graph and carries it out on the parameter"),
    Rule("anti_quant.x.present", ANTI_QUANT, Present("x"), "npu_anti_quant.md: x"),
    Rule("anti_quant.x.dtype", ANTI_QUANT, DtypeIn("x", (I8, I32)), "npu_anti_quant.md: x"),
    Rule("anti_quant.scale.dtype", ANTI_QUANT, DtypeIn("scale", (F32, BF16)), "npu_anti_quant.md: scale"),
    Rule("anti_quant.scale.shape", ANTI_QUANT, Shape("scale", (("last",), (1,))), "npu_anti_quant.md: scale is (1,) or the last dimension",
         hint="the operator scales along the last dimension only"),
    Rule("anti_quant.offset.shape", ANTI_QUANT, Shape("offset", (("last",), (1,))), "npu_anti_quant.md: offset"),
    Rule("anti_quant.offset.dtype", ANTI_QUANT, SameDtype("offset", "scale"), "npu_anti_quant.md: offset"),
    Rule("anti_quant.dst", ANTI_QUANT, Value("dst_dtype", _one_of(F16, BF16), "dst_dtype float16 or bfloat16", lambda v, call: F16), "npu_anti_quant.md: dst_dtype"),
    Rule("quantize.input.present", QUANTIZE, Present("input"), f"{_Q}: input"),
    Rule("quantize.input.dtype", QUANTIZE, DtypeIn("input", (F16, BF16, F32)), f"{_Q}: input"),
    Rule("quantize.dtype.divide", QUANTIZE, Value("dtype", _one_of("qint8", "quint8", "qint32"), "dtype qint8, quint8 or qint32 with div_mode=True"),
         f"{_Q}: dtype", "documented, code", when=DIVIDES, hint="quint4x2 needs div_mode=False"),
    Rule("quantize.dtype.multiply", QUANTIZE, Value("dtype", _one_of("qint8", "quint4x2"), "dtype qint8 or quint4x2 with div_mode=False"),
         f"{_Q}: dtype", "documented, code", when=MULTIPLIES),
    Rule("quantize.scales.present", QUANTIZE, Present("scales"), f"{_Q}: scales"),
    Rule("quantize.scales.multiply", QUANTIZE, SameDtype("scales", "input"), f"{_Q}: scales has the dtype of self with div_mode=False", when=MULTIPLIES,
         hint="give 1 / scale in the dtype of the tensor"),
    Rule("quantize.scales.divide", QUANTIZE, DtypeIn("scales", (F32, BF16)), f"{_Q}: scales with div_mode=True", when=DIVIDES),
    *(Rule(f"quantize.{a}.shape", QUANTIZE, AlongAxis(a), f"{_Q}: {a} with div_mode=False; aclnnAscendQuantV3.md", when=MULTIPLIES,
           hint="the last axis is meant unless axis is -2: a scale for each head of (..., heads, h)") for a in ("scales", "zero_points")),
    Rule("quantize.zero_points.alike", QUANTIZE, SameShape("zero_points", "scales"), f"{_Q}: zero_points has the shape of scales with div_mode=False", when=MULTIPLIES),
    Rule("quantize.axis", QUANTIZE, Value("axis", lambda v, call: (x := call.tensor("input")) is None or -2 <= v < max(x.rank, 2), "axis from -2 to the last dimension", lambda v, call: -1, 1),
         f"{_Q}: axis with div_mode=False; QuantizeKernelNpuOpApi.cpp: below -1 it is handed over, else it is -1", "documented, code", when=MULTIPLIES),
    Rule("quantize.zero_points.multiply", QUANTIZE, SameDtype("zero_points", "scales"), f"{_Q}: zero_points has the dtype of scales with div_mode=False", when=MULTIPLIES),
)  # fmt: skip

_A2_ONLY = (
    Rule("format_cast.customize", FORMAT_CAST, Value("acl_format", _one_of(_NZ), "acl_format 29", lambda v, call: _NZ), "npu_format_cast.md: customize_dtype sets the tiles of FRACTAL_NZ", "documented",
         when=CUSTOMIZED),
    Rule("quantize.int4.last", QUANTIZE, LastMultiple("input", 8), f"{_Q}: quint4x2 packs eight along the last dimension", "documented, code", when=_is_int4("dtype")),
    Rule("int4pack.weight.present", INT4PACK, Present("weight"), "npu_convert_weight_to_int4pack.md: weight"),
    Rule("int4pack.dtype", INT4PACK, DtypeIn("weight", (I32,)), "npu_convert_weight_to_int4pack.md: weight is int32", "documented, code"),
    Rule("int4pack.rank", INT4PACK, Rank("weight", 2, 2), "npu_convert_weight_to_int4pack.md: weight has 2 dimensions", "documented, code"),
    Rule("int4pack.contiguous", INT4PACK, Layout("weight", transposed=False), "npu_convert_weight_to_int4pack.md: contiguous", "documented, code",
         hint="a transposed weight is packed as (n, k/8) and viewed transposed"),
    Rule("int4pack.last", INT4PACK, LastMultiple("weight", 8), "npu_convert_weight_to_int4pack.md: the last dimension a multiple of 8", "documented, code"),
    Rule("int4pack.graph", INT4PACK, Unavailable("pack the parameter before compiling"), "no fake kernel, no converter in torch_npu 2.13.0", "probed", modes=GRAPH, contradicted=True,
         hint="its document says that it supports graph mode"),
    Rule("dynamic_quant.input.present", DYNAMIC_QUANT, Present("input"), "npu_dynamic_quant.md: input"),
    Rule("dynamic_quant.input", DYNAMIC_QUANT, DtypeIn("input", (F16, BF16)), "npu_dynamic_quant.md: input is float16 or bfloat16"),
    Rule("dynamic_quant.rank", DYNAMIC_QUANT, Rank("input", 2, 8), "npu_dynamic_quant.md: input has more than one dimension"),
    Rule("dynamic_quant.smooth.dtype", DYNAMIC_QUANT, SameDtype("smooth_scales", "input"), "npu_dynamic_quant.md: smooth_scales has the dtype of input"),
    Rule("dynamic_quant.smooth.shape", DYNAMIC_QUANT, Shape("smooth_scales", (("last",),)), "npu_dynamic_quant.md: smooth_scales has the size of the last dimension",
         when=When("no group_index", lambda call: call.args.get("group_index") is None)),
    Rule("dynamic_quant.group.dtype", DYNAMIC_QUANT, DtypeIn("group_index", (I32,)), "npu_dynamic_quant.md: group_index is int32; dynamic_quant_tiling.cpp:378", "documented, code"),
    Rule("dynamic_quant.group.rank", DYNAMIC_QUANT, Rank("group_index", 1, 1), "npu_dynamic_quant.md: group_index has one dimension", "documented, code"),
    Rule("dynamic_quant.group.experts", DYNAMIC_QUANT, Size("groups", 1, 1024), "dynamic_quant_tiling.cpp:235", "code"),
    Rule("dynamic_quant.group.scales", DYNAMIC_QUANT, Present("smooth_scales"), "npu_dynamic_quant.md: group_index shares smooth_scales out", when=_GROUPED),
    Rule("dynamic_quant.group.smooth", DYNAMIC_QUANT, Shape("smooth_scales", (("groups", "last"),)), "npu_dynamic_quant.md: smooth_scales has a row for each group; dynamic_quant_tiling.cpp:245-251", "documented, code", when=_GROUPED),
    Rule("dynamic_quant.dst", DYNAMIC_QUANT, Value("dst_type", _one_of(I8, "qint8", "quint4x2"), "dst_type int8 or quint4x2", lambda v, call: I8),
         "npu_dynamic_quant.md: dst_type"),
    Rule("dynamic_quant.int4.last", DYNAMIC_QUANT, LastMultiple("input", 8), "npu_dynamic_quant.md: quint4x2: the last dimension a multiple of 8", when=_is_int4("dst_type")),
    Rule("dynamic_quant.mode", DYNAMIC_QUANT, Value("quant_mode", _one_of("pertoken", "pertensor"), "quant_mode 'pertoken' or 'pertensor'", lambda v, call: "pertoken"),
         "npu_dynamic_quant.md: quant_mode"),
)  # fmt: skip

RULES_A2 = (*_COMMON, *_A2_ONLY)

RULES_950 = (
    *(rule for rule in RULES_A2 if rule.op != ANTI_QUANT),
    Rule("format_cast.950.customize", FORMAT_CAST, Absent("customize_dtype"), "npu_format_cast.md: customize_dtype on A2 and A3 with CANN 9.1.0 alone", contradicted=True,
         hint="FormatCastKernelNpu.cpp:105-133 hands it over on the Ascend 950, and a vendor test gives it there"),
    Rule("anti_quant.unavailable", ANTI_QUANT, Unavailable("npu_weight_quant_batchmatmul, or arithmetic of its own"), "aclnnAscendAntiQuant.md: supported products"),
)  # fmt: skip

RULES_310P = (
    *_COMMON,
    Rule("format_cast.310p.customize", FORMAT_CAST, Absent("customize_dtype"), "npu_format_cast.md: customize_dtype on A2 and A3 with CANN 9.1.0 alone; FormatCastKernelNpu.cpp:189", "documented, code"),
    Rule("quantize.310p.axis", QUANTIZE, Value("axis", lambda v, call: v != -2, "axis -1", lambda v, call: -1, 1), f"{_Q}: axis -2 on the Atlas inference series", when=MULTIPLIES,
         hint="lay the heads out as the last dimension, or quantize each by itself"),
    Rule("int4pack.310p", INT4PACK, Unavailable("int8 weights"), "npu_convert_weight_to_int4pack.md: supported products", "documented"),
    Rule("dynamic_quant.310p", DYNAMIC_QUANT, Unavailable("a static scale"), "npu_dynamic_quant.md: supported products", "documented", contradicted=True,
         hint="aclnnDynamicQuant.md lists the Atlas inference series, and kernels for it exist (dynamic_quant_align_310p.h)"),
    Rule("anti_quant.310p.x", ANTI_QUANT, DtypeIn("x", (I8,)), "npu_anti_quant.md: supported products", "inferred"),
    Rule("anti_quant.310p.dst", ANTI_QUANT, Value("dst_dtype", _one_of(F16), "dst_dtype float16", lambda v, call: F16), "npu_anti_quant.md: supported products", "inferred"),
    Rule("quantize.310p.input", QUANTIZE, DtypeIn("input", (F16, F32)), f"{_Q}: self on the Atlas inference series"),
    Rule("quantize.310p.int4", QUANTIZE, Unavailable("int8"), "npu_quantize.md: supported products", "inferred", when=_is_int4("dtype")),
)  # fmt: skip
