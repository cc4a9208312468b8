"""A legal call of each form of the operators: what a message found is put into one, to see what the rules say of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from quantpass.basics.tensor_spec import TensorSpec
from quantpass.basics.torch_types import dtype_name
from quantpass.chips import CHIPS
from quantpass.chips.calls import OpCall
from quantpass.chips.checking import OPERATORS
from quantpass.chips.legality import judge
from quantpass.chips.rules import Chip

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "npu_quant_matmul": (
        "x1=int8[16,512] x2=int8[512,128] scale=float32[128] pertoken_scale=float32[16] bias=float32[128] output_dtype=bfloat16",
        "x1=int8[16,512] x2=int8[512,128] scale=float32[128] pertoken_scale=float32[16] output_dtype=float16",
        "x1=int8[16,512] x2=int8[512,128]:NZ:T scale=int64[128] bias=int32[128] output_dtype=float16",
        "x1=int8[16,512] x2=int8[512,128]:NZ:T scale=int64[128] offset=float32[128] output_dtype=int8",
        "x1=int8[16,512] x2=int8[512,128] scale=int64[128] bias=int32[128] output_dtype=float16",
        "x1=int8[16,512] x2=int8[512,128] scale=float32[128] output_dtype=int32",
        "x1=int32[16,64] x2=int32[64,128]:T scale=int64[128] bias=int32[128] output_dtype=float16",
    ),
    "npu_weight_quant_batchmatmul": (
        "x=bfloat16[16,512] weight=int8[512,128] antiquant_scale=bfloat16[128] antiquant_offset=bfloat16[128] bias=float32[128]",
        "x=float16[16,512] weight=int8[512,128]:T antiquant_scale=float16[128] antiquant_offset=float16[128] bias=float16[128]",
        "x=bfloat16[16,512] weight=int8[512,128] antiquant_scale=bfloat16[4,128] antiquant_group_size=128",
        "x=bfloat16[16,512] weight=int32[512,16]:NZ antiquant_scale=bfloat16[4,128] antiquant_group_size=128",
        "x=float16[16,512] weight=int8[512,128]:NZ:T antiquant_scale=float16[128] antiquant_offset=float16[128] bias=float16[128]",
        "x=float16[16,512] weight=int8[512,128] antiquant_scale=float16[128] quant_scale=int64[128] quant_offset=float32[128]",
    ),
    "npu_quant_matmul_dequant": (
        "x=float16[16,512] quantized_weight=int8[128,512] weight_scale=float32[128] smooth_scale=float16[512]",
        "x=float16[16,512] quantized_weight=int8[128,512] weight_scale=float32[128] x_scale=float32[16]",
    ),
    "npu_grouped_matmul": (
        "x=int8[16,512] weight=int8[8,512,128] scale=bfloat16[8,128] per_token_scale=float32[16] bias=int32[8,128] "
        "group_list=int64[8] group_type=0 split_item=2 group_list_type=0 act_type=0 output_dtype=bfloat16",
        "x=int8[16,512] weight=int8[8,512,128]:NZ scale=float32[8,128] per_token_scale=float32[16] group_list=int64[8] "
        "group_type=0 split_item=2 output_dtype=float16",
        "x=float16[16,512] weight=int8[8,512,128] antiquant_scale=float16[8,128] antiquant_offset=float16[8,128] "
        "group_list=int64[8] group_type=0 split_item=2",
        "x=int32[16,64] weight=int32[8,512,16]:NZ scale=int64[8,128] per_token_scale=float32[16] group_list=int64[8] "
        "group_type=0 split_item=2 output_dtype=bfloat16",
        "x=float16[16,512] weight=float16[8,512,128] group_list=int64[8] group_type=0 split_item=2 act_type=0",
    ),
    "npu_grouped_matmul_swiglu_quant_v2": (
        "x=int8[16,512] weight=int8[8,512,128]:NZ weight_scale=float32[8,128] x_scale=float32[16] group_list=int64[8]",
        "x=int8[16,512] weight=int8[8,512,128] weight_scale=float32[8,128] x_scale=float32[16] group_list=int64[8]",
    ),
    "npu_quant_grouped_matmul_dequant": (
        "x=float16[16,512] quantized_weight=int8[8,128,512] weight_scale=float32[8,128] group_list=int64[8] smooth_scale=float16[512]",
        "x=float16[16,512] quantized_weight=int8[8,128,512] weight_scale=float32[8,128] group_list=int64[8] x_scale=float32[16]",
    ),
    "npu_mm_all_reduce_base": (
        "x1=int8[16,512] x2=int8[512,128] hcom=group bias=int32[128] x3=float16[16,128] dequant_scale=int64[128]",
        "x1=int8[16,512] x2=int8[512,128] hcom=group dequant_scale=bfloat16[128] pertoken_scale=float32[16]",
        "x1=float16[16,512] x2=int8[512,128] hcom=group antiquant_scale=float16[128] antiquant_offset=float16[128]",
    ),
    "npu_moe_init_routing_v2": (
        "x=bfloat16[16,512] expert_idx=int32[16,8] expert_num=8 scale=float32[8,512] quant_mode=1 expert_tokens_num_flag=True",
        "x=float16[16,512] expert_idx=int32[16,8] expert_num=8 expert_tokens_num_flag=True",
    ),
    "npu_add_rms_norm_quant": (
        "x1=float16[16,512] x2=float16[16,512] gamma=float16[512] scales1=float32[512] zero_points1=int32[512]",
    ),
    "npu_rms_norm_quant": (
        "x=float16[16,512] gamma=float16[512] beta=float16[512] scale=float16[1] offset=int8[1]",
    ),
    "npu_swiglu_quant": ("x=float16[16,512] smooth_scales=float32[1,256] quant_mode=1",),
    "npu_dequant_swiglu_quant": (
        "x=int32[16,512] weight_scale=float32[8,512] activation_scale=float32[16,1] quant_scale=float32[8,256] "
        "group_index=int64[8] quant_mode=1",
    ),
    "npu_quant_matmul_reduce_sum": (
        "x1=int8[8,16,512] x2=int8[8,512,128]:NZ x1_scale=float32[8,16] x2_scale=bfloat16[128]",
    ),
    "npu_trans_quant_param": ("scale=float32[128] offset=float32[128] round_mode=0",),
    "npu_convert_weight_to_int4pack": ("weight=int32[512,128]",),
    "npu_format_cast": ("input=int8[512,128] acl_format=29",),
    "npu_dynamic_quant": (
        "input=float16[16,512] smooth_scales=float16[512] quant_mode=pertoken",
        "input=float16[16,512] dst_type=int8",
        "input=float16[16,512] dst_type=quint4x2",
    ),
    "npu_anti_quant": ("x=int8[16,512] scale=float32[512] offset=float32[512] dst_dtype=float16",),
    "npu_quantize": (
        "input=float16[16,512] scales=float32[512] dtype=qint8 axis=-1",
        "input=float16[16,512] scales=float16[512] zero_points=float16[512] dtype=qint8 axis=-1 div_mode=False",
        "input=float16[16,512] scales=float16[512] dtype=quint4x2 axis=-1 div_mode=False",
    ),
}  # fmt: skip
"""As ``quantpass check-op`` takes them."""


def examples(operator: str, chip: Chip, mode: str) -> Iterator[OpCall]:
    """The calls of an operator that are legal on a chip."""
    op = OPERATORS.get(operator)
    for text in EXAMPLES.get(operator, ()) if op else ():
        call = OpCall(op, mode, dict(_parsed(text)))  # type: ignore[arg-type]
        if judge(call, chip, _everything(chip.name)):
            yield call


@lru_cache
def _everything(chip: str) -> tuple[str, ...]:
    """What is contradicted on a chip: an example may use it."""
    chosen = CHIPS[chip]
    rows = (row for rule in chosen.rules for row in getattr(rule.need, "rows", ()))
    return tuple(
        {r.id for r in chosen.rules if r.contradicted} | {row.contradicted for row in rows if row.contradicted}
    )


@lru_cache
def _parsed(text: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, _value(value)) for name, _, value in (word.partition("=") for word in text.split()))


def _value(text: str) -> Any:
    if "[" not in text:
        return {"False": False, "True": True}.get(text, int(text) if text.lstrip("-").isdigit() else text)
    dtype, _, rest = text.partition("[")
    sizes, _, marks = rest.partition("]")
    return TensorSpec(dtype, map(int, sizes.split(",")), "NZ" if ":NZ" in marks else "ND", ":T" in marks)


def spelled(arguments: Mapping[str, Any]) -> str:
    """Arguments as ``quantpass check-op`` takes them."""
    return " ".join(f"{name}={_spelling(value)}" for name, value in arguments.items() if value is not None)


def _spelling(value: Any) -> str:
    if isinstance(value, tuple) and value:
        value = value[0]
    if not isinstance(value, TensorSpec):
        return dtype_name(value) or str(value)
    marks = (":NZ" if value.format == "NZ" else "") + (":T" if value.transposed else "")
    return f"{value.dtype_name}[{','.join(map(str, value.shape))}]{marks}"
