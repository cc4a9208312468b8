"""Sizes that may be symbolic, compared without adding a guard: a data-dependent size has no value to guard on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def statically_true(condition: Any) -> bool | None:
    """True or False where that is known without guarding on a symbolic size, None where it depends on it."""
    if isinstance(condition, bool):
        return condition
    import torch
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if statically_known_true(condition):
        return True
    if statically_known_true(torch.sym_not(condition)):
        return False
    return None


def same_size(a: Any, b: Any) -> bool:
    """True where two sizes are known to be equal."""
    return a is b or statically_true(a == b) is True


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """True where two shapes are known to be equal."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def is_one(size: Any) -> bool:
    """True where a size is 1 as a number; a symbolic one is taken to be larger."""
    return isinstance(size, int) and size == 1


def has_no_elements(shape: Sequence[Any]) -> bool:
    """True where a size is known to be 0."""
    return any(isinstance(s, int) and s == 0 for s in shape)


def elements(shape: Sequence[Any]) -> Any:
    """The product of sizes."""
    product: Any = 1
    for size in shape:
        product = product * size
    return product


def broadcast_shape(*shapes: Sequence[Any]) -> tuple[Any, ...]:
    """``torch.broadcast_shapes`` that asks symbolic sizes nothing: of two that may differ, a number counts.

    Raises:
        ValueError: two sizes are numbers, not equal, and neither is 1.
    """
    rank = max(map(len, shapes), default=0)
    result: list[Any] = [1] * rank
    for shape in shapes:
        for d, size in enumerate(shape, rank - len(shape)):
            have = result[d]
            if is_one(size) or same_size(have, size):
                continue
            if isinstance(have, int) and isinstance(size, int) and have != 1:
                raise ValueError(f"shapes {', '.join(str(tuple(s)) for s in shapes)} do not broadcast")
            if is_one(have) or isinstance(size, int):
                result[d] = size
    return tuple(result)
