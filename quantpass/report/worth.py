"""What fusing is worth: bytes and operators, counted from the graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from quantpass.graph.records import Site


@dataclass(frozen=True, slots=True)
class Worth:
    """What the fused sites of some targets save each time that the model runs.

    Attributes:
        targets: the chips, all with the same numbers.
        sites: how many matmuls are fused by the pass.
        stored: bytes of quantized weights that the fused operators read.
        floats: bytes of the float weights that the graph would make of them.
        dtypes: element types of those.
        operators: how many operators the graph has less.
    """

    targets: tuple[str, ...]
    sites: int
    stored: int
    floats: int
    dtypes: tuple[str, ...]
    operators: int

    @property
    def moved(self) -> int:
        """Bytes of weights that the graph moves unfused: codes read, floats written, floats read."""
        return self.stored + 2 * self.floats

    def lines(self) -> Iterator[str]:
        """In words."""
        if self.floats:
            ratio = f", {self.moved / self.stored:.1f} times less" if self.stored else ""
            yield (
                f"weights read: {human(self.stored)} in place of {human(self.moved)}{ratio} (unfused, "
                f"{human(self.floats)} of {' and '.join(self.dtypes)} weights are made of the codes, written and read)"
            )
        elif self.stored:
            yield f"weights read: {human(self.stored)}, fused or not: the graph multiplies the codes"
        if self.operators > 0:
            many = "s" if self.sites > 1 else ""
            yield f"operators: {self.operators} fewer in the graph for {self.sites} matmul{many}"


def worth(sites: Iterable[Site], targets: Sequence[str]) -> list[Worth]:
    """What is saved, those targets in one that save the same."""
    found: dict[tuple[int, int, int, tuple[str, ...], int], list[str]] = {}
    every = list(sites)
    for target in targets:
        fused = [s for s in every if s.target == target and s.fused and s.weight is not None]
        uses = [s.weight for s in fused if s.weight is not None]
        if fused:
            dtypes = tuple(dict.fromkeys(u.float_dtype for u in uses if u.floats))
            numbers = (sum(u.stored for u in uses), sum(u.floats for u in uses))
            found.setdefault((len(fused), *numbers, dtypes, sum(s.operators for s in fused)), []).append(target)
    return [Worth(tuple(of), *numbers) for numbers, of in found.items()]


def human(size: int) -> str:
    """``1.4 MiB``."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"
