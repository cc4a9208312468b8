"""Names that differ in the numbers of layers and experts, as one line: ``model.layers.{0..93}.self_attn.q_proj``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Numbers = tuple[int, ...]
Form = tuple[str | None, ...]
"""A name's parts; None for each number."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Several names in one.

    Attributes:
        text: the name, with ``{0..5}`` or ``{0,2,7..9}`` where the names have those numbers.
        count: how many names it stands for.
    """

    text: str
    count: int

    def __str__(self) -> str:
        return f"{self.text} x{self.count}" if self.count > 1 else self.text


def folded(names: Iterable[str]) -> list[Fold]:
    """Names folded by the numbers among their dotted parts, in the order of the first of each; repeated ones count.

    A fold stands for every combination of its numbers, and for no other name.
    """
    by_form: dict[Form, dict[Numbers, int]] = {}
    for name in names:
        form, numbers = split_numbers(name)
        found = by_form.setdefault(form, {})
        found[numbers] = found.get(numbers, 0) + 1
    folds = []
    for form, found in by_form.items():
        for times in sorted(set(found.values())):
            for ranges in _products([n for n, t in found.items() if t == times]):
                count = times
                for numbers in ranges:
                    count *= len(numbers)
                folds.append(Fold(_text(form, ranges), count))
    return folds


def split_numbers(name: str) -> tuple[Form, Numbers]:
    """``model.layers.3.mlp`` as ``("model", "layers", None, "mlp")`` and ``(3,)``."""
    parts = name.split(".")
    numeric = [part.isascii() and part.isdigit() and str(int(part)) == part for part in parts]
    form = tuple(None if n else part for part, n in zip(parts, numeric, strict=True))
    return form, tuple(int(part) for part, n in zip(parts, numeric, strict=True) if n)


def _products(found: list[Numbers]) -> list[tuple[Numbers, ...]]:
    """Tuples of numbers as products of sets, each exact: those with the same behind their first number go together."""
    if not found or not found[0]:
        return [()] if found else []
    rests: dict[int, list[Numbers]] = {}
    for first, *rest in found:
        rests.setdefault(first, []).append(tuple(rest))
    firsts: dict[frozenset[Numbers], list[int]] = {}
    for first, behind in rests.items():
        firsts.setdefault(frozenset(behind), []).append(first)
    return [
        (tuple(sorted(group)), *product)
        for rest, group in firsts.items()
        for product in _products([r for r in rests[group[0]] if r in rest])
    ]


def _text(form: Form, ranges: tuple[Numbers, ...]) -> str:
    left = iter(ranges)
    return ".".join(_range(next(left)) if part is None else part for part in form)


def _range(numbers: Numbers) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{{{ranges(numbers)}}}"


def ranges(numbers: Numbers) -> str:
    """``(0, 1, 2, 5)``, in their order, as ``0..2,5``."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(f"{r[0]}..{r[-1]}" if len(r) > 2 else ",".join(map(str, r)) for r in runs)
