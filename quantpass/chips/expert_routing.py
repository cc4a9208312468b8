"""Legality of ``npu_moe_init_routing_v2`` (GE MoeInitRoutingV3): rows gathered by expert, and quantized on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantpass.basics.torch_types import BF16, F16, F32, I8, I32
from quantpass.chips.calls import OpCall, VendorOp
from quantpass.chips.companions import Unavailable
from quantpass.chips.requirements import (
    Absent,
    DtypeIn,
    EqualSizes,
    Present,
    Rank,
    Requirement,
    Shape,
    Size,
    Value,
)
from quantpass.chips.rules import Rule, When, both, given


def _number(call: OpCall, name: str, default: int) -> int:
    value = call.args.get(name)
    return value if isinstance(value, int) else default


def _sizes(call: OpCall) -> dict[str, Any]:
    """Rows, their length h, how many experts take a row, and how many experts are active."""
    x, chosen, active = call.tensor("x"), call.tensor("expert_idx"), call.args.get("active_expert_range")
    sizes: dict[str, Any] = {}
    if x is not None and x.rank == 2:
        sizes |= {"rows": x.shape[0], "h": x.shape[1]}
    if chosen is not None and chosen.rank == 2:
        sizes |= {"rows_of_expert_idx": chosen.shape[0], "top_k": chosen.shape[1]}
    if isinstance(active, Sequence) and len(active) == 2:
        sizes["experts"] = active[1] - active[0]
    elif _number(call, "expert_num", -1) > 0:
        sizes["experts"] = call.args["expert_num"]
    return sizes


ROUTING = VendorOp(
    "npu_moe_init_routing_v2(Tensor x, Tensor expert_idx, *, Tensor? scale=None, Tensor? offset=None, int active_num=-1, "
    "int expert_capacity=-1, int expert_num=-1, int drop_pad_mode=0, int expert_tokens_num_type=0, "
    "bool expert_tokens_num_flag=False, int quant_mode=-1, int[2] active_expert_range=[], int row_idx_type=0, "
    "int? x_dtype=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _sizes,
    unjudged=("x_dtype",),
    family="moe_routing",
)

_DOC, _ACLNN = "npu_moe_init_routing_v2.md", "aclnnMoeInitRoutingV3.md"
_CODE, _TILING = "MoeInitRoutingV2KernelNpuOpApi.cpp", "moe_init_routing_v3_tiling.cpp"
_BOTH = "documented, code"


def _mode(*modes: int) -> When:
    words = f"quant_mode {' or '.join(map(str, modes))}"
    return When(words, lambda call: _number(call, "quant_mode", -1) in modes)


PLAIN, STATIC, DYNAMIC, INT4 = _mode(-1), _mode(0), _mode(1), _mode(13)
QUANTIZED = When("quant_mode given", lambda call: _number(call, "quant_mode", -1) != -1)
PADS = When("drop_pad_mode 1", lambda call: call.args.get("drop_pad_mode") == 1)
PAIRS = When("expert_tokens_num_type 2", lambda call: call.args.get("expert_tokens_num_type") == 2)
NO_PAIRS = When("expert_tokens_num_type 0 or 1", lambda call: not PAIRS.test(call))
RANGE = given("active_expert_range")


def _is(*accepted: Any) -> Any:
    return lambda value, call: value in accepted


def _range(value: Any, call: OpCall) -> Any:
    """From one expert to behind another, of those that there are."""
    number = _number(call, "expert_num", -1)
    if not isinstance(value, Sequence) or len(value) not in (0, 2):
        return False
    return not value or (0 <= value[0] < value[1] and (number < 0 or value[1] <= number))


def _all_rows(value: Any, call: OpCall) -> Any:
    rows, top_k = call.sizes.get("rows"), call.sizes.get("top_k")
    return value == -1 or rows is None or top_k is None or value == rows * top_k


def _capacity(value: Any, call: OpCall) -> Any:
    return 0 < value <= call.sizes.get("rows", value)


def _rule(name: str, need: Requirement, source: str, evidence: str = "documented", **rest: Any) -> Rule:
    return Rule(f"{ROUTING.family}.{name}", ROUTING, need, source, evidence, **rest)


_COMMON = (
    *(_rule(f"{a}.present", Present(a), f"{_DOC}: {a}") for a in ("x", "expert_idx")),
    _rule("x.rank", Rank("x", 2, 2), f"{_DOC}: x is (rows, h); {_CODE}:142-149", _BOTH),
    _rule("expert_idx.rank", Rank("expert_idx", 2, 2), f"{_DOC}: expert_idx is (rows, k); {_CODE}:152-159", _BOTH),
    _rule("expert_idx.dtype", DtypeIn("expert_idx", (I32,)), f"{_DOC}: expert_idx"),
    _rule("rows", EqualSizes("rows", "rows_of_expert_idx", "x (rows, h) and expert_idx (rows, k) with the same rows"), f"{_DOC}; {_TILING}:314", _BOTH),
    _rule("expert_num", Value("expert_num", lambda v, call: 0 < v <= 10240, "expert_num from 1 to 10240"), f"{_DOC}: expert_num; {_TILING}:261, 290", _BOTH),
    _rule("range", Value("active_expert_range", _range, "active_expert_range [first, behind the last], from 0 to expert_num"), f"{_DOC}: active_expert_range; {_CODE}:163-170", _BOTH),
    _rule("tokens_type", Value("expert_tokens_num_type", _is(0, 1, 2), "expert_tokens_num_type 0 (sums), 1 (counts) or 2 (pairs)", lambda v, call: 1), f"{_DOC}: expert_tokens_num_type"),
    _rule("row_idx_type", Value("row_idx_type", _is(0, 1), "row_idx_type 0 (gather) or 1 (scatter)", lambda v, call: 0), f"{_DOC}: row_idx_type; {_TILING}:296", _BOTH),
)  # fmt: skip


def _quantizing(modes: tuple[int, ...], source: str, hint: str) -> tuple[Rule, ...]:
    """What A2, A3 and the 950 share: the forms that quantize."""
    words = f"quant_mode {', '.join(map(str, modes[:-1]))} or {modes[-1]}"
    return (
        _rule("x.dtype", DtypeIn("x", (F16, BF16, F32, I8)), f"{_DOC}: x"),
        _rule("x.dtype.quantized", DtypeIn("x", (F16, BF16, F32)), f"{_DOC}: an int8 x is not quantized again; moe_init_routing_v3_def.cpp", _BOTH, when=QUANTIZED),
        _rule("quant_mode", Value("quant_mode", _is(*modes), words, lambda v, call: 1), source, hint=hint),
        _rule("scale.dtype", DtypeIn("scale", (F32,)), f"{_DOC}: scale"),
        _rule("scale.plain", Shape("scale", (("rows",),)), f"{_DOC}: scale without quantization is (rows,)", when=PLAIN),
        _rule("scale.static", Shape("scale", ((1,),)), f"{_DOC}: a static scale is (1,)", when=STATIC),
        _rule("scale.static.present", Present("scale"), f"{_DOC}: scale of quant_mode 0", when=STATIC),
        _rule("scale.dynamic", Shape("scale", (("experts", "h"), (1, "h"))), f"{_DOC}: smoothing scales are (experts, h) or (1, h)", when=DYNAMIC),
        _rule("scale.dynamic.experts", Shape("scale", (("experts", "h"),)), f"{_ACLNN}: scale of quant_mode 1 is (experts, h); {_TILING}:346-351", _BOTH, when=DYNAMIC, contradicted=True,
              hint=f"{_DOC} takes one row for all experts too"),
        _rule("offset.dtype", DtypeIn("offset", (F32,)), f"{_DOC}: offset", when=STATIC),
        _rule("offset.shape", Shape("offset", ((1,),)), f"{_DOC}: offset is (1,)", when=STATIC),
        _rule("offset.present", Present("offset"), f"{_DOC}: offset of quant_mode 0", when=STATIC),
        _rule("offset.none", Absent("offset"), f"{_DOC}: offset with quant_mode 0 only", when=When("quant_mode not 0", lambda call: not STATIC.test(call))),
        _rule("pads", Value("drop_pad_mode", _is(0, 1), "drop_pad_mode 0 or 1", lambda v, call: 0), f"{_DOC}: drop_pad_mode"),
        _rule("pads.capacity", Value("expert_capacity", _capacity, "expert_capacity from 1 to the rows of x", lambda v, call: call.sizes.get("rows"), -1), f"{_DOC}: expert_capacity", when=PADS),
        _rule("pads.tokens_type", Value("expert_tokens_num_type", _is(1), "expert_tokens_num_type 1", lambda v, call: 1, 0), f"{_ACLNN}: drop_pad_mode 1 counts", when=PADS),
        _rule("pads.row_idx_type", Value("row_idx_type", _is(0), "row_idx_type 0", lambda v, call: 0), f"{_DOC}: example; {_ACLNN}: drop_pad_mode 1 gathers", when=PADS),
        _rule("pads.range", Value("active_expert_range", lambda v, call: not v or list(v) == [0, call.args.get("expert_num")], "every expert in active_expert_range"), f"{_DOC}: active_expert_range", when=both(PADS, RANGE)),
        _rule("pairs.experts", Value("expert_num", lambda v, call: v <= 5120, "expert_num of at most 5120"), f"{_DOC}: expert_num; {_TILING}:284", _BOTH, when=PAIRS),
    )  # fmt: skip


RULES_A2 = (
    *_COMMON,
    *_quantizing(
        (-1, 0, 1),
        f"{_ACLNN}: quantMode on A2 and A3",
        "older versions of CANN have -1 and 1 alone (moe_init_routing_v3_tiling.cpp:293)",
    ),
    _rule("active_num", Value("active_num", lambda v, call: v >= -1, "active_num of at least -1", lambda v, call: -1), f"{_DOC}: active_num; {_TILING}:256", _BOTH),
)  # fmt: skip

_TOKENS = "expert_tokens_num_flag True"

RULES_950 = (
    *_COMMON,
    *_quantizing(
        (-1, 0, 1, 13),
        f"{_ACLNN}: quantMode on the Ascend 950",
        "its float8, float4 and hifloat8 modes (2 to 12, 14 to 17) are outside what quantpass knows",
    ),
    _rule("a5.active_num", Value("active_num", _all_rows, "active_num -1, or all of rows * k", lambda v, call: -1), f"{_ACLNN}: activeNum on the Ascend 950"),
    _rule("a5.tokens_flag", Value("expert_tokens_num_flag", lambda v, call: v is True, _TOKENS, lambda v, call: True, False), f"{_ACLNN}: expertTokensNumFlag on the Ascend 950"),
    _rule("a5.pads.plain", Value("quant_mode", _is(-1), "quant_mode -1", lambda v, call: -1), f"{_ACLNN}: dropPadMode on the Ascend 950", when=PADS),
    _rule("a5.int4.x", DtypeIn("x", (F32, BF16)), f"{_ACLNN}: quantMode 13; {_CODE}:195-198", _BOTH, when=INT4),
    _rule("a5.int4.h", Size("h", 2, None, 2), f"{_ACLNN}: quantMode 13; {_CODE}:200-203", _BOTH, when=INT4),
    _rule("a5.int4.scale", Shape("scale", ((1, "h"),)), f"{_ACLNN}: quantMode 13; {_CODE}:213-224", _BOTH, when=INT4),
)  # fmt: skip

RULES_310P = (
    *_COMMON,
    _rule("310p.x.dtype", DtypeIn("x", (F16, F32)), f"{_DOC}: the Atlas inference series has no bfloat16 here"),
    _rule("310p.quantized", Unavailable("npu_quant_grouped_matmul_dequant, which quantizes the rows itself"), f"{_DOC}: no quantization on the Atlas inference series; {_CODE}:305-331", _BOTH,
          when=QUANTIZED, hint="torch_npu calls aclnnMoeInitRoutingV2 there and hands no scale over: give quant_mode=-1"),
    *(_rule(f"310p.{a}", Absent(a), f"{_CODE}:317-330: {a} is not handed over on the Atlas inference series", "code") for a in ("scale", "offset")),
)  # fmt: skip
