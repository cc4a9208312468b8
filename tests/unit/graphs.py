"""Small graphs to read, without a compiler around them."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from quantpass.graph.static_values import StaticValues
from quantpass.patterns import default_dialects
from quantpass.patterns.affine import AffineReader


class Traced:
    """``function`` as an ATen graph, with what the pass reads graphs with.

    Args:
        function: takes ``inputs`` by position.
        inputs: example tensors.
        known: how many of the last inputs have values known when compiling (weights, scales).
        symbolic: sizes of the inputs are symbols.
    """

    def __init__(self, function, *inputs, known=0, symbolic=False):
        # Wrapped, so that defaults of the function are no inputs.
        traced = make_fx(lambda *given: function(*given), tracing_mode="symbolic" if symbolic else "fake")(*inputs)
        self._read(traced, inputs, known)

    @classmethod
    def call(cls, target, *args, known=0, **kwargs):
        """A graph of one call of ``target``, which tracing might take apart; tensors become inputs."""
        graph = torch.fx.Graph()
        nodes = []
        for a in args:
            nodes.append(graph.placeholder(f"x{len(nodes)}") if isinstance(a, torch.Tensor) else a)
            if isinstance(a, torch.Tensor):
                nodes[-1].meta["val"] = a
        node = graph.call_function(target, tuple(nodes), kwargs)
        node.meta["val"] = target(*args, **kwargs)
        graph.output(node)
        made = cls.__new__(cls)
        made._read(GraphModule({}, graph), [a for a in args if isinstance(a, torch.Tensor)], known)
        return made

    def _read(self, gm, inputs, known):
        self.gm: GraphModule = gm
        self.graph = self.gm.graph
        self.inputs = list(self.graph.find_nodes(op="placeholder"))
        leaves = dict(zip(self.inputs[len(inputs) - known :], inputs[len(inputs) - known :], strict=True))
        self.values = StaticValues(self.graph, leaves if known else {})
        self.dialects = default_dialects()
        self.reader = AffineReader(self.values, self.dialects)

    @property
    def result(self) -> Node:
        """The node that the function returns (the first where it returns several)."""
        return self.results[0]

    @property
    def results(self) -> list[Node]:
        returned = self.graph.output_node().args[0]
        return list(returned) if isinstance(returned, list | tuple) else [returned]

    def run(self, *inputs) -> dict[Node, object]:
        """The value of every node for these inputs."""
        found = {}

        class Noting(torch.fx.Interpreter):
            def run_node(self, n):
                found[n] = super().run_node(n)
                return found[n]

        Noting(self.gm).run(*inputs)
        return found

    def calls(self, target) -> list[Node]:
        return list(self.graph.find_nodes(op="call_function", target=target))


def evaluate(e, values=None):
    """What an expression of constants and of nodes with the given ``values`` computes to."""
    from quantpass.graph.expr import Call, Const, Recentred, Ref, Size

    if isinstance(e, Const):
        return e.tensor
    if isinstance(e, Ref):
        return values[e.node]
    if isinstance(e, Size):
        return values[e.node].shape[e.dim]
    if isinstance(e, Recentred):
        return evaluate(e.otherwise, values)
    if isinstance(e, Call):
        kwargs = {k: evaluate(a, values) for k, a in e.kwargs.items()}
        return e.target(*(evaluate(a, values) for a in e.args), **kwargs)
    if isinstance(e, Node):
        return values[e]
    if isinstance(e, list | tuple):
        return [evaluate(a, values) for a in e]
    return e


def node_of(tensor, name="x"):
    """A graph input that looks like ``tensor``."""
    graph = torch.fx.Graph()
    node = graph.placeholder(name)
    node.meta["val"] = torch.empty_like(tensor, device="meta")
    return node
