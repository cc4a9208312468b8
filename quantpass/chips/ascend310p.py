"""Atlas inference series (Ascend 310P): int8 weights in FRACTAL_NZ, float16 and int8 results, one scale a column."""

from quantpass.chips import (
    companions,
    grouped_matmul,
    neighbours,
    norms,
    quant_matmul,
    quant_matmul_dequant,
    weight_quant_matmul,
)
from quantpass.chips.expert_matmuls import QGMMD
from quantpass.chips.quant_matmul import QMM
from quantpass.chips.quant_matmul_dequant import QMMD
from quantpass.chips.rules import Chip, WeightLayout
from quantpass.chips.weight_quant_matmul import WQMM

_NZ = WeightLayout("NZ", True, "graph mode takes a weight stored (N, K), cast to FRACTAL_NZ, viewed transposed")
_ND = WeightLayout("ND", True, "eager mode converts an ND weight itself")
_ROWS = WeightLayout("ND", True, "the operator takes a weight stored (N, K), as it is")

ASCEND310P = Chip(
    name="ascend310p",
    title="Atlas inference series (310P)",
    soc_prefixes=("Ascend310P",),
    soc_names=tuple(f"Ascend310P{i}" for i in (1, 2, 3, 4, 5, 7)),
    typical_soc="Ascend310P3",
    documented=True,
    rules=(
        *quant_matmul.rules(quant_matmul.ROWS_310P, "310p", quant_matmul.HINT_310P),
        *quant_matmul.LAYOUT_310P,
        *quant_matmul.GROUPED_310P,
        *weight_quant_matmul.rules(weight_quant_matmul.ROWS_310P, "310p", weight_quant_matmul.HINT_310P),
        *weight_quant_matmul.RULES_310P,
        *companions.RULES_310P,
        *norms.RULES_310P,
        *quant_matmul_dequant.RULES_310P,
        *grouped_matmul.rules(grouped_matmul.ROWS_310P, "310p"),
        *grouped_matmul.RULES_310P,
        *neighbours.RULES_310P,
    ),
    costs=(*quant_matmul.COSTS_310P, *quant_matmul_dequant.COSTS_310P),
    layouts={QMM: (_NZ,), WQMM: (_NZ,), QMMD: (_ROWS,), QGMMD: (_ROWS,)},
    saturates=True,
    eager_layouts={
        QMM: (WeightLayout("NZ", True, "saves the operator's own conversion"), _ND),
        WQMM: (_ND,),
        QMMD: (_ROWS,),
        QGMMD: (_ROWS,),
    },
)
