"""Which site breaks the accuracy of the whole: fused up to one site, the results are right; with it, they are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from quantpass.basics.progress import counted


@dataclass(frozen=True, slots=True)
class Bisection:
    """What :func:`bisected` found.

    Attributes:
        within: the largest relative difference of the results that counts as right.
        sites: how many fused sites there are.
        whole: the difference where all of them are fused.
        prefix: how many sites, in order, have to be fused for the results to differ by more; 0 where all can be.
        site: the last of these; empty where all can be fused.
        before: the difference with the sites before it fused.
        difference: the difference with it fused as well.
        alone: with it alone fused.
        without: with all but it fused.
        runs: how often the model was compiled and run for this.
    """

    within: float
    sites: int
    whole: float
    prefix: int = 0
    site: str = ""
    before: float = 0.0
    difference: float = 0.0
    alone: float = 0.0
    without: float = 0.0
    runs: int = 0

    @property
    def is_single(self) -> bool:
        """True where the site alone makes the results differ, and all the others do not."""
        return bool(self.site) and self.alone > self.within >= self.without

    def __str__(self) -> str:
        if not self.site:
            return f"all {self.sites} sites fused, the results differ by {self.whole:.2g}, within {self.within:g}"
        told = (
            f"{self.site}: fused up to the site before it ({self.prefix - 1} of {self.sites}) the results differ by "
            f"{self.before:.2g}, with it by {self.difference:.2g}, more than {self.within:g}. Alone it makes them "
            f"differ by {self.alone:.2g}, all the others by {self.without:.2g}"
        )
        if self.is_single:
            return f"{told}. It is the one: leave=({self.site!r},) keeps it as it was"
        return f"{told}. There is no single culprit: the differences of several sites add up"

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: getattr(self, name) for name in self.__slots__} | {"single": self.is_single}


def bisected(names: Sequence[str], measure: Callable[[Sequence[str]], float], whole: float, within: float) -> Bisection:
    """The shortest beginning of ``names`` that makes the results differ by more than ``within``.

    Args:
        names: the fused sites, in the order in which they run; sites of one name go together.
        measure: the relative difference of the results where only the sites of these names are fused.
        whole: the same for all of them.
        within: what counts as right.

    What a prefix changes need not grow with it; what is found is a prefix that is not right, behind one that is.
    """
    if whole <= within or not names:
        return Bisection(within, len(names), whole)
    known = {0: 0.0, len(names): whole}
    for middle in counted(_middles(known, within), "quantpass bisects", "runs"):
        known[middle] = measure(names[:middle])
    prefix = _first_wrong(known, within)
    site = names[prefix - 1]
    others = [n for n in names if n != site]
    alone = known[1] if prefix == 1 else measure([site])
    without = known[prefix - 1] if prefix == len(names) else measure(others)
    runs = len(known) - 2 + (prefix != 1) + (prefix != len(names))
    return Bisection(within, len(names), whole, prefix, site, known[prefix - 1], known[prefix], alone, without, runs)


def _middles(known: dict[int, float], within: float) -> Iterator[int]:
    """Prefixes to measure; ``known`` grows meanwhile."""
    while (wrong := _first_wrong(known, within)) - (right := _last_right(known, wrong, within)) > 1:
        yield (right + wrong) // 2


def _first_wrong(known: dict[int, float], within: float) -> int:
    return min(n for n, difference in known.items() if not difference <= within)


def _last_right(known: dict[int, float], wrong: int, within: float) -> int:
    return max(n for n, difference in known.items() if n < wrong and difference <= within)
