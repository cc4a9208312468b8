"""The one carrier of "no"."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reject:
    """Why something is not fused: a value with a reason, never a bare ``False``.

    Attributes:
        rule: identifier of the rule that was broken, e.g. ``"310p.qmm.bias.dtype"``.
        fact: what was found.
        want: what the rule accepts.
        hint: what the user can do about it (the nearest legal edit where one exists).
        doc: the document that says so.
    """

    rule: str
    fact: str
    want: str
    hint: str = ""
    doc: str = ""

    def __str__(self) -> str:
        text = f"{self.rule}: {self.fact}; wanted {self.want}"
        return f"{text}. {self.hint}" if self.hint else text
