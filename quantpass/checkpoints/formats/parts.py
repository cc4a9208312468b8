"""What readers of formats share: tensors of a module that have to be there, small ones that are looked at, names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from quantpass.basics.reasons import refuse
from quantpass.checkpoints.folder import Module
from quantpass.checkpoints.headers import LARGEST_READ, CheckpointError, StoredTensor
from quantpass.checkpoints.scheme import Quantized

_LONGEST = 4096
_REPEATS_A_CHOICE = re.compile(r"\((?:[^()\\]|\\.)*[+*}|](?:[^()\\]|\\.)*\)[+*{]")
"""What makes an expression take exponential time: nobody needs it to name modules."""


def tensor(module: Module, name: str, ranks: tuple[int, ...], dtypes: tuple[str, ...] = ()) -> StoredTensor:
    """A tensor that has to be there.

    Raises:
        CheckpointError: it is not, or has another rank or dtype.
    """
    found = module.tensors.get(name)
    if found is None:
        raise CheckpointError(f"{module.name} has no {name}; it has {', '.join(module.tensors)}")
    if len(found.shape) not in ranks or (dtypes and found.dtype not in dtypes):
        raise CheckpointError(
            f"{module.name}.{name} is {found.dtype} of shape {found.shape}; wanted "
            f"{' or '.join(dtypes) or 'any dtype'} of rank {' or '.join(map(str, ranks))}"
        )
    return found


def all_zero(found: StoredTensor | None) -> bool:
    """True where there is no such tensor, or it holds nothing but zeros."""
    if found is None:
        return True
    if found.nbytes > LARGEST_READ:
        return False
    data = found.read()
    if found.dtype.startswith(("float", "bfloat")):
        data = data.replace(b"\x80", b"\x00")  # of a negative zero
    return data.count(0) == len(data)


def holds_only(found: StoredTensor, value: int, bits: int) -> bool:
    """True where every row of packed codes, a stream of ``bits`` each, holds nothing but ``value``."""
    if found.nbytes > LARGEST_READ or not found.nbytes:
        return False
    row = found.nbytes // found.shape[0]
    stream = sum(value << (bits * i) for i in range(32))  # repeats after 32 codes, whatever their bits
    return found.read() == (stream.to_bytes(4 * bits, "little") * (row // (4 * bits) + 1))[:row] * found.shape[0]


def has_zero_points(zeros: StoredTensor | None, middle: int, bits: int) -> bool:
    """True where packed zero points reach the operator.

    Codes of 3 bits less a zero point of 3 bits are int4, so that nothing is left of it.
    """
    return zeros is not None and bits > 3 and not holds_only(zeros, middle, bits)


def integers(found: StoredTensor) -> tuple[int, ...]:
    """The numbers of a small tensor of integers."""
    size = {"int8": 1, "uint8": 1, "int16": 2, "int32": 4, "int64": 8}.get(found.dtype)
    if size is None:
        raise CheckpointError(f"{found.path}: a tensor of {found.dtype} stands where integers are wanted")
    data, signed = found.read(), found.dtype != "uint8"
    return tuple(int.from_bytes(data[i : i + size], "little", signed=signed) for i in range(0, len(data), size))


def positive(value: Any, what: str, accepted: str, allowed: Iterable[int] = ()) -> int:
    """``value`` where it is a positive integer, or among ``allowed``.

    Raises:
        CheckpointError: it is not.
    """
    good = isinstance(value, int) and not isinstance(value, bool) and (value > 0 or value in allowed)
    if not good:
        raise CheckpointError(f"{what} is {value!r}; accepted: {accepted}")
    return int(value)


def groups_of(module: Module, k: int, stored: int, group: int | None = None) -> int:
    """How many rows of K share a scale where ``stored`` scales lie along K; 0 where all do.

    Raises:
        CheckpointError: ``group``, which the configuration names, gives another number.
    """
    if stored == 1:
        return 0
    if stored < 1 or k < 1:
        raise CheckpointError(f"{module.name}: {stored} scales along K, and K is {k}")
    size = group if group is not None and group > 0 else -(-k // stored)
    if -(-k // size) != stored:
        raise CheckpointError(f"{module.name}: {stored} scales along K, and K is {k}, in groups of {size}")
    return size


def no_integers(k: int, n: int, words: str, fact: str, **more: Any) -> Quantized:
    """A module whose weight no fused operator takes."""
    return Quantized(k, n, None, words=words, rejects=(refuse("checkpoint.scheme", fact),), **more)


def matches(name: str, listed: Iterable[str]) -> bool:
    """True where a list of modules has ``name``: by its name, by one of its parts, or as ``re:`` and an expression."""
    parts = name.split(".")
    for entry in listed:
        if entry.startswith("re:"):
            if matched(entry, name):
                return True
        elif entry == name or entry in parts or name.startswith(f"{entry}."):
            return True
    return False


def matched(entry: str, name: str) -> bool:
    """True where the expression behind ``re:`` matches the beginning of ``name``.

    Raises:
        CheckpointError: it is no regular expression, or one that may take forever.
    """
    expression = entry.removeprefix("re:")
    if len(expression) > _LONGEST or _REPEATS_A_CHOICE.search(expression):
        raise CheckpointError(
            f"{entry[:80]!r} repeats a group that repeats or chooses: it may never end. Name the modules"
        )
    try:
        return re.match(expression, name) is not None
    except re.error as error:
        raise CheckpointError(f"{entry!r} is no regular expression: {error}") from error


def texts(config: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    """The first of these settings that is a list of texts; empty where there is none."""
    for name in names:
        found = config.get(name)
        if isinstance(found, list):
            if not all(isinstance(f, str) for f in found):
                raise CheckpointError(f"{name} is {found!r}; a list of names is wanted")
            return tuple(found)
    return ()
