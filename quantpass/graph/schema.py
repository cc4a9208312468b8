"""Argument-complete reading of graph nodes.

A reader of an operator is a plain function whose keyword parameters are *all* arguments of the operator's schema.
:func:`call_reader` binds a node's arguments, defaults included, and calls it; a reader that does not name every
argument can't be put into a table, and a linter rule forbids a named but unused one. So no argument of a consumed
node goes unexplained, and a schema that grows an argument in a newer PyTorch turns into a clear error, not into a
wrong reading. A parameter with a default stands for an argument that older versions of the operator lack.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Generic, TypeVar

from torch._ops import OpOverload
from torch.fx import Node

R = TypeVar("R")


class _Required:
    def __repr__(self) -> str:
        return "<required>"


REQUIRED = _Required()


@cache
def arguments_of(target: OpOverload) -> tuple[tuple[str, Any], ...]:
    """``(name, default)`` of every argument in the operator's schema, :data:`REQUIRED` where there is no default."""
    return tuple(
        (argument.name, argument.default_value if argument.has_default_value() else REQUIRED)
        for argument in target._schema.arguments
    )


@cache
def _defaults(target: OpOverload) -> tuple[tuple[str, ...], dict[str, Any]]:
    arguments = arguments_of(target)
    return tuple(name for name, _ in arguments), {n: d for n, d in arguments if d is not REQUIRED}


def bind(node: Node) -> dict[str, Any]:
    """All arguments of a ``call_function`` node by name, with the schema's defaults filled in."""
    return bind_call(node.target, node.args, node.kwargs)


def bind_call(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The same of an operator and what it is called with."""
    names, defaults = _defaults(target)
    return defaults | dict(zip(names, args, strict=False)) | dict(kwargs)


def positional(node: Node, **replaced: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a node as its schema orders them, whatever way they were passed, some of them replaced.

    Returns:
        Positional and keyword arguments; keyword-only ones at their default are left out.
    """
    bound = {**bind(node), **replaced}
    _, defaults = _defaults(node.target)
    args, kwargs = [], {}
    for argument in node.target._schema.arguments:  # type: ignore[union-attr]
        value = bound[argument.name]
        if not argument.kwarg_only:
            args.append(value)
        elif value != defaults.get(argument.name, REQUIRED):
            kwargs[argument.name] = value
    return tuple(args), kwargs


class ReaderTable(Generic[R]):
    """Readers by operator, checked against the operators' schemas.

    Operators of optional tools are named by string (``"quanto::qbytes_mm"``, overload name added where it is not
    ``default``), so that a table never imports a tool: a graph that holds such an operator has imported it already.

    Args:
        readers: operator (or its name) to reader.
        leading: how many positional parameters each reader has before the operator's arguments.

    Raises:
        TypeError: a reader's keyword parameters are not exactly the schema's arguments.
    """

    def __init__(self, readers: Mapping[Any, Callable[..., R]], leading: int) -> None:
        self._leading = leading
        self._named = {key: reader for key, reader in readers.items() if isinstance(key, str)}
        self._resolved: dict[Any, Callable[..., R] | None] = {}
        for target, reader in readers.items():
            if isinstance(target, OpOverload):
                problem = _mismatch(target, reader, leading)
                if problem:
                    raise TypeError(problem)
                self._resolved[target] = reader

    def get(self, target: Any) -> Callable[..., R] | None:
        """The reader of ``target``, or None."""
        try:
            return self._resolved[target]
        except KeyError:
            self._resolved[target] = found = self._resolve(target)
            return found

    def _resolve(self, target: Any) -> Callable[..., R] | None:
        if not isinstance(target, OpOverload):
            return None
        reader = self._named.get(qualified_name(target))
        problem = _mismatch(target, reader, self._leading) if reader else None
        if problem:
            warnings.warn(
                f"quantpass does not know this version of {target}, its sites stay unfused: {problem}", stacklevel=2
            )
            return None
        return reader

    def readers(self) -> dict[Any, Callable[..., R]]:
        """Every operator (or name of one) in the table, with its reader."""
        return {**self._named, **{t: r for t, r in self._resolved.items() if r}}

    def merged(self, *others: Mapping[Any, Callable[..., R]]) -> ReaderTable[R]:
        """A table with more readers; one that is already there is an error."""
        mine = self.readers()
        for other in others:
            double = sorted(str(key) for key in set(mine) & set(other))
            if double:
                raise ValueError(f"two readers for {', '.join(double)}; give one")
            mine |= other
        return ReaderTable(mine, self._leading)


def _mismatch(target: OpOverload, reader: Callable[..., Any], leading: int) -> str | None:
    parameters = list(inspect.signature(reader).parameters.values())[leading:]
    wanted = {_parameter_name(name) for name, _ in arguments_of(target)}
    missing = sorted(wanted - {p.name for p in parameters})
    extra = sorted({p.name for p in parameters if p.default is inspect.Parameter.empty} - wanted)
    if not missing and not extra:
        return None
    return (
        f"the reader {reader.__name__} of {target} must name every argument of the operator's schema: "
        f"missing {missing}, unknown {extra}"
    )


def qualified_name(target: OpOverload) -> str:
    """``"aten::add.Tensor"``; the overload name is left out where it is ``default``."""
    overload = target._schema.overload_name
    return f"{target._schema.name}.{overload}" if overload else target._schema.name


def _parameter_name(argument: str) -> str:
    return "input_" if argument == "input" else "from_" if argument == "from" else argument


def call_reader(reader: Callable[..., R], node: Node, *leading: Any) -> R:
    """Call ``reader(*leading, **all bound arguments of node)``."""
    return reader(*leading, **parameters(bind(node)))


def parameters(bound: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names that a reader's parameters have."""
    return {_parameter_name(name): value for name, value in bound.items()}


def op_name(node: Node) -> str:
    """``aten.mm`` for ``torch.ops.aten.mm.default``; overload names other than ``default`` are kept."""
    target = node.target
    if isinstance(target, OpOverload):
        return _dotted_name(target)
    if callable(getattr(target, "name", None)):
        return str(target.name())  # type: ignore[union-attr]  # a higher-order operator
    return str(getattr(target, "__name__", target))


@cache
def _dotted_name(target: OpOverload) -> str:
    name, overload = target._schema.name.replace("::", "."), target._schema.overload_name
    return f"{name}.{overload}" if overload else name
