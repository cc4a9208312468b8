"""Ascend 950, newer than the two module documents: A2's ``npu_quant_matmul``, with an int64 scale beside bfloat16 results;
weight-only matmuls, experts and the operators around them from aclnn's pages.
"""

from dataclasses import replace

from quantpass.chips import (
    companions,
    grouped_matmul_950,
    neighbours,
    norms,
    quant_matmul,
    quant_matmul_dequant,
    weight_quant_matmul,
)
from quantpass.chips.ascend910b import ASCEND910B

ASCEND950 = replace(
    ASCEND910B,
    name="ascend950",
    title="Ascend 950",
    soc_prefixes=("Ascend950",),
    soc_names=(
        *(f"Ascend950PR_{v}" for v in ["950z", "9579", "957b", "957bx", "957c", "957d", "9589", "958b", "9599"]),
        *(
            f"Ascend950DT_{v}"
            for v in [
                "950x",
                "950y",
                "9571",
                "9572",
                "9573",
                "9574",
                "9575",
                "9576",
                "9577",
                "9578",
                "9581",
                "9582",
                "9582x",
            ]
        ),
        *(
            f"Ascend950DT_{v}"
            for v in ["9583", "9584", "9585", "9586", "9587", "9588", "9591", "9592", "9595", "9596", "95A1", "95A2"]
        ),
    ),
    typical_soc="Ascend950PR_9599",
    documented=False,
    batch_matmul_v4=True,
    rules=(
        *quant_matmul.rules(quant_matmul.ROWS_A5, "a5", quant_matmul.HINT_A2),
        *quant_matmul.INT4_A2,
        *quant_matmul.NZ_DEGENERATE,
        *quant_matmul.GROUPED_A2,
        *weight_quant_matmul.RULES_950,
        *companions.RULES_950,
        *norms.RULES_A2,
        *quant_matmul_dequant.ELSEWHERE,
        *grouped_matmul_950.RULES,
        *neighbours.RULES_950,
    ),
)
