"""Running a GE graph on CPU tensors: the proof that a previewed graph computes what the model computes.

Quantized operators are the reference kernels of :mod:`quantpass.operators`; the others are PyTorch's. What
an operator means is documented with its prototype in CANN (``REG_OP``). An operator or an attribute that is not known
here is an error, never a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from quantpass.chips import chip_named
from quantpass.lowering.ge_constants import constant_tensor
from quantpass.lowering.ge_graph import GeGraph, GeOp
from quantpass.lowering.ge_kernels import Kernel, kernels
from quantpass.operators.ge import Inputs


def interpret(
    graph: GeGraph,
    inputs: Sequence[Any],
    *,
    target: str,
    exact_gelu: bool = False,
    watch: Callable[[GeOp, tuple[torch.Tensor, ...]], None] | None = None,
) -> tuple[Any, ...]:
    """Run a GE graph.

    Args:
        graph: the graph, as :func:`quantpass.preview_ge` gives it.
        inputs: the inputs of the FX graph that it was made from, in that graph's order.
        target: the chip; it decides what a float16 overflow gives.
        exact_gelu: compute ``Gelu`` with erf, as the FX graph does, not by the tanh form that GE has.
        watch: called with every operator and its outputs.

    Returns:
        The outputs of the FX graph.

    Raises:
        NotImplementedError: an operator, attribute or dtype that is not known; the message names it.
    """
    table = kernels(saturates=chip_named(target).saturates, exact_gelu=exact_gelu)
    values: dict[tuple[str, int], Any] = {}
    results: tuple[Any, ...] = ()
    for op in graph.ops:
        if op.type in ("Data", "RefData"):
            value = inputs[graph.input_positions[op.attrs["index"]]]
            made: tuple[Any, ...] = (value.contiguous() if isinstance(value, torch.Tensor) else torch.tensor(value),)
        elif op.type == "Const":
            made = (constant_tensor(op.attrs["value"]),)
        elif op.type == "NetOutput":
            results = tuple(values[source] for source in op.inputs if source is not None)
            continue
        else:
            given = [None if s is None else values[s] for s in op.inputs]
            made = _run(op, Inputs(given, [t.name for t in op.input_tensors]), table)
        for i, value in enumerate(made):
            values[op.name, i] = value
        if watch is not None:
            watch(op, made)
    return tuple(_result(r, results, inputs) for r in graph.results)


def _run(op: GeOp, given: Inputs, table: dict[str, Kernel]) -> tuple[Any, ...]:
    kernel = table.get(op.type)
    if kernel is None:
        raise NotImplementedError(
            f"the interpreter does not know the GE operator {op.type} (at {op}). It knows: {', '.join(sorted(table))}."
        )
    try:
        made = kernel(given, op.attrs)
    except NotImplementedError as error:
        raise NotImplementedError(f"{error} (at {op})") from error
    except (RuntimeError, ValueError, IndexError) as error:
        shapes = [None if t is None else (t.dtype, tuple(t.shape)) for t in given]
        raise RuntimeError(f"{op} can't be computed from {shapes}: {error}") from error
    return made if isinstance(made, tuple) else (made,)


def _result(result: Any, outputs: tuple[Any, ...], inputs: Sequence[Any]) -> Any:
    if isinstance(result, int):
        return outputs[result]
    kind, *rest = result
    if kind == "view":
        position, (sizes, strides, offset) = rest
        return torch.as_strided(inputs[position], sizes, strides, offset)
    return rest[0]
