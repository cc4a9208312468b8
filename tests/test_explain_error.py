"""Error messages, explained: each row of the table, what people paste, and what is not known."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import quantpass as qp
from quantpass.chips import CHIPS
from quantpass.chips.checking import OPERATORS
from quantpass.doors.cli import main
from quantpass.messages.examples import EXAMPLES, examples
from quantpass.messages.explain import to_json
from quantpass.messages.logs import blocks
from quantpass.messages.names import operator_named
from quantpass.messages.notes import NOTES
from quantpass.messages.places import places
from quantpass.messages.table import ANY, patterns

PATTERNS = patterns()


def said(text, **how):
    """The one explanation of a text."""
    (explained,) = qp.explain_error(text, **how)
    return explained


def placed(text):
    ((block, *_),) = blocks(text)
    return [p for p in places(block) if p.kind != "code"]


def failed(operator, message):
    """A message as aclnn reports it for an operator."""
    return f"RuntimeError: call {operator} failed, error code is 161002\nAclNN_Parameter_Error(EZ1001): {message}"


# -- the table -------------------------------------------------------------------------------------------------------


def test_every_pattern_hits_its_own_text_and_no_others():
    wrong = []
    for pattern in PATTERNS:
        operator = {"": "aclnnMatmul", ANY: "npu_quant_matmul"}.get(pattern.operator, pattern.operator)
        found = placed(f"{operator}: {pattern.words.replace('*', '7')} ")
        own = [p for p in found if p.answer == pattern.answer and pattern.operator in (ANY, p.operator)]
        if len(found) != 1 or not own or (pattern.argument and own[0].argument != pattern.argument):
            wrong.append((pattern.words, [(p.operator, p.argument, p.answer) for p in found]))
    assert not wrong


def test_a_pattern_is_not_taken_for_another_operators():
    for pattern in PATTERNS:
        named = any(operator_named(word) for word in pattern.words.split())
        if pattern.operator not in ("", ANY) and not named:
            found = placed(f"aclnnSomethingElse: {pattern.words.replace('*', '7')}")
            assert not [p for p in found if p.operator], pattern.words


def test_rows_speak_of_what_there_is():
    rules = {r.id for chip in CHIPS.values() for r in chip.rules}
    for pattern in PATTERNS:
        kind, _, note = pattern.answer.partition(":")
        table = pattern.answer.partition(".dtypes")[0] + ".dtypes"
        known = (
            note in NOTES if kind == "note" else pattern.answer in rules or table in rules or pattern.answer in NOTES
        )
        assert known, pattern.answer
        assert pattern.operator in ("", ANY, *OPERATORS), pattern.operator
        assert (
            not pattern.argument
            or pattern.argument in OPERATORS[pattern.operator].arguments
            or pattern.argument == "y_scale"
        ), pattern
        assert pattern.source
    assert len({(p.words, p.operator) for p in PATTERNS}) == len(PATTERNS)


def test_examples_are_legal_somewhere():
    for operator, texts in EXAMPLES.items():
        legal = {
            str(c.args)
            for chip in CHIPS.values()
            for mode in ("graph", "eager")
            for c in examples(operator, chip, mode)
        }
        assert len(legal) == len(texts), operator


@pytest.mark.parametrize(
    ("word", "operator"),
    [
        ("aclnnQuantMatmulV5GetWorkspaceSize", "npu_quant_matmul"),
        ("QuantBatchMatmulV3_12", "npu_quant_matmul"),
        ("npu_quant_matmul_symint", "npu_quant_matmul"),
        ("aclnnWeightQuantBatchMatmulV2", "npu_weight_quant_batchmatmul"),
        ("aclnnGroupedMatmulV5", "npu_grouped_matmul"),
        ("aclnnGroupedMatmulSwigluQuantV2", "npu_grouped_matmul_swiglu_quant_v2"),
        ("aclnnFusedQuantMatmul", ""),
        ("quantized", None),
    ],
)
def test_names_of_operators(word, operator):
    assert operator_named(word) == operator


# -- what people ask -------------------------------------------------------------------------------------------------

SCALE = """\
RuntimeError: npu_quant_matmul_symint:build/CMakeFiles/torch_npu.dir/compiler_depend.ts:211 NPU function error: call aclnnQuantMatmulWeightNz failed, error code is 161002
(Worker_DP1_TP1_EP5 pid=465) ERROR 02-09 17:11:36 [multiproc_executor.py:751] [ERROR] 2026-02-09-17:11:34 (PID:465, Device:1, RankID:-1) ERR00100 PTA call acl api failed.
(Worker_DP1_TP1_EP5 pid=465) ERROR 02-09 17:11:36 [multiproc_executor.py:751] [PID: 465] 2026-02-09-17:11:34.368.749 AclNN_Parameter_Error(EZ1001): Tensor scale not implemented for DT_FLOAT16, should be in dtype support list [DT_UINT64,DT_BFLOAT16,DT_INT64,DT_FLOAT,].
"""
TRANSPOSED = """\
RuntimeError: call aclnnQuantMatmulWeightNz failed, detail:E69999: Inner Error!
E69999: [PID: 301341] 2025-07-08-19:23:04.799.485 op[QuantBatchMatmulV3], this platform only support output transpose_x1 false and transpose_x2 true, actual [false, false][FUNC:AnalyzeAttrs][FILE:quant_batch_matmul_v3_tiling.cc][LINE:403]
        TraceBack (most recent call last):
       op[QuantBatchMatmulV3], fail to analyze context info[FUNC:GetShapeAttrsInfo][FILE:quant_batch_matmul_v3_tiling.cc][LINE:332]
       Tiling failed
"""
GROUP = failed(
    "aclnnWeightQuantBatchMatmulV2",
    "when weight's dtype is [int4], weight's format is [FRACTAL_NZ], antiquantGroupSize should be 128 or 64, but actual "
    "antiquantGroupSize is [256].",
)
BIAS_310P = "Atlas 300I DUO (310P3)\n" + failed(
    "aclnnQuantMatmulWeightNz", "Bias dtype should be INT32, actual dtype is DT_FLOAT16."
)
EXPERTS = failed(
    "aclnnGroupedMatmulWeightNz",
    "When weight(DT_INT8) format is FRACTAL_NZ, weight'shape(k[100], n[48]) should be divisible by the following shape: "
    "INT8:[16, 32],BF16/FP16[16, 16],INT4[16, 64]).",
)


@pytest.mark.parametrize(
    ("text", "operator", "argument", "rule", "found", "nearest"),
    [
        (SCALE, "npu_quant_matmul", "scale", "qmm.a2.dtypes.scale", "DT_FLOAT16", "scale=float32(128)"),
        (BIAS_310P, "npu_quant_matmul", "bias", "qmm.310p.dtypes.bias", "DT_FLOAT16", "bias=int32(128)"),
        (
            GROUP,
            "npu_weight_quant_batchmatmul",
            "antiquant_group_size",
            "wqmm.nz.int4.group.size",
            "[256]",
            "nearest legal",
        ),
        (
            failed(
                "aclnnWeightQuantBatchMatmulV2", "biasOptional's dtype should be [DT_FLOAT], actual is [DT_BFLOAT16]."
            ),
            *("npu_weight_quant_batchmatmul", "bias", "wqmm.a2.dtypes.bias", "[DT_BFLOAT16]", "bias=float32(128)"),
        ),
        (
            TRANSPOSED,
            "npu_quant_matmul",
            "x2",
            "qmm.310p.nz.eager",
            "[false, false]",
            "x2=int8(512, 128) NZ transposed",
        ),
        (
            failed("aclnnQuantMatmulV4", "x1 last dim or x2 last dim is larger than 65535, x1 is 512, x2 is 70000."),
            *("npu_quant_matmul", "x2", "qmm.k.range", None, ""),
        ),
        (
            failed(
                "aclnnQuantMatmulV4",
                "PertokenScaleOptional 1st dim should be equal to x1 m dim 16 or 1, but actually is 8.",
            ),
            *("npu_quant_matmul", "pertoken_scale", "qmm.pertoken.shape", "8", "flatten x1"),
        ),
        (
            failed("aclnnQuantMatmulWeightNz", "When format of x2 is FRACTAL_NZ, n or k cannot be 1."),
            *("npu_quant_matmul", "x2", "qmm.nz.k", None, "ND"),
        ),
    ],
)
def test_public_questions(text, operator, argument, rule, found, nearest):
    explained = said(text)
    assert (explained.operator, explained.argument, explained.rule) == (operator, argument, rule)
    assert explained.known and nearest in explained.hint
    assert found is None or explained.found == found


def test_experts_in_fractal_nz():
    explained = said(EXPERTS)
    assert explained.operator == "npu_grouped_matmul" and explained.argument == "weight"
    assert "int8 16 and 32" in explained.want and "ND" in explained.hint


def test_an_operator_that_the_chip_has_not():
    explained = said("Ascend310P3: call aclnnAddRmsNormDynamicQuantV2 failed, error code is 561000")
    assert explained.rule == "add_rms_norm_dynamic_quant.310p" and "npu_add_rms_norm" in explained.want
    swiglu = said("Ascend310P3: call aclnnSwiGluQuantV2 failed, error code is 561000")
    assert swiglu.rule == "swiglu_quant.unavailable" and "npu_swiglu and npu_quantize" in swiglu.want


def test_the_line_to_play_with_is_illegal_as_the_message_says():
    for text in (SCALE, BIAS_310P, GROUP, TRANSPOSED):
        explained = said(text)
        line = explained.hint.partition(": quantpass ")[2].splitlines()[0]
        run = CliRunner().invoke(main, line.split())
        assert run.exit_code == 1 and explained.rule in run.output, line


def test_the_chip_that_a_text_names_is_asked():
    message = failed("aclnnQuantMatmulV4", "Bias dtype should be INT32, actual dtype is DT_FLOAT16")
    assert said(message).rule == "qmm.a2.dtypes.bias"
    assert said(message, target="Ascend310P3").rule == "qmm.310p.dtypes.bias"
    assert said(f"on Ascend310P3\n{message}").rule == "qmm.310p.dtypes.bias"


def test_a_text_without_an_operator():
    explained = qp.explain_error("Tensor scale not implemented for DT_FLOAT16")
    assert [e.operator for e in explained][:2] == ["npu_quant_matmul", "npu_trans_quant_param"]
    assert all(e.argument == "scale" and "names no operator" in e.hint for e in explained)
    assert said("Bias dtype should be INT32").operator == "npu_quant_matmul"
    assert said("antiquantGroupSize should be 128 or 64").rule == "wqmm.nz.int4.group.size"
    assert said("only support transpose_x1 false and transpose_x2 true").rule == "qmm.310p.nz.eager"


def test_arguments_that_a_message_names_itself():
    text = "Parameter x2Scale of aclnnQuantMatmulV5GetWorkspaceSize has incorrect dtype DT_FLOAT16. Reason: words of a newer CANN."
    assert (said(text).argument, said(text).rule) == ("scale", "qmm.a2.dtypes.scale")
    null = said(failed("aclnnQuantMatmulV4", "Expected a proper Tensor but got null for argument scale."))
    assert (null.argument, null.rule) == ("scale", "qmm.scale.present")


@pytest.mark.parametrize(
    ("operator", "message", "argument", "rule"),
    [
        ("aclnnQuantMatmulAllReduceV3", "Tensor dequantScale not implemented for DT_FLOAT16", "dequant_scale", "mm_all_reduce.dtypes.dequant_scale"),
        ("aclnnMoeInitRoutingV3", "Tensor expertIdx not implemented for DT_INT64", "expert_idx", "moe_routing.expert_idx.dtype"),
        ("aclnnQuantGroupedMatmulDequant", "Tensor weightScale not implemented for DT_FLOAT16", "weight_scale", "qgmmd.scale.dtype"),
        ("aclnnGroupedMatmulSwigluQuantV2", "Tensor xScale not implemented for DT_FLOAT16", "x_scale", "gmm_swiglu_v2.x_scale.dtype"),
        ("aclnnAddRmsNormQuantV2", "Tensor scales1 not implemented for DT_FLOAT16", "scales1", "add_rms_norm_quant.dtypes.scales1"),
        ("aclnnSwiGluQuantV2", "Tensor groupIndexOptional not implemented for DT_INT64", "group_index", "swiglu_quant.group.dtype"),
        ("aclnnDequantSwigluQuantV2", "Tensor weightScaleOptional not implemented for DT_BF16", "weight_scale", "dequant_swiglu_quant.scale.dtype"),
        ("aclnnQuantMatmulReduceSumWeightNz", "Tensor x2Scale not implemented for DT_FLOAT", "x2_scale", "reduce_sum.x2_scale.dtype"),
    ],
)  # fmt: skip
def test_operators_around_the_matmuls(operator, message, argument, rule):
    explained = said(failed(operator, f"{message}, should be in dtype support list []."))
    assert (explained.argument, explained.rule) == (argument, rule)
    assert "check-op" in explained.hint


# -- codes, our own words, what is not known --------------------------------------------------------------------------


def test_codes_alone():
    explained = said("call aclnnGroupedMatmulV5 failed, error code is 161002")
    assert explained.operator == "npu_grouped_matmul" and explained.rule is None and "EZ1001" in explained.hint
    assert "AI core" in said("EE9999 ... error code 507015").hint
    assert (
        "feature is not there"
        in said("[ERROR] 2026-01-01-00:00:00 (PID:1, Device:0, RankID:-1) ERR01007 OPS feature not supported").hint
    )
    assert "error code" not in "".join(e.found or "" for e in qp.explain_error(SCALE)), (
        "the message says more than its code"
    )


def test_quantpass_own_words():
    verdict = qp.check_op("npu_quant_matmul", target="ascend310p", x1=qp.TensorSpec("bfloat16", (4, 8)))
    explained = {e.rule: e for e in qp.explain_error(str(verdict))}
    assert set(explained) == {r.rule for r in verdict.rejects}
    assert all(e.doc and e.operator == "npu_quant_matmul" for e in explained.values())
    assert said("read.weight.experts: one matrix; wanted a weight").rule == "read.weight.experts"


@pytest.mark.parametrize(
    "text",
    [
        "hello",
        "ValueError: too many values to unpack (expected 2)",
        failed("aclnnQuantMatmulV4", "the moon should be full, actual moon is new"),
        failed("aclnnFlashAttentionScore", "Bias dtype should be INT32, actual dtype is DT_FLOAT16"),
    ],
)
def test_what_is_not_known_is_said_with_the_closest_three(text):
    explained = said(text)
    assert explained.rule is None and not explained.known
    assert explained.hint.count("' (") == 3


def test_nothing_is_said_of_nothing():
    assert qp.explain_error("") == qp.explain_error(" \n ") == []
    with pytest.raises(TypeError, match="give what was printed"):
        qp.explain_error(b"bytes")
    with pytest.raises(ValueError, match="unknown target"):
        qp.explain_error("x", target="ascend31")


# -- logs ------------------------------------------------------------------------------------------------------------


def test_colours_prefixes_and_wrapped_lines():
    colours = BIAS_310P.replace("Bias dtype", "\x1b[1;31mBias\x1b[0m dtype")
    assert said(colours).rule == "qmm.310p.dtypes.bias"
    prefix = "(EngineCore_DP0 pid=2350) "
    message = GROUP.replace("antiquantGroupSize should", f"antiquantGroupSize\n{prefix}should")
    assert said(message).rule == "wqmm.nz.int4.group.size"
    cut = "\n".join(GROUP[i : i + 80] for i in range(0, len(GROUP), 80))
    assert said(cut).rule == "wqmm.nz.int4.group.size"


def test_several_errors_each_once():
    text = (SCALE + "\n".join(["INFO nothing"] * 100) + "\n" + GROUP + "\n") * 3
    assert [e.rule for e in qp.explain_error(text)] == ["qmm.a2.dtypes.scale", "wqmm.nz.int4.group.size"]


def test_an_error_deep_in_a_log_of_ten_megabytes():
    lines = [
        f"(Worker pid={i}) INFO 02-09 17:11:36 [worker.py:{i % 97}] scale of x1 but bias should be none, dtype {i}, step done"
        for i in range(45_000)
    ]
    filler = "\n".join(lines) + "\n"
    begun = time.process_time()
    explained = said(filler + SCALE + filler)
    assert explained.rule == "qmm.a2.dtypes.scale"
    assert len(filler) * 2 > 9_000_000 and time.process_time() - begun < 15


def test_a_log_that_repeats_itself_is_explained_once():
    again = "".join(SCALE.replace("465", str(i)) + f"ValueError: request {i} failed\n" for i in range(2_000))
    begun = time.process_time()
    assert said(again).rule == "qmm.a2.dtypes.scale"
    assert time.process_time() - begun < 15


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command():
    run = CliRunner().invoke(main, ["explain-error"], input=SCALE)
    assert run.exit_code == 0 and "qmm.a2.dtypes.scale" in run.output and "check-op" in run.output
    run = CliRunner().invoke(main, ["explain-error"], input="hello")
    assert run.exit_code == 1 and "closest" in run.output
    assert CliRunner().invoke(main, ["explain-error"], input=" ").exit_code == 2
    assert CliRunner().invoke(main, ["explain-error", "-t", "nochip"], input="x").exit_code == 2


def test_json():
    run = CliRunner().invoke(main, ["explain-error", "--json", "-"], input=SCALE + "\n")
    made = json.loads(run.output)
    assert set(made) == {"version", "errors"} and made["version"] == 1
    assert [set(e) for e in made["errors"]] == [
        {"operator", "argument", "rule", "found", "want", "hint", "doc", "text"}
    ]
    assert json.loads(to_json(qp.explain_error("hello")))["errors"][0]["rule"] is None


def test_no_torch_is_loaded():
    code = "import sys, quantpass as qp; qp.explain_error('161002'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_shows_what_is_printed():
    page = (Path(__file__).parent.parent / "docs" / "errors.md").read_text()
    log = (
        "RuntimeError: npu_quant_matmul: call aclnnQuantMatmulWeightNz failed, error code is 161002\n"
        + SCALE.splitlines()[2]
    )
    run = CliRunner().invoke(main, ["explain-error"], input=log)
    shown = page.partition("$ quantpass explain-error < log.txt\n")[2].partition("```")[0]
    assert shown == run.output
