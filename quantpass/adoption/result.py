"""What :func:`quantpass.adopt` returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType

from quantpass.adoption.proof import Proof


@dataclass(frozen=True, slots=True)
class Adopted:
    """A module that was exchanged.

    Attributes:
        names: its paths in the model; several where it is shared.
        tool: the tool's name.
        scheme: weight and activation, in words.
        proof: how its numbers were compared with the tool's.
    """

    names: tuple[str, ...]
    tool: str
    scheme: str
    proof: Proof

    @property
    def name(self) -> str:
        """The first of its paths."""
        return self.names[0]


@dataclass(frozen=True, slots=True)
class Left:
    """A module that holds a quantized weight and stays as it is.

    Attributes:
        name: its path in the model; empty for the model itself.
        kind: its class.
        tool: the tool whose table knows it, or the package that its class comes from.
        why: what keeps it.
    """

    name: str
    kind: str
    tool: str
    why: str


@dataclass(eq=False, repr=False)
class Adoption:
    """What :func:`quantpass.adopt` did to a model. As a context manager it undoes that at the end.

    Attributes:
        exchanged: the modules that were exchanged, in the model's order.
        left: those that hold a quantized weight and were not.
    """

    exchanged: tuple[Adopted, ...] = ()
    left: tuple[Left, ...] = ()
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def release(self) -> None:
        """Put the tools' modules back. A place that holds another module by now stays; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Adoption:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<Adoption: {_modules(len(self.exchanged))} exchanged, {len(self.left)} left>"

    def __str__(self) -> str:
        head = f"{_modules(len(self.exchanged))} exchanged, {len(self.left)} left"
        exchanged = [(f"{a.tool}, {a.scheme}", str(a.proof), a.name) for a in self.exchanged]
        left = [(f"{e.kind} of {e.tool}", e.why, e.name or "the model itself") for e in self.left]
        return "\n".join([head, *_folded("exchanged", exchanged), *_folded("left", left)])


def _modules(n: int) -> str:
    return f"{n} module{'s' * (n != 1)}"


def _folded(head: str, rows: list[tuple[str, str, str]]) -> Iterator[str]:
    """Two lines for each kind: how many there are and where the first one is; what is said of them."""
    counts = Counter((what, said) for what, said, _ in rows)
    first = {(what, said): name for what, said, name in reversed(rows)}
    for (what, said), n in counts.items():
        others = f" and {n - 1} more" if n > 1 else ""
        yield f"  {head}: {first[what, said]}{others} ({what})"
        yield f"      {said}"
