"""A compiled ATen graph whose constants were computed from the model's weights.

The constants hold for exactly the tensors they were computed from. Before each call the tensors are looked at (the same
objects, not written to since); if they changed, the graph is fused anew from the new values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from quantpass.options import Options
from quantpass.pipeline import Outcome, fuse_graph
from quantpass.rewrite import drop_casts_of_inputs
from quantpass.torch_internals import fake_mode_of, inductor_compile, real_tensors

_KEPT_VARIANTS = 64
"""Modules of one structure share a compiled graph; this many sets of weights are kept ready."""


@dataclass(frozen=True, slots=True)
class _Variant:
    """The graph compiled for one set of weights. ``seen``: input index, tensor and state of each weight read."""

    seen: tuple[tuple[int, weakref.ref[torch.Tensor], _State], ...]
    run: Callable[[list[Any]], Any]
    constants: tuple[torch.Tensor, ...]

    def holds_for(self, args: Sequence[Any]) -> bool:
        return all(args[i] is ref() and _state(args[i]) == state for i, ref, state in self.seen)


_State = tuple[int | None, int]


def _state(t: torch.Tensor) -> _State:
    """What changes when the tensor is written to (its version), or given other memory through ``.data``.

    Not seen: writes through ``t.data``, and writes to tensors made in inference mode, which PyTorch does not count.
    """
    return (None if t.is_inference() else t._version, t.data_ptr())


class CompiledGraph:
    """A callable of boxed inputs, as AOTAutograd wants it.

    Args:
        gm: the ATen graph.
        leaves: its placeholders and attributes whose tensors are known.
        fake_inputs: the fake inputs that the compiler was called with.
        options: target, lowering, inner compiler.
        on_outcome: called with the outcome of every fusion and the rewritten graph.
    """

    _boxed_call = True

    def __init__(
        self,
        gm: GraphModule,
        leaves: dict[Node, torch.Tensor],
        fake_inputs: list[Any],
        options: Options,
        on_outcome: Callable[[Outcome, GraphModule], None],
    ) -> None:
        self._options = options
        self._on_outcome = on_outcome
        self._fake_inputs = fake_inputs
        placeholders = list(gm.graph.find_nodes(op="placeholder"))
        self._attributes = {n.target: t for n, t in leaves.items() if n.op == "get_attr"}
        self._static = [i for i, n in enumerate(placeholders) if n in leaves]
        self._pristine = _copied(gm)
        tensors = {placeholders.index(n): t for n, t in leaves.items() if n.op == "placeholder"}
        self._variants = [self._build(gm, tensors)]

    def __call__(self, args: list[Any]) -> Any:
        variant = self._find(args)
        inputs = [*args, *variant.constants]
        args.clear()
        return variant.run(inputs)

    def _find(self, args: list[Any]) -> _Variant:
        for position, variant in enumerate(self._variants):
            if variant.holds_for(args):
                if position:
                    self._variants.insert(0, self._variants.pop(position))
                return variant
        fresh = self._build(_copied(self._pristine), {i: args[i] for i in self._static})
        alive = [v for v in self._variants if all(ref() is not None for _, ref, _ in v.seen)]
        self._variants = [fresh, *alive][:_KEPT_VARIANTS]
        return fresh

    def _build(self, gm: GraphModule, tensors: dict[int, torch.Tensor]) -> _Variant:
        placeholders = list(gm.graph.find_nodes(op="placeholder"))
        leaves = {placeholders[i]: t for i, t in tensors.items()}
        leaves |= {
            n: self._attributes[n.target] for n in gm.graph.find_nodes(op="get_attr") if n.target in self._attributes
        }
        constants: list[torch.Tensor] = []
        last = [placeholders[-1]] if placeholders else []

        def add_constant(name: str, tensor: torch.Tensor) -> Node:
            context = (
                gm.graph.inserting_after(last[0]) if last else gm.graph.inserting_before(next(iter(gm.graph.nodes)))
            )
            with context:
                node = gm.graph.placeholder(name)
            node.target = node.name  # unique, as the parameter of a function must be
            last[:] = [node]
            constants.append(tensor)
            return node

        outcome = fuse_graph(gm, leaves, self._options, add_constant)
        self._on_outcome(outcome, gm)
        drop_casts_of_inputs(gm)
        index = {n: i for i, n in enumerate(placeholders)}
        seen = tuple(
            (index[n], weakref.ref(tensors[index[n]]), _state(tensors[index[n]])) for n in outcome.leaves if n in index
        )
        return _Variant(seen, self._inner(gm, constants), tuple(constants))

    def _inner(self, gm: GraphModule, constants: list[torch.Tensor]) -> Callable[[list[Any]], Any]:
        inner = self._options.inner
        if inner is None or inner == "eager":
            return lambda inputs: gm(*inputs)
        mode = fake_mode_of([v for v in self._fake_inputs if isinstance(v, torch.Tensor)])
        with real_tensors():
            fakes = [mode.from_tensor(t, static_shapes=True) if mode else t for t in constants]
        inputs = [*self._fake_inputs, *fakes]
        compiled = inductor_compile(gm, inputs) if inner == "inductor" else inner(gm, inputs)  # type: ignore[operator]
        if getattr(compiled, "_boxed_call", False):
            return compiled  # type: ignore[no-any-return]
        return lambda boxed: compiled(*boxed)


def _copied(gm: GraphModule) -> GraphModule:
    graph = Graph()
    output = graph.graph_copy(gm.graph, {})
    graph.output(output)
    for old, new in zip(gm.graph.nodes, graph.nodes, strict=True):
        new.meta = dict(old.meta)
    return GraphModule(gm, graph)
