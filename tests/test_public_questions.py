"""What users of Ascend's quantized operators ask in public, asked of the command line: operator, argument, rule, what to do."""

import json

import pytest
import torch
from click.testing import CliRunner

import quantpass as qp
from quantpass.doors.cli import main
from tests.checkpoints import write_headers
from tests.helpers import WeightOnly


def command(*words, text=None, status):
    """What a command prints."""
    run = CliRunner().invoke(main, [str(w) for w in words], input=text)
    assert run.exit_code == status, run.output
    return run.stdout


def explained(text, *words):
    """The one error that ``explain-error`` finds in a text."""
    (error,) = json.loads(command("explain-error", "--json", "-", *words, text=text, status=0))["errors"]
    return error


def about(error):
    return error["operator"], error["argument"], error["rule"]


def failed(operator, message):
    return f"RuntimeError: call {operator} failed, error code is 161002\nAclNN_Parameter_Error(EZ1001): {message}\n"


def checkpoint(folder, tensors, dtype, quantization=None, kinds=None):
    folder.mkdir(exist_ok=True)
    write_headers(folder / "model.safetensors", tensors)
    config = {"torch_dtype": dtype} | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(config))
    if kinds:
        (folder / "quant_model_description.json").write_text(json.dumps(kinds))
    return folder


def w8a8(folder, sizes, dtype, bias=()):
    """LLM-Compressor's W8A8 with dynamic activations: headers alone."""
    tensors = {}
    for name, (n, k) in sizes.items():
        tensors |= {f"{name}.weight": ("I8", (n, k)), f"{name}.weight_scale": ("BF16", (n, 1))}
        tensors |= {f"{name}.bias": ("F16", (n,))} if name in bias else {}
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**int8, "strategy": "channel"},
        "input_activations": {**int8, "strategy": "token", "dynamic": True},
    }
    how = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group}}
    return checkpoint(folder, tensors, dtype, how)


def test_1_a_scale_of_float16():
    """161002 "Tensor scale not implemented for DT_FLOAT16" on a W8A8 model."""
    error = explained(
        "RuntimeError: npu_quant_matmul_symint: NPU function error: call aclnnQuantMatmulWeightNz failed, error code is 161002\n"
        "AclNN_Parameter_Error(EZ1001): Tensor scale not implemented for DT_FLOAT16, should be in dtype support list "
        "[DT_UINT64,DT_BFLOAT16,DT_INT64,DT_FLOAT,].\n"
    )
    assert about(error) == ("npu_quant_matmul", "scale", "qmm.a2.dtypes.scale")
    assert error["found"] == "DT_FLOAT16" and "nearest legal: scale=float32" in error["hint"]


def test_2_a_bias_that_the_310p_wants_in_int32(tmp_path):
    """ "Bias dtype should be INT32, actual DT_FLOAT16": one model fails and another works with the same flags. Which layers?"""
    error = explained(
        failed("aclnnQuantMatmulWeightNz", "Bias dtype should be INT32, actual dtype is DT_FLOAT16."),
        "-t",
        "Ascend310P3",
    )
    assert about(error) == ("npu_quant_matmul", "bias", "qmm.310p.dtypes.bias")
    assert "nearest legal: bias=int32" in error["hint"]
    tensors = {}
    for name in ("with_bias", "without"):
        tensors |= {
            f"{name}.weight": ("I8", (128, 256)),
            f"{name}.weight_scale": ("F16", (128, 1)),
            f"{name}.weight_offset": ("F16", (128, 1)),
        }
        tensors |= {f"{name}.input_scale": ("F16", (1,)), f"{name}.input_offset": ("F16", (1,))}
    tensors["with_bias.bias"] = ("F16", (128,))
    folder = checkpoint(tmp_path, tensors, "float16", kinds=dict.fromkeys(tensors, "W8A8"))
    report = qp.check_checkpoint(folder, targets="ascend310p", bias_dtype="float16")
    ops = {line.name: line.verdicts["ascend310p"].op for line in report.lines}
    assert ops["without"] == "npu_quant_matmul" and ops["with_bias"] != "npu_quant_matmul"
    assert "qmm.310p.dtypes.bias on ascend310p (#1)" in str(report) and "legal:  bias=int32(128)" in str(report)


def test_3_groups_of_256_in_fractal_nz():
    """int4 in FRACTAL_NZ: "antiquantGroupSize should be 128 or 64", with the 256 of a tutorial."""
    error = explained(
        failed(
            "aclnnWeightQuantBatchMatmulV2",
            "when weight's dtype is [int4], weight's format is [FRACTAL_NZ], antiquantGroupSize should be 128 or 64, but "
            "actual antiquantGroupSize is [256].",
        )
    )
    assert about(error) == ("npu_weight_quant_batchmatmul", "antiquant_group_size", "wqmm.nz.int4.group.size")
    assert error["found"] == "[256]" and "use ND, or quantize with groups of 64 or 128" in error["hint"]


def test_4_a_bias_beside_bfloat16_weights_of_int8():
    """W8A16 in bfloat16: "biasOptional's dtype should be DT_FLOAT"."""
    error = explained(
        failed("aclnnWeightQuantBatchMatmulV2", "biasOptional's dtype should be [DT_FLOAT], actual is [DT_BFLOAT16].")
    )
    assert about(error) == ("npu_weight_quant_batchmatmul", "bias", "wqmm.a2.dtypes.bias")
    assert "nearest legal: bias=float32" in error["hint"]


def test_5_transposes_on_the_310p():
    """ "only support output transpose_x1 false and transpose_x2 true, actual [false, false]"."""
    error = explained(
        "E69999: [PID: 301341] op[QuantBatchMatmulV3], this platform only support output transpose_x1 false and transpose_x2 "
        "true, actual [false, false][FUNC:AnalyzeAttrs][FILE:quant_batch_matmul_v3_tiling.cc][LINE:403]\n"
    )
    assert about(error) == ("npu_quant_matmul", "x2", "qmm.310p.nz.eager")
    assert "x2=int8(512, 128) NZ transposed" in error["hint"]


@pytest.mark.parametrize(
    ("arguments", "rule", "says"),
    [
        ("x1=int8[16,512] x2=int8[512,128] pertoken_scale=float32[16,1]", "qmm.pertoken.shape", "pertoken_scale=float32(16)"),
        ("x1=int8[16,512] x2=int8[512,70000] pertoken_scale=float32[16]", "qmm.n.range", "n is 70000"),
        ("x1=int8[2,16,512] x2=int8[512,128] pertoken_scale=float32[2,16]", "qmm.pertoken.shape", "pertoken_scale has shape (2, 16)"),
    ],
)  # fmt: skip
def test_6_sizes_of_rows_and_columns(arguments, rule, says):
    """A per-token scale of two dimensions, more than 65535 columns, an x1 that is no matrix."""
    columns = "70000" if "70000" in arguments else "128"
    words = f"{arguments} scale=float32[{columns}] output_dtype=float16".split()
    printed = command("check-op", "npu_quant_matmul", "-t", "ascend910b", "--mode", "eager", *words, status=1)
    assert rule in printed and says in printed, printed
    error = explained(
        failed("aclnnQuantMatmulV4", "x1 last dim or x2 last dim is larger than 65535, x1 is 512, x2 is 70000.")
    )
    assert error["operator"] == "npu_quant_matmul" and error["rule"] == "qmm.k.range"


def test_7_low_bit_kernels_or_dequantization(tmp_path):
    """ "Does it use native low-bit kernels, or dequantize? How do I verify that?": each linear's operator, and a status for CI."""
    folder = w8a8(tmp_path, {f"model.layers.{i}.mlp.up_proj": (11008, 4096) for i in range(4)}, "bfloat16")
    printed = command("check-checkpoint", folder, "-t", "ascend910b", "--json", "-", status=0)
    (line,) = json.loads(printed)["linears"]
    assert line["verdicts"]["ascend910b"]["op"] == "npu_quant_matmul" and line["count"] == 4
    report = qp.explain(
        WeightOnly(dtype=torch.float32), (torch.randn(4, 64),), target="ascend910b"
    )  # in float32: it is dequantized
    with pytest.raises(AssertionError, match="0 of 1"):
        report.require(fused=1.0)


def test_8_an_operator_that_the_310p_has_not():
    """561000 in aclnnAddRmsNormDynamicQuantV2 for a model that somebody quantized for the 310P."""
    error = explained("Ascend310P3: call aclnnAddRmsNormDynamicQuantV2 failed, error code is 561000\n")
    assert about(error) == ("npu_add_rms_norm_dynamic_quant", None, "add_rms_norm_dynamic_quant.310p")
    assert "npu_add_rms_norm" in error["want"]
    words = ["x1=float16[4,64]", "x2=float16[4,64]", "gamma=float16[64]"]
    assert "add_rms_norm_dynamic_quant.310p" in command(
        "check-op", "npu_add_rms_norm_dynamic_quant", "-t", "ascend310p", *words, status=1
    )


def test_9_experts_that_do_not_fit():
    """161002 in aclnnGroupedMatmulV5 with expert parallelism: the list of groups, or a shard that FRACTAL_NZ does not take."""
    error = explained("call aclnnGroupedMatmulV5 failed, error code is 161002\n")
    assert error["operator"] == "npu_grouped_matmul" and "EZ1001" in error["hint"]
    rank = "x=int8[16,256] weight=int8[8,256,128] scale=bfloat16[8,128] per_token_scale=float32[16] output_dtype=bfloat16 split_item=2 group_type=0"
    printed = command(
        "check-op", "npu_grouped_matmul", "-t", "ascend910b", *rank.split(), "group_list=int64[128]", status=1
    )
    assert "gmm.group_list.shape" in printed and "group_list=int64(8)" in printed
    shape = "When weight(DT_INT8) format is FRACTAL_NZ, weight'shape(k[100], n[48]) should be divisible by the following shape: INT8:[16, 32],BF16/FP16[16, 16],INT4[16, 64])."
    error = explained(failed("aclnnGroupedMatmulWeightNz", shape))
    assert (error["operator"], error["argument"]) == ("npu_grouped_matmul", "weight")
    assert "int8 16 and 32" in error["want"] and "leave this weight in ND, or pad it" in error["hint"]


def test_10_checkpoints_on_the_310p(tmp_path):
    """W4A4 and W4A8 of a 14B model, LLM-Compressor's W8A8 and a W4A16 of experts: what does the 310P run?"""
    size = {"q_proj.weight": ("I8", (5120, 5120)), "q_proj.weight_scale": ("F16", (5120, 1))}
    for kind, runs in (("W4A4_DYNAMIC", 0), ("W4A8_DYNAMIC", 0), ("W8A8_DYNAMIC", 1)):
        folder = checkpoint(tmp_path / kind, size, "float16", kinds={"q_proj.weight": kind})
        assert qp.check_checkpoint(folder, targets="ascend310p").fused("ascend310p") == runs, kind
    compressor = w8a8(tmp_path / "w8a8", {"up_proj": (11008, 4096)}, "bfloat16")
    said = command("check-checkpoint", compressor, "-t", "ascend310p", status=1)
    assert "in a model of float16 (dtype)" in said
    command("check-checkpoint", compressor, "-t", "ascend310p", "--dtype", "float16", status=0)
    experts = {}
    for e in range(4):
        at = f"model.layers.0.mlp.experts.{e}.up_proj"
        experts |= {
            f"{at}.weight_packed": ("I32", (2048, 7168 // 8)),
            f"{at}.weight_scale": ("BF16", (2048, 7168 // 32)),
        }
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    how = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    packed = checkpoint(tmp_path / "w4a16", experts, "bfloat16", how)
    assert qp.check_checkpoint(packed, targets="ascend910b").all_fused
    assert "gmm.310p.dtypes" in command("check-checkpoint", packed, "-t", "ascend310p", status=1)


def test_and_fractal_nz_where_a_dimension_is_1():
    """ "Do quantized models depend on FRACTAL_NZ?": a weight with n = 1 has to stay in ND."""
    error = explained(failed("aclnnQuantMatmulWeightNz", "When format of x2 is FRACTAL_NZ, n or k cannot be 1."))
    assert about(error) == ("npu_quant_matmul", "x2", "qmm.nz.k") and "ND" in error["hint"]
    words = [
        "x1=int8[16,512]",
        "x2=int8[512,1]:NZ",
        "scale=float32[1]",
        "pertoken_scale=float32[16]",
        "output_dtype=float16",
    ]
    printed = command("check-op", "npu_quant_matmul", "-t", "ascend910b", *words, status=1)
    assert "qmm.nz.n" in printed and "nearest legal" in printed
