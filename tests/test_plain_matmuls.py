"""Matmuls of plain floats are passed over unread; whatever may hold codes is read, and every report stays the same."""

from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantpass as qp
from quantpass.doors.compiled import copied
from quantpass.patterns import sites
from quantpass.patterns.reach import Reach
from tests.coverage import elsewhere
from tests.coverage.captured import load
from tests.coverage.store import CAPTURES
from tests.helpers import CHIPS, WeightOnly

K = 64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Holding(nn.Module):
    """``forward(module, x)`` with tensors as buffers."""

    def __init__(self, forward, **tensors):
        super().__init__()
        self.body = forward
        for name, t in tensors.items():
            self.register_buffer(name, t)

    def forward(self, x):
        return self.body(self, x)


class Block(nn.Module):
    """A causal transformer block as models spell it: looked up, normalized, masked, residual."""

    def __init__(self, dtype, linear):
        super().__init__()
        self.embedding = nn.Embedding(40, K, dtype=dtype)
        self.q, self.k, self.v, self.out = (linear() for _ in range(4))
        self.norm = nn.LayerNorm(K, dtype=dtype)
        self.register_buffer("causal", torch.ones(8, 8, dtype=torch.bool).tril())
        self.register_buffer("positions", torch.arange(8))

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + torch.sin(self.positions[:, None] * 0.1).to(x.dtype)
        h = self.norm(x)
        q, k, v = (m(h).view(2, 8, 4, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2) / 4).masked_fill(~self.causal, -100.0)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x @ self.embedding.weight.t()


TOKENS = torch.arange(16).view(2, 8)


def read_matmuls(model, *args):
    """The matmuls whose operands are read, and the report."""
    with patch.object(sites, "_read_site", wraps=sites._read_site) as read:
        report = qp.explain(model.eval(), args, target="cpu")
    return [str(call.args[2].target) for call in read.call_args_list], report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_read_where_nothing_is_quantized(dtype):
    read, report = read_matmuls(Block(dtype, lambda: nn.Linear(K, K, dtype=dtype)), TOKENS)
    assert read == [] and report.total == 0
    assert "floats" in str(report)


def test_of_a_quantized_model_only_the_quantized_matmuls_are_read():
    """Neither the products of attention, which take what quantized matmuls give, nor the logits."""
    read, report = read_matmuls(Block(torch.float16, lambda: WeightOnly(K, K)), TOKENS)
    assert len(read) == report.total == report.fused == 4


def test_int32_tokens_are_no_codes():
    block = Block(torch.float32, lambda: nn.Linear(K, K))
    assert read_matmuls(block, TOKENS.int())[0] == []


# -- what may hold codes -----------------------------------------------------------------------------------------------

CODES = torch.randint(-127, 128, (K, K), dtype=torch.int8, generator=generator())
SCALE = torch.rand(K, 1, generator=generator(1)) * 0.01 + 1e-3
FLOATS = torch.randn(K, K, generator=generator(2))
X = torch.randn(8, K, generator=generator(3))


def scaled(m):
    return m.c.float() * m.s


def rounded(w, s):
    return torch.clamp(torch.round(w / s), -128, 127) * s


WITH_CODES = {
    "stored": (lambda m, x: F.linear(x, scaled(m)), 1),
    "stored in int32": (lambda m, x: F.linear(x, scaled(m)), 1),
    "stored in int64": (lambda m, x: F.linear(x, scaled(m)), 0),
    "chosen by stored booleans": (lambda m, x: F.linear(x, torch.where(m.b, m.s, -m.s)), 1),
    "rounded in the graph": (lambda m, x: F.linear(x, rounded(m.w, m.s)), 1),
    "a factor away from being rounded": (lambda m, x: F.linear(x, torch.clamp(m.w / m.s, -128, 127) * m.s), 0),
    "cast to int8 in the graph": (lambda m, x: F.linear(x, (m.w * 50).to(torch.int8).float() * m.s), 1),
    "rounded in a branch": (
        lambda m, x: torch.cond(x.sum() > 0, lambda a: F.linear(a, rounded(m.w, m.s)), lambda a: a + 1, (x,)),
        1,
    ),
    "fake-quantized": (lambda m, x: F.linear(x, torch.fake_quantize_per_tensor_affine(m.w, 0.05, 0, -128, 127)), 1),
    "folded": (lambda m, x: F.linear(x, m.folded), 1),
    "folded, on the left": (lambda m, x: m.folded @ x.t(), 1),
    "folded, behind a cast": (lambda m, x: F.linear(x.half(), m.folded.half()), 1),
    "folded, repeated": (lambda m, x: x.expand(2, 8, K) @ m.folded.t().expand(2, K, K), 1),
    "masked at run time": (lambda m, x: F.linear(x, scaled(m) * (x.sum(0) > 0)), 1),
    "added to at run time": (lambda m, x: F.linear(x, scaled(m) + x.t() @ x), 1),
    "looked up": (lambda m, x: x @ F.embedding(torch.arange(K) % 8 + x.argmax(), scaled(m)), 1),
    "the indices alone": (lambda m, x: x @ F.embedding((m.c[0].long() + x.argmax()) % K, m.w), 0),
    "a factor of what they chose": (lambda m, x: x @ torch.where(x > 0, x, 0.0).t() @ x * m.s[0], 0),
    "on both sides": (lambda m, x: rounded(x, 0.02) @ rounded(x.t().contiguous(), 0.02), 1),
    "of attention": (lambda m, x: F.linear(F.linear(x, scaled(m)), m.w), 1),
    "of attention, rounded again": (lambda m, x: F.linear(rounded(F.linear(x, scaled(m)), 0.05), scaled(m)), 2),
    "in a branch": (lambda m, x: torch.cond(x.sum() > 0, lambda a: F.linear(a, scaled(m)), lambda a: a + 1, (x,)), 1),
    "from outside of a branch": (
        lambda m, x: (lambda w: torch.cond(x.sum() > 0, lambda a: F.linear(a, w), lambda a: a + 1, (x,)))(scaled(m)),
        1,
    ),
    "returned": (lambda m, x: (x @ m.w, scaled(m)), 1),
    "times a vector": (lambda m, x: scaled(m) @ x[0], 1),
    "keys and values": (lambda m, x: F.scaled_dot_product_attention(x, scaled(m), scaled(m)), 2),
}


def holding(name):
    codes = {"stored in int32": CODES.int(), "stored in int64": CODES.long()}.get(name, CODES)
    tensors = {"c": codes, "s": SCALE, "b": CODES > 0, "w": FLOATS, "folded": CODES.float() * SCALE}
    return Holding(WITH_CODES[name][0], **tensors)


def without_shortcuts():
    stack = ExitStack()
    stack.enter_context(patch.object(sites, "is_plain", lambda *_: False))
    stack.enter_context(patch.object(Reach, "concerns", lambda *_: True))
    return stack


@pytest.mark.parametrize("name", WITH_CODES)
def test_what_may_hold_codes_is_read(name):
    torch.compiler.reset()
    report = qp.explain(holding(name), (X,), target=CHIPS)
    assert report[CHIPS[0]].total == WITH_CODES[name][1], str(report)
    torch.compiler.reset()
    with without_shortcuts():
        assert qp.explain(holding(name), (X,), target=CHIPS).as_dict() == report.as_dict()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", list(elsewhere.schemes()), ids=lambda s: s.slug)
def test_tools_graphs_have_the_same_reports_where_every_matmul_is_read(scheme):
    graphs, _ = load(CAPTURES / f"{scheme.slug}.pt")
    for c in graphs:
        report = qp.explain(copied(c.graph), target=CHIPS).as_dict()
        with without_shortcuts():
            assert qp.explain(copied(c.graph), target=CHIPS).as_dict() == report
