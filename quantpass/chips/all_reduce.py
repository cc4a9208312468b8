"""Legality of ``npu_mm_all_reduce_base`` (GE MatmulAllReduce): a row-parallel matmul and the sum over ranks behind it."""

from __future__ import annotations

import math
from typing import Any

from quantpass.basics.torch_types import BF16, F16, F32, I8, I32, I64
from quantpass.chips.calls import OpCall, VendorOp, in_groups, matrix_sizes
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
    SameShape,
    Shape,
    Size,
    Value,
)
from quantpass.chips.rules import Rule, When, both, dtype_is, given


def _sizes(call: OpCall) -> dict[str, Any]:
    """All rows of x1 as m, and its dimensions b and s where it has three; k, n, and the groups that share a scale."""
    x1, x2 = call.tensor("x1"), call.tensor("x2")
    sizes = matrix_sizes(x2, "k_of_x2", "n")
    if x1 is not None and x1.rank >= 2:
        sizes |= {"m": math.prod(x1.shape[:-1]), "k": x1.shape[-1]}
    if x1 is not None and x1.rank == 3:
        sizes |= {"b": x1.shape[0], "s": x1.shape[1]}
    if x2 is not None and "n" in sizes:
        sizes["x2_inner"] = sizes["k_of_x2" if x2.transposed else "n"]
    return in_groups(sizes, call.args.get("antiquant_group_size") or 0)


ALL_REDUCE = VendorOp(
    "npu_mm_all_reduce_base(Tensor x1, Tensor x2, str hcom, *, str reduce_op='sum', Tensor? bias=None, "
    "Tensor? antiquant_scale=None, Tensor? antiquant_offset=None, Tensor? x3=None, Tensor? dequant_scale=None, "
    "Tensor? pertoken_scale=None, Tensor? comm_quant_scale_1=None, Tensor? comm_quant_scale_2=None, "
    "int antiquant_group_size=0, int comm_turn=0, int[]? group_sizes=None, int? y_dtype=None, int? x1_dtype=None, "
    "int? x2_dtype=None, int? dequant_scale_dtype=None, int? pertoken_scale_dtype=None, int comm_quant_mode=0, "
    "str? comm_mode=None) -> Tensor",
    _sizes,
    unjudged=(
        *("group_sizes", "y_dtype", "x1_dtype", "x2_dtype", "dequant_scale_dtype", "pertoken_scale_dtype"),
        *("comm_quant_mode", "comm_mode"),
    ),
    weight="x2",
    family="mm_all_reduce",
)

_DOC, _CODE = "npu_mm_all_reduce_base.md", "MatmulAllReduceBaseKernelNpuOpApi.cpp"
_INT8, _HALF_WEIGHT = "aclnn_quant_matmul_all_reduce_v3.cpp", "aclnn_weight_quant_matmul_all_reduce.cpp"
NO = (None,)
COLUMNS = ("x1", "x2", "bias", "antiquant_scale", "antiquant_offset", "x3", "dequant_scale", "pertoken_scale")


def _row(
    x1: str, x2: str, bias: str, out: str, anti: Any = NO, shift: Any = NO, scale: Any = NO, token: Any = NO
) -> Row:
    return Row(((x1,), (x2,), (bias, None), anti, shift, (out, None), scale, token))


_FLOAT16 = (
    _row(F16, F16, F16, F16),
    _row(F16, I8, F16, F16, anti=(F16,), shift=(F16, None)),
    _row(I8, I8, I32, F16, scale=(I64,)),
)
_HINTS = {
    "dequant_scale": "a float16 result takes an int64 word (npu_trans_quant_param), beside pertoken_scale a float32 scale; a "
    "bfloat16 result takes a bfloat16 scale",
    "pertoken_scale": "it scales the rows of int8 x1, beside dequant_scale",
    "x3": "what is added has the dtype of the result",
}
_ROWS = DtypeTable(
    COLUMNS,
    (
        *_FLOAT16,
        _row(BF16, BF16, BF16, BF16),
        _row(BF16, I8, BF16, BF16, anti=(BF16,), shift=(BF16, None)),
        _row(I8, I8, I32, F16, scale=(F32,), token=(F32,)),
        _row(I8, I8, I32, BF16, scale=(BF16,), token=(F32, None)),
    ),
    hints=_HINTS,
)
_ROWS_310P = DtypeTable(COLUMNS, _FLOAT16, hints=_HINTS)

QUANTIZED = dtype_is("x1", I8)
FLOATS = When("float x1", lambda call: not QUANTIZED.test(call))
WEIGHT_ONLY = both(FLOATS, dtype_is("x2", I8))
GROUPED = When("antiquant_group_size given", lambda call: bool(call.args.get("antiquant_group_size")))
WHOLE = When("no antiquant_group_size", lambda call: not call.args.get("antiquant_group_size"))
BF16_RESULT = dtype_is("dequant_scale", BF16)
F16_RESULT = When("a float16 result", lambda call: not BF16_RESULT.test(call))


def _rank_is(rank: int) -> When:
    def test(call: OpCall) -> bool:
        x1 = call.tensor("x1")
        return x1 is not None and x1.rank == rank

    return When(f"x1 of rank {rank}", test)


def _group(value: Any, call: OpCall) -> Any:
    """A group is a multiple of 32, below K."""
    k = call.sizes.get("k")
    below = True if k is None else value < k
    return value == 0 or (value >= 32 and value % 32 == 0 and below)


def _is(*accepted: Any) -> Any:
    return lambda value, call: value in accepted


def _rule(name: str, need: Requirement, source: str, evidence: str = "documented", **rest: Any) -> Rule:
    return Rule(f"{ALL_REDUCE.family}.{name}", ALL_REDUCE, need, source, evidence, **rest)


_BOTH = "documented, code"
_COMM = ("comm_quant_scale_1", "comm_quant_scale_2")
_COMMON = (
    *(_rule(f"{a}.present", Present(a), f"{_DOC}: {a}") for a in ("x1", "x2", "hcom")),
    _rule("reduce_op", Value("reduce_op", _is("sum"), "reduce_op 'sum'", lambda v, call: "sum"), f"{_DOC}: reduce_op; {_INT8}:136", _BOTH),
    _rule("comm_turn", Value("comm_turn", _is(0), "comm_turn 0", lambda v, call: 0), f"{_DOC}: comm_turn; matmul_all_reduce_tiling.cpp:660", _BOTH),
    _rule("x1.rank", Rank("x1", 2, 3), f"{_DOC}: x1 is (m, k) or (b, s, k); {_INT8}:191-192", _BOTH),
    _rule("x2.rank", Rank("x2", 2, 2), f"{_DOC}: x2 is (k, n); {_CODE}:46", _BOTH),
    _rule("x1.layout", Layout("x1", transposed=False), f"{_DOC}: x1 is not transposed"),
    _rule("k", EqualSizes("k", "k_of_x2", "x1 (..., k) and x2 (k, n) with the same k"), f"{_CODE}:47-53", _BOTH),
    _rule("m.range", Size("m", 1, 2**31 - 1), f"{_DOC}: m"),
    _rule("k.range", Size("k", 1, 65535), f"{_DOC}: k", when=dtype_is("x2", I8)),
    _rule("x2.inner", Size("x2_inner", 1, 65535), f"{_DOC}: the last dimension of x2: an n above 65535 asks for a transposed x2", when=QUANTIZED),
    _rule("n.range", Size("n", 1, 65535), f"{_DOC}: n", when=WEIGHT_ONLY),
    _rule("empty", NotEmpty(("x1", "x2")), f"{_DOC}: no empty tensors"),
    _rule("bias.shape", Shape("bias", (("n",),)), f"{_DOC}: bias is (n,); {_INT8}:219-224", _BOTH),
    _rule("x3.shape", Shape("x3", (("m", "n"),)), f"{_DOC}: x3 has the shape of the result; {_CODE}:93-99", _BOTH, when=_rank_is(2)),
    _rule("x3.shape.batched", Shape("x3", (("b", "s", "n"),)), f"{_DOC}: x3 has the shape of the result; {_CODE}:93-99", _BOTH, when=_rank_is(3)),
    _rule("dequant.shape", Shape("dequant_scale", (("n",), (1, "n"), (1,))), f"{_DOC}: dequant_scale; {_INT8}:232-245", _BOTH),
    _rule("pertoken.shape", Shape("pertoken_scale", (("m",),)), f"{_DOC}: pertoken_scale has a number for each row; {_CODE}:117-135", _BOTH,
          hint="flatten it: (b * s,) beside an x1 of three dimensions"),
    _rule("antiquant.shape", Shape("antiquant_scale", (("n",), (1, "n"), (1,))), f"{_DOC}: antiquant_scale; {_HALF_WEIGHT}:181-188", _BOTH, when=WHOLE),
    _rule("antiquant.groups", Shape("antiquant_scale", (("groups", "n"),)), f"{_DOC}: antiquant_scale; {_HALF_WEIGHT}:191-197", _BOTH, when=GROUPED),
    _rule("antiquant.offset", SameShape("antiquant_offset", "antiquant_scale"), f"{_DOC}: antiquant_offset has the shape of antiquant_scale"),
    _rule("group", Value("antiquant_group_size", _group, "antiquant_group_size 0, or a multiple of 32 from 32 to k - 1", lambda v, call: 0, 0),
          f"{_DOC}: antiquant_group_size; {_HALF_WEIGHT}:151-161", _BOTH, when=FLOATS),
    _rule("group.int8", Value("antiquant_group_size", _is(0), "antiquant_group_size 0", lambda v, call: 0, 0), f"{_DOC}: antiquant_group_size", when=QUANTIZED),
    *(_rule(f"{a}.none", Absent(a), f"{_DOC}: {a} beside int8 operands only; matmul_all_reduce_tiling.cpp:678", _BOTH, when=FLOATS) for a in _COMM),
    *(_rule(f"{a}.present", Present(a), f"{_CODE}:146-150", "code", when=given(b)) for a, b in (_COMM, _COMM[::-1])),
    *(_rule(f"{a}.shape", Shape(a, (("n",), (1, "n"))), f"{_DOC}: {a} is (n,) or (1, n); {_CODE}:154-175", _BOTH, when=QUANTIZED) for a in _COMM),
    _rule("comm.alike", SameShape(*_COMM), f"{_DOC}: both of one shape; {_CODE}:154-175", _BOTH, when=QUANTIZED),
    *(_rule(f"{a}.float16", DtypeIn(a, (F16,)), f"{_DOC}: {a} has the dtype of the result; {_CODE}:177-185", _BOTH, when=both(QUANTIZED, F16_RESULT)) for a in _COMM),
)  # fmt: skip

_BFLOAT = (
    *(_rule(f"{a}.bfloat16", DtypeIn(a, (BF16,)), f"{_DOC}: {a} has the dtype of the result; {_CODE}:177-185", _BOTH, when=both(QUANTIZED, BF16_RESULT)) for a in _COMM),
)  # fmt: skip


def _not_on(what: str, code: str) -> Rule:
    """Documents leave the chip out, and code for it is there."""
    return _rule("unavailable", Unavailable("npu_quant_matmul and an all_reduce"), f"{_DOC}: supported products", contradicted=True,
                 hint=f"aclnnQuantMatmulAllReduceV3.md says so of {what} as well, and the operator has code for it ({code})")  # fmt: skip


RULES_A2 = (*_COMMON, *_BFLOAT, _rule("dtypes", _ROWS, f"{_DOC}: tables 1 to 3; {_CODE}:59-84", _BOTH))

RULES_A3 = (_not_on("the A3", "matmul_all_reduce/op_host/config/ascend910_93"),)
"""Beside those of A2."""

RULES_310P = (
    *_COMMON,
    _rule("310p.dtypes", _ROWS_310P, f"{_INT8}:64-67; {_HALF_WEIGHT}:51", "code"),
    _not_on("the Atlas inference series", f"{_INT8}:64-67"),
)

_950 = "aclnnQuantMatmulAllReduceV3.md, aclnnWeightQuantMatmulAllReduce.md"

RULES_950 = (
    *_COMMON,
    *_BFLOAT,
    _rule("a5.dtypes", _ROWS, f"{_950}: tables of dtypes", hint="its float8 and float4 forms are outside what quantpass knows"),
    _rule("a5.x2.nd", Layout("x2", "ND"), f"{_950}: x2 on the Ascend 950", when=dtype_is("x2", I8)),
    _rule("a5.k.multiple", Size("k", 32, None, 32), f"{_950}: n and k of an int8 weight are multiples of 32", when=WEIGHT_ONLY),
    _rule("a5.n.multiple", Size("n", 32, None, 32), f"{_950}: n and k of an int8 weight are multiples of 32", when=WEIGHT_ONLY),
)  # fmt: skip
