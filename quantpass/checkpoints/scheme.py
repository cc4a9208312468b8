"""How a module is quantized, whatever tool did it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from quantpass.basics.reject import Reject
from quantpass.checkpoints.folder import Module


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """``real = (codes - zero_point) * scale``.

    Attributes:
        bits: how many a code has.
        group: how many rows of K share a scale; 0 where all do.
        per_tensor: there is one scale for all.
        zero_point: there are zero points that are not the middle of the codes.
        ordered: the rows of a group do not lie together (quantized in order of activation size).
    """

    bits: int
    group: int = 0
    per_tensor: bool = False
    zero_point: bool = False
    ordered: bool = False

    def __str__(self) -> str:
        along = f"groups of {self.group}" if self.group else "per tensor" if self.per_tensor else "per channel"
        more = [", zero points" * self.zero_point, ", in order of activation size" * self.ordered]
        return f"int{self.bits} weight, {along}{''.join(more)}"


@dataclass(frozen=True, slots=True)
class ActivationScheme:
    """How x is quantized.

    Attributes:
        bits: how many a code has.
        dynamic: by its own values, when the model runs; with one scale that calibration has found otherwise.
        per: ``"token"``, ``"tensor"`` or ``"group"``.
        zero_point: it has one.
        codes: the tool's forward multiplies codes; it dequantizes x before the matmul otherwise.
        opaque: an operator of the tool's own quantizes x: the vendor's do not stand in for it.
    """

    bits: int = 8
    dynamic: bool = True
    per: str = "token"
    zero_point: bool = False
    codes: bool = False
    opaque: bool = False

    def __str__(self) -> str:
        kind = "dynamic" if self.dynamic else "static"
        return f"int{self.bits} activation, {kind} per {self.per}{', zero point' * self.zero_point}"


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized linear, or a stack of them.

    Attributes:
        k: rows of the whole weight: the reduced dimension.
        n: its columns.
        weight: how it is quantized; None where that is no integer scheme.
        activation: how x is; None where it stays a float.
        bias: there is one.
        packed_k: how many rows of K one stored element holds: no shard can cut it.
        packed_n: likewise, of columns.
        experts: how many matrices one tensor holds; 0 for a plain one.
        whole: one operator multiplies, scales and adds the bias: there is no matmul without these.
        words: the scheme, where ``weight`` can't say it.
        rejects: what no fused operator takes, whatever the chip.
        notes: what else is to be said.
    """

    k: int
    n: int
    weight: WeightScheme | None
    activation: ActivationScheme | None = None
    bias: bool = False
    packed_k: int = 1
    packed_n: int = 1
    experts: int = 0
    whole: bool = False
    words: str = ""
    rejects: tuple[Reject, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def scheme(self) -> str:
        """In words."""
        if self.weight is None:
            return self.words
        return f"{self.weight}; {self.activation}" if self.activation else f"{self.weight}; float activation"


class Format(Protocol):
    """A tool's way to write quantized modules.

    Attributes:
        title: the tool and its scheme, in words.
        notes: what is to be said of the whole checkpoint.
    """

    title: str
    notes: tuple[str, ...]

    def read(self, module: Module) -> Quantized | None:
        """How ``module`` is quantized; None where it is not.

        Raises:
            CheckpointError: its tensors contradict the configuration, or each other.
        """
        ...
