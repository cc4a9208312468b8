"""Atlas A3 (Ascend 910_93): the same architecture as A2, so the same rules, but for what is not there."""

from dataclasses import replace

from quantpass.chips import neighbours
from quantpass.chips.ascend910b import ASCEND910B

ASCEND910_93 = replace(
    ASCEND910B,
    name="ascend910_93",
    title="Atlas A3 (910_93)",
    soc_prefixes=("Ascend910_93",),
    soc_names=tuple(f"Ascend910_93{v}" for v in (62, 63, 72, 81, 82, 91, 92)),
    typical_soc="Ascend910_9392",
    rules=(*ASCEND910B.rules, *neighbours.RULES_A3),
)
