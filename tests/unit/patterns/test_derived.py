"""What is computed from stored codes by something that no weight reader takes: what it is, and what stands between."""

import pytest
import torch

from quantpass.patterns.derived import DerivedWeights
from tests.unit.graphs import Traced

K, N = 512, 384
CODES = torch.arange(K * N).mul(11).remainder(201).sub(100).reshape(K, N).to(torch.int8)
SCALE = torch.linspace(0.01, 0.02, N)
STACK = CODES.view(4, K // 4, N)
WORDS = torch.arange(K // 8 * N, dtype=torch.int32).reshape(K // 8, N)
INDEX = torch.tensor([1, 0, 2])
NOISE = torch.randn(K, N)
LORA = torch.randn(K, 4), torch.randn(4, N)


def dequantized(c, s):
    return c.float() * s


def derived(function, *inputs, known=2, symbolic=False):
    t = Traced(function, *inputs, known=known, symbolic=symbolic)
    return DerivedWeights(t.reader).find(t.result), t


@pytest.mark.parametrize(
    ("function", "more", "kind"),
    [
        (lambda c, s: dequantized(c, s), (), "plain"),
        (lambda c, s: dequantized(c, s).t(), (), "plain"),
        (lambda c, s: dequantized(c, s).half(), (), "plain"),
        (lambda c, s: dequantized(c, s).clone(), (), "plain"),
        (lambda n, c, s: dequantized(c, s) + n, (NOISE,), "sum"),
        (lambda n, c, s: n - dequantized(c, s), (NOISE,), "sum"),
        (lambda a, b, c, s: dequantized(c, s) + a @ b, LORA, "sum"),
        (lambda n, c, s: dequantized(c, s) * n, (NOISE,), "mask"),
        (lambda n, c, s: torch.where(n > 0, dequantized(c, s), 0.0), (NOISE,), "mask"),
        (lambda n, c, s: torch.maximum(dequantized(c, s), n), (NOISE,), "other"),
        (lambda n, c, s: torch.cat([dequantized(c, s), n]), (NOISE,), "other"),
        (lambda n, c, s: (dequantized(c, s) + n) * 2.0, (NOISE,), "sum"),
        (lambda i, c, s: dequantized(c, s)[i], (INDEX,), "lookup"),
        (lambda i, c, s: dequantized(c, s)[i], (INDEX, STACK), "experts"),
    ],
)
def test_what_stands_between(function, more, kind):
    codes = STACK if kind == "experts" else CODES
    more = more[:1] if kind == "experts" else more
    found, _ = derived(function, *more, codes, SCALE)
    assert found.kind == kind
    said = found.reason()
    assert said.quantized and ("experts" in said.rule) == (kind == "experts")


def test_rows_of_what_only_the_run_knows():
    """Chosen from a value of the run, or from known words, it is a lookup; words of the run may be anything."""
    chosen = derived(lambda i, c, s: dequantized(c, s)[i], INDEX, CODES, SCALE, known=0)[0]
    assert chosen.kind == "lookup"
    assert derived(lambda i, w: w[i], INDEX, WORDS, known=1)[0].kind == "lookup"
    assert derived(lambda i, w: w[i], INDEX, WORDS, known=0)[0] is None


def test_sizes_above_those_that_python_keeps():
    """Two equal sizes need not be one object."""
    assert derived(lambda n, c, s: dequantized(c, s) + n.view(int(str(K)), N), NOISE, CODES, SCALE)[0].kind == "sum"


def test_a_vector_beside_the_matrix_is_no_carrier():
    """What is broadcast along the matrix is not where its elements come from."""
    codes = torch.arange(N).remainder(100).to(torch.int8)
    assert derived(lambda n, c: n + c.float() * 0.5, NOISE, codes, known=1)[0] is None
    assert derived(lambda n, c: n + c.float().view(N, 1) * 0.5, torch.randn(N, N), codes, known=1)[0] is None


def test_words_of_unknown_values():
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    found, _ = derived(lambda w, s: (w[:, None] >> s[:, None]) & 15, WORDS, shifts, known=1)
    assert found.kind == "packed" and found.reason().rule == "read.weight.packed"
    assert derived(lambda w: w + 1, WORDS, known=0)[0] is None  # words that nobody takes bits of


@pytest.mark.parametrize(
    ("tensor", "stored"),
    [
        (CODES, True),
        (torch.eye(K, dtype=torch.int8), False),
        (CODES.float(), False),
        (CODES > 0, False),
        (CODES.short(), False),  # words: they may hold several codes, or be something else
    ],
)
def test_which_inputs_hold_codes(tensor, stored):
    t = Traced(lambda c: c.float() * 2.0, tensor, known=1)
    assert (DerivedWeights(t.reader).find(t.inputs[0]) is not None) == stored


def test_an_operator_that_nobody_knows():
    library = torch.library.Library("quantpass_unknown", "DEF")
    try:
        library.define("spread(Tensor codes) -> Tensor")
        library.impl("spread", lambda c: c.float() * 3.0, "CompositeExplicitAutograd")
        t = Traced(lambda c: torch.ops.quantpass_unknown.spread(c), CODES)
        found = DerivedWeights(t.reader).find(t.result)
        assert found.kind == "opaque" and found.reason().rule == "read.weight.opaque"
    finally:
        library._destroy()
