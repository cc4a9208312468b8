"""Whether a plain module gives a tool's numbers: both are run on the same inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantpass.adoption.tables import CannotAdopt, Found

_UNITS = 4
"""Units in the last place of the largest output that a sum in another order may be off by."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What came of a comparison.

    Attributes:
        against: ``"output"`` (the tool's own forward), ``"weight"`` (its own dequantization), or ``""`` for nothing.
        exact: every number is the same.
        error: the largest difference in units of the largest magnitude.
        note: why there is no better proof; empty where it is the tool's output.
    """

    against: str
    exact: bool
    error: float
    note: str = ""

    def __str__(self) -> str:
        if not self.against:
            return f"not proven against the tool{f': {self.note}' if self.note else ''}"
        what = {"output": "the tool's output", "weight": "the tool's weight"}[self.against]
        how = f"equal to {what}" if self.exact else f"within {self.error:.1e} of {what}"
        return f"{how} ({self.note})" if self.note else how


def unchecked() -> Proof:
    """What stands where nothing was compared."""
    return Proof("", False, 0.0, "check=False")


def prove(found: Found, inputs: list[torch.Tensor] | None = None) -> Proof:
    """Compare a plain module with the tool's on random inputs, or on those given.

    Raises:
        CannotAdopt: the numbers differ, or neither the tool's forward nor its dequantization runs here.
    """
    if inputs is None:
        inputs = _drawn(found)
    with torch.no_grad():
        try:
            theirs = [found.own(x.clone()) for x in inputs]
        except Exception as error:  # the tool's code: whatever it raises, it can't be compared with
            return _weights_compared(found, f"its own forward fails here: {type(error).__name__}: {_line(error)}")
        try:
            ours = [found.plain.forward(x) for x in inputs]  # not through its hooks: this may be one
        except Exception as error:  # what the table says fits, and still can't be multiplied
            raise CannotAdopt(f"a plain module of its tensors fails: {type(error).__name__}: {_line(error)}") from error
    proof = _compared(ours, theirs, "output", found.caveat)
    if proof is None:
        raise CannotAdopt("a plain module of its tensors gives other numbers than its own forward")
    return proof


def _drawn(found: Found) -> list[torch.Tensor]:
    """Inputs of ranks 3 and 2, one with some large values."""
    g = torch.Generator().manual_seed(0)
    k = found.plain.in_features
    drawn = [torch.randn(2, 3, k, generator=g), torch.randn(5, k, generator=g) * torch.logspace(-2, 1, 5)[:, None]]
    return [x.to(_device(found), found.dtype) for x in drawn]


def _device(found: Found) -> torch.device:
    return next(t.device for t in (*found.plain.parameters(), *found.plain.buffers()))


def _weights_compared(found: Found, why: str) -> Proof:
    if found.reference is None:
        raise CannotAdopt(f"{why}; check=False exchanges it unproven")
    x = torch.zeros(1, found.plain.in_features, dtype=found.dtype, device=_device(found))
    with torch.no_grad():
        proof = _compared([found.plain.dequantized(x)], [found.reference()], "weight", why)
    if proof is None:
        raise CannotAdopt(f"{why}, and the weight is not what the tool's own dequantization gives")
    return proof


def _compared(ours: list[torch.Tensor], theirs: list[torch.Tensor], against: str, note: str) -> Proof | None:
    """None where they differ by more than sums in another order do."""
    worst, exact = 0.0, True
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return None
        if torch.equal(a, b):
            continue
        if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
            return None
        finite = torch.isfinite(b)
        largest = b[finite].double().abs().amax() if finite.any() else torch.tensor(0.0)
        error = float((a[finite].double() - b[finite].double()).abs().amax() / largest.clamp(min=1e-300))
        if not error <= _UNITS * torch.finfo(b.dtype).eps:
            return None
        worst, exact = max(worst, error), False
    return Proof(against, exact, worst, note)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else "no message"
