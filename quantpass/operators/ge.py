"""GE's operators as torchair makes them, for the conversions that fused operators state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


class LackingGeOperatorError(RuntimeError):
    """torchair can't make a GE operator: it has no function for it, or one that does not take an argument.

    The message names both as the end of a sentence: "GE's DynamicQuantV2 with quant_mode".
    """


class GeFunctions:
    """torchair's functions, one for each GE operator. Generations differ in which there are, and in their arguments.

    Args:
        module: torchair's ``ge_apis``, or what stands for it.

    Asking for a function that is not there, or calling one with a keyword that it does not take, raises
    :class:`LackingGeOperatorError`.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name, None)
        if function is None:
            raise LackingGeOperatorError(f"GE's {name}")

        def make(*args: Any, **kwargs: Any) -> Any:
            unknown = [k for k in kwargs if k not in inspect.signature(function).parameters]
            if unknown:
                raise LackingGeOperatorError(f"GE's {name} with {', '.join(unknown)}")
            return function(*args, **kwargs)

        return make

    def takes(self, name: str, argument: str) -> bool:
        """Whether the function ``name`` has an argument."""
        function = getattr(self._module, name, None)
        return function is not None and argument in inspect.signature(function).parameters


@dataclass(frozen=True, slots=True)
class Ge:
    """Makes GE operators; ``api`` has a function for each.

    ``matmul_v4``: QuantBatchMatmulV4, which some chips take, in place of QuantBatchMatmulV3.
    """

    matmul_v4: bool = False

    @property
    def api(self) -> GeFunctions:
        from torchair._ge_concrete_graph import ge_apis

        return GeFunctions(ge_apis)

    @property
    def dtypes(self) -> Any:
        """``DT_INT4`` and its like."""
        from torchair.ge._ge_graph import DataType

        return DataType

    def turned(self, parameter: Any) -> Any:
        """A scale or offset as an operator with ``transpose_weight`` reads it."""
        if parameter is None or parameter.rank < 2:
            return parameter
        return self.api.Transpose(parameter, [1, 0])

    def as_int4(self, x: Any) -> Any:
        """``(..., C / 8)`` int32 as ``(..., C)`` INT4: Bitcast adds a last dimension of eight, Reshape folds it in."""
        if x.dtype != self.dtypes.DT_INT32:
            return x
        *leading, last = x.symsize
        if all(isinstance(size, int) for size in x.symsize):
            shape = self.api.Const(whole([*leading, last * 8], "an int4 operand"))
        else:
            shape = self.api.Mul(self.api.Shape(x), self.api.Const([1] * len(leading) + [8]))
        return self.api.Reshape(self.api.Bitcast(x, type=self.dtypes.DT_INT4), shape)


def whole(sizes: list[Any], what: str) -> list[int]:
    """``sizes``, which have to be known.

    Raises:
        RuntimeError: one is symbolic.
    """
    if not all(isinstance(size, int) for size in sizes):
        raise RuntimeError(f"quantpass: {what} of dynamic shape {sizes}; compile with dynamic=False")
    return sizes


class Inputs(list[Any]):
    """What a GE operator is given, in order and ``named``: of some operators torchair leaves out what is not given."""

    def __init__(self, values: Sequence[Any], names: Sequence[str] = ()) -> None:
        super().__init__(values)
        self.named = dict(zip(names, values, strict=False))


def padded(inputs: list[Any], count: int) -> list[Any]:
    """Inputs of a GE operator with those at the end that were left out."""
    return [*inputs, *[None] * (count - len(inputs))]


def turned(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """A parameter that :meth:`Ge.turned` has turned, the way it was."""
    return parameter if parameter is None or parameter.dim() < 2 else parameter.transpose(-2, -1)


_BY_NAME = {
    "FLOAT": torch.float32, "FLOAT16": torch.float16, "BF16": torch.bfloat16, "DOUBLE": torch.float64,
    "INT8": torch.int8, "UINT8": torch.uint8, "INT16": torch.int16, "INT32": torch.int32, "INT64": torch.int64,
    "BOOL": torch.bool,
}  # fmt: skip
_BY_NUMBER = {
    0: "FLOAT", 1: "FLOAT16", 2: "INT8", 3: "INT32", 4: "UINT8", 6: "INT16", 9: "INT64", 10: "UINT64", 11: "DOUBLE",
    12: "BOOL", 27: "BF16", 29: "INT4",
}  # fmt: skip
"""GE's own numbers, as attributes such as ``dst_type`` hold them; the numbers in a protocol buffer are others."""


def dtype_named(name: str) -> torch.dtype:
    """The dtype that GE calls ``name`` (without ``DT_``)."""
    if name not in _BY_NAME:
        raise NotImplementedError(f"GE dtype {name!r} has no tensor in PyTorch; known: {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def dtype_name(number: int) -> str:
    """GE's name of the dtype number in an attribute."""
    if number not in _BY_NUMBER:
        raise NotImplementedError(f"GE dtype number {number} is not known; known: {_BY_NUMBER}")
    return _BY_NUMBER[number]
