"""What a fused operator is: its meaning, and how each lowering carries it out, in one record.

Its signature is that of its ``kernel``; the schema of ``torch.ops.quantpass.<name>`` is inferred from it. Everything
else takes the arguments of one call by name, as :class:`quantpass.operators.arguments.Arguments`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch._ops import OpOverload
from torch.fx import Node
from torch.library import infer_schema

from quantpass.chips.calls import OpCall, VendorOp
from quantpass.chips.checking import logical
from quantpass.operators.arguments import Arguments, bound
from quantpass.operators.ge import Ge, Inputs


class AclnnGraph(Protocol):
    """A graph in which an operator's call becomes the vendor's."""

    def viewed(self, node: Node, operand: Node, transposed: bool) -> Node:
        """``operand`` with its last two dimensions swapped where ``transposed``."""

    def stored_transposed(self, node: Node, matrix: Node, reads_transposed: Callable[[Node], bool]) -> Node:
        """``matrix`` as a transposed view of contiguous storage, which replaces it where all users want that."""

    def scale_word(self, node: Node, scale: Node, offset: Node | None, name: str) -> Node:
        """Scale and offset packed in an int64 word, in front of ``node``."""

    def replace(self, node: Node, op: VendorOp, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """The vendor's ``op`` in place of ``node``."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Emulated:
    """One of the vendor's operators as CPU tensors see it after :func:`quantpass.emulate_npu`.

    Attributes:
        vendor: the operator, as legality knows it.
        emulate: what it computes, from the arguments of its schema.
        emulate_fake: what it returns for fake tensors, likewise; by default ``emulate`` itself.
        vendor_fake: whether torch_npu's own fake kernel is ``"right"``, ``"missing"`` or ``"wrong"``.
    """

    vendor: VendorOp
    emulate: Callable[[Arguments], Any]
    emulate_fake: Callable[[Arguments], Any] | None = None
    vendor_fake: str = "right"


@dataclass(frozen=True, eq=False, kw_only=True)
class Operator(Emulated):
    """One of quantpass's own operators, ``torch.ops.quantpass.<name>``.

    Attributes:
        kernel: what it computes; its name and signature are the operator's.
        fake: the shapes and dtypes of its results.
        aclnn: puts the vendor's operator in place of a call: ``(graph, node, arguments)``.
        ge: makes GE operators of a call: ``(ge, arguments)``.
        ge_kernels: what those compute: ``(inputs, attributes, saturates)``.
        renamed: the vendor's names of arguments that have another name here.
        always: arguments that every call gives the vendor's operator.
    """

    kernel: Callable[..., Any]
    fake: Callable[[Arguments], Any]
    aclnn: Callable[[AclnnGraph, Node, Arguments], None]
    ge: Callable[[Ge, Arguments], Any]
    ge_kernels: Mapping[str, Callable[[Inputs, dict[str, Any], bool], Any]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @cached_property
    def schema(self) -> str:
        """``name(Tensor x, ...) -> Tensor``. Integers are plain: none of them is a size."""
        return self.name + infer_schema(self.kernel, mutates_args=()).replace("SymInt", "int")

    @property
    def overload(self) -> OpOverload:
        found: OpOverload = getattr(torch.ops.quantpass, self.name).default
        return found

    def described(
        self, arguments: Mapping[str, Any], mode: str, describe: Callable[[Any], Any] = lambda v: v
    ) -> OpCall:
        """A call of this operator, its arguments by name, as legality sees the vendor's."""
        renamed = {self.renamed.get(name, name): value for name, value in arguments.items()}
        return vendor_call(self.vendor, {**renamed, **self.always}, mode, describe)

    def bind(self, node: Node) -> Arguments:
        """The arguments of a call in a graph."""
        return bound(self.overload._schema, node.args, node.kwargs)


def vendor_call(
    op: VendorOp, arguments: Mapping[str, Any], mode: str, describe: Callable[[Any], Any] = lambda v: v
) -> OpCall:
    """The vendor's call as legality sees it.

    Args:
        op: the operator.
        arguments: those of quantpass's operator, by name, or of the vendor's itself. What quantpass's says by flags
            (a matrix that is stored transposed) is put into the descriptions; what only quantpass's has is left out.
        mode: ``"graph"`` or ``"eager"``.
        describe: a description for a tensor as it is stored, anything else as it is.
    """
    found = {name: describe(value) for name, value in arguments.items() if name in op.types}
    for name in found:
        if arguments.get(f"transpose_{name}") is True:
            found[name] = logical(found[name])
    return OpCall(op, mode, found)
