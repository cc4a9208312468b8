"""Legality of RMSNorm's operators: ``npu_rms_norm``, ``npu_add_rms_norm``, ``npu_add_rms_norm_dynamic_quant``."""

from __future__ import annotations

from typing import Any

from quantpass.basics.torch_types import BF16, F16, F32
from quantpass.chips.calls import OpCall, VendorOp
from quantpass.chips.companions import Unavailable
from quantpass.chips.requirements import DtypeIn, NotEmpty, Present, Rank, SameDtype, SameShape, Shape, Size, Value
from quantpass.chips.rules import Rule, dtype_is


def _sizes(call: OpCall) -> dict[str, Any]:
    x = call.tensor("input") or call.tensor("x1")
    return {"last": x.shape[-1]} if x is not None and x.shape else {}


RMS_NORM = VendorOp(
    "npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)", _sizes, family="rms_norm"
)
ADD_RMS_NORM = VendorOp(
    "npu_add_rms_norm(Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor, Tensor)",
    _sizes,
    family="add_rms_norm",
)
ADD_RMS_NORM_DYNAMIC_QUANT = VendorOp(
    "npu_add_rms_norm_dynamic_quant(Tensor x1, Tensor x2, Tensor gamma, *, Tensor? smooth_scale1=None, "
    "Tensor? smooth_scale2=None, Tensor? beta=None, float epsilon=1e-06, bool[2]? output_mask=None, "
    "int? y_dtype=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sizes,
    unjudged=("smooth_scale1", "smooth_scale2", "beta", "output_mask", "y_dtype"),
    family="add_rms_norm_dynamic_quant",
)

_RN, _ARN, _ARNDQ = "aclnnRmsNorm.md", "aclnnAddRmsNorm.md", "aclnnAddRmsNormDynamicQuantV2.md"
_ROWS = "the last dimension only; quantpass judges no norm over several"


def _epsilon(name: str, op: VendorOp, source: str) -> Rule:
    def test(value: Any, call: OpCall) -> bool:
        del call
        return value is None or (isinstance(value, int | float) and value >= 0)

    return Rule(f"{name}.epsilon", op, Value("epsilon", test, "epsilon of at least 0", lambda v, call: 1e-6), source)


def _added(name: str, op: VendorOp, source: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{name}.x1.present", op, Present("x1"), f"{source}: x1"),
        Rule(f"{name}.x2.present", op, Present("x2"), f"{source}: x2"),
        Rule(f"{name}.gamma.present", op, Present("gamma"), f"{source}: gamma"),
        Rule(f"{name}.x2.shape", op, SameShape("x2", "x1"), f"{source}: x2 has the shape of x1"),
        Rule(f"{name}.x2.dtype", op, SameDtype("x2", "x1"), f"{source}: x2 has the dtype of x1"),
        Rule(f"{name}.gamma.dtype", op, SameDtype("gamma", "x1"), f"{source}: gamma has the dtype of x1"),
        Rule(
            f"{name}.gamma.shape", op, Shape("gamma", (("last",),)), f"{source}: gamma; {_ROWS}", "documented, inferred"
        ),
        _epsilon(name, op, f"{_ARN}: epsilon"),
    )


_COMMON = (
    Rule("rms_norm.input.present", RMS_NORM, Present("input"), f"{_RN}: x"),
    Rule("rms_norm.gamma.present", RMS_NORM, Present("gamma"), f"{_RN}: gamma"),
    Rule("rms_norm.rank", RMS_NORM, Rank("input", 2, 8), "npu_rms_norm.md: 2 to 8 dimensions", hint="aclnnRmsNorm.md takes one dimension too"),
    Rule("rms_norm.gamma.shape", RMS_NORM, Shape("gamma", (("last",),)), f"{_RN}: gamma; {_ROWS}", "documented, inferred"),
    Rule("rms_norm.gamma.dtype", RMS_NORM, SameDtype("gamma", "input"), "npu_rms_norm.md: gamma has the dtype of input",
         hint="GE and aclnn also take a float32 gamma beside 16-bit rows; torch_npu's document does not"),
    _epsilon("rms_norm", RMS_NORM, f"{_ARN}: epsilon"),
    *_added("add_rms_norm", ADD_RMS_NORM, _ARN),
    Rule("add_rms_norm.empty", ADD_RMS_NORM, NotEmpty(("x1", "x2", "gamma")), "npu_add_rms_norm.md: no empty tensors", hint="aclnnAddRmsNorm.md takes them"),
)  # fmt: skip

RULES_A2 = (
    *_COMMON,
    Rule("rms_norm.input.dtype", RMS_NORM, DtypeIn("input", (F16, BF16, F32)), f"{_RN}: x", "documented, code"),
    Rule("add_rms_norm.x1.dtype", ADD_RMS_NORM, DtypeIn("x1", (F16, BF16, F32)), f"{_ARN}: x1", "documented, code"),
    *_added("add_rms_norm_dynamic_quant", ADD_RMS_NORM_DYNAMIC_QUANT, _ARNDQ),
    Rule("add_rms_norm_dynamic_quant.x1.dtype", ADD_RMS_NORM_DYNAMIC_QUANT, DtypeIn("x1", (F16, BF16)), f"{_ARNDQ}: x1", "documented, code"),
    Rule("add_rms_norm_dynamic_quant.rank", ADD_RMS_NORM_DYNAMIC_QUANT, Rank("x1", 2, 8), f"{_ARNDQ}: x1 has 2 to 8 dimensions", "documented, code"),
    Rule("add_rms_norm_dynamic_quant.empty", ADD_RMS_NORM_DYNAMIC_QUANT, NotEmpty(("x1", "x2", "gamma")), "npu_add_rms_norm_dynamic_quant.md: no empty tensors"),
)  # fmt: skip

_32_BYTES = "the last dimension of x and gamma holds at least 32 bytes"

RULES_310P = (
    *_COMMON,
    Rule("rms_norm.310p.dtype", RMS_NORM, DtypeIn("input", (F16, F32)), f"{_RN}: the Atlas inference series has no bfloat16", "documented, code"),
    Rule("rms_norm.310p.last.float16", RMS_NORM, Size("last", 16), f"{_RN}: {_32_BYTES}", when=dtype_is("input", F16)),
    Rule("rms_norm.310p.last.float32", RMS_NORM, Size("last", 8), f"{_RN}: {_32_BYTES}", when=dtype_is("input", F32)),
    Rule("add_rms_norm.310p.dtype", ADD_RMS_NORM, DtypeIn("x1", (F16, F32)), f"{_ARN}: the Atlas inference series has no bfloat16"),
    Rule("add_rms_norm_dynamic_quant.310p", ADD_RMS_NORM_DYNAMIC_QUANT, Unavailable("npu_add_rms_norm"), f"{_ARNDQ}: supported products"),
)  # fmt: skip
