"""Legality of ``npu_quant_matmul_dequant`` (W8A8, float16 rows quantized inside; GE QuantMatmulDequant): 310P only."""

from __future__ import annotations

from typing import Any

from quantpass.basics.symbolic import statically_true
from quantpass.basics.torch_types import F16, F32, I8
from quantpass.chips.calls import OpCall, VendorOp, matrix_sizes
from quantpass.chips.companions import Unavailable
from quantpass.chips.requirements import (
    Absent,
    DtypeIn,
    EqualSizes,
    Layout,
    NotEmpty,
    Present,
    Rank,
    Shape,
    Size,
    Value,
)
from quantpass.chips.rules import Cost, Rule, When, both, given


def _sizes(call: OpCall) -> dict[str, Any]:
    sizes = matrix_sizes(call.tensor("x"), "m", "k")
    return sizes | matrix_sizes(call.tensor("quantized_weight"), "n", "k_of_weight")


QMMD = VendorOp(
    "npu_quant_matmul_dequant(Tensor x, Tensor quantized_weight, Tensor weight_scale, *, Tensor? bias=None, "
    "Tensor? x_scale=None, Tensor? x_offset=None, Tensor? smooth_scale=None, str? quant_mode='pertoken') -> Tensor",
    _sizes,
    weight="quantized_weight",
    family="qmmd",
)

_DOC, _CODE, _FAKE = (
    "aclnnQuantMatmulDequant.md",
    "aclnn_quant_matmul_dequant.cpp",
    "op_plugin/meta/_meta_registrations.py",
)

STATIC = given("x_scale")
DYNAMIC = When("x_scale not given", lambda call: call.args.get("x_scale") is None)
PER_TENSOR = When("quant_mode 'pertensor'", lambda call: call.args.get("quant_mode") == "pertensor")
PER_TOKEN = When("quant_mode 'pertoken'", lambda call: call.args.get("quant_mode") in (None, "pertoken"))

RULES_310P = (
    Rule("qmmd.x.present", QMMD, Present("x"), f"{_DOC}: x"),
    Rule("qmmd.weight.present", QMMD, Present("quantized_weight"), f"{_DOC}: weight"),
    Rule("qmmd.scale.present", QMMD, Present("weight_scale"), f"{_DOC}: weightScale"),
    Rule("qmmd.x.rank", QMMD, Rank("x", 2, 2), f"{_DOC}: x is (m, k); {_FAKE}", "documented, probed", hint="flatten x to (m, k)"),
    Rule("qmmd.x.dtype", QMMD, DtypeIn("x", (F16,)), f"{_DOC}: x; {_FAKE}", "documented, probed", hint="run the model in float16"),
    Rule("qmmd.weight.rank", QMMD, Rank("quantized_weight", 2, 2), f"{_FAKE}: two dimensions", "documented, probed",
         hint="aclnn also takes the four dimensions of FRACTAL_NZ written out, torch_npu's shape function does not"),
    Rule("qmmd.weight.dtype", QMMD, DtypeIn("quantized_weight", (I8,)), f"{_DOC}: weight; {_FAKE}", "documented, probed"),
    Rule("qmmd.weight.layout", QMMD, Layout("quantized_weight", "ND", False), f"{_DOC}: weight (n, k), contiguous, in ND", "documented, code",
         hint="store the weight as (n, k) and give it as it is, not a transposed view"),
    Rule("qmmd.scale.dtype", QMMD, DtypeIn("weight_scale", (F32,)), f"{_DOC}: weightScale; {_FAKE}", "documented, probed",
         hint="aclnn's int64 words are refused by torch_npu's shape function"),
    Rule("qmmd.scale.shape", QMMD, Shape("weight_scale", (("n",),)), f"{_DOC}: weightScale is (n,); {_FAKE}", "documented, probed"),
    Rule("qmmd.empty", QMMD, NotEmpty(("x", "quantized_weight", "weight_scale")), f"{_DOC}: no empty tensors", "inferred"),
    Rule("qmmd.k", QMMD, EqualSizes("k", "k_of_weight", "x (m, k) and quantized_weight (n, k) with the same k"), f"{_DOC}; {_FAKE}", "documented, probed"),
    Rule("qmmd.k.multiple", QMMD, Size("k", 16, None, 16), f"{_CODE}: n and k of a weight in ND are multiples of 16", "documented, code"),
    Rule("qmmd.n.multiple", QMMD, Size("n", 16, None, 16), f"{_CODE}: n and k of a weight in ND are multiples of 16", "documented, code"),
    Rule("qmmd.bias", QMMD, Absent("bias"), f"{_CODE}: bias has to be null", "documented, code", hint="add the bias behind the operator"),
    Rule("qmmd.x_offset", QMMD, Absent("x_offset"), f"{_CODE}: xOffset has to be null", "documented, code", hint="quantize x symmetrically"),
    Rule("qmmd.x_scale.dtype", QMMD, DtypeIn("x_scale", (F32,)), f"{_DOC}: xScale beside a float32 weightScale"),
    Rule("qmmd.x_scale.tensor", QMMD, Shape("x_scale", ((1,),)), f"{_DOC}: xScale is (1,)", "documented, code", when=both(STATIC, PER_TENSOR)),
    Rule("qmmd.x_scale.token", QMMD, Shape("x_scale", (("m",),)), f"{_DOC}: xScale is (m,)", "documented, code", when=both(STATIC, PER_TOKEN)),
    Rule("qmmd.smooth.dtype", QMMD, DtypeIn("smooth_scale", (F16,)), f"{_DOC}: smoothScale"),
    Rule("qmmd.smooth.shape", QMMD, Shape("smooth_scale", (("k",),)), f"{_DOC}: smoothScale is (k,)", "documented, code"),
    Rule("qmmd.mode", QMMD, Value("quant_mode", lambda v, call: v in ("pertoken", "pertensor"), "quant_mode 'pertoken' or 'pertensor'", lambda v, call: "pertoken"),
         f"{_DOC}: xQuantMode", "documented, code"),
    Rule("qmmd.dynamic", QMMD, Value("quant_mode", lambda v, call: v == "pertoken", "quant_mode 'pertoken'", lambda v, call: "pertoken"),
         f"{_DOC}: without xScale each row has its own", "documented, code", when=DYNAMIC, hint="or give x_scale, (1,)"),
)  # fmt: skip

ELSEWHERE = (
    Rule("qmmd.unavailable", QMMD, Unavailable("npu_dynamic_quant and npu_quant_matmul"), f"{_DOC}: supported products"),
)  # fmt: skip

_UNPADDED = When("k no multiple of 32", lambda call: statically_true(call.sizes.get("k", 0) % 32 == 0) is False)

COSTS_310P = (
    Cost(QMMD, "Transpose of the whole weight to FRACTAL_NZ", f"{_CODE}:196-203", None, ("eager",),
         "torch_npu's shape function takes no weight that is in FRACTAL_NZ already"),
    Cost(QMMD, "PadV3 of the whole weight", f"{_CODE}:187-195", _UNPADDED, ("eager",), "pad k to a multiple of 32 once"),
)  # fmt: skip
