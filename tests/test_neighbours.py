"""Operators around the quantized matmuls, asked about chip by chip: what differs from one to the next."""

import pytest
from click.testing import CliRunner

import quantpass as qp
from quantpass import TensorSpec as T
from quantpass.chips import NPUS, chip_named
from quantpass.doors.cli import main
from quantpass.doors.cli.inputs import parse_argument

A2, A3, P310, A5 = "ascend910b", "ascend910_93", "ascend310p", "ascend950"

NEIGHBOURS = (
    *("npu_grouped_matmul", "npu_grouped_matmul_swiglu_quant", "npu_grouped_matmul_swiglu_quant_v2"),
    *("npu_quant_grouped_matmul_dequant", "npu_add_rms_norm_quant", "npu_add_rms_norm_dynamic_quant"),
    *("npu_rms_norm_quant", "npu_swiglu_quant", "npu_dequant_swiglu_quant", "npu_mm_all_reduce_base"),
    *("npu_quant_matmul_reduce_sum", "npu_transpose_quant_batchmatmul", "npu_moe_init_routing_v2"),
)


def asked(target, op, arguments, mode="eager"):
    return qp.check_op(op, target=target, mode=mode, **dict(map(parse_argument, arguments.split())))


def rules(verdict):
    return {r.rule for r in verdict.rejects}


@pytest.mark.parametrize("op", NEIGHBOURS)
def test_every_chip_has_rules_with_sources(op):
    for name in NPUS:
        found = [r for r in chip_named(name).rules if r.op.name == op]
        assert found and all(r.source and r.evidence for r in found), (op, name)


EXPERTS = "group_list=int64[8] group_type=0 split_item=2 group_list_type=1 act_type=0"
W8A8 = f"x=int8[16,256] weight=int8[8,256,128] per_token_scale=float32[16] output_dtype=bfloat16 {EXPERTS}"
HALF_WEIGHT = f"x=float16[16,256] weight=int8[8,256,128] antiquant_scale=float16[8,128] {EXPERTS}"
WIDE = f"x=float16[16,65536] weight=float16[8,65536,128] {EXPERTS}"
SWIGLU = "x=int8[16,256] weight_scale=float32[8,128] x_scale=float32[16] group_list=int64[8] weight=int8[8,256,128]"
NORM = "x1=bfloat16[4,64] x2=bfloat16[4,64] gamma=bfloat16[64] scales1=float32[64] zero_points1=int32[64]"
NORM32 = "x=float32[4,64] gamma=float32[64] beta=float32[64] scale=float32[1] offset=float32[1]"
SUM = "x1=int8[4,16,256] x2=int8[4,256,128]:NZ x1_scale=float32[4,16] x2_scale=bfloat16[128]"
REDUCED = "x1=int8[16,256] x2=int8[256,128]:NZ hcom=group dequant_scale=int64[128]"
ROUTED = "x=bfloat16[16,256] expert_idx=int32[16,2] expert_num=8 expert_tokens_num_flag=True expert_tokens_num_type=1"
ROWS = "x=float16[16,256] quantized_weight=int8[8,128,256] weight_scale=float32[8,128] group_list=int64[8]"


@pytest.mark.parametrize(
    ("op", "arguments", "legal", "illegal"),
    [
        ("npu_grouped_matmul", f"{W8A8} scale=bfloat16[8,128] bias=float32[8,128]", [A5], {A2: "gmm.a2.dtypes.bias"}),
        ("npu_grouped_matmul", f"{W8A8} scale=bfloat16[8,128]", [A2, A3, A5], {P310: "gmm.310p.dtypes.weight"}),
        ("npu_grouped_matmul", f"{W8A8} scale=bfloat16[8,1]", [A5], {A2: "gmm.scale.shape"}),
        ("npu_grouped_matmul", HALF_WEIGHT, [A5], {A2: "gmm.a2.dtypes.antiquant_offset"}),
        ("npu_grouped_matmul", HALF_WEIGHT.replace("weight=int8[8,256,128]", "weight=int8[8,256,128]:NZ"), [], {A5: "gmm.a5.nz.weight_only"}),
        ("npu_grouped_matmul", f"{HALF_WEIGHT} antiquant_offset=float16[8,128]", [A2, A3, A5], {}),
        ("npu_grouped_matmul", f"{HALF_WEIGHT} antiquant_offset=float16[8,128]".replace("[8,256,128]", "[8,256,128]:NZ"), [], {A2: "gmm.nz.weight_only"}),
        ("npu_grouped_matmul", f"{W8A8} scale=int64[8,128]".replace("256,128]", "256,128]:NZ").replace("bfloat16", "int8"), [], {A2: "gmm.nz.output"}),
        ("npu_grouped_matmul", WIDE, [A5], {A2: "gmm.x.inner", P310: "gmm.x.inner"}),
        ("npu_grouped_matmul_swiglu_quant_v2", SWIGLU, [A5], {A2: "gmm_swiglu_v2.int8.nz", P310: "gmm_swiglu_v2.unavailable"}),
        ("npu_grouped_matmul_swiglu_quant_v2", f"{SWIGLU}:NZ", [A2, A3], {A5: "gmm_swiglu_v2.a5.nd"}),
        ("npu_grouped_matmul_swiglu_quant", f"{SWIGLU}:NZ", [A2, A3], {A5: "gmm_swiglu.unavailable"}),
        ("npu_add_rms_norm_quant", NORM, [A5], {A2: "add_rms_norm_quant.dtypes.scales1", P310: "add_rms_norm_quant.dtypes.x1"}),
        ("npu_rms_norm_quant", NORM32, [A5], {A2: "rms_norm_quant.dtypes.x", P310: "rms_norm_quant.dtypes.x"}),
        ("npu_quant_matmul_reduce_sum", SUM, [A2, A3], {A5: "reduce_sum.unavailable", P310: "reduce_sum.unavailable"}),
        ("npu_mm_all_reduce_base", REDUCED, [A2], {A3: "mm_all_reduce.unavailable", P310: "mm_all_reduce.unavailable", A5: "mm_all_reduce.a5.x2.nd"}),
        ("npu_mm_all_reduce_base", REDUCED.replace(":NZ", ""), [A2, A5], {}),
        ("npu_mm_all_reduce_base", REDUCED.replace(":NZ", " pertoken_scale=float32[16]"), [], {A2: "mm_all_reduce.dtypes.pertoken_scale"}),
        ("npu_moe_init_routing_v2", f"{ROUTED} quant_mode=1 scale=float32[8,256]", [A2, A3, A5], {P310: "moe_routing.310p.quantized"}),
        ("npu_moe_init_routing_v2", f"{ROUTED} quant_mode=0 scale=float32[1] offset=float32[1]", [A2, A3, A5], {}),
        ("npu_moe_init_routing_v2", f"{ROUTED} quant_mode=0 scale=float32[1]", [], {A2: "moe_routing.offset.present"}),
        ("npu_moe_init_routing_v2", f"{ROUTED} quant_mode=13", [A5], {A2: "moe_routing.quant_mode"}),
        ("npu_quant_grouped_matmul_dequant", ROWS, [P310], {A2: "qgmmd.unavailable", A5: "qgmmd.unavailable"}),
        ("npu_quant_grouped_matmul_dequant", ROWS.replace("128", "120"), [], {P310: "qgmmd.n.multiple"}),
        ("npu_anti_quant", "x=int8[4,64] scale=float32[64] dst_dtype=float16", [A2, P310], {A5: "anti_quant.unavailable"}),
    ],
)  # fmt: skip
def test_what_chips_take(op, arguments, legal, illegal):
    for target in legal:
        assert asked(target, op, arguments).legal, (target, asked(target, op, arguments))
    for target, rule in illegal.items():
        assert rule in rules(asked(target, op, arguments)), (target, asked(target, op, arguments))


def test_where_documents_disagree():
    one_row = asked(A2, "npu_moe_init_routing_v2", f"{ROUTED} quant_mode=1 scale=float32[1,256]")
    assert one_row.contradicted and rules(one_row) == {"moe_routing.scale.dynamic.experts"}
    reduced = asked(A3, "npu_mm_all_reduce_base", REDUCED)
    assert reduced.contradicted and rules(reduced) == {"mm_all_reduce.unavailable"}
    listed = {"x": T("int8", (16, 256)), "weight": [T("int8", (256, 128))] * 8, "scale": [T("float32", (128,))] * 8}
    listed |= {"per_token_scale": T("float32", (16,)), "group_list": T("int64", (8,)), "group_type": 0, "split_item": 2}
    verdict = qp.check_op("npu_grouped_matmul", target=A2, output_dtype="float16", **listed)
    assert verdict.contradicted and rules(verdict) == {"gmm.integers.listed"}
    half = asked(A2, "npu_dequant_swiglu_quant", "x=float16[16,256] group_index=int64[4] quant_mode=1")
    assert half.contradicted and rules(half) == {"dequant_swiglu_quant.x.half"}
    times = asked(A2, "npu_add_rms_norm_quant", f"{NORM.replace('bfloat16', 'float16')} div_mode=False")
    assert times.contradicted and rules(times) == {"add_rms_norm_quant.div_mode"}


QUANTIZED = "input=float16[8,4,128] dtype=qint8 div_mode=False"


@pytest.mark.parametrize(
    ("op", "arguments", "legal", "illegal"),
    [
        ("npu_quantize", f"{QUANTIZED} scales=float16[4] axis=-2", [A2, A3, A5], {P310: "quantize.310p.axis"}),
        ("npu_quantize", f"{QUANTIZED} scales=float16[1,4,1] axis=-2", [A2], {}),
        ("npu_quantize", f"{QUANTIZED} scales=float16[4] axis=-1", [], {A2: "quantize.scales.shape", P310: "quantize.scales.shape"}),
        ("npu_quantize", f"{QUANTIZED} scales=float16[128] axis=1", [A2, P310], {}),
        ("npu_format_cast", "input=int32[128,256] acl_format=29 customize_dtype=int32", [A2, A3], {P310: "format_cast.310p.customize", A5: "format_cast.950.customize"}),
        ("npu_format_cast", "input=int32[128,256] acl_format=2 customize_dtype=int32", [], {A2: "format_cast.customize"}),
        ("npu_dynamic_quant", "input=float16[8,128] smooth_scales=float16[4,128] group_index=int32[4]", [A2, A3], {P310: "dynamic_quant.310p"}),
        ("npu_dynamic_quant", "input=float16[8,128] smooth_scales=float16[128] group_index=int32[4]", [], {A2: "dynamic_quant.group.smooth"}),
    ],
)  # fmt: skip
def test_arguments_of_companions(op, arguments, legal, illegal):
    test_what_chips_take(op, arguments, legal, illegal)


WEIGHT_ONLY = "x=bfloat16[16,256] antiquant_scale=bfloat16[128] weight=int8[256,128]"


@pytest.mark.parametrize(
    ("arguments", "legal", "illegal"),
    [
        (f"{WEIGHT_ONLY} bias=bfloat16[128]", [A5], {A2: "wqmm.a2.dtypes.bias"}),
        (f"{WEIGHT_ONLY}:NZ bias=bfloat16[128]", [], {A5: "wqmm.a5.nz.int8.bias"}),
        (f"{WEIGHT_ONLY}:NZ bias=float32[128]", [A2, A5], {}),
        (f"{WEIGHT_ONLY} quant_scale=int64[128]", [A2], {A5: "wqmm.a5.dtypes.quant_scale"}),
        ("x=float16[16,70000] antiquant_scale=float16[128] weight=int8[70000,128]", [A5], {A2: "wqmm.k.range"}),
        ("x=float16[16,256] antiquant_scale=float16[128] weight=int32[32,128]:NZ:T", [A2], {A5: "wqmm.a5.nz.int4"}),
    ],
)  # fmt: skip
def test_weight_only_matmuls(arguments, legal, illegal):
    for target in legal:
        verdict = asked(target, "npu_weight_quant_batchmatmul", arguments, "graph")
        assert verdict.legal, (target, verdict)
    for target, rule in illegal.items():
        assert rule in rules(asked(target, "npu_weight_quant_batchmatmul", arguments, "graph"))


def test_scales_in_the_other_16_bit_float():
    mixed = "x=float16[16,256] weight=int8[256,128] antiquant_scale=bfloat16[128]"
    graph = asked(A2, "npu_weight_quant_batchmatmul", mixed, "graph")
    assert graph.contradicted and rules(graph) == {"wqmm.a2.mixed"} and "converts" in str(graph)
    eager = asked(A2, "npu_weight_quant_batchmatmul", mixed, "eager")
    assert not eager.contradicted and "wqmm.scale.dtype" in rules(eager)
    batched = "x=float16[4,16,256] weight=int8[4,256,128] antiquant_scale=float16[128]"
    assert asked(P310, "npu_weight_quant_batchmatmul", batched).contradicted
    assert not asked(A2, "npu_weight_quant_batchmatmul", batched).contradicted


def test_the_command_knows_them():
    run = CliRunner().invoke(main, ["check-op", "npu_mm_all_reduce_base", "-t", A2, *REDUCED.split()])
    assert run.exit_code == 0 and "legal" in run.output, run.output
    words = [*ROUTED.split(), "quant_mode=1", "active_expert_range=[4,12]"]
    run = CliRunner().invoke(main, ["check-op", "npu_moe_init_routing_v2", "-t", A2, *words])
    assert run.exit_code == 1 and "moe_routing.range" in run.output, run.output
