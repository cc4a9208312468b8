"""A compiled ATen graph whose constants were computed from the model's weights.

The constants hold for exactly the values they were computed from. Before each call the weights are compared with those
(:mod:`quantpass.graph.identity`); if they changed, the graph is fused anew from the new values.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from quantpass.doors.lower import carry_out
from quantpass.graph.constants import InputConstants
from quantpass.graph.dump import dump
from quantpass.graph.identity import Seen, State, state_of
from quantpass.graph.known_sizes import known_sizes, with_known_sizes
from quantpass.graph.records import WeightFormat
from quantpass.graph.torch_internals import (
    StaticInputs,
    fake_mode_of,
    inductor_compile,
    like_inputs,
    real_tensors,
    without_function_modes,
)
from quantpass.pipeline import Outcome, fuse_graph
from quantpass.planning.options import Options

OnOutcome = Callable[[Outcome, str, tuple[WeightFormat, ...]], None]

_KEPT_VARIANTS = 64
"""Modules of one structure share a compiled graph; this many sets of weights are kept ready."""

_Place = int | str
"""Where a tensor is found at a call: the index of an input, or the name of an attribute."""


class _Weights:
    """The tensors of one call; the contents of each are looked at once, however many variants ask."""

    def __init__(self, args: Sequence[Any], attributes: dict[str, torch.Tensor]) -> None:
        self._args, self._attributes = args, attributes
        self._states: dict[int, State] = {}

    def at(self, place: _Place) -> torch.Tensor:
        tensor: torch.Tensor = self._args[place] if isinstance(place, int) else self._attributes[place]
        return tensor

    def state(self, tensor: torch.Tensor) -> State:
        if id(tensor) not in self._states:
            self._states[id(tensor)] = state_of(tensor)
        return self._states[id(tensor)]


@dataclass(frozen=True, slots=True)
class _Variant:
    """The graph compiled for one set of weights.

    Attributes:
        seen: each weight that was read.
        shapes: of the weights whose sizes were taken for symbolic ones.
        run: a function of boxed inputs and ``constants``.
        constants: the tensors that were prepared.
    """

    seen: dict[_Place, Seen]
    shapes: dict[_Place, torch.Size]
    run: Callable[[list[Any]], Any]
    constants: tuple[torch.Tensor, ...]

    def holds_for(self, weights: _Weights) -> bool:
        return all(weights.at(place).shape == shape for place, shape in self.shapes.items()) and all(
            seen.is_still(weights.at(place), weights.state) for place, seen in self.seen.items()
        )

    @property
    def is_freed(self) -> bool:
        return any(seen.is_freed for seen in self.seen.values())


class CompiledGraph:
    """A callable of boxed inputs, as AOTAutograd wants it.

    Args:
        gm: the ATen graph.
        weights: its parameters, buffers and tensor attributes.
        fake_inputs: the fake inputs that the compiler was called with.
        options: target, lowering, inner compiler.
        on_outcome: called after every fusion with its outcome, the rewritten graph as text, and the format ledger.
    """

    _boxed_call = True

    def __init__(
        self,
        gm: GraphModule,
        weights: StaticInputs,
        fake_inputs: list[Any],
        options: Options,
        on_outcome: OnOutcome,
    ) -> None:
        self._options = options
        self._contents = options.compare_weights == "contents"
        self._on_outcome = on_outcome
        self._fake_inputs = fake_inputs
        index = {n: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
        self._attributes = {str(n.target): t for n, t in weights.known.items() if n.op == "get_attr"}
        self._static = [index[n] for n in (*weights.known, *weights.unread) if n in index]
        self._without_data = bool(weights.unread)
        self._pristine = Pristine(gm)
        self._lock = threading.RLock()
        self._variants = [self._build(gm, weights)]

    def __call__(self, args: list[Any]) -> Any:
        with self._lock:
            variant = self._find(args)
        constants = like_inputs(variant.constants, args) if self._without_data else variant.constants
        inputs = [*args, *constants]
        args.clear()
        return variant.run(inputs)

    def _find(self, args: list[Any]) -> _Variant:
        weights = _Weights(args, self._attributes)
        with real_tensors():
            position = next((i for i, variant in enumerate(self._variants) if variant.holds_for(weights)), None)
        if position is not None:
            self._variants.insert(0, self._variants.pop(position))
            return self._variants[0]
        # What was made from memory that is gone would be kept for nothing while weights are streamed.
        self._variants = [v for v in self._variants if not v.is_freed]
        gm = self._pristine.module()
        fresh = self._build(gm, self._weights_of(gm, args))
        self._variants = [fresh, *self._variants][:_KEPT_VARIANTS]
        return fresh

    def _weights_of(self, gm: GraphModule, args: list[Any]) -> StaticInputs:
        found = StaticInputs({}, {})
        placeholders = list(gm.graph.find_nodes(op="placeholder"))
        for i in self._static:
            found.add(placeholders[i], args[i])
        for node in gm.graph.find_nodes(op="get_attr"):
            if node.target in self._attributes:
                found.add(node, self._attributes[node.target])
        return found

    def _build(self, gm: GraphModule, weights: StaticInputs) -> _Variant:
        leaves = weights.known
        place: dict[Node, _Place] = {n: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
        place |= {n: str(n.target) for n in leaves if n.op == "get_attr"}
        sizes, fake_inputs = known_sizes(leaves), self._fake_inputs
        if sizes:
            fake_inputs = with_known_sizes(gm, fake_inputs, sizes)
        constants = InputConstants(gm, leaves)
        outcome = fuse_graph(gm, leaves, self._options, constants.add, unread=weights.unread)
        fused = dump(gm)
        formats = carry_out(gm, outcome, self._options, constants)
        read = [n for n in leaves if n in outcome.leaves or n in constants.consulted]
        with real_tensors():  # now: a cast gives a parameter other memory
            seen = {place[n]: Seen.now(leaves[n], self._contents) for n in read}
        self._on_outcome(outcome, fused, formats)
        shapes = {place[n]: t.shape for n, t in leaves.items()} if sizes else {}
        return _Variant(seen, shapes, self._inner(gm, fake_inputs, constants.inputs), constants.inputs)

    def _inner(
        self, gm: GraphModule, fake_inputs: list[Any], constants: tuple[torch.Tensor, ...]
    ) -> Callable[[list[Any]], Any]:
        inner = self._options.inner
        if inner is None or inner == "eager":
            run = without_function_modes(gm)
            return lambda inputs: run(*inputs)
        mode = fake_mode_of([v for v in fake_inputs if isinstance(v, torch.Tensor)])
        with real_tensors():
            fakes = [mode.from_tensor(t, static_shapes=True) if mode else t for t in constants]
        inputs = [*fake_inputs, *fakes]
        compiled = inductor_compile(gm, inputs) if inner == "inductor" else inner(gm, inputs)
        if getattr(compiled, "_boxed_call", False):
            return compiled
        return lambda boxed: compiled(*boxed)


class Pristine:
    """A graph as it was before it was rewritten. Hardly any is asked for again, so it is not made a module before that:
    writing its code would take a seventh of the time of the pass.
    """

    def __init__(self, gm: GraphModule) -> None:
        self._graph = _copy(gm.graph)
        names = {str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
        self._attributes = {name: operator.attrgetter(name)(gm) for name in names}
        self._meta = dict(gm.meta)

    def module(self) -> GraphModule:
        """A fresh module with a graph that can be rewritten; it shares the tensors."""
        gm = GraphModule(self._attributes, _copy(self._graph))
        gm.meta.update(self._meta)
        return gm


def copied(gm: GraphModule) -> GraphModule:
    """A copy of ``gm`` whose graph can be rewritten; it shares the tensors."""
    return GraphModule(gm, _copy(gm.graph))


def _copy(given: Graph) -> Graph:
    graph = Graph()
    output = graph.graph_copy(given, {})
    graph.output(output)
    for old, new in zip(given.nodes, graph.nodes, strict=True):
        new.meta = dict(old.meta)
    return graph
