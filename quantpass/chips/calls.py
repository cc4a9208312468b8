"""An operator call as legality sees it: descriptions of tensors, numbers, and the sizes that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quantpass.basics.tensor_spec import TensorSpec
from quantpass.basics.torch_types import I32, dtype_name, is_dtype

INT4_PER_INT32 = 8


@dataclass(frozen=True)
class OpCall:
    """A call of one of the vendor's operators.

    Attributes:
        op: the operator.
        mode: ``"graph"`` (GE, through torchair) or ``"eager"`` (aclnn).
        args: argument name to :class:`TensorSpec`, number, dtype or None; those not given are None. A list of tensors is
            one description where it holds one tensor, and a tuple of equal ones where it holds more.
    """

    op: VendorOp
    mode: str
    args: Mapping[str, Any]

    def tensor(self, name: str) -> TensorSpec | None:
        value = self.args.get(name)
        if isinstance(value, tuple) and value:
            value = value[0]
        return value if isinstance(value, TensorSpec) else None

    def count(self, name: str) -> int:
        """How many tensors an argument holds."""
        value = self.args.get(name)
        return len(value) if isinstance(value, tuple) else int(value is not None)

    def value(self, name: str) -> Any:
        """An argument as rules compare it: a dtype by its name, a list of tensors by its first."""
        value = self.args.get(name)
        if isinstance(value, tuple) and value and isinstance(value[0], TensorSpec):
            return value[0]
        return dtype_name(value) if is_dtype(value) else value

    def replaced(self, **changes: Any) -> OpCall:
        """The call with other arguments; a description in place of several tensors stands for as many."""
        for name, new in changes.items():
            if isinstance(new, TensorSpec) and self.count(name) > 1:
                changes[name] = (new,) * self.count(name)
        return OpCall(self.op, self.mode, {**self.args, **changes})

    @cached_property
    def sizes(self) -> dict[str, Any]:
        """The named sizes of the call (``m``, ``k``, ``n`` ...); a size that the arguments do not determine is absent."""
        return self.op.sizes(self)


def packed_int4(spec: TensorSpec | None) -> bool:
    return spec is not None and spec.dtype_name == I32


def matrix_sizes(spec: TensorSpec | None, rows: str, columns: str) -> dict[str, Any]:
    """Sizes of a matrix by name; int32 carries eight int4 along the stored last axis."""
    if spec is None or spec.rank < 2:
        return {}
    r, c = spec.shape[-2:]
    if packed_int4(spec):
        r, c = (r * INT4_PER_INT32, c) if spec.transposed else (r, c * INT4_PER_INT32)
    return {rows: r, columns: c}


def in_groups(sizes: dict[str, Any], group: int) -> dict[str, Any]:
    """``sizes``, and how many ``groups`` of ``group`` rows K has, where that is known."""
    if group > 0 and isinstance(sizes.get("k"), int):
        return {**sizes, "groups": -(-sizes["k"] // group)}
    return sizes


def last_size(call: OpCall) -> dict[str, Any]:
    """The last dimension of the tensor that an elementwise operator works on, unpacked."""
    spec = call.tensor("input") or call.tensor("x")
    if spec is None or not spec.shape:
        return {}
    return {"last": spec.shape[-1] * (INT4_PER_INT32 if packed_int4(spec) else 1)}


@dataclass(frozen=True, eq=False)
class VendorOp:
    """One of the vendor's operators, ``torch.ops.npu.<name>``.

    Attributes:
        schema: as torch_npu 2.13.0 declares it.
        sizes: the named sizes of a call, for its rules.
        unjudged: arguments of forms that no rule speaks of; no call that can be judged gives them.
        weight: the argument whose storage format a chip cares for; none where there is no such argument.
        family: what the ids of its rules begin with.
    """

    schema: str
    sizes: Callable[[OpCall], dict[str, Any]] = last_size
    unjudged: tuple[str, ...] = ()
    weight: str = ""
    family: str = ""

    def __str__(self) -> str:
        return self.name

    @cached_property
    def name(self) -> str:
        return self.schema.partition("(")[0]

    @cached_property
    def types(self) -> Mapping[str, str]:
        """The arguments that rules speak of, in order, and their types: ``{"x": "Tensor", "axis": "int"}``."""
        inside = self.schema.partition("(")[2].partition(") ->")[0]
        pairs = (argument.split("=")[0].rsplit(" ", 1) for argument in inside.split(", ") if argument != "*")
        return {name: type_.removesuffix("?") for type_, name in pairs if name not in self.unjudged}

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(self.types)

    @cached_property
    def numbers(self) -> frozenset[str]:
        """Arguments that are no tensors: numbers, dtypes, words."""
        return frozenset(name for name, type_ in self.types.items() if not type_.startswith("Tensor"))

    @cached_property
    def lists(self) -> frozenset[str]:
        """Arguments that are lists of tensors."""
        return frozenset(name for name, type_ in self.types.items() if type_ == "Tensor[]")

    @cached_property
    def integers(self) -> frozenset[str]:
        """Arguments that take an integer and no dtype."""
        return frozenset(n for n, type_ in self.types.items() if type_ == "int" and not n.endswith(("dtype", "_type")))
