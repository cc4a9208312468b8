"""The ``reference`` lowering: the operators' own CPU kernels, which define what they compute."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.fx import GraphModule

if TYPE_CHECKING:
    from quantpass.chips.rules import Chip
    from quantpass.graph.constants import Constants


class Reference:
    """A graph stays as it is."""

    name = "reference"
    mode = "graph"
    needs_a_chip = False
    keeps_casts = True

    def prepare(self, chip: Chip) -> None:
        """Nothing: the kernels are there."""

    def lower(self, gm: GraphModule, constants: Constants | None = None) -> None:
        """Nothing: the kernels are there."""
