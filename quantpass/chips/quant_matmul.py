"""Legality of ``npu_quant_matmul`` (A8W8, A4W4; GE QuantBatchMatmulV3)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from quantpass.basics.torch_types import BF16, F16, F32, I8, I32, I64
from quantpass.chips.calls import INT4_PER_INT32, OpCall, VendorOp, in_groups, matrix_sizes, packed_int4
from quantpass.chips.dtype_table import Cell, DtypeTable, Row
from quantpass.chips.requirements import (
    Broadcasts,
    DtypeIn,
    EqualSizes,
    Layout,
    NotEmpty,
    Present,
    QmmBias,
    Rank,
    SameDtype,
    Shape,
    Size,
    Value,
)
from quantpass.chips.rules import Cost, Rule, When, both, dtype_is, given, in_nz, transposed


def _sizes(call: OpCall) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    x1 = call.tensor("x1")
    if x1 is not None and x1.rank >= 2:
        m, k = x1.shape[-2:]
        sizes = {"m": m, "k": k * INT4_PER_INT32 if packed_int4(x1) else k}
    sizes |= matrix_sizes(call.tensor("x2"), "k_of_x2", "n")
    return in_groups(sizes, (call.args.get("group_sizes") or (0,))[-1])


QMM = VendorOp(
    "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? pertoken_scale=None, "
    "Tensor? bias=None, int? output_dtype=None, int? x1_dtype=None, int? x2_dtype=None, "
    "int? pertoken_scale_dtype=None, int? scale_dtype=None, int[]? group_sizes=None, Tensor? y_scale=None) -> Tensor",
    _sizes,
    unjudged=("x1_dtype", "x2_dtype", "pertoken_scale_dtype", "scale_dtype", "y_scale"),
    weight="x2",
    family="qmm",
)

COLUMNS = ("x1", "x2", "scale", "offset", "bias", "pertoken_scale", "output_dtype")
EAGER = ("eager",)
GROUPED = When("group_sizes given", lambda call: any(call.args.get("group_sizes") or ()))
UNGROUPED = When("no group_sizes", lambda call: not any(call.args.get("group_sizes") or ()))
INT4 = When("int4 packed in int32", lambda call: packed_int4(call.tensor("x1")) or packed_int4(call.tensor("x2")))


HINTS = {
    "scale": "float16 and int8 results read an int64 word: pack a float32 scale with npu_trans_quant_param; bfloat16, "
    "int32 and per-token results take a float32 or bfloat16 scale",
    "bias": "an int32 bias is added before the scales (round(bias / scale)), a floating one after them: that needs a "
    "bfloat16 result, or a float16 one with pertoken_scale",
    "offset": "an offset belongs to an int8 result; pack it into the scale's word",
    "pertoken_scale": "scales for each row need a float16 or bfloat16 result and a float scale",
}


def table(*rows: Row, hints: Mapping[str, str] = MappingProxyType({})) -> DtypeTable:
    return DtypeTable(COLUMNS, rows, {"output_dtype": I8}, hints)


def row(x: str, scale: Cell, offset: Cell, bias: Cell, pertoken: Cell, out: Cell, **marks: Any) -> Row:
    """A line of the dtype tables; every cell is a tuple of accepted dtypes."""
    return Row(((x,), (x,), scale, offset, bias, pertoken, out), **marks)


NO = (None,)

ROWS_310P = table(
    row(I8, (I64,), NO, (I32, None), NO, (F16,)),
    row(I8, (F32,), NO, (I32, None), NO, (F16,), modes=EAGER),
    row(I8, (I64,), (F32, None), (I32, None), NO, (I8,)),
    row(I8, (F32,), (F32, None), (I32, None), NO, (I8,), modes=EAGER),
    row(
        I8, (F32,), NO, (I32, None), (F32,), (F16,),
        contradicted="qmm.310p.pertoken",
        note="pertoken_scale on the Atlas inference series: the module's document says it is not supported, the "
        "operator's checker (quant_matmul_checker.cpp:1850-1866) and aclnnQuantMatmulV4.md allow it",
    ),
)  # fmt: skip

_A2_ROWS = (
    row(I8, (I64,), NO, (I32, None), NO, (F16,)),
    row(I8, (F32,), NO, (I32, None), NO, (F16,), modes=EAGER),
    row(I8, (I64,), (F32, None), (I32, None), NO, (I8,)),
    row(I8, (F32,), (F32, None), (I32, None), NO, (I8,), modes=EAGER),
    row(I8, (F32, BF16), NO, (I32, BF16, F32, None), (F32, None), (BF16,)),
    row(I8, (F32,), NO, (I32, F16, F32, None), (F32,), (F16,)),
    row(I8, (F32, BF16), NO, (I32, None), NO, (I32,)),
    row(I32, (I64,), NO, (I32, None), NO, (F16,)),
    row(I32, (F32,), NO, (I32, None), NO, (F16,), modes=EAGER),
    row(I32, (F32,), NO, (I32, BF16, F16, F32, None), (F32,), (BF16, F16)),
    row(I32, (BF16,), NO, (I32, BF16, F16, F32, None), (F32,), (BF16,)),
    row(
        I8, (F32,), NO, (F16, F32), NO, (F16,),
        contradicted="qmm.a2.float_bias",
        note="float bias with float16 output and no pertoken_scale: table 2 of LinearQuant.md lists it, the operator's "
        "checker takes only an int64 scale with an int32 bias there",
    ),
    row(
        I8, (F32,), NO, (BF16,), (F32,), (F16,),
        contradicted="qmm.a2.bf16_bias",
        note="bfloat16 bias with float16 output: the operator's document lists it, LinearQuant.md and the operator's "
        "checker list float16 instead",
    ),
)  # fmt: skip

ROWS_A2 = table(*_A2_ROWS, hints=HINTS)
ROWS_A5 = table(*_A2_ROWS, row(I8, (I64,), NO, (I32, None), NO, (BF16,)), hints=HINTS)


def _module(line: str) -> str:
    return f"LinearQuant.md, {line}"


def rules(dtypes: DtypeTable, chip: str, hint: str) -> tuple[Rule, ...]:
    """The rules that every chip shares, around a chip's dtype table."""
    return (
        Rule("qmm.x1.present", QMM, Present("x1"), _module("function prototype")),
        Rule("qmm.x2.present", QMM, Present("x2"), _module("function prototype")),
        Rule("qmm.scale.present", QMM, Present("scale"), _module("constraints: x1, weight, scale may not be empty")),
        Rule("qmm.x1.rank", QMM, Rank("x1", 2, 6), _module("inputs: x1 has 2 to 6 dimensions"), "documented, code, probed"),
        Rule("qmm.x2.rank", QMM, Rank("x2", 2, 6), _module("variables: weight has 2 to 6 dimensions"), "documented, code, probed"),
        Rule("qmm.empty", QMM, NotEmpty(("x1", "x2", "scale")), _module("constraints: x1, weight, scale may not be empty"), "documented, code"),
        Rule("qmm.same_dtype", QMM, SameDtype("x2", "x1"), _module("variables: weight has the dtype of x1"), "documented, code",
             hint="A8W4 (int8 x1, int32-packed x2) has a recipe of its own that is newer than the module's document", when=UNGROUPED),
        Rule("qmm.k", QMM, EqualSizes("k", "k_of_x2", "x1 (..., m, k) and x2 (..., k, n) with the same k"),
             "QuantMatmulKernelNpuOpApi.cpp", "documented, code"),
        Rule("qmm.batch", QMM, Broadcasts("x1", "x2"), "QuantMatmulKernelNpuOpApi.cpp:79-102", "code, probed"),
        Rule("qmm.k.range", QMM, Size("k", 1, 65535), _module("constraints: last dimension at most 65535"), "documented, code",
             hint="A2/A3 lift the limit in code for some calls (aclnnQuantMatmulV4.md:324-325); the documents do not"),
        Rule("qmm.n.range", QMM, Size("n", 1, 65535), _module("constraints: last dimension at most 65535"), "documented, code"),
        Rule("qmm.m.range", QMM, Size("m", 1, 65535), "aclnnQuantMatmulV3.md:348-349", "code", when=transposed("x1")),
        Rule("qmm.scale.shape", QMM, Shape("scale", (("n",), (1,))), _module("variables: scale is (t,), t = 1 or n"), "documented, code", when=UNGROUPED),
        Rule("qmm.offset.shape", QMM, Shape("offset", (("n",), (1,))), _module("variables: offset is (t,), t = 1 or n"), "documented, code", when=UNGROUPED),
        Rule("qmm.pertoken.shape", QMM, Shape("pertoken_scale", (("m",),)), _module("variables: pertoken_scale is (m,)"), "documented, code",
             hint="flatten x1 to (m, k) and the scale to (m,)", when=UNGROUPED),
        Rule("qmm.bias.shape", QMM, QmmBias(), _module("variables: bias is (n,) or (batch, 1, n)"), "documented, code, probed"),
        Rule(f"qmm.{chip}.dtypes", QMM, dtypes, _module("constraints: table of dtypes"), "documented, code", when=UNGROUPED, hint=hint),
    )  # fmt: skip


_NEWER = "newer than LinearQuant.md: npu_quant_matmul.md; aclnnQuantMatmulV5.md"

ROWS_GROUPED = DtypeTable(
    COLUMNS,
    (
        Row(((I32,), (I32,), (F32,), (F16, None), NO, (F32,), (BF16, F16))),
        Row(((I8,), (I32,), (I64,), (F32, None), NO, (F32,), (BF16, F16))),
    ),
    defaults={"output_dtype": I8},
)

GROUPED_A2 = (
    Rule("qmm.group", QMM, Value("group_sizes", lambda v, call: False, "no group_sizes"), _NEWER, "code", when=GROUPED, modes=EAGER, contradicted=True,
         hint="the A4W4 per-group and A8W4 forms are in the operator's document and code; torch_npu 2.13.0's own shape function rejects some of them"),
    Rule("qmm.group.graph", QMM, Value("group_sizes", lambda v, call: False, "no group_sizes in graph mode"), "quantmatmul.py:244-260: the converter drops them", "code", when=GROUPED, modes=("graph",)),
    Rule("qmm.group.size", QMM, Value("group_sizes", lambda v, call: len(v) == 3 and v[0] in (0, 1) and v[1] in (0, 1) and v[2] == 256, "group_sizes [0, 0, 256] or [1, 1, 256]", lambda v, call: [0, 0, 256]),
         _NEWER, "documented, code", when=GROUPED),
    Rule("qmm.group.k", QMM, Size("k", 256, None, 256), _NEWER, "documented, code", when=GROUPED),
    Rule("qmm.group.scale", QMM, Shape("scale", (("groups", "n"),)), _NEWER, "documented, code", when=GROUPED),
    Rule("qmm.group.offset", QMM, Shape("offset", (("groups", "n"),)), _NEWER, "documented, code", when=both(GROUPED, dtype_is("x1", I32))),
    Rule("qmm.group.a8w4.offset", QMM, Shape("offset", (("n",),)), _NEWER, "code", when=both(GROUPED, dtype_is("x1", I8)),
         hint="it must hold 8 * sum_k(scale * weight): the kernel multiplies x - 8"),
    Rule("qmm.group.pertoken", QMM, Shape("pertoken_scale", (("m", 1), ("m",))), _NEWER, "code", when=GROUPED),
    Rule("qmm.group.dtypes", QMM, ROWS_GROUPED, _NEWER, "documented, code", when=GROUPED),
)  # fmt: skip

GROUPED_310P = (
    Rule("qmm.310p.group", QMM, Value("group_sizes", lambda v, call: False, "no group_sizes"), _NEWER, "documented", when=GROUPED),
)  # fmt: skip

HINT_310P = (
    "this chip returns float16 or int8, takes an int32 bias and no scale per token: quantize activations with one "
    "static scale in a float16 model"
)
HINT_A2 = (
    "float16 and int8 results take an int64 scale word and an int32 bias; bfloat16 and per-token ones a float scale"
)

INT4_A2 = (
    Rule("qmm.int4.x1", QMM, Layout("x1", transposed=False), _module("constraints: int4: x1 is (m, k/8) and contiguous"), "documented, code", when=INT4),
    Rule("qmm.int4.x2.rank", QMM, Rank("x2", 2, 2), _module("variables: an int32 weight has 2 dimensions"), "documented, code", when=INT4),
    Rule("qmm.int4.bias", QMM, Rank("bias", 1, 1), "quant_matmul_checker.cpp:997-1002", "code", when=INT4),
    Rule("qmm.int4.n", QMM, Size("n", 8, None, 8), _module("constraints: int4: n a multiple of 8"), when=INT4),
    Rule("qmm.int4.nz.graph", QMM, Layout("x2", format="ND"), "quant_batch_matmul_v3_def.cpp: no INT4 line in NZ", "code", when=INT4, modes=("graph",)),
    Rule("qmm.int4.nz.eager", QMM, DtypeIn("scale", (F32,)), "QuantMatmulKernelNpuOpApi.cpp:299-316,335", "code",
         when=both(INT4, in_nz("x2")), modes=EAGER, hint="leave an int4 weight in ND"),
)  # fmt: skip

NZ_DEGENERATE = (
    Rule("qmm.nz.k", QMM, Size("k", 2), "quant_matmul_checker.cpp:818-823", "code", when=in_nz("x2"), hint="leave this weight in ND"),
    Rule("qmm.nz.n", QMM, Size("n", 2), "quant_matmul_checker.cpp:818-823", "code", when=in_nz("x2"), hint="leave this weight in ND"),
)  # fmt: skip

LAYOUT_310P = (
    Rule("qmm.310p.x1", QMM, Layout("x1", transposed=False), "quant_batch_matmul_v3_tiling_base.cpp:220-228", "code"),
    Rule("qmm.310p.nz.graph", QMM, Layout("x2", "NZ", True), "LinearQuant.md, variables: weight; quant_batch_matmul_v3_def.cpp", "documented, code",
         modes=("graph",), hint="store the weight as (n, k), cast it to FRACTAL_NZ, then transpose the view"),
    Rule("qmm.310p.nz.eager", QMM, Layout("x2", transposed=True), "npu_quant_matmul.md, constraints: transpose before the cast", "documented, code",
         when=in_nz("x2"), modes=EAGER, hint="store the weight as (n, k), cast it to FRACTAL_NZ, then transpose the view"),
)  # fmt: skip

_V5 = "aclnn_quant_matmul_v5.cpp"
_IN_ND = When("x2 in ND", lambda call: not in_nz("x2").test(call))
_ONCE = "a weight stored as (n, k) that is cast to FRACTAL_NZ once (npu_format_cast) costs nothing here"

COSTS_310P = (
    Cost(QMM, "TransData of the whole weight to FRACTAL_NZ", f"{_V5}:903", _IN_ND, EAGER, _ONCE),
    Cost(QMM, "Transpose of the whole weight", f"{_V5}:897-902", both(_IN_ND, transposed("x2", False)), EAGER,
         "store the weight as (n, k)"),
    Cost(QMM, "TransData of x1 and of the result", f"{_V5}:1118-1122, 1175-1179", given("pertoken_scale"), EAGER,
         "one static scale for x1 costs nothing here"),
)  # fmt: skip
