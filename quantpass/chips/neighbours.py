"""Legality of fused operators beside the quantized matmuls, chip by chip; each family of them in a file of its own."""

from __future__ import annotations

from typing import Any

from quantpass.basics.torch_types import BF16, F32, I8
from quantpass.chips import all_reduce, expert_matmuls, expert_routing, norm_quant, swiglu_quant
from quantpass.chips.calls import OpCall, VendorOp, matrix_sizes
from quantpass.chips.companions import Unavailable
from quantpass.chips.requirements import DtypeIn, EqualSizes, Layout, Present, Rank, Requirement, Shape
from quantpass.chips.rules import Rule


def _batches(call: OpCall) -> dict[str, Any]:
    x1, x2 = call.tensor("x1"), call.tensor("x2")
    found = matrix_sizes(x1, "m", "k") | matrix_sizes(x2, "k_of_x2", "n")
    found |= {"batch": x1.shape[0]} if x1 is not None and x1.rank == 3 else {}
    return found | ({"batch_of_x2": x2.shape[0]} if x2 is not None and x2.rank == 3 else {})


REDUCE_SUM = VendorOp(
    "npu_quant_matmul_reduce_sum(Tensor x1, Tensor x2, *, Tensor? x1_scale=None, Tensor? x2_scale=None) -> Tensor",
    _batches,
    weight="x2",
    family="reduce_sum",
)
TRANSPOSE_QMM = VendorOp(
    "npu_transpose_quant_batchmatmul(Tensor x1, Tensor x2, int dtype, *, Tensor? bias=None, Tensor? x1_scale=None, "
    "Tensor? x2_scale=None, int[]? group_sizes=None, int[]? perm_x1=None, int[]? perm_x2=None, int[]? perm_y=None, "
    "int? batch_split_factor=1, int? x1_dtype=None, int? x2_dtype=None) -> Tensor",
    family="transpose_qmm",
)


def _row(op: VendorOp, name: str, need: Requirement, what: str, evidence: str = "documented", **rest: Any) -> Rule:
    """A row of an operator that has one document."""
    return Rule(f"{op.family}.{name}", op, need, f"{op}.md: {what}", evidence, **rest)


def _not_here(op: VendorOp, instead: str, what: str = "supported products", hint: str = "") -> Rule:
    return _row(op, "unavailable", Unavailable(instead), what, hint=hint)


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

_PERMUTED = "npu_quant_matmul, with permute around it"

RULES_A2 = (
    *expert_matmuls.SWIGLU_A2,
    *expert_matmuls.DEQUANT_ELSEWHERE,
    *expert_routing.RULES_A2,
    *swiglu_quant.RULES_A2,
    *norm_quant.RULES_A2,
    *all_reduce.RULES_A2,
    *_REDUCE_SUM_A2,
    _not_here(TRANSPOSE_QMM, _PERMUTED),
)

RULES_A3 = all_reduce.RULES_A3
"""Beside those of A2."""

RULES_950 = (
    *expert_matmuls.SWIGLU_950,
    *expert_matmuls.DEQUANT_ELSEWHERE,
    *expert_routing.RULES_950,
    *swiglu_quant.RULES_950,
    *norm_quant.RULES_950,
    *all_reduce.RULES_950,
    _not_here(REDUCE_SUM, "npu_quant_matmul and a sum", "supported products; aclnnQuantMatmulReduceSumWeightNz.md"),
    _not_here(TRANSPOSE_QMM, _PERMUTED, "x1 and x2 on the Ascend 950: 8-bit floats alone", "quantpass has no rules for 8-bit floats"),
)  # fmt: skip

RULES_310P = (
    *expert_matmuls.DEQUANT_310P,
    *expert_matmuls.SWIGLU_310P,
    *expert_routing.RULES_310P,
    *swiglu_quant.RULES_310P,
    *norm_quant.RULES_310P,
    *all_reduce.RULES_310P,
    _not_here(REDUCE_SUM, "npu_quant_matmul and a sum"),
    _not_here(TRANSPOSE_QMM, _PERMUTED),
)
