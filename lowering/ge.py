"""The ``ge`` lowering: how torchair makes GE operators of ``torch.ops.quantpass.*``.

What each becomes stands with the operator; :func:`register_converters` hands it to torchair's public
``register_fx_node_ge_converter``. Attributes
and dtypes are those of the vendor's converters of the same operators, with one difference: a transposed operand is
the operator's own attribute here, not a ``Transpose`` operator in front. That is the graph that CANN's mandatory fusion
passes (QuantBatchMatmulV3TransposeFusionPass, WeightQuantBatchMatmulV2TransposeFusionPass, and its NZ form on 310P)
make of the vendor's, on every chip: they move the Transpose of a weight into the attribute and drop, with it, those
of a two-dimensional ``antiquant_scale`` and ``antiquant_offset``. So with ``transpose_weight`` the operator reads
these as ``(N, groups)``. On 310P the attribute has to be set (``weight_quant_batch_matmul_v2_proto.h:20-60``,
``quant_batch_matmul_v3_tiling_base.cpp:220-228``); setting it leaves nothing to a pass that may not match.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from quantpass.lowering.aclnn import lacking
from quantpass.lowering.leftovers import expand_leftovers
from quantpass.lowering.torchair_versions import generation_of, install_line
from quantpass.operators import OPERATORS
from quantpass.operators.arguments import Arguments, bound
from quantpass.operators.ge import Ge as Conversion
from quantpass.operators.ge import LackingGeOperatorError
from quantpass.operators.operator import Operator
from quantpass.operators.preparation import FORMAT_CAST, PACK_INT4

if TYPE_CHECKING:
    from quantpass.chips.rules import Chip
    from quantpass.graph.constants import Constants


class Ge:
    """A graph for torchair, which asks the converters what becomes of each operator."""

    name = "ge"
    mode = "graph"
    needs_a_chip = False
    keeps_casts = True

    def prepare(self, chip: Chip) -> None:
        """Register the converters.

        Raises:
            ImportError: torchair is not installed.
        """
        register_converters(matmul_v4=chip.batch_matmul_v4)

    def lower(self, gm: GraphModule, constants: Constants | None = None) -> None:
        """Spell out the operators that torchair does not know; the fused ones stay."""
        del constants
        expand_leftovers(gm)


def register_converters(*, matmul_v4: bool = False) -> None:
    """Make torchair convert the quantpass operators; harmless when called again.

    Args:
        matmul_v4: emit QuantBatchMatmulV4, which some chips take, in place of QuantBatchMatmulV3.

    Raises:
        ImportError: torchair is not installed.
    """
    import torch_npu  # noqa: F401  - brings torchair
    from torchair import register_fx_node_ge_converter

    conversion = Conversion(matmul_v4)
    for op in OPERATORS:
        register_fx_node_ge_converter(op.overload)(_converter(op, conversion))
    for target, converter in MISSING_CONVERTERS.items():
        register_fx_node_ge_converter(target)(_saying_what_lacks(str(target), converter))


def _converter(op: Operator, conversion: Conversion) -> Callable[..., Any]:
    def ways(*args: Any, **kwargs: Any) -> list[str]:
        return _other_ways(op, bound(op.overload._schema, args, kwargs))

    def convert(*args: Any, meta_outputs: Any = None, **kwargs: Any) -> Any:
        del meta_outputs
        return op.ge(conversion, bound(op.overload._schema, args, kwargs))

    return _saying_what_lacks(f"quantpass.{op.name}", convert, ways)


def _saying_what_lacks(
    name: str, convert: Callable[..., Any], other_ways: Callable[..., list[str]] = lambda *_, **__: []
) -> Callable[..., Any]:
    """A converter that says which GE operator this torchair lacks for ``name``, and what works in its place."""

    def guarded(*args: Any, meta_outputs: Any = None, **kwargs: Any) -> Any:
        try:
            return convert(*args, **kwargs, meta_outputs=meta_outputs)
        except LackingGeOperatorError as error:
            ways = [f"install a newer torch_npu ({install_line()})", *other_ways(*args, **kwargs)]
            raise LackingGeOperatorError(
                f"{name} becomes {error} here, which this torchair ({_installed()}) does not have: {', or '.join(ways)}"
            ) from error

    return guarded


def _other_ways(op: Operator, arguments: Arguments) -> list[str]:
    given = {op.renamed.get(name, name): value for name, value in vars(arguments).items()} | dict(op.always)
    captured = op not in (FORMAT_CAST, PACK_INT4) and not lacking(op.vendor, given)
    mode = f"take torchair's reduce-overhead mode, which calls torch.ops.npu.{op.vendor.name} in its place"
    return [*([mode] if captured else []), "keep such sites as they are (leave=...)"]


def _installed() -> str:
    import torch_npu

    generation = generation_of(Path(torch_npu.__file__).parent)
    return (f"generation {generation.name}, " if generation else "") + f"torch_npu {torch_npu.__version__}"


def amax(self: Any, dim: Sequence[int] = (), keepdim: bool = False, meta_outputs: Any = None) -> Any:
    """ReduceMax."""
    del meta_outputs
    return Conversion().api.ReduceMax(self, list(dim) or list(range(self.rank)), keep_dims=keepdim)


def amin(self: Any, dim: Sequence[int] = (), keepdim: bool = False, meta_outputs: Any = None) -> Any:
    """ReduceMin."""
    del meta_outputs
    return Conversion().api.ReduceMin(self, list(dim) or list(range(self.rank)), keep_dims=keepdim)


def int_mm(self: Any, mat2: Any, meta_outputs: Any = None) -> Any:
    """MatMulV2, whose result for int8 operands is int32."""
    del meta_outputs
    return Conversion().api.MatMulV2(self, mat2, None, None)


MISSING_CONVERTERS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.amax.default: amax,
    torch.ops.aten.amin.default: amin,
    torch.ops.aten._int_mm.default: int_mm,
}
"""ATen operators of quantized models for which torchair 2.13.0 has no converter, or one that raises."""
