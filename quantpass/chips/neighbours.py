"""Legality of fused operators beside the quantized matmuls: SwiGLU, norms and experts with a quantization in them."""

from __future__ import annotations

from typing import Any

from quantpass.basics.torch_types import BF16, F16, F32, I8, I32, I64
from quantpass.chips.calls import OpCall, VendorOp, last_size, matrix_sizes
from quantpass.chips.companions import Unavailable
from quantpass.chips.requirements import (
    Absent,
    DtypeIn,
    EqualSizes,
    Layout,
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
from quantpass.chips.rules import Rule, dtype_is, given


def _experts(weight: str) -> Any:
    """Sizes of x (m, k) beside a weight for each of some experts."""

    def sizes(call: OpCall) -> dict[str, Any]:
        spec = call.tensor(weight)
        found = matrix_sizes(call.tensor("x"), "m", "k") | matrix_sizes(spec, "k_of_weight", "n")
        return found | ({"experts": spec.shape[0]} if spec is not None and spec.rank == 3 else {})

    return sizes


def _stored_experts(call: OpCall) -> dict[str, Any]:
    """As above, for weights that are given as they are stored: (experts, n, k)."""
    spec = call.tensor("quantized_weight")
    found = matrix_sizes(call.tensor("x"), "m", "k") | matrix_sizes(spec, "n", "k_of_weight")
    return found | ({"experts": spec.shape[0]} if spec is not None and spec.rank == 3 else {})


def _batches(call: OpCall) -> dict[str, Any]:
    x1, x2 = call.tensor("x1"), call.tensor("x2")
    found = matrix_sizes(x1, "m", "k") | matrix_sizes(x2, "k_of_x2", "n")
    found |= {"batch": x1.shape[0]} if x1 is not None and x1.rank == 3 else {}
    return found | ({"batch_of_x2": x2.shape[0]} if x2 is not None and x2.rank == 3 else {})


def _swiglu(call: OpCall) -> dict[str, Any]:
    """The last dimension, its half, the rows of a matrix and the groups that they are shared out to."""
    x, groups = call.tensor("x"), call.tensor("group_index")
    found = last_size(call)
    if "last" in found:
        found["half"] = found["last"] // 2
    if x is not None and x.rank == 2:
        found["tokens"] = x.shape[0]
    if groups is None:
        found["groups"] = 1
    elif groups.rank == 1:
        found["groups"] = groups.shape[0]
    return found


GMM_SWIGLU = VendorOp(
    "npu_grouped_matmul_swiglu_quant(Tensor x, Tensor weight, Tensor group_list, Tensor weight_scale, Tensor x_scale, *, "
    "Tensor? bias=None, Tensor? offset=None) -> (Tensor, Tensor, Tensor)",
    _experts("weight"),
    weight="weight",
    family="gmm_swiglu",
)
GMM_SWIGLU_V2 = VendorOp(
    "npu_grouped_matmul_swiglu_quant_v2(Tensor x, Tensor[] weight, Tensor[] weight_scale, Tensor x_scale, "
    "Tensor group_list, *, Tensor? smooth_scale=None, Tensor[]? weight_assist_matrix=None, Tensor? bias=None, "
    "int? dequant_mode=0, int? dequant_dtype=6, int? quant_mode=0, int? quant_dtype=1, int? group_list_type=0, "
    "int[]? tuning_config=None, int? x_dtype=None, int? weight_dtype=None, int? weight_scale_dtype=None, "
    "int? x_scale_dtype=None) -> (Tensor, Tensor)",
    _experts("weight"),
    unjudged=(
        *("dequant_dtype", "quant_dtype", "tuning_config", "x_dtype", "weight_dtype", "weight_scale_dtype"),
        "x_scale_dtype",
    ),
    weight="weight",
    family="gmm_swiglu_v2",
)
QGMMD = VendorOp(
    "npu_quant_grouped_matmul_dequant(Tensor x, Tensor quantized_weight, Tensor weight_scale, Tensor group_list, *, "
    "Tensor? bias=None, Tensor? x_scale=None, Tensor? x_offset=None, Tensor? smooth_scale=None, "
    "str? quant_mode='pertoken') -> Tensor",
    _stored_experts,
    weight="quantized_weight",
    family="qgmmd",
)
RMS_NORM_QUANT = VendorOp(
    "npu_rms_norm_quant(Tensor x, Tensor gamma, Tensor beta, Tensor scale, Tensor offset, float epsilon=1e-06, *, "
    "int? dst_dtype=None) -> Tensor",
    family="rms_norm_quant",
)
SWIGLU_QUANT = VendorOp(
    "npu_swiglu_quant(Tensor x, *, Tensor? smooth_scales=None, Tensor? offsets=None, Tensor? group_index=None, "
    "bool activate_left=False, int quant_mode=0, int group_list_type=0, ScalarType? dst_type=None) -> (Tensor, Tensor)",
    _swiglu,
    family="swiglu_quant",
)
DEQUANT_SWIGLU_QUANT = VendorOp(
    "npu_dequant_swiglu_quant(Tensor x, *, Tensor? weight_scale=None, Tensor? activation_scale=None, Tensor? bias=None, "
    "Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? group_index=None, bool activate_left=False, "
    "int quant_mode=0, int? dst_type=None, int? round_mode=None, int? activate_dim=None, int swiglu_mode=0, "
    "float clamp_limit=7.0, float glu_alpha=1.702, float glu_bias=1.0) -> (Tensor, Tensor)",
    _swiglu,
    unjudged=("dst_type", "round_mode", "activate_dim"),
    family="dequant_swiglu_quant",
)
REDUCE_SUM = VendorOp(
    "npu_quant_matmul_reduce_sum(Tensor x1, Tensor x2, *, Tensor? x1_scale=None, Tensor? x2_scale=None) -> Tensor",
    _batches,
    weight="x2",
    family="reduce_sum",
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
TRANSPOSE_QMM = VendorOp(
    "npu_transpose_quant_batchmatmul(Tensor x1, Tensor x2, int dtype, *, Tensor? bias=None, Tensor? x1_scale=None, "
    "Tensor? x2_scale=None, int[]? group_sizes=None, int[]? perm_x1=None, int[]? perm_x2=None, int[]? perm_y=None, "
    "int? batch_split_factor=1, int? x1_dtype=None, int? x2_dtype=None) -> Tensor",
    family="transpose_qmm",
)

_NAMES = {
    GMM_SWIGLU: "npu_grouped_matmul_swiglu_quant_v2.md (the first version is not in it)",
    GMM_SWIGLU_V2: "npu_grouped_matmul_swiglu_quant_v2.md",
    QGMMD: "test_quant_grouped_matmul_dequant.py, for the 310P alone",
}


def _one_of(*accepted: Any) -> Any:
    return lambda value, call: value in accepted


def _row(op: VendorOp, name: str, need: Requirement, what: str, evidence: str = "documented", **rest: Any) -> Rule:
    """A row of an operator that has one document."""
    return Rule(f"{op.family}.{name}", op, need, f"{_NAMES.get(op, f'{op}.md')}: {what}", evidence, **rest)


INT4 = dtype_is("weight", I32)
INT8 = dtype_is("weight", I8)
GROUPED = given("group_index")


def _experts_rows(op: VendorOp, evidence: str) -> tuple[Rule, ...]:
    """What both versions of the grouped matmul with SwiGLU and quantization take on A2 and A3."""
    return (
        *(_row(op, f"{a}.present", Present(a), a, evidence) for a in ("x", "weight", "weight_scale", "x_scale", "group_list")),
        _row(op, "x.dtype", DtypeIn("x", (I8, I32)), "x", evidence),
        _row(op, "x.rank", Rank("x", 2, 2), "x is (m, k)", evidence),
        _row(op, "weight.dtype", DtypeIn("weight", (I8, I32)), "weight", evidence),
        _row(op, "weight.rank", Rank("weight", 3, 3), "weight is (experts, k, n)", evidence),
        _row(op, "k", EqualSizes("k", "k_of_weight", "x (m, k) and weight (experts, k, n) with the same k"), "formula", evidence),
        _row(op, "n", Size("n", 2, None, 2), "SwiGLU halves n", evidence),
        _row(op, "int8.nz", Layout("weight", "NZ"), "an int8 weight in FRACTAL_NZ only", evidence, when=INT8,
             hint="cast it with npu_format_cast(weight, 29)"),
        _row(op, "x_scale.dtype", DtypeIn("x_scale", (F32,)), "x_scale", evidence),
        _row(op, "x_scale.shape", Shape("x_scale", (("m",),)), "x_scale is (m,)", evidence),
        _row(op, "weight_scale.shape", Shape("weight_scale", (("experts", "n"),)), "weight_scale of an int8 weight is (experts, n)", evidence, when=INT8),
        _row(op, "group_list.dtype", DtypeIn("group_list", (I64,)), "group_list", evidence),
        _row(op, "group_list.shape", Shape("group_list", (("experts",),)), "group_list has a number for each expert", evidence),
        _row(op, "bias", Absent("bias"), "bias: None alone so far", evidence, hint="no expert's bias goes in here: use npu_grouped_matmul"),
    )  # fmt: skip


_SWIGLU_A2 = (
    *_experts_rows(GMM_SWIGLU, "inferred"),
    _row(GMM_SWIGLU, "offset", Absent("offset"), "no offset", "inferred"),
    *_experts_rows(GMM_SWIGLU_V2, "documented"),
    _row(GMM_SWIGLU_V2, "weight_scale.rank", Rank("weight_scale", 2, 3), "weight_scale of an int4 weight has 2 or 3 dimensions", when=INT4),
    _row(GMM_SWIGLU_V2, "smooth", DtypeIn("smooth_scale", (F32,)), "smooth_scale"),
    _row(GMM_SWIGLU_V2, "smooth.int4", Absent("smooth_scale"), "smooth_scale beside int4 operands only", when=INT8),
    _row(GMM_SWIGLU_V2, "assist", Absent("weight_assist_matrix"), "weight_assist_matrix beside int8 x and an int4 weight only", when=INT8),
    _row(GMM_SWIGLU_V2, "dequant_mode", Value("dequant_mode", _one_of(0, 1), "dequant_mode 0 or 1", lambda v, call: 0), "dequant_mode on A2 and A3"),
    _row(GMM_SWIGLU_V2, "dequant_mode.int8", Value("dequant_mode", _one_of(0), "dequant_mode 0", lambda v, call: 0), "dequant_mode of int8 weights", when=INT8),
    _row(GMM_SWIGLU_V2, "quant_mode", Value("quant_mode", _one_of(0), "quant_mode 0", lambda v, call: 0), "quant_mode on A2 and A3"),
    _row(GMM_SWIGLU_V2, "group_list_type", Value("group_list_type", _one_of(0, 1), "group_list_type 0 or 1", lambda v, call: 0), "group_list_type"),
)  # fmt: skip

_SWIGLU_QUANT_A2 = (
    _row(SWIGLU_QUANT, "x.present", Present("x"), "x"),
    _row(SWIGLU_QUANT, "x.dtype", DtypeIn("x", (F16, BF16, F32)), "x"),
    _row(SWIGLU_QUANT, "x.rank", Rank("x", 2, 8), "x has more than one dimension"),
    _row(SWIGLU_QUANT, "last", Size("last", 2, 8192, 2), "the last dimension is even and at most 8192"),
    _row(SWIGLU_QUANT, "smooth.dtype", DtypeIn("smooth_scales", (F32,)), "smooth_scales"),
    _row(SWIGLU_QUANT, "smooth.shape", Shape("smooth_scales", (("groups", "half"), ("groups",))), "smooth_scales is (groups, n) or (groups,)"),
    _row(SWIGLU_QUANT, "group.dtype", DtypeIn("group_index", (I32,)), "group_index"),
    _row(SWIGLU_QUANT, "group.rank", Rank("group_index", 1, 1), "group_index has one dimension"),
    _row(SWIGLU_QUANT, "mode", Value("quant_mode", _one_of(0, 1), "quant_mode 0 (static) or 1 (dynamic)", lambda v, call: 1), "quant_mode"),
    _row(SWIGLU_QUANT, "group_list_type", Value("group_list_type", _one_of(0, 1), "group_list_type 0 (sums) or 1 (counts)", lambda v, call: 0), "group_list_type"),
    _row(DEQUANT_SWIGLU_QUANT, "x.present", Present("x"), "x"),
    _row(DEQUANT_SWIGLU_QUANT, "x.dtype", DtypeIn("x", (I32, F16, BF16)), "x"),
    _row(DEQUANT_SWIGLU_QUANT, "x.rank", Rank("x", 2, 2), "x is (tokens, 2h)"),
    _row(DEQUANT_SWIGLU_QUANT, "scale.dtype", DtypeIn("weight_scale", (F32,)), "weight_scale"),
    _row(DEQUANT_SWIGLU_QUANT, "activation.dtype", DtypeIn("activation_scale", (F32,)), "activation_scale"),
    _row(DEQUANT_SWIGLU_QUANT, "activation.shape", Shape("activation_scale", (("tokens", 1),)), "activation_scale is (tokens, 1)"),
    _row(DEQUANT_SWIGLU_QUANT, "activation.present", Present("activation_scale"), "activation_scale where x is int32", when=dtype_is("x", I32)),
    *(_row(DEQUANT_SWIGLU_QUANT, f"{name}.{a}", Absent(a), f"a {dtype} x is not dequantized", when=dtype_is("x", dtype))
      for name, dtype in (("half", F16), ("bfloat", BF16)) for a in ("activation_scale", "bias")),
    _row(DEQUANT_SWIGLU_QUANT, "quant.dtype", DtypeIn("quant_scale", (F32, F16, BF16)), "quant_scale"),
    _row(DEQUANT_SWIGLU_QUANT, "group.dtype", DtypeIn("group_index", (I64,)), "group_index"),
    _row(DEQUANT_SWIGLU_QUANT, "group.rank", Rank("group_index", 1, 1), "group_index has one dimension"),
    _row(DEQUANT_SWIGLU_QUANT, "group.bias", Absent("bias"), "no bias beside group_index", when=GROUPED),
    _row(DEQUANT_SWIGLU_QUANT, "group.offset", Absent("quant_offset"), "no quant_offset beside group_index", when=GROUPED),
    _row(DEQUANT_SWIGLU_QUANT, "mode", Value("quant_mode", _one_of(0, 1), "quant_mode 0 (static) or 1 (dynamic)", lambda v, call: 1), "quant_mode"),
    _row(DEQUANT_SWIGLU_QUANT, "swiglu_mode", Value("swiglu_mode", _one_of(0, 1, 2), "swiglu_mode 0, 1 or 2", lambda v, call: 0), "swiglu_mode"),
)  # fmt: skip

_REDUCE_SUM_A2 = (
    *(_row(REDUCE_SUM, f"{a}.present", Present(a), f"{a} has to be given") for a in ("x1", "x2", "x1_scale", "x2_scale")),
    _row(REDUCE_SUM, "x1.dtype", DtypeIn("x1", (I8,)), "x1"),
    _row(REDUCE_SUM, "x2.dtype", DtypeIn("x2", (I8,)), "x2"),
    _row(REDUCE_SUM, "x1.rank", Rank("x1", 3, 3), "x1 is (batch, m, k)"),
    _row(REDUCE_SUM, "x2.rank", Rank("x2", 3, 3), "x2 is (batch, k, n)"),
    _row(REDUCE_SUM, "x2.nz", Layout("x2", "NZ"), "x2 in FRACTAL_NZ", hint="cast it with npu_format_cast(x2.contiguous(), 29)"),
    _row(REDUCE_SUM, "k", EqualSizes("k", "k_of_x2", "x1 and x2 with the same k"), "formula"),
    _row(REDUCE_SUM, "batch", EqualSizes("batch", "batch_of_x2", "x1 and x2 with the same batch"), "formula"),
    _row(REDUCE_SUM, "x1_scale.dtype", DtypeIn("x1_scale", (F32,)), "x1_scale"),
    _row(REDUCE_SUM, "x1_scale.shape", Shape("x1_scale", (("batch", "m"),)), "x1_scale is (batch, m)"),
    _row(REDUCE_SUM, "x2_scale.dtype", DtypeIn("x2_scale", (BF16,)), "x2_scale"),
    _row(REDUCE_SUM, "x2_scale.shape", Shape("x2_scale", (("n",),)), "x2_scale is (n,)"),
)  # fmt: skip


def _norm(dtypes: tuple[str, ...], offsets: tuple[str, ...]) -> tuple[Rule, ...]:
    """``npu_rms_norm_quant`` on a chip, by the dtypes of its x and its offset."""
    return (
        *(_row(RMS_NORM_QUANT, f"{a}.present", Present(a), a) for a in ("x", "gamma", "beta", "scale", "offset")),
        _row(RMS_NORM_QUANT, "x.dtype", DtypeIn("x", dtypes), "x"),
        _row(RMS_NORM_QUANT, "x.rank", Rank("x", 1, 8), "x has 1 to 8 dimensions"),
        _row(RMS_NORM_QUANT, "empty", NotEmpty(("x", "gamma")), "no empty tensors"),
        _row(RMS_NORM_QUANT, "gamma.dtype", SameDtype("gamma", "x"), "gamma has the dtype of x"),
        _row(RMS_NORM_QUANT, "beta.dtype", SameDtype("beta", "x"), "beta has the dtype of x"),
        _row(RMS_NORM_QUANT, "gamma.shape", Shape("gamma", (("last",), (1, "last"))), "gamma is (n,) or (1, n)"),
        _row(RMS_NORM_QUANT, "beta.shape", Shape("beta", (("last",), (1, "last"))), "beta is (n,) or (1, n)"),
        _row(RMS_NORM_QUANT, "scale.dtype", SameDtype("scale", "x"), "table of dtypes: scale has the dtype of x"),
        _row(RMS_NORM_QUANT, "scale.shape", Shape("scale", ((1,),)), "scale is (1,)"),
        _row(RMS_NORM_QUANT, "offset.dtype", DtypeIn("offset", offsets), "offset"),
        _row(RMS_NORM_QUANT, "offset.shape", SameShape("offset", "scale"), "offset has the shape of scale"),
    )  # fmt: skip


def _added_norm(dtypes: tuple[str, ...], scales: tuple[str, ...], offsets: tuple[str, ...]) -> tuple[Rule, ...]:
    """``npu_add_rms_norm_quant`` on a chip; quantpass judges norms over the last dimension."""
    op, per_column = ADD_RMS_NORM_QUANT, ("gamma", "beta", "scales1", "zero_points1", "scales2", "zero_points2")
    return (
        *(_row(op, f"{a}.present", Present(a), a) for a in ("x1", "x2", "gamma", "scales1")),
        _row(op, "x1.dtype", DtypeIn("x1", dtypes), "x1"),
        _row(op, "x1.rank", Rank("x1", 1, 8), "x1 has 1 to 8 dimensions"),
        _row(op, "x2.dtype", SameDtype("x2", "x1"), "x2 has the dtype of x1"),
        _row(op, "x2.shape", SameShape("x2", "x1"), "x2 has the shape of x1"),
        *(_row(op, f"{a}.dtype", SameDtype(a, "x1"), f"{a} has the dtype of x1") for a in ("gamma", "beta")),
        *(_row(op, f"{a}.shape", Shape(a, (("last",),)), f"{a} has the shape of gamma", "documented, inferred") for a in per_column),
        _row(op, "scales1.dtype", DtypeIn("scales1", scales), "scales1"),
        _row(op, "zero_points1.dtype", DtypeIn("zero_points1", offsets), "zero_points1"),
        _row(op, "scales2.dtype", SameDtype("scales2", "scales1"), "scales2 has the dtype of scales1"),
        _row(op, "zero_points2.dtype", SameDtype("zero_points2", "zero_points1"), "zero_points2 has the dtype of zero_points1"),
        _row(op, "axis", Value("axis", _one_of(-1), "axis -1", lambda v, call: -1), "axis"),
        _row(op, "graph", Unavailable("npu_add_rms_norm and npu_quantize in a graph"), "no converter in torch_npu 2.13.0", "probed", modes=("graph",)),
    )  # fmt: skip


_QGMMD_310P = (
    *(_row(QGMMD, f"{a}.present", Present(a), a, "inferred") for a in ("x", "quantized_weight", "weight_scale", "group_list")),
    _row(QGMMD, "x.dtype", DtypeIn("x", (F16,)), "x is float16", "inferred"),
    _row(QGMMD, "x.rank", Rank("x", 2, 2), "x is (m, k)", "inferred"),
    _row(QGMMD, "weight.dtype", DtypeIn("quantized_weight", (I8,)), "weights are int8", "inferred"),
    _row(QGMMD, "weight.rank", Rank("quantized_weight", 3, 3), "weights are (experts, n, k), contiguous", "inferred"),
    _row(QGMMD, "weight.layout", Layout("quantized_weight", transposed=False), "weights are (experts, n, k), contiguous", "inferred"),
    _row(QGMMD, "k", EqualSizes("k", "k_of_weight", "x (m, k) and weights (experts, n, k) with the same k"), "formula", "inferred"),
    _row(QGMMD, "scale.dtype", DtypeIn("weight_scale", (F32,)), "scales are float32", "inferred"),
    _row(QGMMD, "scale.shape", Shape("weight_scale", (("experts", "n"),)), "scales are (experts, n)", "inferred"),
    _row(QGMMD, "group_list.dtype", DtypeIn("group_list", (I64,)), "group_list is int64", "inferred"),
    _row(QGMMD, "group_list.shape", Shape("group_list", (("experts",),)), "group_list has a number for each expert", "inferred"),
    _row(QGMMD, "smooth.dtype", DtypeIn("smooth_scale", (F16,)), "smooth_scale is float16", "inferred"),
    _row(QGMMD, "smooth.shape", Shape("smooth_scale", (("k",),)), "smooth_scale is (k,)", "inferred"),
    _row(QGMMD, "mode", Value("quant_mode", lambda v, call: v in ("pertoken", "pertensor"), "quant_mode 'pertoken' or 'pertensor'", lambda v, call: "pertoken"), "quant_mode", "inferred"),
)  # fmt: skip


def _not_here(op: VendorOp, instead: str, evidence: str = "documented") -> Rule:
    return _row(op, "unavailable", Unavailable(instead), "supported products", evidence)


RULES_A2 = (
    *_SWIGLU_A2,
    *_SWIGLU_QUANT_A2,
    *_REDUCE_SUM_A2,
    *_norm((F16, BF16), (I8,)),
    *_added_norm((F16, BF16), (F32, BF16), (I32, BF16)),
    _not_here(QGMMD, "npu_dynamic_quant and npu_grouped_matmul", "inferred"),
    _not_here(
        TRANSPOSE_QMM,
        "npu_quant_matmul, with permute around it; Ascend 950 has it for float8, which quantpass has no rules for",
    ),
)

RULES_310P = (
    *_QGMMD_310P,
    *_norm((F16,), (I8,)),
    *_added_norm((F16,), (F32,), (I32,)),
    _row(ADD_RMS_NORM_QUANT, "310p.last", Size("last", 32), "the last dimension has at least 32 elements"),
    _not_here(TRANSPOSE_QMM, "npu_quant_matmul, with permute around it"),
    _row(RMS_NORM_QUANT, "310p.last", Size("last", 16), "the last dimension has at least 32 bytes"),
    _not_here(GMM_SWIGLU, "npu_quant_grouped_matmul_dequant and npu_swiglu"),
    _not_here(GMM_SWIGLU_V2, "npu_quant_grouped_matmul_dequant and npu_swiglu"),
    _not_here(SWIGLU_QUANT, "npu_swiglu and npu_quantize"),
    _not_here(DEQUANT_SWIGLU_QUANT, "npu_swiglu and npu_quantize"),
    _not_here(REDUCE_SUM, "npu_quant_matmul and a sum"),
)
