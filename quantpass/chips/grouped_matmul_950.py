"""Legality of ``npu_grouped_matmul`` on the Ascend 950, for integers and 16-bit floats: rows of its own in aclnn's pages."""

from __future__ import annotations

from quantpass.basics.torch_types import BF16, F16, F32, I8, I32, I64
from quantpass.chips.calls import OpCall
from quantpass.chips.dtype_table import DtypeTable
from quantpass.chips.grouped_matmul import (
    COLUMNS,
    EAGER,
    FLOAT_WEIGHT,
    FLOATS,
    GMM,
    INT4,
    INT8,
    INTEGERS,
    LISTED,
    NO,
    NZ_HINT,
    PAIRS,
    SPLIT_M,
    STACKED,
    STRAIGHT,
    TURNED,
    W4A4,
    W4A8,
    W8A8,
    WEIGHT_ONLY,
    EvenGroups,
    GroupsOf,
    group_type_is,
    one_of,
    row_of,
    rules,
)
from quantpass.chips.requirements import (
    Absent,
    DtypeIn,
    Layout,
    Present,
    Rank,
    Requirement,
    Shape,
    Size,
    Value,
)
from quantpass.chips.rules import Rule, When, both, given, in_nz

_DOC, _NZ = "aclnnGroupedMatmulV5.md", "aclnnGroupedMatmulWeightNz.md"
_HINTS = {
    "scale": "a bfloat16 result takes a bfloat16 or float32 scale, a float16 one a float32 scale, or an int64 word without "
    "per_token_scale",
    "output_dtype": "name the dtype of the result: left out it is that of x",
    "x": "8- and 4-bit floats are outside what quantpass knows",
    "weight": "8- and 4-bit floats are outside what quantpass knows",
}
ROWS = DtypeTable(
    COLUMNS,
    (
        row_of(F16, F16, (F16, F32, None), (None, F16)),
        row_of(BF16, BF16, (BF16, F32, None), (None, BF16)),
        row_of(F32, F32, (F32, None), (None, F32)),
        row_of(I8, I8, (I32, None), (BF16, F16, None), scale=(I64,)),
        row_of(I8, I8, (I32, None), (I8,), scale=(I64,), modes=EAGER),
        row_of(I8, I8, (I32, None), (I32,), scale=(I64, None)),
        row_of(I8, I8, (I32, BF16, F32, None), (BF16,), scale=(BF16, F32), token=(F32, None)),
        row_of(I8, I8, (I32, F16, F32, None), (F16,), scale=(F32,), token=(F32, None)),
        row_of(I32, I32, NO, (BF16, F16), scale=(I64,), token=(F32, None)),
        row_of(I8, I32, (F32,), (BF16,), scale=(I64,), token=(F32,)),
        row_of(I8, I32, (F32,), (F16,), scale=(I64,), offset=(F32, None), token=(F32,)),
        row_of(I8, I32, (F32, None), (BF16, F16), scale=(F32,), token=(F32,), anti=(F16,), shift=NO),
        *(row_of(F16, w, (F16, None), (None, F16), anti=(F16,), shift=(F16, None)) for w in (I8, I32)),
        *(row_of(BF16, w, (BF16, F32, None), (None, BF16), anti=(BF16,), shift=(BF16, None)) for w in (I8, I32)),
    ),
    hints=_HINTS,
)

NOT_WEIGHT_ONLY = When("not weight-only", lambda call: not WEIGHT_ONLY.test(call))
TWICE = both(W4A8, given("antiquant_scale"))
FUSED = both(W4A8, When("no antiquant_scale", lambda call: call.args.get("antiquant_scale") is None))
SYMMETRIC = both(FUSED, When("no offset", lambda call: call.args.get("offset") is None))
SHIFTED = both(FUSED, given("offset"))


def _grouped(call: OpCall) -> bool:
    scale = call.tensor("antiquant_scale")
    return scale is not None and scale.rank == (2 if LISTED.test(call) else 3)


def _activates(call: OpCall) -> bool:
    scale = call.tensor("scale")
    return W8A8.test(call) and scale is not None and scale.dtype_name in (F32, BF16)


GROUPS = both(WEIGHT_ONLY, When("a scale for each group of rows", _grouped))
ACTIVATES = When("int8 operands with a float scale", _activates)
IDLE = When("not int8 operands with a float scale", lambda call: not _activates(call))
PER_COLUMN = When("a scale for each column", lambda call: (s := call.tensor("scale")) is not None and s.rank == 2)


def _rule(name: str, need: Requirement, what: str, **rest: object) -> Rule:
    return Rule(f"gmm.a5.{name}", GMM, need, f"{_DOC}: {what}", **rest)  # type: ignore[arg-type]


def _nz(name: str, need: Requirement, what: str, evidence: str = "documented", **rest: object) -> Rule:
    return Rule(f"gmm.a5.nz.{name}", GMM, need, f"{_NZ}: {what}", evidence, **rest)  # type: ignore[arg-type]


_ALIGNED = "aclnn_grouped_matmul.cpp:1513-1524, of A2; the page of the 950 names no multiples"

RULES = (
    *rules(ROWS, "a5", f"{_DOC}, {_NZ}: tables of dtypes on the Ascend 950"),
    _rule("group_type", Value("group_type", one_of(-1, 0, 2), "group_type -1, 0 or 2", lambda v, call: 0), "groupType"),
    _rule("group_type.integers", Value("group_type", one_of(0), "group_type 0", lambda v, call: 0), "groupType of int8 and int4 activations", when=INTEGERS),
    _rule("group_type.weight_only", Value("group_type", one_of(-1, 0), "group_type -1 or 0", lambda v, call: 0), "groupType of weight-only forms", when=WEIGHT_ONLY),
    _rule("listed.integers", Rank("weight", 3, 3), "one weight for all experts where x is an integer", when=INTEGERS),
    _rule("listed.weight_only", Rank("weight", 3, 3), "one weight for all experts with groupType 0", when=both(SPLIT_M, WEIGHT_ONLY)),
    _rule("weight.stacked", Rank("weight", 3, 3), "one weight of a list is (experts, k, n)", when=both(SPLIT_M, When("one weight", lambda call: call.count("weight") == 1)),
          hint="a list of one holds all experts: (experts, k, n)"),
    _rule("weight.separate", Rank("weight", 2, 2), "groupType -1 and 2 have matrices", when=group_type_is(-1, 2)),
    _rule("x.rank", Rank("x", 2, 2), "x is a matrix unless the weight alone is quantized", when=NOT_WEIGHT_ONLY),
    _rule("experts.listed", Size("experts", 1, 128), "at most 128 groups of listed weights", when=both(LISTED, group_type_is(0, 2))),
    _rule("group_list.none", Absent("group_list"), "groupType -1 has no groupList", when=group_type_is(-1)),
    _rule("split_item.many", Value("split_item", one_of(0, 1), "split_item 0 or 1", lambda v, call: 0, 0), "groupType -1 has a result for each weight", when=group_type_is(-1)),
    _rule("split_k.x", Layout("x", transposed=True), "x of groupType 2 is transposed", when=group_type_is(2)),
    _rule("split_k.weight", Layout("weight", transposed=False), "weight of groupType 2 is not transposed", when=group_type_is(2)),
    _rule("split_k.bias", Absent("bias"), "groupType 2 has no bias", when=group_type_is(2)),
    _rule("group_list.pairs", Shape("group_list", (("experts", 2),)), "groupListType 2", when=PAIRS),
    _rule("pairs", DtypeIn("x", (I8, I32)), "groupListType 2 beside integer activations alone", when=PAIRS),
    _rule("bias.shape.listed", Shape("bias", (("n",),)), "bias of a listed weight is (n,)", when=LISTED),
    _rule("act_type", Value("act_type", one_of(0, 1, 2, 4, 5), "act_type 0, 1, 2, 4 or 5", lambda v, call: 0), "actType", when=ACTIVATES),
    _rule("act_type.none", Value("act_type", one_of(0), "act_type 0", lambda v, call: 0), "actType of other forms", when=IDLE),
    _rule("scale.shape", Shape("scale", (("experts", "n"), ("experts", 1), ("experts",))), "scale is (g, n), (g, 1) or (g,)", when=W8A8),
    _rule("token.shape", Shape("per_token_scale", (("m",),)), "perTokenScale is (m,)"),
    _rule("w4a4.scale", Shape("scale", (("experts", "n"), ("experts", "groups", "n"))), "scale is (g, n) or (g, groups, n)", when=W4A4),
    _rule("w4a4.token", Present("per_token_scale"), "int4 operands with a scale for each column", when=both(W4A4, PER_COLUMN)),
    _rule("w4a4.groups", EvenGroups(), "groups divide k into even parts", when=W4A4),
    _rule("w4a4.nd", Layout("weight", transposed=False), "an int4 weight in ND is not transposed", when=both(W4A4, When("weight in ND", lambda call: not in_nz("weight").test(call)))),
    _rule("w4a4.n", Size("n", 8, None, 8), "n is a multiple of 8", when=W4A4),
    _rule("w4a8.lists", Value("group_list_type", one_of(1), "group_list_type 1", lambda v, call: 1, 0), "int8 x with an int4 weight has counts alone", when=FUSED),
    _rule("w4a8.layout", Layout("weight", transposed=False), "int8 x with an int4 weight that is not transposed", when=W4A8),
    _rule("w4a8.k", Size("k", 256, 18432, 256), "int8 x with a symmetric int4 weight", when=SYMMETRIC),
    _rule("w4a8.groups", GroupsOf((256,)), "scale is (g, k / 256, n)", when=SYMMETRIC),
    _rule("w4a8.scale", Shape("scale", (("experts", "groups", "n"),)), "scale is (g, k / 256, n)", when=SYMMETRIC),
    _rule("w4a8.scale.shifted", Shape("scale", (("experts", 1, "n"),)), "scale is (g, 1, n) beside an offset", when=SHIFTED),
    _rule("w4a8.offset", Shape("offset", (("experts", 1, "n"),)), "offset is (g, 1, n)", when=SHIFTED),
    _rule("antiquant.shape", Shape("antiquant_scale", (("experts", "n"),)), "antiquantScale of an int8 weight is (g, n)", when=both(STACKED, INT8)),
    _rule("antiquant.shape.int4", Shape("antiquant_scale", (("experts", "n"), ("experts", "groups", "n"))), "antiquantScale of an int4 weight is (g, n) or (g, groups, n)",
          when=both(STACKED, INT4, FLOATS)),
    _rule("antiquant.offset", Shape("antiquant_offset", (("experts", "n"), ("experts", "groups", "n"))), "antiquantOffset has the shape of antiquantScale", when=STACKED),
    _rule("antiquant.groups", GroupsOf((32, 64, 128, 256)), "groups of weight-only int4", when=GROUPS),
    _rule("int4.inner", Size("weight_inner", 2, None, 2), "an int4 weight's last dimension is even", when=both(INT4, FLOATS)),
    _nz("one.k", Size("k", 2), "no FRACTAL_NZ where k or n is 1", when=in_nz("weight")),
    _nz("one.n", Size("n", 2), "no FRACTAL_NZ where k or n is 1", when=in_nz("weight")),
    _nz("weight_only", Layout("weight", "ND"), "weight-only forms of int8 and int4 are in ND", when=WEIGHT_ONLY, hint="leave this weight in ND"),
    _nz("float32", DtypeIn("weight", (F16, BF16, I8, I32)), "a float32 weight is in ND", when=in_nz("weight")),
    _nz("twice", Layout("weight", "NZ"), "int8 x with an int4 weight that has two scales", when=TWICE, hint="cast it with npu_format_cast(weight, 29)"),
    _nz("twice.groups", GroupsOf((128, 192, 256, 512)), "groupSize of int8 x with an int4 weight that has two scales", when=TWICE),
    _nz("twice.scale", Shape("scale", (("experts", "n"),)), "scale beside antiquantScale is (g, n)", when=TWICE),
    _nz("twice.antiquant", Shape("antiquant_scale", (("experts", "groups", "n"),)), "antiquantScale is (g, k / groupSize, n)", when=TWICE),
    _nz("float.k", Size("k", 16, None, 16), "rows and columns of whole 32 bytes", when=both(FLOAT_WEIGHT, in_nz("weight")), hint=NZ_HINT),
    _nz("float.n", Size("n", 16, None, 16), "rows and columns of whole 32 bytes", when=both(FLOAT_WEIGHT, in_nz("weight")), hint=NZ_HINT),
    *(_nz(f"int8.{'turned.' if turned is TURNED else ''}{axis}", Size(axis, of, None, of), _ALIGNED, "inferred", when=both(INT8, in_nz("weight"), turned), hint=NZ_HINT)
      for turned, axis, of in ((STRAIGHT, "k", 16), (STRAIGHT, "n", 32), (TURNED, "k", 32), (TURNED, "n", 16))),
    *(_nz(f"int4.{'turned.' if turned is TURNED else ''}{axis}", Size(axis, of, None, of), _ALIGNED, "inferred", when=both(INT4, in_nz("weight"), turned), hint=NZ_HINT)
      for turned, axis, of in ((STRAIGHT, "k", 16), (STRAIGHT, "n", 64), (TURNED, "k", 64), (TURNED, "n", 16))),
)  # fmt: skip
