"""What the vendor's layers call an operator and its arguments, and what torch_npu calls them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from quantpass.chips.checking import OPERATORS

_LAYERS: Mapping[str, tuple[str, ...]] = {
    "npu_quant_matmul": (
        *("aclnnQuantMatmul", "aclnnQuantMatmulWeightNz", "QuantMatmul", "QuantMatmulV4"),
        *("QuantBatchMatmul", "QuantBatchMatmulV2", "QuantBatchMatmulV3", "QuantBatchMatmulV4", "quant_matmul"),
    ),
    "npu_weight_quant_batchmatmul": (
        *("aclnnWeightQuantBatchMatmul", "aclnnWeightQuantBatchMatmulNz", "WeightQuantBatchMatmul"),
        *("WeightQuantBatchMatmulV2", "weight_quant_batchmatmul"),
    ),
    "npu_quant_matmul_dequant": ("aclnnQuantMatmulDequant", "QuantMatmulDequant"),
    "npu_convert_weight_to_int4pack": ("aclnnConvertWeightToINT4Pack",),
    "npu_trans_quant_param": ("aclnnTransQuantParam", "TransQuantParam", "TransQuantParamV2"),
    "npu_dynamic_quant": ("aclnnDynamicQuant", "DynamicQuant", "DynamicQuantV2"),
    "npu_quantize": ("aclnnAscendQuant", "AscendQuantV2"),
    "npu_anti_quant": ("aclnnAscendAntiQuant", "AscendAntiQuant", "AscendAntiQuantV2"),
    "npu_format_cast": ("aclnnNpuFormatCast",),
    "npu_grouped_matmul": ("aclnnGroupedMatmul", "aclnnGroupedMatmulWeightNz", "GroupedMatmul"),
    "npu_grouped_matmul_swiglu_quant": ("aclnnGroupedMatmulSwigluQuant", "aclnnGroupedMatmulSwigluQuantWeightNZ"),
    "npu_grouped_matmul_swiglu_quant_v2": (
        *("aclnnGroupedMatmulSwigluQuantV2", "aclnnGroupedMatmulSwigluQuantWeightNzV2", "GroupedMatmulSwigluQuantV2"),
    ),
    "npu_quant_grouped_matmul_dequant": ("aclnnQuantGroupedMatmulDequant", "QuantGroupedMatmulDequant"),
    "npu_add_rms_norm_quant": ("aclnnAddRmsNormQuant", "AddRmsNormQuant", "AddRmsNormQuantV2"),
    "npu_add_rms_norm_dynamic_quant": ("aclnnAddRmsNormDynamicQuant", "AddRmsNormDynamicQuant"),
    "npu_rms_norm_quant": ("aclnnRmsNormQuant", "RmsNormQuant"),
    "npu_swiglu_quant": ("aclnnSwiGluQuant", "SwiGluQuant"),
    "npu_dequant_swiglu_quant": ("aclnnDequantSwigluQuant", "DequantSwigluQuant"),
    "npu_mm_all_reduce_base": (
        *("aclnnMatmulAllReduce", "aclnnQuantMatmulAllReduce", "aclnnWeightQuantMatmulAllReduce", "MatmulAllReduce"),
    ),
    "npu_quant_matmul_reduce_sum": ("aclnnQuantMatmulReduceSumWeightNz", "QuantMatmulReduceSum"),
    "npu_transpose_quant_batchmatmul": ("aclnnTransposeQuantBatchMatMul", "TransposeQuantBatchMatMul"),
    "npu_moe_init_routing_v2": ("aclnnMoeInitRoutingV3", "MoeInitRoutingV3"),
}
"""torch_npu's name to those of aclnn (with or without a version) and of GE."""

_ALIASES: Mapping[str, Mapping[str, str]] = {
    "npu_quant_matmul": {
        "x1": r"x1|transposex1|transpose_x1|trans_a",
        "x2": r"x2|transposex2|transpose_x2",
        "scale": r"x2scale\w*|deqscale|scale(optional)?",
        "pertoken_scale": r"x1scale\w*|per_?token(scale)?(optional)?",
        "offset": r"offset(optional)?|x2offset\w*|yoffset\w*",
        "bias": r"bias(optional)?",
        "output_dtype": r"out|output|y",
        "group_sizes": r"group_?sizes?\w?",
        "y_scale": r"yscale\w*",
    },
    "npu_weight_quant_batchmatmul": {
        "x": r"x|transpose_x",
        "antiquant_scale": r"antiquantscale(optional)?",
        "antiquant_offset": r"antiquantoffset(optional)?",
        "quant_scale": r"quantscale(optional)?",
        "quant_offset": r"quantoffset(optional)?",
        "bias": r"bias(optional)?",
        "antiquant_group_size": r"antiquantgroupsize|groupsize|group_size",
        "inner_precise": r"innerprecise",
    },
    "npu_grouped_matmul": {
        "bias": r"bias(optional)?",
        "scale": r"scale(optional)?",
        "offset": r"offset(optional)?",
        "antiquant_scale": r"antiquantscale(optional)?",
        "antiquant_offset": r"antiquantoffset(optional)?",
        "per_token_scale": r"per_?tokenscale(optional)?",
        "group_list": r"grouplist(optional|tensor)?|grouptensoroptional",
        "output_dtype": r"y|out",
    },
    "npu_dynamic_quant": {
        "input": "x|input",
        "smooth_scales": r"smooth_?scales?(optional)?",
        "group_index": r"group_?index\w*",
        "dst_type": "dst_?type|y",
    },
    "npu_quantize": {"input": "x|self", "scales": "scales?", "zero_points": "offset|zeropoints?", "dtype": "dst_?type"},
    "npu_anti_quant": {"dst_dtype": "dst_?type"},
    "npu_trans_quant_param": {"round_mode": "roundmode", "offset": "offset(array|optional)?"},
    "npu_convert_weight_to_int4pack": {"weight": "weight(int4pack)?"},
    "npu_format_cast": {"input": "srctensor|src|self"},
    "npu_quant_matmul_dequant": {
        "quantized_weight": "weight|quantizedweight",
        "weight_scale": "weightscale",
        "x_scale": "xscale(optional)?",
        "smooth_scale": "smoothscale(optional)?",
    },
    "npu_quant_grouped_matmul_dequant": {
        "quantized_weight": "weight|quantizedweight",
        "weight_scale": "weightscale",
        "x_scale": "xscale(optional)?",
        "smooth_scale": "smoothscale(optional)?",
    },
    "npu_mm_all_reduce_base": {
        "dequant_scale": r"dequant(scale)?(optional)?|x2scale",
        "pertoken_scale": r"per_?token(scale)?(optional)?|x1scale(optional)?",
        "antiquant_scale": r"antiquantscale(optional)?",
        "antiquant_offset": r"antiquantoffset(optional)?",
        "comm_quant_scale_1": r"comm_?quant_?scale_?1(optional)?",
        "comm_quant_scale_2": r"comm_?quant_?scale_?2(optional)?",
        "antiquant_group_size": "antiquantgroupsize",
    },
    "npu_moe_init_routing_v2": {
        "active_expert_range": r"(active)?_?expert_?range(optional)?",
        "expert_tokens_num_type": "expert_?tokens_?num_?type",
    },
}
"""An operator's arguments to what aclnn and GE call them, where that is something else."""


def _plain(name: str) -> str:
    """A name in any layer's spelling, without what torch, aclnn and GE put behind it."""
    return re.sub(r"(getworkspacesize|_symint|_default|_kernel_npu|_meta)$", "", name.lower())


@lru_cache(maxsize=1)
def _operators() -> Mapping[str, str]:
    found: dict[str, str] = {}
    for op in (*_LAYERS, *OPERATORS):
        for name in (op, *_LAYERS.get(op, ())):
            found.setdefault(name.lower(), op)
    return found


def operator_named(word: str) -> str | None:
    """torch_npu's operator for a word in any layer's spelling; "" for an operator of Ascend's that is none of these."""
    name, known = _plain(word), _operators()
    for candidate in (name, re.sub(r"_\d+$", "", name), re.sub(r"v\d$", "", name), re.sub(r"v\d(_\d+)?$", "", name)):
        if candidate in known and not (candidate != name and candidate.startswith("npu_")):
            return known[candidate]
    return "" if re.fullmatch(r"aclnn[a-z0-9]{3,}", name) else None


def argument_named(operator: str, name: str) -> str:
    """The operator's argument for a name in any layer's spelling; "" where it is none."""
    plain = re.sub(r"\W.*$", "", name.strip().rpartition(".")[2]).lower()
    for argument, spelling in _ALIASES.get(operator, {}).items():
        if re.fullmatch(spelling, plain):
            return argument
    op = OPERATORS.get(operator)
    for argument in op.arguments if op else ():
        if plain in (argument, argument.replace("_", ""), argument.replace("_", "") + "optional"):
            return argument
    return ""
