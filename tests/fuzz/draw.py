"""Choices, sizes and tensors: known when the graph is made, or given when it runs; ordinary, or extreme."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INF, NAN = float("inf"), float("nan")


@dataclass(frozen=True)
class Case:
    """``graph(*args)`` returns tensors. ``matmuls``: how many of its matmuls have a quantized operand."""

    graph: Any
    args: tuple
    matmuls: int
    capture: str = "fake"


class Draw:
    """A source of choices and of tensors that depend on nothing else.

    ``wild`` graphs hold extreme and non-finite values. Tensors that :meth:`given` hands out are constants of the graph
    or, where ``run_time`` says so, inputs of it.
    """

    def __init__(self, draw):
        self._draw = draw
        self.rng = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
        self.wild = self.one_of(False, False, True)
        self.run_time = self.one_of("nothing", "nothing", "some", "parameters", "all")
        self.inputs, self._bound = [], ()

    def one_of(self, *choices):
        return self._draw(st.sampled_from(choices))

    def maybe(self):
        return self._draw(st.booleans())

    def int(self, low, high):
        return self._draw(st.integers(low, high))

    # -- tensors -------------------------------------------------------------------------------------------------------

    def floats(self, *shape, scale=1.0):
        return torch.randn(*shape, generator=self.rng) * scale

    def codes(self, *shape, low, high, dtype=torch.int8):
        t = torch.randint(low, high + 1, shape, generator=self.rng)
        if self.wild and self.one_of(False, False, True):
            t = torch.full_like(t, self.one_of(low or 5, high))  # zeros alone are no sign of codes
        return t.to(dtype)

    def scales(self, *shape):
        t = torch.rand(*shape, generator=self.rng) * 0.01 + 0.002
        return self.distorted(t, _SCALES) if self.wild else t

    def addend(self, *shape, scale=3.0):
        t = self.floats(*shape, scale=scale)
        return self.distorted(t, _ADDENDS) if self.wild else t

    def activation(self, *shape):
        t = self.floats(*shape)
        return self.distorted(t, _ACTIVATIONS) if self.wild else t

    def distorted(self, t, kinds):
        kind = self.one_of(*kinds)
        if kind == "plain" or not t.numel():
            return t
        if isinstance(kind, float):
            return t * kind
        t = t.clone()
        which = self.one_of("one", "row", "column", "third")
        if kind == "outlier":
            kind = 10.0 ** self.one_of(3, 5, 6, 7, 9, 10)
            _part(t, which).mul_(kind)
        elif kind == "apart":
            t.mul_(10.0 ** torch.randint(-9, 1, (t.shape[0], *[1] * (t.dim() - 1)), generator=self.rng))
        elif kind == "negative":
            _part(t, which).neg_()
        else:
            _part(t, which).fill_(float(kind))
        return t

    # -- constants and inputs ------------------------------------------------------------------------------------------

    def given(self, t, what="parameters"):
        """A function that returns ``t`` in the graph, as a constant or as an input."""
        late = {"nothing": False, "some": None, "parameters": what == "parameters", "all": True}[self.run_time]
        if late is None:
            late = self.maybe() and (what == "parameters" or self.maybe())
        if not late:
            return lambda: t
        self.inputs.append(t)
        position = len(self.inputs) - 1
        return lambda: self._bound[position]

    def bind(self, inputs):
        self._bound = inputs

    def case(self, graph, *xs, matmuls, capture="fake"):
        """``graph`` of ``xs`` and of all inputs that were given out."""

        def with_inputs(*args):
            self.bind(args[len(xs) :])
            return graph(*args[: len(xs)])

        return Case(with_inputs, (*xs, *self.inputs), matmuls, capture)


_SCALES = (
    "plain",
    "outlier",
    "outlier",
    "apart",
    1e-30,
    1e-7,
    1e-4,
    6e4,
    1e30,
    "0",
    "1e-40",
    "1e-45",
    "negative",
    "inf",
    "nan",
)
_ADDENDS = ("plain", "outlier", "-inf", "-inf", "inf", "nan", "-65504", "-3.4e38", 1e4, 1e6, 1e-6, 1e30)
_ACTIVATIONS = ("plain", "plain", "0", "outlier", 1e-5, 1e-3, 1e2, 1e4, "inf", "-inf", "nan", "apart")


def _part(t, which):
    if which == "one":
        return t.view(-1)[t.numel() // 2 : t.numel() // 2 + 1]
    if which == "row":
        return t[t.shape[0] // 2]
    if which == "column":
        return t[..., t.shape[-1] // 2]
    return t.view(-1)[::3]
