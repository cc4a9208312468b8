"""Legality of ``npu_grouped_matmul`` (GE GroupedMatmul): float, W8A8, W4A4, W8A4 and weight-only forms of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantpass.basics.symbolic import statically_true
from quantpass.basics.torch_types import BF16, F16, F32, I8, I32, I64
from quantpass.chips.calls import INT4_PER_INT32, OpCall, VendorOp, matrix_sizes, packed_int4
from quantpass.chips.dtype_table import DtypeTable, Row
from quantpass.chips.requirements import (
    Absent,
    DtypeIn,
    EqualSizes,
    Finding,
    Layout,
    NotEmpty,
    Present,
    Rank,
    Shape,
    Size,
    Value,
)
from quantpass.chips.rules import Rule, When, both, dtype_is, given, in_nz, transposed


def _sizes(call: OpCall) -> dict[str, Any]:
    """m, k, n, the number of experts, and the last stored dimensions of x and weight."""
    sizes: dict[str, Any] = {}
    x, weight, listed = call.tensor("x"), call.tensor("weight"), call.count("weight")
    if x is not None and x.rank >= 2:
        m, k = x.shape[-2:]
        k = k * INT4_PER_INT32 if packed_int4(x) else k
        sizes = {"m": m, "k": k, "x_inner": m if x.transposed else k}
    sizes |= matrix_sizes(weight, "k_of_weight", "n")
    if weight is not None and "n" in sizes:
        sizes["experts"] = weight.shape[0] if weight.rank == 3 else listed
        sizes["weight_inner"] = sizes["k_of_weight" if weight.transposed else "n"]
    for scales in (call.tensor("scale"), call.tensor("antiquant_scale")):
        if scales is not None and scales.rank == (3 if listed == 1 else 2):
            sizes["groups"] = scales.shape[-2]
    return sizes


GMM = VendorOp(
    "npu_grouped_matmul(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, Tensor[]? scale=None, "
    "Tensor[]? offset=None, Tensor[]? antiquant_scale=None, Tensor[]? antiquant_offset=None, "
    "Tensor[]? per_token_scale=None, Tensor? group_list=None, Tensor[]? activation_input=None, "
    "Tensor[]? activation_quant_scale=None, Tensor[]? activation_quant_offset=None, int? split_item=0, "
    "int? group_type=None, int? group_list_type=0, int? act_type=0, int[]? tuning_config=None, "
    "int? output_dtype=None, int? x_dtype=None, int? weight_dtype=None, int? scale_dtype=None, "
    "int? per_token_scale_dtype=None) -> Tensor[]",
    _sizes,
    unjudged=("tuning_config", "x_dtype", "weight_dtype", "scale_dtype", "per_token_scale_dtype"),
    weight="weight",
    family="gmm",
)

_DOC, _CODE, _ACLNN = "npu_grouped_matmul.md", "aclnn_grouped_matmul.cpp", "aclnnGroupedMatmulV5.md"
COLUMNS = (
    *("x", "weight", "bias", "scale", "offset", "antiquant_scale", "antiquant_offset", "per_token_scale"),
    "output_dtype",
)
NO = (None,)
EAGER = ("eager",)


def row_of(
    x: str, weight: str, bias: Any, out: Any, scale: Any = NO, token: Any = NO, anti: Any = NO, **marks: Any
) -> Row:
    shift = marks.pop("shift", anti)
    return Row(((x,), (weight,), bias, scale, marks.pop("offset", NO), anti, shift, token, out), **marks)


_FLOAT16 = row_of(F16, F16, (F16, None), (None, F16))

ROWS_310P = DtypeTable(
    COLUMNS,
    (
        _FLOAT16,
        row_of(
            F16, F16, (F16, None), (None, F16), token=(F32,), contradicted="gmm.310p.pertoken",
            note="per_token_scale on the Atlas inference series: table 3 of npu_grouped_matmul.md lists it, its parameter "
            "list and the operator's checker (aclnn_grouped_matmul.cpp:634-641) do not",
        ),
    ),
    hints={
        "x": "this chip has the float16 form only: experts are quantized with npu_quant_grouped_matmul_dequant here",
        "weight": "this chip has the float16 form only: experts are quantized with npu_quant_grouped_matmul_dequant here",
    },
)  # fmt: skip

ROWS_A2 = DtypeTable(
    COLUMNS,
    (
        _FLOAT16,
        row_of(BF16, BF16, (F32, None), (None, BF16)),
        row_of(F32, F32, (F32, None), (None, F32)),
        row_of(I8, I8, (I32, None), (BF16,), scale=(BF16,), token=(F32, None)),
        row_of(I8, I8, (I32, None), (F16,), scale=(F32,), token=(F32, None)),
        row_of(I8, I8, (I32, None), (None,), scale=(I64,)),
        row_of(I8, I8, (I32, None), (I8,), scale=(I64,), modes=EAGER),
        row_of(I8, I8, (I32, None), (I32,), scale=(BF16, F32, I64, None)),
        row_of(I32, I32, NO, (F16, BF16), scale=(I64,), token=(F32, None)),
        row_of(F16, I8, (F16, None), (None, F16), anti=(F16,)),
        row_of(F16, I32, (F16, None), (None, F16), anti=(F16,)),
        row_of(BF16, I8, (F32, None), (None, BF16), anti=(BF16,)),
        row_of(BF16, I32, (F32, None), (None, BF16), anti=(BF16,)),
        row_of(
            I8, I32, (F32,), (F16, BF16), scale=(I64,), offset=(F32, None), token=(F32,), contradicted="gmm.a2.w4a8",
            note="int8 x with an int4 weight: npu_grouped_matmul.md has no such line, the operator has the form "
            "(aclnn_grouped_matmul.cpp:813-872, GroupedMatmulKernelNpuOpApi.cpp:323) and servers rely on it",
        ),
        row_of(
            I8, I8, (BF16,), (BF16,), scale=(BF16, F32), token=(F32, None), contradicted="gmm.a2.bf16_bias",
            note="bfloat16 bias of an int8 weight: npu_grouped_matmul.md names int32 in its table and bfloat16 in a formula, "
            "the operator's checker takes both (aclnn_grouped_matmul.cpp:801-805)",
        ),
    ),
    hints={
        "scale": "a bfloat16 result takes a bfloat16 scale, a float16 one a float32 scale, an int8 one an int64 word",
        "bias": "int8 operands take an int32 bias (added before the scales), float16 a float16 and bfloat16 a float32 one",
        "antiquant_offset": "weight-only quantization wants an offset beside the scale: give zeros for symmetric weights",
        "output_dtype": "name the dtype of the result: left out it is that of x",
    },
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class EvenGroups:
    """A scale for each group of rows: their number divides K, and a group has an even number of rows."""

    @property
    def want(self) -> str:
        return "groups that divide K and have an even number of rows"

    def check(self, call: OpCall) -> list[Finding]:
        k, groups = call.sizes.get("k"), call.sizes.get("groups")
        if k is None or groups is None:
            return []
        holds = (
            statically_true(groups > 0) and statically_true(k % groups == 0) and statically_true(k // groups % 2 == 0)
        )
        if holds is None:
            return [Finding(f"{groups} groups divide k, {k}, into even parts", self.want, undecided=True)]
        return [] if holds else [Finding(f"k is {k} and there are {groups} groups", self.want)]


@dataclass(frozen=True, slots=True)
class GroupsOf:
    """K in groups of one of some sizes."""

    sizes: tuple[int, ...]

    @property
    def want(self) -> str:
        *most, last = self.sizes
        return f"groups of {', '.join(map(str, most))}{' or ' if most else ''}{last} rows"

    def check(self, call: OpCall) -> list[Finding]:
        k, groups = call.sizes.get("k"), call.sizes.get("groups")
        if k is None or groups is None:
            return []
        holds = [statically_true(groups * size == k) for size in self.sizes]
        if any(h is True for h in holds):
            return []
        if any(h is None for h in holds):
            return [Finding(f"{k} rows in {groups} groups of a size that is one of these", self.want, undecided=True)]
        return [Finding(f"k is {k} and there are {groups} groups", self.want)]


def _listed(call: OpCall) -> bool:
    weight = call.tensor("weight")
    return weight is not None and weight.rank == 2


def group_type_is(*types: int) -> When:
    return When(f"group_type {' or '.join(map(str, types))}", lambda call: call.args.get("group_type") in types)


STACKED = When("one weight for all experts", lambda call: not _listed(call))
LISTED = When("a weight for each expert", _listed)
SPLIT_M = group_type_is(0)
ONE_RESULT = When("split_item 2 or 3", lambda call: call.args.get("split_item") in (2, 3))
PAIRS = When("group_list_type 2", lambda call: call.args.get("group_list_type") == 2)
NO_PAIRS = When("group_list_type 0 or 1", lambda call: call.args.get("group_list_type") in (None, 0, 1))
QUANTIZED = When(
    "an integer weight", lambda call: (w := call.tensor("weight")) is not None and w.dtype_name in (I8, I32)
)
FLOAT_WEIGHT = When("a float weight", lambda call: not QUANTIZED.test(call))
INT4 = dtype_is("weight", I32)
INT8 = dtype_is("weight", I8)
W4A4 = both(dtype_is("x", I32), INT4)
W4A8 = both(dtype_is("x", I8), INT4)
NOT_W4A8 = When("not int8 x with an int4 weight", lambda call: not W4A8.test(call))
INTEGERS = When("integer x", lambda call: (x := call.tensor("x")) is not None and x.dtype_name in (I8, I32))
FLOATS = When("float x", lambda call: not INTEGERS.test(call))
WEIGHT_ONLY = When("float x with an integer weight", lambda call: FLOATS.test(call) and not FLOAT_WEIGHT.test(call))
W8A8 = both(dtype_is("x", I8), INT8)
TURNED, STRAIGHT = transposed("weight"), transposed("weight", False)
NO_OFFSET = When("no offset", lambda call: call.args.get("offset") is None)
NO_ROW_SCALES = When("no per_token_scale", lambda call: call.args.get("per_token_scale") is None)
NZ_HINT = "leave this weight in ND, or pad it"


def one_of(*accepted: Any) -> Any:
    return lambda value, call: value in accepted


def rules(
    dtypes: DtypeTable, chip: str, source: str = f"{_DOC}: tables of dtypes; {_CODE}:960-1006"
) -> tuple[Rule, ...]:
    """The rules that every chip shares, around a chip's dtype table."""
    return (
        Rule("gmm.x.present", GMM, Present("x"), f"{_DOC}: x"),
        Rule("gmm.weight.present", GMM, Present("weight"), f"{_DOC}: weight"),
        Rule("gmm.empty", GMM, NotEmpty(("weight",)), f"{_CODE}: CheckZeroShape", "code"),
        Rule("gmm.group_type.present", GMM, Present("group_type"), f"{_DOC}: group_type; GroupedMatmulKernelNpuOpApi.cpp:129-130", "documented, code",
             hint="group_type=0 shares the rows of x out among the experts"),
        Rule("gmm.split_item", GMM, Value("split_item", one_of(0, 1, 2, 3), "split_item 0 to 3", lambda v, call: 2, 0), f"{_DOC}: split_item", "documented, code"),
        Rule("gmm.split_item.one", GMM, Value("split_item", one_of(2, 3), "split_item 2 or 3", lambda v, call: 2, 0), f"{_DOC}: table of forms; {_CODE}:1025-1026", "documented, code",
             when=SPLIT_M, hint="one result for all experts; several are not there where group_list is a tensor"),
        Rule("gmm.x.rank", GMM, Rank("x", 2, 6), f"{_DOC}: x", "documented, code"),
        Rule("gmm.x.rank.one", GMM, Rank("x", 2, 2), f"{_DOC}: x has 2 dimensions unless split_item is 0", "documented, code", when=ONE_RESULT, hint="flatten x to (tokens, k)"),
        Rule("gmm.weight.rank", GMM, Rank("weight", 2, 3), f"{_DOC}: weight has 2 or 3 dimensions", "documented, code"),
        Rule("gmm.x.layout", GMM, Layout("x", transposed=False), f"{_DOC}: x is not transposed; {_CODE}:1319", "documented, code", when=group_type_is(0, -1)),
        Rule("gmm.k", GMM, EqualSizes("k", "k_of_weight", "x (m, k) and weight (experts, k, n) with the same k"), f"{_DOC}: formula; {_CODE}:1036", "documented, code"),
        Rule("gmm.group_list.present", GMM, Present("group_list"), f"{_DOC}: table of forms; {_CODE}:1050", "documented, code", when=SPLIT_M, hint="how many rows each expert has"),
        Rule("gmm.group_list.dtype", GMM, DtypeIn("group_list", (I64,)), f"{_DOC}: group_list; {_CODE}:357", "documented, code"),
        Rule("gmm.group_list.shape", GMM, Shape("group_list", (("experts",),)), f"{_DOC}: group_list has a number for each expert; {_CODE}:353", "documented, code",
             when=both(SPLIT_M, NO_PAIRS), hint="a rank has a number for each of its own experts, not for all of the model's"),
        Rule("gmm.group_list_type", GMM, Value("group_list_type", one_of(0, 1, 2), "group_list_type 0 (sums), 1 (counts) or 2 (pairs)", lambda v, call: 0), f"{_DOC}: group_list_type", "documented, code"),
        Rule("gmm.experts", GMM, Size("experts", 1, 1024), f"{_DOC}: at most 1024 groups; {_CODE}:52", "documented, code", when=STACKED),
        Rule("gmm.bias.shape", GMM, Shape("bias", (("experts", "n"),)), f"{_CODE}:516-537: (experts, n) beside one weight; {_DOC} says one dimension", "code", when=STACKED),
        *(Rule(f"gmm.{name}", GMM, Absent(name), f"{_DOC}: {name} is reserved; {_CODE}:1373-1386", "documented, code") for name in ("activation_input", "activation_quant_scale", "activation_quant_offset")),
        Rule(f"gmm.{chip}.dtypes", GMM, dtypes, source, "documented, code" if _CODE in source else "documented"),
    )  # fmt: skip


INNER = (
    Rule("gmm.x.inner", GMM, Size("x_inner", 1, 65535), f"{_DOC}: InnerLimit; {_CODE}:53", "documented, code"),
    Rule("gmm.weight.inner", GMM, Size("weight_inner", 1, 65535), f"{_DOC}: InnerLimit; {_CODE}:53", "documented, code"),
)  # fmt: skip

RULES_A2 = (
    *INNER,
    Rule("gmm.experts.listed", GMM, Size("experts", 1, 128), f"{_DOC}: lists of at most 128; {_CODE}:51", "documented, code", when=LISTED, hint="stack them: (experts, k, n)"),
    Rule("gmm.bias.shape.listed", GMM, Shape("bias", (("n",),)), f"{_DOC}: bias has one dimension", "documented, code", when=LISTED),
    Rule("gmm.group_type", GMM, Value("group_type", one_of(-1, 0, 2), "group_type -1, 0 or 2", lambda v, call: 0), f"{_DOC}: group_type", "documented, code, probed"),
    Rule("gmm.weight.stacked", GMM, Rank("weight", 3, 3), f"{_DOC}: table of forms; {_CODE}:1031", "documented, code", hint="a list of one holds all experts: (experts, k, n)",
         when=both(SPLIT_M, When("one weight", lambda call: call.count("weight") == 1))),
    Rule("gmm.weight.separate", GMM, Rank("weight", 2, 2), f"{_DOC}: table of forms; {_CODE}:1275", "documented, code", when=group_type_is(-1)),
    Rule("gmm.group_list.none", GMM, Absent("group_list"), f"{_DOC}: table of forms; {_CODE}:249-252", "documented, code", when=group_type_is(-1)),
    Rule("gmm.split_item.many", GMM, Value("split_item", one_of(0, 1), "split_item 0 or 1", lambda v, call: 0, 0), f"{_DOC}: table of forms; {_CODE}:1246", "documented, code", when=group_type_is(-1)),
    Rule("gmm.quantized.group_type", GMM, Value("group_type", one_of(-1, 0), "group_type -1 or 0", lambda v, call: 0), f"{_DOC}: quantized forms have group_type -1 or 0; {_CODE}:682-683", "documented, code", when=QUANTIZED),
    Rule("gmm.split_k.bias", GMM, Absent("bias"), f"{_CODE}:1324-1325", "code", when=group_type_is(2)),
    Rule("gmm.group_list.pairs", GMM, Shape("group_list", (("experts", 2),)), f"{_DOC}: group_list_type 2", "documented, code", when=PAIRS),
    Rule("gmm.group_list_type.pairs", GMM, DtypeIn("weight", (I8,)), f"{_DOC}: group_list_type 2 beside int8 operands", "documented", when=PAIRS),
    Rule("gmm.act_type", GMM, Value("act_type", one_of(0, 1, 2, 4, 5), "act_type 0, 1, 2, 4 or 5", lambda v, call: 0), f"{_DOC}: act_type", "documented, code"),
    Rule("gmm.act_type.none", GMM, Value("act_type", one_of(0), "act_type 0 unless the activations have a scale for each row", lambda v, call: 0), f"{_DOC}: activation beside per_token_scale only", when=NO_ROW_SCALES),
    Rule("gmm.scale.shape", GMM, Shape("scale", (("experts", "n"),)), f"{_CODE}:516-537: (experts, n) beside one weight; {_DOC} says one dimension", "code", when=both(STACKED, INT8)),
    Rule("gmm.scale.shape.listed", GMM, Shape("scale", (("n",),)), f"{_DOC}: scale has one dimension", "documented, code", when=both(LISTED, INT8)),
    Rule("gmm.scale.shape.int4", GMM, Shape("scale", (("experts", "n"), ("experts", "groups", "n"))), f"{_CODE}:897-920; example of {_DOC}", "documented, code", when=both(INT4, STACKED, given("scale"))),
    Rule("gmm.int4.groups", GMM, EvenGroups(), f"{_DOC}: groups divide k; {_CODE}:484, 746, 910-917", "documented, code", when=INT4),
    Rule("gmm.int4.n", GMM, Size("n", 8, None, 8), f"{_CODE}:904", "code", when=W4A4),
    Rule("gmm.int4.inner", GMM, Size("weight_inner", 2, None, 2), f"{_DOC}: an int4 weight's last dimension is even; {_CODE}:1015", "documented, code", when=INT4),
    Rule("gmm.w4a4.nz", GMM, Layout("weight", "NZ"), f"{_DOC}: formula 3-3", "documented", when=W4A4, contradicted=True, hint="aclnnGroupedMatmulV5.md and grouped_matmul_def.cpp list ND as well"),
    Rule("gmm.w4a4.listed", GMM, Rank("weight", 3, 3), f"{_CODE}:953-955", "code", when=W4A4),
    Rule("gmm.w4a8.lists", GMM, Value("group_list_type", one_of(1), "group_list_type 1", lambda v, call: 1, 0), f"{_ACLNN}: A8W4 counts, and nothing checks it", when=W4A8),
    Rule("gmm.w4a8.k", GMM, Size("k", 256, 18432, 256), f"{_ACLNN}: A8W4 without offset", when=both(W4A8, NO_OFFSET)),
    Rule("gmm.w4a8.groups", GMM, GroupsOf((256,)), f"{_ACLNN}: A8W4 without offset", when=both(W4A8, NO_OFFSET)),
    Rule("gmm.w4a8.n", GMM, Size("n", 8, None, 8), f"{_ACLNN}: A8W4 without offset", when=both(W4A8, NO_OFFSET)),
    Rule("gmm.integers.group_type", GMM, Value("group_type", one_of(0), "group_type 0", lambda v, call: 0), f"{_ACLNN}: A8W8, A8W4 and A4W4 share rows out", when=INTEGERS, contradicted=True,
         hint=f"{_DOC} has group_type -1 for quantized forms"),
    Rule("gmm.integers.listed", GMM, Rank("weight", 3, 3), f"{_ACLNN}: A8W8 and A4W4 have one weight for all experts", when=INTEGERS, contradicted=True,
         hint=f"{_DOC} has a list of weights for quantized forms: stack them, (experts, k, n)"),
    Rule("gmm.nz.weight_only", GMM, Layout("weight", "ND"), f"{_ACLNN}: A16W8 and A16W4 in ND; {_CODE}:1669-1741, which torch_npu calls for FRACTAL_NZ", "documented, code", when=WEIGHT_ONLY,
         hint="leave this weight in ND"),
    Rule("gmm.nz.output", GMM, Value("output_dtype", one_of(F16, BF16, I32), "output_dtype float16, bfloat16 or int32", lambda v, call: BF16, I8), f"{_ACLNN}: int8 results beside a weight in ND; {_CODE}:1690-1697", "documented, code",
         when=both(W8A8, in_nz("weight"))),
    Rule("gmm.nz.dtype", GMM, DtypeIn("weight", (I8, I32, F16, BF16)), f"{_ACLNN}: float32 in ND; {_CODE}:1709-1726", "documented, code", when=in_nz("weight")),
    Rule("gmm.nz.split_k", GMM, Value("group_type", one_of(-1, 0), "group_type -1 or 0", lambda v, call: 0), f"{_CODE}:1943", "code", when=in_nz("weight")),
    Rule("gmm.w4a8.bias", GMM, Shape("bias", (("experts", "n"),)), f"{_CODE}:825-827", "code", when=W4A8, hint="it holds 8 * sum_k(scale * weight): the kernel multiplies x - 8"),
    Rule("gmm.token.shape", GMM, Shape("per_token_scale", (("m",),)), f"{_DOC}: per_token_scale has one dimension; {_CODE}:573-579", "documented, code", when=NOT_W4A8, hint="flatten it to (tokens,)"),
    Rule("gmm.antiquant.shape", GMM, Shape("antiquant_scale", (("experts", "n"),)), f"{_DOC}: antiquant_scale", "documented, code", when=both(STACKED, INT8)),
    Rule("gmm.antiquant.shape.int4", GMM, Shape("antiquant_scale", (("experts", "n"), ("experts", "groups", "n"))), f"{_DOC}: antiquant_scale", "documented, code", when=both(STACKED, INT4, given("antiquant_scale"))),
    Rule("gmm.antiquant.offset", GMM, Shape("antiquant_offset", (("experts", "n"), ("experts", "groups", "n"))), f"{_DOC}: antiquant_offset", "documented, code", when=both(STACKED, given("antiquant_scale"))),
    Rule("gmm.nz.int8.k", GMM, Size("k", 16, None, 16), f"{_CODE}:1513-1517", "code", when=both(INT8, in_nz("weight"), STRAIGHT), hint=NZ_HINT),
    Rule("gmm.nz.int8.n", GMM, Size("n", 32, None, 32), f"{_CODE}:1513-1517", "code", when=both(INT8, in_nz("weight"), STRAIGHT), hint=NZ_HINT),
    Rule("gmm.nz.int8.turned.k", GMM, Size("k", 32, None, 32), f"{_CODE}:1513-1517", "code", when=both(INT8, in_nz("weight"), TURNED), hint=NZ_HINT),
    Rule("gmm.nz.int8.turned.n", GMM, Size("n", 16, None, 16), f"{_CODE}:1513-1517", "code", when=both(INT8, in_nz("weight"), TURNED), hint=NZ_HINT),
    Rule("gmm.nz.int4.k", GMM, Size("k", 16, None, 16), f"{_CODE}:1521-1524", "code", when=both(INT4, in_nz("weight"), STRAIGHT), hint=NZ_HINT),
    Rule("gmm.nz.int4.n", GMM, Size("n", 64, None, 64), f"{_CODE}:1521-1524", "code", when=both(INT4, in_nz("weight"), STRAIGHT), hint=NZ_HINT),
    Rule("gmm.nz.int4.turned.k", GMM, Size("k", 64, None, 64), f"{_CODE}:1521-1524", "code", when=both(INT4, in_nz("weight"), TURNED), hint=NZ_HINT),
    Rule("gmm.nz.int4.turned.n", GMM, Size("n", 16, None, 16), f"{_CODE}:1521-1524", "code", when=both(INT4, in_nz("weight"), TURNED), hint=NZ_HINT),
    Rule("gmm.nz.float.k", GMM, Size("k", 16, None, 16), f"{_CODE}:1518-1520", "code", when=both(FLOAT_WEIGHT, in_nz("weight")), hint=NZ_HINT),
    Rule("gmm.nz.float.n", GMM, Size("n", 16, None, 16), f"{_CODE}:1518-1520", "code", when=both(FLOAT_WEIGHT, in_nz("weight")), hint=NZ_HINT),
)  # fmt: skip

RULES_310P = (
    *INNER,
    Rule("gmm.310p.group_type", GMM, Value("group_type", one_of(0), "group_type 0", lambda v, call: 0), f"{_DOC}: group_type on the Atlas inference series; {_CODE}:2044-2047", "documented, code"),
    Rule("gmm.310p.weight", GMM, Rank("weight", 3, 3), f"{_DOC}: one weight for all experts on the Atlas inference series; {_CODE}:2044-2047", "documented, code"),
    Rule("gmm.310p.group_list_type", GMM, Value("group_list_type", one_of(0, 1), "group_list_type 0 or 1", lambda v, call: 0), f"{_DOC}: group_list_type"),
    Rule("gmm.310p.act_type", GMM, Value("act_type", one_of(0), "act_type 0", lambda v, call: 0), f"{_DOC}: act_type; {_CODE}:782", "documented, code"),
    Rule("gmm.310p.n", GMM, Size("n", 16, None, 16), f"{_DOC}: n is a multiple of 16; {_CODE}:1487", "documented, code"),
)  # fmt: skip
