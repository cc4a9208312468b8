"""Sites, weights and reasons that are alike, told once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from quantpass.basics.reject import Reject
from quantpass.graph.records import Site

_INDEX = re.compile(r"(?<![^.])\d+(?![^.])|(?<=_)\d+$")
"""A number that is a whole part of a module path, or that ends a node's name."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Folded(Generic[_T]):
    """Things that are alike but for the numbers in their names.

    Attributes:
        name: ``model.layers.{0..41}.self_attn.q_proj``.
        members: the things, in their order.
    """

    name: str
    members: tuple[_T, ...]

    @property
    def times(self) -> str:
        """``" x42"``; nothing for one thing."""
        return f" x{len(self.members)}" if len(self.members) > 1 else ""


def fold(items: Iterable[_T], name: Callable[[_T], str], alike: Callable[[_T], Hashable]) -> list[Folded[_T]]:
    """``items`` with those of one kind in one, in the order of their first.

    Args:
        items: what to fold.
        name: of an item; numbers in it may differ.
        alike: what has to be equal.
    """
    groups: dict[Hashable, list[_T]] = {}
    for item in items:
        groups.setdefault((_INDEX.sub("#", name(item)), alike(item)), []).append(item)
    return [piece for group in groups.values() for piece in _pieces(group, name)]


def _pieces(group: list[_T], name: Callable[[_T], str]) -> Iterator[Folded[_T]]:
    """One piece where the numbers are all combinations of those at each place; else one for each first number."""
    numbers = [tuple(map(int, _INDEX.findall(name(item)))) for item in group]
    places = [list(dict.fromkeys(place)) for place in zip(*numbers, strict=True)]
    combinations = 1
    for place in places:
        combinations *= len(place)
    if combinations == len({*numbers}):
        texts = iter([_numbers(place) for place in places])
        yield Folded(_INDEX.sub(lambda _: next(texts), name(group[0])), tuple(group))
        return
    varied = next(i for i, place in enumerate(places) if len(place) > 1)
    for first in places[varied]:
        yield from _pieces([g for g, n in zip(group, numbers, strict=True) if n[varied] == first], name)


def _numbers(values: Sequence[int]) -> str:
    """``{0..41}``, ``{0,2,5..7}``, ``3``."""
    if len(values) == 1:
        return str(values[0])
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return "{" + ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}..{r[-1]}" for r in runs) + "}"


def siblings(pieces: Iterable[Folded[_T]], alike: Callable[[_T], Hashable]) -> list[Folded[_T]]:
    """``pieces`` with those of one module and one kind in one: ``self_attn.{q_proj,k_proj}``."""
    groups: dict[Hashable, list[Folded[_T]]] = {}
    for piece in pieces:
        parent, dot, _ = piece.name.rpartition(".")
        groups.setdefault((parent, alike(piece.members[0])) if dot else object(), []).append(piece)
    return [_together(group) for group in groups.values()]


def _together(group: Sequence[Folded[_T]]) -> Folded[_T]:
    parent, _, last = group[0].name.rpartition(".")
    lasts = list(dict.fromkeys(piece.name.rpartition(".")[2] for piece in group))
    if len(lasts) > 1:
        last = "{" + ",".join(lasts) + "}"
    return Folded(f"{parent}.{last}" if parent else last, tuple(m for piece in group for m in piece.members))


@dataclass(frozen=True, slots=True)
class Cause:
    """Why some sites are not fused.

    Attributes:
        key: that of its sites, see :func:`cause_key`.
        rejects: the reasons, each once.
        targets: the chips that they hold on.
        sites: the names of the sites.
        count: how many sites there are, on the chip that has most of them.
    """

    key: Hashable
    rejects: tuple[Reject, ...]
    targets: tuple[str, ...]
    sites: tuple[str, ...]
    count: int

    @property
    def hints(self) -> tuple[str, ...]:
        """What to do about it, each hint once."""
        return tuple(dict.fromkeys(r.hint for r in self.rejects if r.hint))


def causes(sites: Iterable[Site]) -> list[Cause]:
    """What stands against the sites that are not fused: that of most sites first."""
    found: dict[Hashable, tuple[list[Site], tuple[Reject, ...]]] = {}
    for site in sites:
        if not site.fused:
            rejects = tuple({_nameless(r): r for r in reversed(site.rejects)}.values())[::-1]
            found.setdefault(cause_key(site), ([], rejects))[0].append(site)
    return sorted((_cause(key, of, rejects) for key, (of, rejects) in found.items()), key=lambda c: -c.count)


def _cause(key: Hashable, sites: Sequence[Site], rejects: tuple[Reject, ...]) -> Cause:
    by_target = Counter(s.target for s in sites)
    return Cause(key, rejects, tuple(by_target), tuple(dict.fromkeys(s.name for s in sites)), max(by_target.values()))


def cause_key(site: Site) -> Hashable:
    """Equal for sites that are not fused for the same reasons."""
    return tuple(dict.fromkeys(_nameless(r) for r in site.rejects))


def _nameless(reject: Reject) -> tuple[str, ...]:
    """A reason without the names of nodes that it speaks of."""
    return (reject.rule, re.sub(r" \([a-z]\w*\)", "", reject.fact), reject.want, reject.hint)


def names(sites: Sequence[str], at_most: int = 3) -> str:
    """Site names folded into a few words: ``model.layers.{0..1}.mlp.up_proj x2, lm_head and 3 more``."""
    pieces = siblings(fold(sites, str, lambda _: None), lambda _: None)
    text = ", ".join(f"{p.name}{p.times}" for p in pieces[:at_most])
    rest = sum(len(p.members) for p in pieces[at_most:])
    return f"{text} and {rest} more" if rest else text
