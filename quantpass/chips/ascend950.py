"""Ascend 950, newer than the two module documents: A2's rules, and an int64 scale with bfloat16 results."""

from dataclasses import replace

from quantpass.chips import companions, quant_matmul, weight_quant_matmul
from quantpass.chips.ascend910b import ASCEND910B

ASCEND950 = replace(
    ASCEND910B,
    name="ascend950",
    title="Ascend 950",
    soc_prefixes=("Ascend950",),
    rules=(
        *quant_matmul.rules(quant_matmul.ROWS_A5, "a5", quant_matmul.HINT_A2),
        *quant_matmul.INT4_A2,
        *quant_matmul.NZ_DEGENERATE,
        *quant_matmul.GROUPED_A2,
        *weight_quant_matmul.rules(weight_quant_matmul.ROWS_A2, "a2", weight_quant_matmul.HINT_A2),
        *weight_quant_matmul.RULES_A2,
        *companions.RULES_A2,
    ),
)
