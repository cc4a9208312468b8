"""Graphs whose structure is unusual: very deep, with branches and loops, of unknown sizes."""

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear

from tests.fuzz.draw import Draw

K = 16


class Layer(nn.Module):
    """A quantized layer that keeps the size of its values, in one of a few forms."""

    def __init__(self, d, form=None):
        super().__init__()
        self.form = form or d.one_of("weight only", "static", "token")
        self.register_buffer("codes", d.codes(K, K, low=-127, high=127))
        self.register_buffer("scale", torch.rand(K, 1, generator=d.rng) * 1e-3 + 1e-3)

    def forward(self, x):
        if self.form == "static":
            x = torch.clamp(torch.round(x / 0.03), -128, 127).to(torch.int8).to(x.dtype) * 0.03
        elif self.form == "token":
            t = x.abs().amax(-1, keepdim=True) / 127 + 1e-5
            x = torch.clamp(torch.round(x / t), -128, 127).to(torch.int8).to(x.dtype) * t
        return linear(x, self.codes.to(x.dtype) * self.scale)


@st.composite
def deep(draw):
    """Hundreds of nodes in front of a site, behind it, or both."""
    d = Draw(draw)
    d.wild = False
    kind = d.one_of("add", "mul", "residual", "view", "transpose", "clamp", "weight", "codes")
    depth, layer, place = d.int(150, 1500), Layer(d), d.one_of("before", "after", "both")
    x = d.floats(4, K)

    def many(y):
        for _ in range(depth):
            if kind == "add":
                y = y + 1e-3
            elif kind == "mul":
                y = y * 1.0001
            elif kind == "residual":
                y = torch.relu(y) * 1e-3 + y
            elif kind == "view":
                y = y.view(2, 2, K).view(4, K)
            elif kind == "transpose":
                y = y.t().t()
            elif kind == "clamp":
                y = torch.clamp(y, -100, 100)
        return y

    def graph(x):
        if kind == "weight":
            w = layer.codes.float() * layer.scale
            for _ in range(depth // 2):
                w = w.t().contiguous().t()
            return linear(x, w)
        if kind == "codes":
            q = torch.clamp(torch.round(x / 0.03), -128, 127).to(torch.int8)
            for _ in range(depth):
                q = q.view(2, 2, K).view(4, K)
            return linear(q.float() * 0.03, layer.codes.float() * layer.scale)
        y = layer(many(x) if place != "after" else x)
        return many(y) if place != "before" else y

    return d.case(graph, x, matmuls=1)


class Branches(nn.Module):
    """Quantized layers inside of ``cond``, ``while_loop`` or ``map``, one before, one behind."""

    def __init__(self, d):
        super().__init__()
        self.kind = d.one_of("cond", "while_loop", "map", "cond in cond")
        self.inside, self.other, self.outside = Layer(d), Layer(d), Layer(d)
        self.first = d.maybe()
        self.bodies = {"cond": 2, "while_loop": 1, "map": 1, "cond in cond": 3}[self.kind]

    def forward(self, x):
        y = self.outside(x) if self.first else x
        if self.kind == "cond":
            y = torch.cond(x.sum() > 0, lambda y: self.inside(y), lambda y: self.other(y) + 1, (y,))
        elif self.kind == "cond in cond":
            y = torch.cond(x.sum() > 0, lambda y: self._nested(y), lambda y: self.other(y) + 1, (y,))
        elif self.kind == "while_loop":
            _, y = torch.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, self.inside(y)), (torch.tensor(0), y))
        else:
            y = torch._higher_order_ops.map(lambda row: self.inside(row.unsqueeze(0)).squeeze(0), y)
        return y if self.first else self.outside(y)

    def _nested(self, y):
        return torch.cond(y.amax() > 0.5, lambda y: self.inside(y), lambda y: self.inside(y) * 0.5, (y,))


class Routed(nn.Module):
    """The rows that a router picks: their number is known at run time only."""

    def __init__(self, d):
        super().__init__()
        self.layer, self.rank = Layer(d), d.one_of(2, 3)
        self.how = d.one_of("nonzero", "mask", "item", "sizes")
        self.bodies = 0

    def forward(self, x):
        if self.how == "nonzero":
            y = x[(x[:, 0] > 0).nonzero().squeeze(-1)]
        elif self.how == "mask":
            y = x[x[:, 0] > 0]
        elif self.how == "item":
            count = (x[:, 0] > 0).sum().item()
            torch._check(count >= 0)
            torch._check(count <= x.shape[0])
            y = x[:count]
        else:
            y = torch.cat([x, x[: x.shape[0] // 2]])
        if self.rank == 3:
            return self.layer(y.unsqueeze(1).expand(-1, 2, -1)) if self.how == "mask" else self.layer(y.unsqueeze(0))
        return self.layer(y)


@st.composite
def models(draw, kind):
    """A model and inputs of several sizes: ``(model, inputs, quantized matmuls, door)``."""
    d = Draw(draw)
    d.wild = False
    torch.manual_seed(d.int(0, 2**16))
    model = kind(d)
    sizes = d.one_of((5, 4, 8), (4, 4), (7, 6, 9))
    xs = [d.floats(m, K) for m in sizes]
    matmuls = 1 + model.bodies if model.bodies else 1
    return model, xs, matmuls, d.one_of("compile", "compile", "export", "explain")
