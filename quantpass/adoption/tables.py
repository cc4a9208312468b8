"""What a tool's table says of a module, and what came of comparing the two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantpass.adoption.plain import PlainLinear

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)

Shape = tuple[int, ...]


class CannotAdopt(Exception):
    """A module is this tool's, but not such that a plain one gives the same numbers; says why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of a tool's module.

    Attributes:
        dtypes: the accepted ones.
        shapes: the accepted ones.
        optional: whether it may be missing or None.
    """

    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[Shape, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """A module that a tool's table fits.

    Attributes:
        plain: what may stand in for it.
        dtype: of the inputs that it is made for.
        own: the tool's own forward, on a copy of the module that shares its tensors: it may change itself. None where
            the tool can't run here.
        reference: the tool's own dequantized weight ``(out_features, in_features)``, where its forward can't run.
        caveat: what is said to be different from the tool's numbers; empty where nothing is.
        name: its path in the model.
    """

    plain: PlainLinear
    dtype: torch.dtype
    own: Callable[[torch.Tensor], torch.Tensor]
    reference: Callable[[], torch.Tensor] | None = None
    caveat: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool's table.

    Attributes:
        name: what users call it.
        read: compares a module with the table: None for one that is not this tool's.
        around: called when modules were exchanged, with the model and those that were left; returns what undoes it.
    """

    name: str
    read: Callable[[nn.Module, Allowances], Found | None]
    around: Callable[[nn.Module], Callable[[], None] | None] | None = None


@dataclass(frozen=True, slots=True)
class Allowances:
    """What a user allows to differ from the tool."""

    drop_outliers: bool = False


def check(module: nn.Module, rows: Mapping[str, Row]) -> None:
    """Compare a module's tensors with a table.

    Raises:
        CannotAdopt: one is missing, or has another dtype or shape; or holds no data.
    """
    for name, row in rows.items():
        tensor = getattr(module, name, None)
        if tensor is None:
            if row.optional:
                continue
            raise CannotAdopt(f"it has no {name}")
        if not isinstance(tensor, torch.Tensor):
            raise CannotAdopt(f"its {name} is a {type(tensor).__name__}, not a tensor")
        if tensor.is_meta:
            raise CannotAdopt(f"its {name} is on the meta device and holds no data: load the weights first")
        if tensor.dtype not in row.dtypes:
            raise CannotAdopt(f"its {name} is {_name(tensor.dtype)}; read: {', '.join(map(_name, row.dtypes))}")
        if tuple(tensor.shape) not in row.shapes:
            shapes = " or ".join(map(str, dict.fromkeys(row.shapes)))
            raise CannotAdopt(f"its {name} has the shape {tuple(tensor.shape)}; its configuration asks for {shapes}")


def bias_row(n: int) -> Row:
    """A bias of ``n`` elements, or none."""
    return Row(FLOATS, ((n,),), optional=True)


def nothing_else(module: nn.Module, *, children: tuple[str, ...] = ()) -> None:
    """Raise ``CannotAdopt`` where a module does more than its forward: hooks, parametrizations, adapters."""
    hooks = [k for k in ("_forward_hooks", "_forward_pre_hooks") if getattr(module, k, None)]
    if hooks:
        raise CannotAdopt("it has forward hooks, which an exchanged module would not run: remove them first")
    more = sorted({*module._modules} - {*children})
    if more:
        raise CannotAdopt(f"it has modules of its own that no table knows: {', '.join(more)}")


def integer(module: nn.Module, name: str, accepted: tuple[int, ...] | None = None) -> int:
    """A number that the module's configuration states."""
    value = getattr(module, name, None)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CannotAdopt(f"its {name} is {value!r}; a whole number is expected")
    if accepted is not None and value not in accepted:
        raise CannotAdopt(f"its {name} is {value}; read: {', '.join(map(str, accepted))}")
    return value


def copy_of(module: nn.Module) -> nn.Module:
    """A module that shares the other's tensors and may change what it holds without changing the other."""
    other = object.__new__(type(module))
    state: dict[str, Any] = dict(vars(module))
    for name in ("_parameters", "_buffers", "_modules"):
        state[name] = dict(state[name])
    vars(other).update(state)
    state["training"] = False
    forward: Any = state.get("forward")
    if getattr(forward, "__self__", None) is module:
        vars(other)["forward"] = forward.__func__.__get__(other)
    return other


def as_words(bits: int, group: int, k: int, symmetric: bool) -> str:
    """A weight in words."""
    spread = "per channel" if group == k else "per tensor" if group == 0 else f"groups of {group}"
    return f"int{bits} weight, {spread}{'' if symmetric else ', asymmetric'}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
