"""What a legality rule can demand of a call. Each requirement can be checked, put into words and, often, met by an edit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from quantpass.basics.symbolic import broadcast_shape, statically_true
from quantpass.basics.tensor_spec import TensorSpec
from quantpass.basics.torch_types import I8, I32
from quantpass.chips.calls import INT4_PER_INT32, OpCall

Dtype = str | None
"""A dtype by its name."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One way in which a call breaks a requirement.

    ``undecided``: it depends on a symbolic size; ``fact`` is then the assumption that makes the call legal.
    ``fix``: arguments that would meet the requirement, where there is an obvious edit. ``hint`` stands in for the
    rule's own where it is more to the point.
    """

    fact: str
    want: str
    fix: dict[str, Any] | None = None
    part: str = ""
    undecided: bool = False
    hint: str = ""


class Requirement(Protocol):
    """A demand on a call."""

    @property
    def want(self) -> str:
        """The demand in words."""
        ...

    def check(self, call: OpCall) -> list[Finding]:
        """How the call breaks it; empty where it does not, or where it says nothing of this call."""
        ...


def name_of(dtype: Dtype) -> str:
    return "None" if dtype is None else str(dtype)


def _holds(condition: Any) -> bool | None:
    return statically_true(condition)


def _decide(condition: Any, fact: str, want: str, assumption: str, fix: dict[str, Any] | None = None) -> list[Finding]:
    holds = _holds(condition)
    if holds is True:
        return []
    if holds is None:
        return [Finding(assumption, want, undecided=True)]
    return [Finding(fact, want, fix)]


@dataclass(frozen=True, slots=True)
class Rank:
    """A tensor's number of dimensions lies in ``[low, high]``."""

    arg: str
    low: int
    high: int

    @property
    def want(self) -> str:
        between = f"{self.low}" if self.low == self.high else f"{self.low} to {self.high}"
        return f"{self.arg} of rank {between}"

    def check(self, call: OpCall) -> list[Finding]:
        spec = call.tensor(self.arg)
        if spec is None or self.low <= spec.rank <= self.high:
            return []
        fix = None
        if self.high == 2 and spec.rank > 2 and all(isinstance(s, int) for s in spec.shape):
            rows = 1
            for s in spec.shape[:-1]:
                rows *= s
            fix = {self.arg: TensorSpec(spec.dtype_name, (rows, spec.shape[-1]), spec.format)}
        return [Finding(f"{self.arg} has rank {spec.rank}, shape {spec.shape}", self.want, fix)]


@dataclass(frozen=True, slots=True)
class NotEmpty:
    """No tensor among ``args`` is without elements."""

    args: tuple[str, ...]

    @property
    def want(self) -> str:
        return f"{', '.join(self.args)} with at least one element"

    def check(self, call: OpCall) -> list[Finding]:
        found = []
        for arg in self.args:
            spec = call.tensor(arg)
            if spec is not None and any(isinstance(s, int) and s == 0 for s in spec.shape):
                found.append(Finding(f"{arg} has shape {spec.shape}", f"{arg} with at least one element", part=arg))
        return found


@dataclass(frozen=True, slots=True)
class Present:
    """An argument must be given."""

    arg: str

    @property
    def want(self) -> str:
        return f"{self.arg} given"

    def check(self, call: OpCall) -> list[Finding]:
        return [Finding(f"{self.arg} is missing", self.want)] if call.args.get(self.arg) is None else []


@dataclass(frozen=True, slots=True)
class Absent:
    """An argument must be left out."""

    arg: str

    @property
    def want(self) -> str:
        return f"no {self.arg}"

    def check(self, call: OpCall) -> list[Finding]:
        value = call.value(self.arg)
        return [] if value is None else [Finding(f"{self.arg} is {value}", self.want, {self.arg: None})]


@dataclass(frozen=True, slots=True)
class Size:
    """A named size lies in ``[low, high]`` and is a multiple of ``multiple``."""

    symbol: str
    low: int = 1
    high: int | None = None
    multiple: int = 1

    @property
    def want(self) -> str:
        parts = []
        if self.high is not None:
            parts.append(f"{self.low} <= {self.symbol} <= {self.high}")
        elif self.low > 1:
            parts.append(f"{self.symbol} >= {self.low}")
        if self.multiple > 1:
            parts.append(f"{self.symbol} a multiple of {self.multiple}")
        return " and ".join(parts) or f"{self.symbol} >= {self.low}"

    def check(self, call: OpCall) -> list[Finding]:
        size = call.sizes.get(self.symbol)
        if size is None:
            return []
        fact = f"{self.symbol} is {size}"
        found = _decide(size >= self.low, fact, self.want, f"{self.symbol} >= {self.low}")
        if self.high is not None:
            found += _decide(size <= self.high, fact, self.want, f"{self.symbol} <= {self.high}")
        if self.multiple > 1:
            found += _decide(size % self.multiple == 0, fact, self.want, f"{self.symbol} % {self.multiple} == 0")
        return found


@dataclass(frozen=True, slots=True)
class EqualSizes:
    """Two named sizes are equal."""

    a: str
    b: str
    words: str

    @property
    def want(self) -> str:
        return self.words

    def check(self, call: OpCall) -> list[Finding]:
        a, b = call.sizes.get(self.a), call.sizes.get(self.b)
        if a is None or b is None:
            return []
        return _decide(a == b, f"{self.a} is {a} and {self.b} is {b}", self.want, f"{self.a} == {self.b}")


@dataclass(frozen=True, slots=True)
class Shape:
    """A tensor has one of the given shapes; a string stands for a named size."""

    arg: str
    forms: tuple[tuple[str | int, ...], ...]

    @property
    def want(self) -> str:
        texts = ["(" + ", ".join(map(str, f)) + ("," if len(f) == 1 else "") + ")" for f in self.forms]
        return f"{self.arg} of shape {' or '.join(texts)}"

    def check(self, call: OpCall) -> list[Finding]:
        spec = call.tensor(self.arg)
        if spec is None:
            return []
        undecided = None
        first: tuple[Any, ...] | None = None
        for form in self.forms:
            wanted = tuple(call.sizes.get(s) if isinstance(s, str) else s for s in form)
            if any(w is None for w in wanted):
                return []
            first = first or wanted
            if len(wanted) != spec.rank:
                continue
            verdicts = [_holds(a == b) for a, b in zip(spec.shape, wanted, strict=True)]
            if all(v is True for v in verdicts):
                return []
            if all(v is not False for v in verdicts):
                undecided = f"{self.arg}'s shape {spec.shape} equals {wanted}"
        if undecided:
            return [Finding(undecided, self.want, undecided=True)]
        fix = {self.arg: TensorSpec(spec.dtype_name, first, spec.format)} if first else None
        return [Finding(f"{self.arg} has shape {spec.shape}", self.want, fix)]


@dataclass(frozen=True, slots=True)
class SameShape:
    """Two tensors, where both are given, have the same shape."""

    a: str
    b: str

    @property
    def want(self) -> str:
        return f"{self.a} and {self.b} of the same shape"

    def check(self, call: OpCall) -> list[Finding]:
        a, b = call.tensor(self.a), call.tensor(self.b)
        if a is None or b is None:
            return []
        fact = f"{self.a} has shape {a.shape} and {self.b} has shape {b.shape}"
        if a.rank != b.rank:
            return [Finding(fact, self.want, {self.a: TensorSpec(a.dtype_name, b.shape, a.format)})]
        verdicts = [_holds(x == y) for x, y in zip(a.shape, b.shape, strict=True)]
        if all(v is True for v in verdicts):
            return []
        if any(v is False for v in verdicts):
            return [Finding(fact, self.want, {self.a: TensorSpec(a.dtype_name, b.shape, a.format)})]
        return [Finding(f"{self.a} and {self.b} have the same shape", self.want, undecided=True)]


@dataclass(frozen=True, slots=True)
class SameDtype:
    """Two tensors, where both are given, have the same dtype."""

    a: str
    b: str

    @property
    def want(self) -> str:
        return f"{self.a} of the dtype of {self.b}"

    def check(self, call: OpCall) -> list[Finding]:
        a, b = call.tensor(self.a), call.tensor(self.b)
        if a is None or b is None or a.dtype_name == b.dtype_name:
            return []
        fact = f"{self.a} is {a.dtype_name} and {self.b} is {b.dtype_name}"
        return [Finding(fact, self.want, {self.a: with_dtype(self.a, a, b.dtype_name)})]


@dataclass(frozen=True, slots=True)
class DtypeIn:
    """A tensor, where it is given, has one of the given dtypes."""

    arg: str
    dtypes: tuple[str, ...]

    @property
    def want(self) -> str:
        return f"{self.arg} {' or '.join(self.dtypes)}"

    def check(self, call: OpCall) -> list[Finding]:
        spec = call.tensor(self.arg)
        if spec is None or spec.dtype_name in self.dtypes:
            return []
        return [
            Finding(
                f"{self.arg} is {spec.dtype_name}",
                self.want,
                {self.arg: with_dtype(self.arg, spec, self.dtypes[0])},
            )
        ]


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor's format and whether it is a transposed view."""

    arg: str
    format: str | None = None
    transposed: bool | None = None

    @property
    def want(self) -> str:
        parts = []
        if self.format:
            parts.append("in FRACTAL_NZ" if self.format == "NZ" else "in ND")
        if self.transposed is not None:
            parts.append("a transposed view" if self.transposed else "not transposed")
        return f"{self.arg} {' and '.join(parts)}"

    def check(self, call: OpCall) -> list[Finding]:
        spec = call.tensor(self.arg)
        if spec is None or spec.rank < 2:
            return []
        format_ok = self.format is None or spec.format == self.format
        # A matrix with a dimension of 1 is its own transpose as far as strides can tell.
        either = any(isinstance(s, int) and s == 1 for s in spec.shape[-2:])
        turned_ok = self.transposed is None or spec.transposed == self.transposed or either
        if format_ok and turned_ok:
            return []
        turned = spec.transposed if self.transposed is None else self.transposed
        fix: dict[str, Any] | None = {
            self.arg: TensorSpec(spec.dtype_name, spec.shape, self.format or spec.format, turned)
        }
        if spec.dtype_name == I32 and turned != spec.transposed:
            fix = None  # the packed shape changes with the axis that is packed
        state = f"in {'FRACTAL_NZ' if spec.format == 'NZ' else 'ND'}, {'' if spec.transposed else 'not '}transposed"
        return [Finding(f"{self.arg} is {state}", self.want, fix)]


@dataclass(frozen=True, slots=True)
class Value:
    """A number among the arguments passes a test."""

    arg: str
    test: Callable[[Any, OpCall], Any]
    words: str
    nearest: Callable[[Any, OpCall], Any] | None = None
    default: Any = None

    @property
    def want(self) -> str:
        return self.words

    def check(self, call: OpCall) -> list[Finding]:
        value = call.value(self.arg)
        if value is None:
            value = self.default
        if value is None:
            return []
        holds = self.test(value, call)
        fix = None
        if self.nearest is not None and holds is False:
            near = self.nearest(value, call)
            fix = None if near is None else {self.arg: near}
        return _decide(holds, f"{self.arg} is {value}", self.want, self.want, fix)


@dataclass(frozen=True, slots=True)
class Broadcasts:
    """The leading (batch) dimensions of two tensors broadcast."""

    a: str
    b: str

    @property
    def want(self) -> str:
        return f"batch dimensions of {self.a} and {self.b} that broadcast"

    def check(self, call: OpCall) -> list[Finding]:
        a, b = call.tensor(self.a), call.tensor(self.b)
        if a is None or b is None or a.rank < 2 or b.rank < 2:
            return []
        for x, y in zip(reversed(a.shape[:-2]), reversed(b.shape[:-2]), strict=False):
            if _holds(x == y) is False and _holds(x == 1) is False and _holds(y == 1) is False:
                fact = f"{self.a} has batch {a.shape[:-2]} and {self.b} has batch {b.shape[:-2]}"
                return [Finding(fact, self.want)]
        return []


@dataclass(frozen=True, slots=True)
class QmmBias:
    """Bias of a quantized matmul: ``(n,)``, or ``(batch, 1, n)`` where the output has three dimensions."""

    @property
    def want(self) -> str:
        return "bias of shape (n,), or (batch, 1, n) for an output of rank 3"

    def check(self, call: OpCall) -> list[Finding]:
        bias, n = call.tensor("bias"), call.sizes.get("n")
        x1, x2 = call.tensor("x1"), call.tensor("x2")
        if bias is None or n is None or x1 is None or x2 is None:
            return []
        fact = f"bias has shape {bias.shape}"
        if bias.rank == 1:
            fix = {"bias": TensorSpec(bias.dtype_name, (n,))}
            return _decide(bias.shape[0] == n, fact, self.want, f"bias's size {bias.shape[0]} equals n", fix)
        batch = _batch(x1, x2)
        if bias.rank == 3 and batch is not None and len(batch) == 1:
            wanted = (batch[0], 1, n)
            verdicts = [_holds(a == b) for a, b in zip(bias.shape, wanted, strict=True)]
            if all(v is True for v in verdicts):
                return []
            if all(v is not False for v in verdicts):
                return [Finding(f"bias's shape {bias.shape} equals {wanted}", self.want, undecided=True)]
        return [Finding(fact, self.want, {"bias": TensorSpec(bias.dtype_name, (n,))})]


def _batch(a: TensorSpec, b: TensorSpec) -> tuple[Any, ...] | None:
    try:
        return broadcast_shape(a.shape[:-2], b.shape[:-2])
    except ValueError:
        return None


def with_dtype(arg: str, spec: TensorSpec, dtype: str) -> TensorSpec:
    """``spec`` in another dtype; a matrix operand that goes between int8 and packed int4 changes its stored last axis."""
    shape = list(spec.shape)
    if arg in ("x1", "x2", "weight") and {spec.dtype_name, dtype} == {I8, I32} and spec.rank >= 2:
        axis = -2 if spec.transposed else -1
        unpacks = dtype == I8
        shape[axis] = shape[axis] * INT4_PER_INT32 if unpacks else shape[axis] // INT4_PER_INT32
    return TensorSpec(dtype, tuple(shape), spec.format, spec.transposed)
