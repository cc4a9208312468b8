"""What a lowering is: a way to carry out the fused operators of a rewritten graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch.fx import GraphModule

if TYPE_CHECKING:
    from quantpass.chips.rules import Chip
    from quantpass.graph.constants import Constants


class Lowering(Protocol):
    """A way to carry out ``torch.ops.quantpass.*``.

    Attributes:
        name: what users and reports call it.
        mode: which of a chip's rules hold where nothing else is said: ``"graph"`` (GE) or ``"eager"`` (aclnn).
        needs_a_chip: it takes plans that follow a chip's rules only.
        keeps_casts: format casts may stay in the graph.
    """

    name: str
    mode: str
    needs_a_chip: bool
    keeps_casts: bool

    def prepare(self, chip: Chip) -> None:
        """What has to be there before graphs for ``chip`` are compiled."""

    def lower(self, gm: GraphModule, constants: Constants | None = None) -> None:
        """Put what runs in place of the fused operators, in place.

        Args:
            gm: a fused graph whose casts of parameters were carried out.
            constants: the tensors that are known; None where there are none.
        """
