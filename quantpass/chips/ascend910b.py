"""Atlas A2 (Ascend 910B): bfloat16, per-token scales, int32 results, int4 weights."""

from quantpass.chips import (
    companions,
    grouped_matmul,
    neighbours,
    norms,
    quant_matmul,
    quant_matmul_dequant,
    weight_quant_matmul,
)
from quantpass.chips.quant_matmul import QMM
from quantpass.chips.rules import Chip, WeightLayout
from quantpass.chips.weight_quant_matmul import WQMM

_ND = WeightLayout("ND", None, "as stored")
_NZ = WeightLayout("NZ", None, "the matmul units read FRACTAL_NZ directly")

ASCEND910B = Chip(
    name="ascend910b",
    title="Atlas A2 (910B)",
    soc_prefixes=("Ascend910B",),
    soc_names=tuple(f"Ascend910B{v}" for v in ("1", "2", "2C", "3", "4", "4-1")),
    typical_soc="Ascend910B2",
    documented=True,
    rules=(
        *quant_matmul.rules(quant_matmul.ROWS_A2, "a2", quant_matmul.HINT_A2),
        *quant_matmul.INT4_A2,
        *quant_matmul.NZ_DEGENERATE,
        *quant_matmul.GROUPED_A2,
        *weight_quant_matmul.rules(weight_quant_matmul.ROWS_A2, "a2", weight_quant_matmul.HINT_A2),
        *weight_quant_matmul.RULES_A2,
        *companions.RULES_A2,
        *norms.RULES_A2,
        *quant_matmul_dequant.ELSEWHERE,
        *grouped_matmul.rules(grouped_matmul.ROWS_A2, "a2"),
        *grouped_matmul.RULES_A2,
        *neighbours.RULES_A2,
    ),
    layouts={QMM: (_NZ, _ND), WQMM: (_NZ, _ND)},
    eager_layouts={QMM: (_NZ, _ND), WQMM: (_ND,)},
)
