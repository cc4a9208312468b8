"""Legality of experts' matmuls with more in them: SwiGLU and a quantization behind (A2, A3, 950), or one in front (310P)."""

from __future__ import annotations

from typing import Any

from quantpass.basics.torch_types import BF16, F16, F32, I8, I32, I64
from quantpass.chips.calls import OpCall, VendorOp, matrix_sizes
from quantpass.chips.companions import Unavailable
from quantpass.chips.dtype_table import DtypeTable, Row
from quantpass.chips.requirements import (
    Absent,
    DtypeIn,
    EqualSizes,
    Layout,
    NotEmpty,
    Present,
    Rank,
    Requirement,
    Shape,
    Size,
    Value,
)
from quantpass.chips.rules import Rule, When, both, dtype_is, given


def _experts(weight: str, *names: str) -> Any:
    """Sizes of x (m, k) beside a weight for each of some experts."""

    def sizes(call: OpCall) -> dict[str, Any]:
        spec = call.tensor(weight)
        found = matrix_sizes(call.tensor("x"), "m", "k") | matrix_sizes(spec, *names)
        if "n" in found:
            found["half"] = found["n"] // 2
        return found | ({"experts": spec.shape[0]} if spec is not None and spec.rank == 3 else {})

    return sizes


GMM_SWIGLU = VendorOp(
    "npu_grouped_matmul_swiglu_quant(Tensor x, Tensor weight, Tensor group_list, Tensor weight_scale, Tensor x_scale, *, "
    "Tensor? bias=None, Tensor? offset=None) -> (Tensor, Tensor, Tensor)",
    _experts("weight", "k_of_weight", "n"),
    weight="weight",
    family="gmm_swiglu",
)
GMM_SWIGLU_V2 = VendorOp(
    "npu_grouped_matmul_swiglu_quant_v2(Tensor x, Tensor[] weight, Tensor[] weight_scale, Tensor x_scale, "
    "Tensor group_list, *, Tensor? smooth_scale=None, Tensor[]? weight_assist_matrix=None, Tensor? bias=None, "
    "int? dequant_mode=0, int? dequant_dtype=6, int? quant_mode=0, int? quant_dtype=1, int? group_list_type=0, "
    "int[]? tuning_config=None, int? x_dtype=None, int? weight_dtype=None, int? weight_scale_dtype=None, "
    "int? x_scale_dtype=None) -> (Tensor, Tensor)",
    _experts("weight", "k_of_weight", "n"),
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
    _experts("quantized_weight", "n", "k_of_weight"),
    weight="quantized_weight",
    family="qgmmd",
)

_DOC = {
    GMM_SWIGLU: "aclnnGroupedMatmulSwigluQuant.md",
    GMM_SWIGLU_V2: "npu_grouped_matmul_swiglu_quant_v2.md",
    QGMMD: "aclnnQuantGroupedMatmulDequant.md",
}
_FAKE = "op_plugin/meta/_meta_registrations.py"
_PROBED = "documented, probed"
NO = (None,)


def _row(op: VendorOp, name: str, need: Requirement, what: str, evidence: str = "documented", **rest: Any) -> Rule:
    return Rule(f"{op.family}.{name}", op, need, f"{_DOC[op]}: {what}", evidence, **rest)


def _is(*accepted: Any) -> Any:
    return lambda value, call: value in accepted


INT8, INT4 = dtype_is("weight", I8), dtype_is("weight", I32)
W4A4 = both(dtype_is("x", I32), INT4)
W4A8 = both(dtype_is("x", I8), INT4)

# -- with SwiGLU and a quantization behind -------------------------------------------------------------------------


def _shared(op: VendorOp) -> tuple[Rule, ...]:
    """What both versions take on every chip."""
    return (
        *(_row(op, f"{a}.present", Present(a), a) for a in ("x", "weight", "weight_scale", "x_scale", "group_list")),
        _row(op, "x.rank", Rank("x", 2, 2), "x is (m, k)"),
        _row(op, "weight.rank", Rank("weight", 3, 3), "weight is (experts, k, n)"),
        _row(op, "k", EqualSizes("k", "k_of_weight", "x (m, k) and weight (experts, k, n) with the same k"), "formula"),
        _row(op, "n", Size("n", 2, None, 2), "SwiGLU halves n"),
        _row(op, "x_scale.dtype", DtypeIn("x_scale", (F32,)), "x_scale"),
        _row(op, "x_scale.shape", Shape("x_scale", (("m",),)), "x_scale is (m,)"),
        _row(op, "weight_scale.shape", Shape("weight_scale", (("experts", "n"),)), "weight_scale of an int8 weight is (experts, n)", when=INT8),
        _row(op, "group_list.dtype", DtypeIn("group_list", (I64,)), "group_list"),
        _row(op, "group_list.shape", Shape("group_list", (("experts",),)), "group_list has a number for each expert"),
    )  # fmt: skip


def _on_a2(op: VendorOp) -> tuple[Rule, ...]:
    return (
        *_shared(op),
        _row(op, "int8.nz", Layout("weight", "NZ"), "an int8 weight in FRACTAL_NZ only", when=INT8,
             hint="cast it with npu_format_cast(weight, 29)"),
        _row(op, "weight_scale.rank", Rank("weight_scale", 2, 3), "weight_scale of an int4 weight has 2 or 3 dimensions", when=INT4),
        _row(op, "n.range", Size("n", 2, 10240), "n is at most 10240"),
        _row(op, "k.range", Size("k", 1, 65535), "k of int8 operands is below 65536", when=INT8),
        _row(op, "k.range.int4", Size("k", 1, 19999), "k beside an int4 weight is below 20000", when=INT4),
    )  # fmt: skip


_HINTS = {"weight_scale": "int8 x beside an int4 weight takes int64 words, other forms a float"}
_FIRST = DtypeTable(
    ("x", "weight", "weight_scale", "bias"),
    (
        Row(((I8,), (I8,), (F32, F16, BF16), NO)),
        Row(((I8,), (I32,), (I64,), (F32,))),
    ),
    hints=_HINTS | {"bias": "it is the assisting matrix of an int4 weight; no expert's bias goes in here: use npu_grouped_matmul"},
)  # fmt: skip
_SECOND_COLUMNS = ("x", "weight", "weight_scale", "smooth_scale", "weight_assist_matrix")
_SECOND = DtypeTable(
    _SECOND_COLUMNS,
    (
        Row(((I8,), (I8,), (F32, F16, BF16), NO, NO)),
        Row(((I8,), (I32,), (I64,), NO, (F32,))),
        Row(((I32,), (I32,), (F32,), (F32, None), NO)),
    ),
    hints=_HINTS,
)  # fmt: skip
_SECOND_950 = DtypeTable(_SECOND_COLUMNS, (Row(((I8,), (I8,), (F32, F16, BF16), NO, NO)),))

_OF_SECOND = (
    _row(GMM_SWIGLU_V2, "bias", Absent("bias"), "bias: None alone so far", hint="no expert's bias goes in here: use npu_grouped_matmul"),
    _row(GMM_SWIGLU_V2, "experts", Size("experts", 1, 1024), "at most 1024 groups"),
    _row(GMM_SWIGLU_V2, "group_list_type", Value("group_list_type", _is(0, 1), "group_list_type 0 or 1", lambda v, call: 0), "group_list_type"),
)  # fmt: skip

SWIGLU_A2 = (
    *_on_a2(GMM_SWIGLU),
    _row(GMM_SWIGLU, "dtypes", _FIRST, "dtypes of x, weight, weightScale and bias"),
    _row(GMM_SWIGLU, "bias.shape", Shape("bias", (("experts", "n"),)), "bias is the assisting matrix, (experts, n)", when=W4A8),
    _row(GMM_SWIGLU, "offset", Absent("offset"), "offset is reserved"),
    *_on_a2(GMM_SWIGLU_V2),
    *_OF_SECOND,
    _row(GMM_SWIGLU_V2, "dtypes", _SECOND, "table of dtypes on A2 and A3"),
    _row(GMM_SWIGLU_V2, "smooth.shape", Shape("smooth_scale", (("experts", "half"), ("experts",))), "smooth_scale is (experts, n / 2) or (experts,)", when=W4A4),
    _row(GMM_SWIGLU_V2, "assist.shape", Shape("weight_assist_matrix", (("experts", "n"),)), "weight_assist_matrix is (experts, n)", when=W4A8),
    _row(GMM_SWIGLU_V2, "dequant_mode", Value("dequant_mode", _is(0, 1), "dequant_mode 0 or 1", lambda v, call: 0), "dequant_mode on A2 and A3", when=W4A8),
    _row(GMM_SWIGLU_V2, "dequant_mode.int8", Value("dequant_mode", _is(0), "dequant_mode 0", lambda v, call: 0), "dequant_mode 1 is of int8 x beside an int4 weight",
         when=When("not int8 x beside an int4 weight", lambda call: not W4A8.test(call))),
    _row(GMM_SWIGLU_V2, "quant_mode", Value("quant_mode", _is(0), "quant_mode 0", lambda v, call: 0), "quant_mode on A2 and A3"),
)  # fmt: skip

_A5 = "its float8, float4 and hifloat8 forms are outside what quantpass knows"

SWIGLU_950 = (
    _row(GMM_SWIGLU, "unavailable", Unavailable("npu_grouped_matmul_swiglu_quant_v2"), "supported products"),
    *_shared(GMM_SWIGLU_V2),
    *_OF_SECOND,
    _row(GMM_SWIGLU_V2, "a5.dtypes", _SECOND_950, "tables of dtypes on the Ascend 950", hint=_A5),
    _row(GMM_SWIGLU_V2, "a5.nd", Layout("weight", "ND"), "FRACTAL_NZ for float8 weights only on the Ascend 950"),
    _row(GMM_SWIGLU_V2, "a5.dequant_mode", Value("dequant_mode", _is(0), "dequant_mode 0", lambda v, call: 0), "dequant_mode 2 is of MX scales on the Ascend 950", hint=_A5),
    _row(GMM_SWIGLU_V2, "a5.quant_mode", Value("quant_mode", _is(0), "quant_mode 0", lambda v, call: 0), "quant_mode 2 is of MX scales on the Ascend 950", hint=_A5),
)  # fmt: skip

_INSTEAD = "npu_quant_grouped_matmul_dequant and npu_swiglu"
SWIGLU_310P = tuple(
    _row(op, "unavailable", Unavailable(_INSTEAD), "supported products") for op in (GMM_SWIGLU, GMM_SWIGLU_V2)
)

# -- npu_quant_grouped_matmul_dequant ------------------------------------------------------------------------------

PER_TENSOR = When("quant_mode 'pertensor'", lambda call: call.args.get("quant_mode") == "pertensor")
PER_TOKEN = When("quant_mode 'pertoken'", lambda call: call.args.get("quant_mode") in (None, "pertoken"))
ASKED_FOR_ROWS = When("x_scale not given", lambda call: call.args.get("x_scale") is None)

DEQUANT_310P = (
    *(_row(QGMMD, f"{a}.present", Present(a), a) for a in ("x", "quantized_weight", "weight_scale", "group_list")),
    _row(QGMMD, "x.dtype", DtypeIn("x", (F16,)), f"x; {_FAKE}", _PROBED, hint="run the model in float16"),
    _row(QGMMD, "x.rank", Rank("x", 2, 2), f"x is (m, k); {_FAKE}", _PROBED),
    _row(QGMMD, "weight.dtype", DtypeIn("quantized_weight", (I8,)), f"weight; {_FAKE}", _PROBED),
    _row(QGMMD, "weight.rank", Rank("quantized_weight", 3, 3), f"weight is (experts, n, k); {_FAKE}", _PROBED),
    _row(QGMMD, "weight.layout", Layout("quantized_weight", transposed=False), "weight lies as (experts, n, k)", "documented, inferred",
         hint="stack the weights as they are stored, (n, k), not as transposed views"),
    _row(QGMMD, "k", EqualSizes("k", "k_of_weight", "x (m, k) and weights (experts, n, k) with the same k"), f"formula; {_FAKE}", _PROBED),
    _row(QGMMD, "k.multiple", Size("k", 16, None, 16), "n and k are multiples of 16"),
    _row(QGMMD, "n.multiple", Size("n", 16, None, 16), "n and k are multiples of 16"),
    _row(QGMMD, "empty", NotEmpty(("x", "quantized_weight")), "no empty tensors"),
    _row(QGMMD, "scale.dtype", DtypeIn("weight_scale", (F32,)), f"weightScale; {_FAKE}", _PROBED, hint="aclnn's int64 words are refused by torch_npu's shape function"),
    _row(QGMMD, "scale.shape", Shape("weight_scale", (("experts", "n"),)), f"weightScale is (experts, n); {_FAKE}", _PROBED),
    _row(QGMMD, "group_list.dtype", DtypeIn("group_list", (I64,)), "groupList"),
    _row(QGMMD, "group_list.shape", Shape("group_list", (("experts",),)), "groupList has the sum of rows up to each expert"),
    _row(QGMMD, "bias", Absent("bias"), "bias: null alone so far", hint="add it behind the operator"),
    _row(QGMMD, "x_offset", Absent("x_offset"), "xOffset: null alone so far", hint="quantize x symmetrically"),
    _row(QGMMD, "x_scale.dtype", DtypeIn("x_scale", (F32,)), "xScale beside a float32 weightScale"),
    _row(QGMMD, "x_scale.tensor", Shape("x_scale", ((1,),)), "xScale is (1,)", when=both(given("x_scale"), PER_TENSOR)),
    _row(QGMMD, "x_scale.token", Shape("x_scale", (("m",),)), "xScale is (m,)", when=both(given("x_scale"), PER_TOKEN)),
    _row(QGMMD, "smooth.dtype", DtypeIn("smooth_scale", (F16,)), "smoothScale"),
    _row(QGMMD, "smooth.shape", Shape("smooth_scale", (("k",),)), "smoothScale is (k,)"),
    _row(QGMMD, "mode", Value("quant_mode", _is("pertoken", "pertensor"), "quant_mode 'pertoken' or 'pertensor'", lambda v, call: "pertoken"), "xQuantMode"),
    _row(QGMMD, "dynamic", Value("quant_mode", _is("pertoken"), "quant_mode 'pertoken'", lambda v, call: "pertoken"), "without xScale each row has its own", when=ASKED_FOR_ROWS,
         hint="or give x_scale, (1,)"),
)  # fmt: skip

DEQUANT_ELSEWHERE = (
    _row(QGMMD, "unavailable", Unavailable("npu_dynamic_quant and npu_grouped_matmul"), "supported products"),
)
