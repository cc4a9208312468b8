"""Legality of ``npu_weight_quant_batchmatmul`` (A16W8, A16W4; GE WeightQuantBatchMatmulV2)."""

from __future__ import annotations

from typing import Any

from quantpass.basics.torch_types import BF16, F16, F32, I8, I32, I64
from quantpass.chips.calls import OpCall, VendorOp, in_groups, matrix_sizes
from quantpass.chips.dtype_table import DtypeTable, Row
from quantpass.chips.requirements import (
    Absent,
    DtypeIn,
    EqualSizes,
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
from quantpass.chips.rules import Rule, When, both, dtype_is, given, grouped, in_nz, transposed


def _sizes(call: OpCall) -> dict[str, Any]:
    x = call.tensor("x")
    sizes = {} if x is None or x.rank < 2 else {"m": x.shape[-2], "k": x.shape[-1]}
    sizes |= matrix_sizes(call.tensor("weight"), "k_of_weight", "n")
    return in_groups(sizes, call.args.get("antiquant_group_size") or 0)


WQMM = VendorOp(
    "npu_weight_quant_batchmatmul(Tensor x, Tensor weight, Tensor antiquant_scale, Tensor? antiquant_offset=None, "
    "Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? bias=None, int antiquant_group_size=0, "
    "int inner_precise=0, int? weight_dtype=None) -> Tensor",
    _sizes,
    unjudged=("weight_dtype",),
    weight="weight",
    family="wqmm",
)

COLUMNS = ("x", "weight", "antiquant_scale", "antiquant_offset", "bias", "quant_scale", "quant_offset")
EAGER, GRAPH = ("eager",), ("graph",)
NO = (None,)

ROWS_310P = DtypeTable(COLUMNS, (Row(((F16,), (I8,), (F16,), (F16, None), (F16, None), NO, NO)),))


_MIXED = (
    "float16 and bfloat16 beside each other in a graph: npu_weight_quant_batchmatmul.md says that the operator converts, its "
    "tiling wants one dtype (weight_quant_batch_matmul_v2_tiling.cpp:817-838)"
)


def _a2_rows() -> tuple[Row, ...]:
    rows = []
    for x, bias in ((F16, F16), (BF16, F32)):
        operands = ((x,), (I8, I32), (x,), (x, None), (bias, None))
        rows += [
            Row((*operands, NO, NO)),
            Row((*operands, (I64,), (F32, None))),
            Row((*operands, (F32,), (F32, None)), modes=EAGER),
        ]
        other = BF16 if x == F16 else F16
        mixed = ((x,), (I8, I32), (other,), (other, None), (bias, None))
        rows += [
            Row((*mixed, quant, shift), GRAPH, "wqmm.a2.mixed", _MIXED)
            for quant, shift in ((NO, NO), ((I64,), (F32, None)))
        ]
    return (*rows, Row(((F16,), (I8,), (I64,), (I32, None), (F16, None), NO, NO)))


ROWS_A2 = DtypeTable(
    COLUMNS,
    _a2_rows(),
    hints={
        "antiquant_scale": "cast it to the dtype of x",
        "antiquant_offset": "cast it to the dtype of antiquant_scale (int32 beside an int64 one)",
        "bias": "float16 x takes a float16 bias, bfloat16 x a float32 one",
        "quant_scale": "pack it with npu_trans_quant_param(quant_scale, quant_offset); an int64 antiquant_scale takes none",
    },
)


def _is_mixed(call: OpCall) -> bool:
    dtypes = {spec.dtype_name for spec in (call.tensor("x"), call.tensor("antiquant_scale")) if spec is not None}
    return call.mode == "graph" and dtypes == {F16, BF16}


INT64_SCALE = dtype_is("antiquant_scale", I64)
NO_INT64_SCALE = When("antiquant_scale not int64", lambda call: not INT64_SCALE.test(call))
NOT_MIXED = When(
    "antiquant_scale not int64, nor the other 16-bit float in a graph",
    lambda call: NO_INT64_SCALE.test(call) and not _is_mixed(call),
)
INT4 = dtype_is("weight", I32)
INT8 = dtype_is("weight", I8)
PER_CHANNEL = (("n",), (1, "n"))


def _group_ok(group: int, call: OpCall) -> bool:
    k = call.sizes.get("k")
    return group == 0 or (group % 32 == 0 and group >= 32 and (not isinstance(k, int) or group <= k - 1))


def _nearest_group(group: int, call: OpCall) -> int | None:
    k = call.sizes.get("k")
    if not isinstance(k, int) or k <= 32:
        return 0
    return min(range(32, k, 32), key=lambda g: abs(g - group))


def _module(line: str) -> str:
    return f"LinearWeightQuant.md, {line}"


def rules(dtypes: DtypeTable, chip: str, hint: str) -> tuple[Rule, ...]:
    """The rules that every chip shares, around a chip's dtype table."""
    return (
        Rule("wqmm.x.present", WQMM, Present("x"), _module("inputs: x")),
        Rule("wqmm.weight.present", WQMM, Present("weight"), _module("variables: weight")),
        Rule("wqmm.scale.present", WQMM, Present("antiquant_scale"), _module("variables: antiquant_scale")),
        Rule("wqmm.weight.rank", WQMM, Rank("weight", 2, 2), _module("variables: weight has 2 dimensions"), "documented, code", contradicted=chip == "310p",
             hint="aclnnWeightQuantBatchMatmulV2.md and a vendor test have a matrix for each batch on the Atlas inference series" if chip == "310p" else ""),
        Rule("wqmm.empty", WQMM, NotEmpty(("x", "weight", "antiquant_scale")), _module("constraints: no empty tensors"), "documented, code"),
        Rule("wqmm.k", WQMM, EqualSizes("k", "k_of_weight", "x (m, k) and weight (k, n) with the same k"), _module("constraints: (M, K) and (N, K)"), "documented, code"),
        Rule("wqmm.k.range", WQMM, Size("k", 1, 65535), _module("constraints: K, N in [1, 65535]"), "documented, code"),
        Rule("wqmm.n.range", WQMM, Size("n", 1, 65535), _module("constraints: K, N in [1, 65535]"), "documented, code"),
        Rule("wqmm.m.range", WQMM, Size("m", 1, 2**31 - 1), _module("constraints: M in [1, 2^31-1]"), "documented, code"),
        Rule("wqmm.scale.shape", WQMM, Shape("antiquant_scale", (*PER_CHANNEL, (1,), (1, 1))), _module("variables: antiquant_scale"), "documented, code", when=grouped(False)),
        Rule("wqmm.scale.shape.group", WQMM, Shape("antiquant_scale", (("groups", "n"),)), _module("variables: antiquant_scale per group"), "documented, code", when=grouped()),
        Rule("wqmm.offset.shape", WQMM, SameShape("antiquant_offset", "antiquant_scale"), _module("constraints: antiquant_scale and antiquant_offset have one shape"), "documented, code"),
        Rule("wqmm.bias.shape", WQMM, Shape("bias", PER_CHANNEL), "weight_quant_batch_matmul_v2_tiling.cpp:609-633", "code",
             hint="LinearWeightQuant.md also lists (1,), which the operator's tiling rejects: repeat it to (n,)"),
        Rule("wqmm.group", WQMM, Value("antiquant_group_size", _group_ok, "antiquant_group_size 0, or a multiple of 32 in [32, K-1]", _nearest_group),
             _module("parameters: antiquant_group_size"), "documented, code",
             hint="a group of K rows is per-channel: drop the group size and give one scale for each column"),
        Rule("wqmm.inner_precise", WQMM, Value("inner_precise", lambda v, call: v in (0, 1), "inner_precise 0 or 1", lambda v, call: 0),
             _module("parameters: inner_precise"), "documented, code"),
        Rule(f"wqmm.{chip}.dtypes", WQMM, dtypes, _module("inputs and variables: dtypes"), "documented, code", hint=hint),
    )  # fmt: skip


HINT_310P = "this chip takes float16 throughout and an int8 weight: run the model in float16"
HINT_A2 = (
    "x, antiquant_scale and the result share float16 or bfloat16, with a float16 or float32 bias: run the model in "
    "float16 or bfloat16"
)

RULES_310P = (
    Rule("wqmm.310p.rank", WQMM, Rank("x", 2, 2), _module("inputs: x is (M, K)"), "documented", contradicted=True,
         hint="aclnnWeightQuantBatchMatmulV2.md and a vendor test use up to 6 dimensions; flatten x to (m, k)"),
    Rule("wqmm.310p.x", WQMM, Layout("x", transposed=False), "weight_quant_batch_matmul_v2_weight_nz_tiling.cpp:321-391", "code"),
    Rule("wqmm.310p.per_channel", WQMM, Shape("antiquant_scale", PER_CHANNEL), _module("the Atlas inference series takes per-channel only"), "documented, code",
         when=grouped(False), hint="repeat a per-tensor scale for each column"),
    Rule("wqmm.310p.group", WQMM, Value("antiquant_group_size", lambda v, call: v == 0, "no groups", lambda v, call: 0),
         _module("parameters: antiquant_group_size is not supported on the Atlas inference series"), "documented", contradicted=True,
         hint="quantize per channel for this chip"),
    Rule("wqmm.310p.nz.graph", WQMM, Layout("weight", "NZ", True), "weight_quant_batch_matmul_v2_proto.h:20-60", "documented, code", modes=GRAPH,
         hint="store the weight as (n, k), cast it to FRACTAL_NZ, then transpose the view"),
    Rule("wqmm.310p.nz.eager", WQMM, Layout("weight", "ND"), _module("constraints: a FRACTAL_NZ weight in graph mode only"), "documented", modes=EAGER),
)  # fmt: skip

RULES_A2 = (
    Rule("wqmm.m.range.transposed", WQMM, Size("m", 1, 65535), _module("constraints: M in [1, 65535] where x is transposed"), "documented, code", when=transposed("x")),
    Rule("wqmm.quant_offset", WQMM, Present("quant_scale"), _module("constraints: quant_offset needs quant_scale"), "documented, code", when=given("quant_offset")),
    Rule("wqmm.x.rank", WQMM, Rank("x", 2, 2), _module("inputs: x is (M, K)"), "documented, code", hint="flatten x to (m, k)"),
    Rule("wqmm.scale.dtype", WQMM, SameDtype("antiquant_scale", "x"), _module("variables: antiquant_scale has the dtype of x"), "documented, code", when=NOT_MIXED),
    Rule("wqmm.offset.dtype", WQMM, SameDtype("antiquant_offset", "antiquant_scale"), _module("variables: antiquant_offset has the dtype of antiquant_scale"), "documented, code", when=NO_INT64_SCALE),
    Rule("wqmm.nz.eager", WQMM, Layout("weight", "ND"), _module("constraints: a FRACTAL_NZ weight in graph mode only"), "documented", modes=EAGER, contradicted=True,
         hint="the aclnn operator takes it on A2/A3, and deployments rely on it"),
    Rule("wqmm.nz.quant_scale", WQMM, Absent("quant_scale"), _module("variables: quant_scale only where weight is ND"), "documented, code", when=in_nz("weight")),
    Rule("wqmm.nz.k", WQMM, Size("k", 2), "aclnn_weight_quant_batch_matmul_v2.cpp", "code", when=in_nz("weight"), hint="leave this weight in ND"),
    Rule("wqmm.nz.n", WQMM, Size("n", 2), "aclnn_weight_quant_batch_matmul_v2.cpp", "code", when=in_nz("weight"), hint="leave this weight in ND"),
    Rule("wqmm.nz.int8.group", WQMM, Value("antiquant_group_size", lambda v, call: v == 0, "no groups for an int8 weight in FRACTAL_NZ", lambda v, call: 0),
         "weight_quant_batch_matmul_v2_tiling_custom.cpp:55-77: the documents do not speak of it", "code", when=both(INT8, in_nz("weight")), contradicted=True,
         hint="leave this weight in ND"),
    Rule("wqmm.nz.int4.channel", WQMM, Layout("weight", transposed=True), _module("constraints: int32 weight in FRACTAL_NZ, per channel"), "documented, code",
         when=both(INT4, in_nz("weight"), grouped(False))),
    Rule("wqmm.nz.int4.tensor", WQMM, Shape("antiquant_scale", PER_CHANNEL), "aclnn_weight_quant_batch_matmul_v2.cpp:630-636", "code",
         when=both(INT4, in_nz("weight"), grouped(False)), hint="repeat the scale for each column"),
    Rule("wqmm.nz.int4.group.x", WQMM, Layout("x", transposed=False), "aclnn_weight_quant_batch_matmul_v2.cpp:602-618", "code",
         when=both(INT4, in_nz("weight"), grouped()), contradicted=True,
         hint="LinearWeightQuant.md demands a transposed x here; the operator rejects it"),
    Rule("wqmm.nz.int4.group.weight", WQMM, Layout("weight", transposed=False), _module("constraints: int32 weight in FRACTAL_NZ, per group"), "documented, code",
         when=both(INT4, in_nz("weight"), grouped())),
    Rule("wqmm.nz.int4.group.size", WQMM, Value("antiquant_group_size", lambda v, call: v in (64, 128), "a group size of 64 or 128", lambda v, call: 64 if v <= 96 else 128),
         _module("constraints: int32 weight in FRACTAL_NZ, per group"), "documented, code", when=both(INT4, in_nz("weight"), grouped()),
         hint="use ND, or quantize with groups of 64 or 128"),
    Rule("wqmm.nz.int4.group.k", WQMM, Value("antiquant_group_size", lambda v, call: call.sizes["k"] % v == 0 if "k" in call.sizes else True, "K a multiple of the group size"),
         _module("constraints: int32 weight in FRACTAL_NZ, per group"), "documented, code", when=both(INT4, in_nz("weight"), grouped())),
    Rule("wqmm.nz.int4.group.n", WQMM, Size("n", 64, None, 64), _module("constraints: int32 weight in FRACTAL_NZ, per group"), "documented, code",
         when=both(INT4, in_nz("weight"), grouped())),
    Rule("wqmm.quant_scale.shape", WQMM, Shape("quant_scale", (("n",), (1, "n"), (1,))), _module("variables: quant_scale"), "documented, code"),
    Rule("wqmm.quant_offset.shape", WQMM, SameShape("quant_offset", "quant_scale"), _module("constraints: quant_scale and quant_offset have one shape"), "documented, code"),
    Rule("wqmm.int64.scale.shape", WQMM, Shape("antiquant_scale", PER_CHANNEL), _module("variables: int64 antiquant_scale is per channel"), "documented, code", when=INT64_SCALE),
    Rule("wqmm.int64.no_group", WQMM, Value("antiquant_group_size", lambda v, call: v == 0, "no groups", lambda v, call: 0), _module("variables: int64 antiquant_scale is per channel"), "documented, code", when=INT64_SCALE),
    Rule("wqmm.int64.x", WQMM, Layout("x", transposed=False), _module("variables: int64 antiquant_scale: x not transposed"), "documented, code", when=INT64_SCALE),
    Rule("wqmm.int64.weight", WQMM, Layout("weight", "ND", True), _module("variables: int64 antiquant_scale: weight in ND, transposed"), "documented, code", when=INT64_SCALE),
    Rule("wqmm.int64.weight.dtype", WQMM, DtypeIn("weight", (I8,)), _module("variables: int64 antiquant_scale: weight int8"), "documented, code", when=INT64_SCALE),
    Rule("wqmm.int64.m", WQMM, Size("m", 1, 96), _module("variables: int64 antiquant_scale: M in [1, 96]"), "documented, code", when=INT64_SCALE),
    Rule("wqmm.int64.k", WQMM, Size("k", 64, None, 64), _module("variables: int64 antiquant_scale: K a multiple of 64"), "documented, code", when=INT64_SCALE),
    Rule("wqmm.int64.n", WQMM, Size("n", 64, None, 64), _module("variables: int64 antiquant_scale: N a multiple of 64"), "documented, code", when=INT64_SCALE),
)  # fmt: skip

# -- the Ascend 950 ------------------------------------------------------------------------------------------------

_950, _950_NZ = "aclnnWeightQuantBatchMatmulV2.md: the Ascend 950", "aclnnWeightQuantBatchMatmulNz.md: the Ascend 950"
_LIMITED = ("wqmm.k.range", "wqmm.n.range")
ROWS_950 = DtypeTable(
    COLUMNS,
    tuple(
        Row(((x,), (I8, I32), (x,), (x, None), (*bias, None), NO, NO))
        for x, bias in ((F16, (F16,)), (BF16, (BF16, F32)))
    ),
    hints={
        "antiquant_scale": "cast it to the dtype of x",
        "antiquant_offset": "cast it to the dtype of x",
        "bias": "float16 x takes a float16 bias, bfloat16 x a bfloat16 or float32 one",
        "quant_scale": "quantize the result with an operator of its own: quant_scale is reserved on this chip",
        "weight": "8- and 4-bit floats are outside what quantpass knows",
    },
)
BF16_INT8_NZ = both(INT8, in_nz("weight"), dtype_is("x", BF16))

RULES_950 = (
    *(rule for rule in rules(ROWS_950, "a5", HINT_A2) if rule.id not in _LIMITED),
    Rule("wqmm.a5.k.range", WQMM, Size("k", 1, 2**31 - 1), f"{_950}: k and n in [1, 2^31-1]"),
    Rule("wqmm.a5.n.range", WQMM, Size("n", 1, 2**31 - 1), f"{_950}: k and n in [1, 2^31-1]"),
    Rule("wqmm.x.rank", WQMM, Rank("x", 2, 2), f"{_950}: x is (m, k)", hint="flatten x to (m, k)"),
    Rule("wqmm.a5.x.layout", WQMM, Layout("x", transposed=False), f"{_950}: x is not transposed"),
    Rule("wqmm.scale.dtype", WQMM, SameDtype("antiquant_scale", "x"), f"{_950}: antiquantScale has the dtype of x"),
    Rule("wqmm.offset.dtype", WQMM, SameDtype("antiquant_offset", "antiquant_scale"), f"{_950}: antiquantOffset has the dtype of x"),
    Rule("wqmm.nz.eager", WQMM, Layout("weight", "ND"), _module("constraints: a FRACTAL_NZ weight in graph mode only"), modes=EAGER, contradicted=True,
         hint="aclnnWeightQuantBatchMatmulNz.md is of the Ascend 950, and torch_npu calls it"),
    Rule("wqmm.a5.nz.scale", WQMM, Shape("antiquant_scale", PER_CHANNEL), f"{_950_NZ}: a scale for each column", when=both(in_nz("weight"), grouped(False)), hint="repeat the scale for each column"),
    Rule("wqmm.a5.nz.int8.group", WQMM, Value("antiquant_group_size", lambda v, call: v == 0, "no groups for an int8 weight in FRACTAL_NZ", lambda v, call: 0), f"{_950_NZ}: int8 weights per channel", when=both(INT8, in_nz("weight")),
         hint="leave this weight in ND"),
    Rule("wqmm.a5.nz.int8.k", WQMM, Size("k", 1, 65535), f"{_950_NZ}: k of int8 weights", when=both(INT8, in_nz("weight")), hint="leave this weight in ND"),
    Rule("wqmm.a5.nz.int8.n", WQMM, Size("n", 2, 65535), f"{_950_NZ}: n of int8 weights", when=both(INT8, in_nz("weight")), hint="leave this weight in ND"),
    Rule("wqmm.a5.nz.int8.bias", WQMM, DtypeIn("bias", (F32,)), f"{_950_NZ}: bias beside bfloat16 x and an int8 weight", when=BF16_INT8_NZ, hint="or leave this weight in ND"),
    Rule("wqmm.a5.nz.int4", WQMM, Layout("weight", transposed=False), f"{_950_NZ}: int4 weights are not transposed", when=both(INT4, in_nz("weight")), hint="leave this weight in ND, or pack it along n"),
)  # fmt: skip
