"""Matrices made of integers in float models are no quantized weights; quantized weights that look like them are."""

import math

import pytest
import torch
from torch import nn

import quantpass as qp
from quantpass.graph.dump import dump
from tests.helpers import CHIPS, assert_close, compiled, rules
from tests.oracle import judge, traced

linear = nn.functional.linear
N, K = 48, 64
F16, F32 = torch.float16, torch.float32


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Holding(nn.Module):
    """``forward(module, *args)`` with the tensors given as buffers."""

    def __init__(self, forward, /, **tensors):
        super().__init__()
        self.body = forward
        for name, t in tensors.items():
            self.register_buffer(name, t)

    def forward(self, *args):
        return self.body(self, *args)


ADJACENCY = torch.rand(K, K, generator=generator()) > 0.8
DEGREE = ADJACENCY.sum(1, keepdim=True) + 1
X = torch.randn(K, K, generator=generator(1))

MATRICES = {
    "adjacency": lambda: ADJACENCY.long(),
    "one-hot": lambda: nn.functional.one_hot(torch.randint(0, K, (K,), generator=generator()), K),
    "permutation": lambda: torch.eye(K, dtype=torch.int64)[torch.randperm(K, generator=generator())],
    "pooling": lambda: (torch.arange(K)[:, None] // 4 == torch.arange(K) // 4).long(),
    "causal": lambda: torch.ones(K, K, dtype=torch.int64).tril(),
    "eye": lambda: torch.eye(K, dtype=torch.int64),
}
"""Zeros and ones."""

WIDE = {
    "hash": lambda: torch.randint(-(2**31), 2**31, (K, K), generator=generator()),
    "counts": lambda: torch.randint(0, 50, (K, K), generator=generator()),
    "signs": lambda: torch.randint(0, 2, (K, K), generator=generator()) * 2 - 1,
    "small hash": lambda: torch.randint(-100, 101, (K, K), generator=generator()),
    "vandermonde": lambda: torch.arange(K)[:, None] ** torch.arange(4).repeat(K // 4),
    "toeplitz": lambda: torch.arange(K)[:, None] - torch.arange(K),
}
"""Other integers, stored as int64."""

FORMS = {
    "right": lambda m, x: x @ m.to(x.dtype),
    "left": lambda m, x: m.to(x.dtype) @ x,
    "linear": lambda m, x: linear(x, m.to(x.dtype)),
    "scaled": lambda m, x: x @ (m.to(x.dtype) * 0.25),
    "normalized": lambda m, x: (m.to(x.dtype) / DEGREE.to(x.dtype)) @ x,
    "both sides": lambda m, x: (m.to(x.dtype) / DEGREE.to(x.dtype).sqrt() / DEGREE.t().to(x.dtype).sqrt()) @ x,
    "einsum": lambda m, x: torch.einsum("ij,bjk->bik", m.to(x.dtype), x[None]),
}


def check_untouched(model, *args):
    """No site, and the same result."""
    actual, report = compiled(model, *args)
    assert report.total == 0, str(report)
    report.require(fused=1.0)
    torch.testing.assert_close(actual, model(*args))


def every_form(m, x):
    return [form(m.a, x) for form in FORMS.values()]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64])
@pytest.mark.parametrize("name", MATRICES)
def test_zeros_and_ones_of_every_type(name, dtype):
    report = qp.explain(Holding(every_form, a=MATRICES[name]().to(dtype)), (X.half(),), target=CHIPS)
    assert report.total == 0, str(report)


@pytest.mark.parametrize("name", WIDE)
def test_indices_and_counts(name):
    report = qp.explain(Holding(every_form, a=WIDE[name]()), (X.half(),), target=CHIPS)
    assert report.total == 0, str(report)


def test_a_share_of_no_sites_is_met():
    """What nobody quantized fails no check; a number of sites is another matter."""
    report = qp.explain(Holding(every_form, a=MATRICES["adjacency"]()), (X,), target="cpu")
    report.require(fused=1.0)
    for least in (None, 1):
        with pytest.raises(AssertionError):
            report.require(fused=least)


COMPUTED = {
    "eye": lambda x: torch.eye(K) @ x,
    "int eye": lambda x: torch.eye(K, dtype=torch.int8).to(x.dtype) @ x,
    "tril": lambda x: torch.ones(K, K, dtype=torch.int32).tril().to(x.dtype) @ x,
    "triu": lambda x: x @ torch.triu(torch.ones(K, K), 1),
    "average": lambda x: (torch.ones(K, K, dtype=torch.int64).tril() / torch.arange(1, K + 1)[:, None]).to(x.dtype) @ x,
    "positions": lambda x: x @ torch.sin(torch.arange(K)[:, None] * torch.exp(torch.arange(K) * -0.1)),
    "powers": lambda x: x @ (torch.arange(K)[:, None] ** torch.arange(4)).float(),
    "distances": lambda x: x @ (torch.arange(K)[:, None] - torch.arange(K)).abs().to(torch.int32).float(),
    "alibi": lambda x: x @ ((torch.arange(K)[:, None] - torch.arange(K)).float() * 0.125),
    "buckets": lambda x: x @ torch.floor(torch.arange(K)[:, None] * torch.arange(1, 9) / 4).float(),
    "band": lambda x: ((torch.arange(K)[:, None] - torch.arange(K)).abs() < 4).to(torch.uint8).to(x.dtype) @ x,
    "one-hot": lambda x: nn.functional.one_hot(torch.arange(K) % 32, 32).t().to(x.dtype) @ x,
    "hadamard": lambda x: x @ (1 - 2 * ((torch.arange(K)[:, None] & torch.arange(K)) % 2)).float(),
    "one-hot of the input": lambda x: nn.functional.one_hot(x.argmax(-1), K).to(x.dtype) @ x,
    "uint8 mask of the input": lambda x: (x > 0).to(torch.uint8).to(x.dtype) @ x,
    "int8 mask of the input, scaled": lambda x: ((x > 0).to(torch.int8).to(x.dtype) * 0.5) @ x,
    "mask of the input on the right": lambda x: x @ (x > 0).to(torch.int8).to(x.dtype),
    "cosines": lambda x: x @ torch.cos(math.pi / K * (torch.arange(K)[:, None] + 0.5) * torch.arange(K)),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_what_the_graph_computes_from_nothing(name):
    check_untouched(COMPUTED[name], X)


def test_fourier_matrices():
    n = torch.arange(K)[:, None] * torch.arange(K)
    model = Holding(lambda m, x: x.to(torch.complex64) @ torch.exp(-2j * math.pi * m.n / K), n=n)
    check_untouched(model, X)
    check_untouched(lambda x: torch.exp(2j * math.pi * n / K) @ x.to(torch.complex64), X)
    check_untouched(lambda x: torch.exp(2j * math.pi * n / K).real @ x, X)
    check_untouched(lambda x: x @ torch.view_as_real(torch.exp(2j * math.pi * n / K))[..., 1], X)


EXOTIC = [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.bool]


@pytest.mark.parametrize("dtype", [*EXOTIC, torch.float64, torch.int16])
@pytest.mark.parametrize("form", ["right", "left", "scaled", "complex"])
def test_exotic_types_behind_a_matmul(dtype, form):
    """Stored in a type that the pass reads nothing from, or hardly: no exception, and the same result."""
    a = torch.randint(0, 2, (K, K), generator=generator()).to(dtype)

    def forward(m, x):
        if form == "complex":
            return x.to(torch.complex64) @ m.a.to(torch.complex64)
        value = m.a.to(x.dtype) if not m.a.dtype.is_complex else m.a.real
        return {"right": lambda: x @ value, "left": lambda: value @ x, "scaled": lambda: x @ (value * 0.3)}[form]()

    model = Holding(forward, a=a)
    check_untouched(model, X)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_matrices(layout):
    a = ADJACENCY.float().to_sparse(layout=layout)
    outcome = qp.explain(Holding(lambda m, x: torch.sparse.mm(m.a, x), a=a), (X,), target="cpu")
    assert outcome.total == 0


def test_integer_matmuls_of_a_float_model():
    """Paths of length two, counted in int64."""
    check_untouched(Holding(lambda m, x: (m.a @ m.a).to(x.dtype) @ x, a=ADJACENCY.long()), X)


# -- quantized weights that look alike -------------------------------------------------------------------------------

SCALE = torch.rand(N, 1, generator=generator(2)) * 0.01 + 1e-3
TERNARY = torch.randint(-1, 2, (N, K), generator=generator(3)).to(torch.int8)
SIGNS = torch.rand(N, K, generator=generator(4)) > 0.5
CODES = torch.randint(-127, 128, (N, K), generator=generator(5)).to(torch.int8)
ROWS = torch.randn(5, K, generator=generator(6))

QUANTIZED = {
    "ternary": (lambda m, x: linear(x, m.c.to(x.dtype) * m.s.to(x.dtype)), {"c": TERNARY}),
    "ternary, scaled after": (lambda m, x: linear(x, m.c.to(x.dtype)) * m.s[0].to(x.dtype), {"c": TERNARY}),
    "ternary, packed": (
        lambda m, x: linear(x, (((m.c.unsqueeze(-1) >> m.by) & 3).view(N, K).to(x.dtype) - 1) * m.s.to(x.dtype)),
        {
            "c": ((TERNARY.view(N, K // 4, 4).int() + 1) << torch.tensor([0, 2, 4, 6])).sum(-1).to(torch.uint8),
            "by": torch.tensor([0, 2, 4, 6], dtype=torch.uint8),
        },
    ),
    "signs in int8": (lambda m, x: linear(x, m.c.to(x.dtype) * m.s.to(x.dtype)), {"c": SIGNS.to(torch.int8) * 2 - 1}),
    "binary, where": (lambda m, x: linear(x, torch.where(m.c, 1.0, -1.0).to(x.dtype) * m.s.to(x.dtype)), {"c": SIGNS}),
    "binary, where of whole numbers": (
        lambda m, x: linear(x, torch.where(m.c, 1, -1).to(x.dtype) * m.s.to(x.dtype)),
        {"c": SIGNS},
    ),
    "binary, where of scales": (
        lambda m, x: linear(x, torch.where(m.c, m.s.to(x.dtype), -m.s.to(x.dtype))),
        {"c": SIGNS},
    ),
    "binary, arithmetic": (lambda m, x: linear(x, (m.c.to(x.dtype) * 2 - 1) * m.s.to(x.dtype)), {"c": SIGNS}),
    "binary, bits in uint8": (
        lambda m, x: linear(x, (m.c.to(x.dtype) * 2 - 1) * m.s.to(x.dtype)),
        {"c": SIGNS.to(torch.uint8)},
    ),
    "masked codes": (
        lambda m, x: linear(x, (m.c * m.m).to(x.dtype) * m.s.to(x.dtype)),
        {"c": CODES, "m": SIGNS.to(torch.int8)},
    ),
    "pruned codes": (
        lambda m, x: linear(x, m.c.masked_fill(m.m, 0).to(x.dtype) * m.s.to(x.dtype)),
        {"c": CODES, "m": SIGNS},
    ),
    "rounded in the graph": (
        lambda m, x: linear(x, (torch.round(m.w / m.s).clamp(-127, 127) * m.s).to(x.dtype)),
        {"w": CODES * SCALE * 1.001},
    ),
    "in int32": (lambda m, x: linear(x, m.c.to(x.dtype) * m.s.to(x.dtype)), {"c": CODES.int()}),
    "in int16 with a zero point": (
        lambda m, x: linear(x, (m.c.to(x.dtype) - 3) * m.s.to(x.dtype)),
        {"c": CODES.short()},
    ),
}


@pytest.mark.parametrize("target", ["cpu", "ascend910b"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_are_sites(name, target):
    forward, tensors = QUANTIZED[name]
    model = Holding(forward, **tensors, s=SCALE)
    actual, report = compiled(model, ROWS.half(), target=target)
    report.require()
    assert report.total == 1
    assert_close(actual, model(ROWS.half()))


def test_binary_weights_have_no_zero_point():
    forward, tensors = QUANTIZED["binary, where"]
    _, report = compiled(Holding(forward, **tensors, s=SCALE), ROWS.half(), target="ascend910b")
    assert report.sites[0].plan.call["antiquant_offset"] is None
    assert "symmetric" not in report.sites[0].reading
    assert report.sites[0].numerics.kind == "exact" or "scale" in report.sites[0].numerics.why[0]


def test_two_levels_with_another_ratio():
    model = Holding(lambda m, x: linear(x, torch.where(m.c, 3.0, -1.0) * m.s), c=SIGNS, s=SCALE)
    actual, report = compiled(model, ROWS)
    assert report.fused == 1
    assert_close(actual, model(ROWS))


@pytest.mark.parametrize("low", [0.0, -math.inf])
def test_boolean_masks_are_no_weights(low):
    model = Holding(lambda m, x: x @ torch.where(m.c, 0.5, low).t(), c=SIGNS)
    assert qp.explain(model, (ROWS,), target="cpu").total == 0


def test_masks_beside_a_quantized_operand():
    """Who multiplies codes with a mask has a quantized matmul, and the mask serves as its weight."""

    def f(x):
        q = torch.clamp(torch.round(x / 0.03), -128, 127).to(torch.int8)
        return linear(q.float() * 0.03, SIGNS.float() * SCALE)

    outcome = judge(traced(f, ROWS), (ROWS,))
    assert outcome.report.total == 1
    integer = traced(
        lambda x: torch._int_mm(x.to(torch.int8), SIGNS.to(torch.int8).t().contiguous()), ROWS.repeat(4, 1)
    )
    assert judge(integer, (ROWS.repeat(4, 1),)).report.total == 1


def test_the_graph_of_a_float_model_is_not_touched():
    gm = traced(lambda x: x @ (ADJACENCY.to(torch.uint8).float() / DEGREE), X)
    before = dump(gm)
    qp.fuse(gm, target="cpu")
    assert dump(gm) == before


def test_weights_in_int64_are_indices():
    """Nobody keeps codes at 8 bytes each: with or without a scale it is no site; the same in int32 is one."""
    model = Holding(lambda m, x: linear(x, m.c.float() * m.s), c=CODES.long(), s=SCALE)
    assert qp.explain(model, (ROWS,), target="cpu").total == 0
    assert qp.explain(Holding(model.body, c=CODES.int(), s=SCALE), (ROWS,), target="cpu").fused == 1


def test_tables_that_narrow_integers_choose_from_are_named():
    """Codes of a quantizer that is no line: a refusal, not silence."""
    table = torch.randn(256, generator=generator(7))
    model = Holding(lambda m, x: linear(x, table[m.c.long()] * m.s), c=CODES.view(torch.uint8), s=SCALE)
    assert rules(qp.explain(model, (ROWS,), target="cpu")) == {"read.weight.nonlinear"}
