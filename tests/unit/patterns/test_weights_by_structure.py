"""What operators alone tell of a weight is what every element of it tells."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpass.graph.expr import Const
from quantpass.graph.records import Weight
from quantpass.graph.row_rules import NotByRows
from quantpass.patterns import weights
from quantpass.patterns.operands import Operand, OperandBlocks
from quantpass.patterns.weights_by_structure import read_by_structure
from quantpass.patterns.weights_in_blocks import read_in_blocks
from tests.unit.graphs import Traced
from tests.unit.patterns.test_weights_in_blocks import CODES, SCALE, ZERO, G, K, N, grouped, same

ROWS = SCALE[:, 0]


def apart():
    """Which group each row of K is of, as in order of activation size: those of a group don't lie together."""
    return torch.arange(K).mul(7).remainder(K // G)


def read(function, *inputs, codes=1, tolerance=1e-9):
    """The weight by structure, and what looking at every element gives; the first ``codes`` inputs hold the codes."""
    t = Traced(function, *inputs, known=len(inputs))
    blocks = OperandBlocks(t.values, Operand(t.result, True), t.dialects.rows, t.inputs[:codes])
    shape = tuple(t.result.meta["val"].shape[::-1])
    arguments = (t.values, blocks, t.inputs[:codes], shape, tolerance)
    return read_by_structure(*arguments), read_in_blocks(*arguments)


def halves(packed, s):
    low, high = packed & 15, packed >> 4
    codes = torch.stack([low, high], dim=-1).view(N, K)
    return ((codes.reshape(N, -1, G).float() - 8.0) * s).view(N, K)


@pytest.mark.parametrize(
    ("function", "inputs", "codes"),
    [
        (grouped, (CODES, SCALE), 1),
        (grouped, (CODES, SCALE, ZERO), 1),
        (grouped, (CODES.int() + 120, SCALE, ZERO), 1),
        (lambda c, s: c.float() * s - 3 * s, (CODES, ROWS), 1),
        (lambda c, s: (c.to(torch.int16) - 8).float() / s, (CODES, ROWS), 1),
        (lambda c, s: grouped(c.t(), s), (CODES.t().contiguous(), SCALE), 1),
        (lambda a, b, s: torch.cat([a, b], 1).float() * s, (CODES[:, :8], CODES[:, 8:], ROWS), 2),
        (lambda a, b, s: torch.cat([a.float(), b.float()], 1) * s, (CODES[:, :8], CODES[:, 8:], ROWS), 2),
        (lambda c, s: c[:, :G].float() * s, (CODES, ROWS), 1),
        (lambda c, s, g: c.float() * s[:, g, 0], (CODES, SCALE, torch.arange(K) // G), 1),
        (lambda c, s, g: (c.float() - 3) * s[:, g, 0], (CODES, SCALE, apart()), 1),
        (lambda c, s, z, g: (c.float() - z[:, g, 0]) * s[:, g, 0], (CODES, SCALE, ZERO, apart()), 1),
        (lambda c, s: c.half().float() * s * 0.5, (CODES, ROWS), 1),
    ],
)
def test_what_operators_tell(function, inputs, codes):
    structure, elements = read(function, *inputs, codes=codes)
    assert isinstance(structure, Weight) and same(structure, elements)


def test_packed_codes():
    """Two to a byte: the integers that are cut are made by operators, and only these run."""
    packed = ((CODES[:, ::2].int() + 8) | (CODES[:, 1::2].int() + 8) << 4).to(torch.uint8)
    t = Traced(halves, packed, SCALE, known=2)
    cut = next(n for n in t.graph.nodes if n.target is torch.ops.aten.view.default)
    blocks = OperandBlocks(t.values, Operand(t.result, True), t.dialects.rows, [cut])
    found = read_by_structure(t.values, blocks, [cut], (K, N), 1e-9)
    assert same(found, read_in_blocks(t.values, blocks, [cut], (K, N), 1e-9))
    assert torch.equal(found.codes.tensor, CODES + 8)


SQUARE = CODES[:, :N].contiguous()


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda c, s: c.float().clamp(-7, 7) * s, (CODES, ROWS)),
        (lambda c, s: (c.float() * 1.5).round() * s, (CODES, ROWS)),
        (lambda c, s: c.float() * c.float() * s, (CODES, ROWS)),
        (lambda c, s: (c + c.t()).float() * s, (SQUARE, ROWS)),
        (lambda c, s: c * 0.1 * s, (CODES, ROWS)),  # float32 beside a number of Python's
        (lambda c, s: (c / 3).float() * s, (CODES, ROWS)),
        (lambda c, s: s / (c.float() + 300), (CODES, ROWS)),
        (lambda c, s: ((c.float() + 2.0**60) - 2.0**60) * s, (CODES, ROWS)),
        (lambda c, s: (c.float() + 2.0**30) * s, (CODES, ROWS)),
        (lambda c, s: c.double() * 1e-300 * 1e-20 * 1e300 * s, (CODES, ROWS)),
        (lambda c, s: torch.cat([c[:, :8].float(), s.expand(-1, K - 8)], 1), (CODES, ROWS)),
        (lambda c, s: (c.to(torch.int8) - 100).float() * s, ((CODES.int() * 8).to(torch.int8), ROWS)),  # wraps around
        (lambda c, s: (2 * c.float() - 1) * s, (CODES % 2, ROWS)),  # binary
        (lambda c, s: c.float() * s * float("nan"), (CODES, ROWS)),
        (lambda c, s: c.float() * (s * 0), (CODES, ROWS)),
        (lambda c, s: c.float() * s + torch.arange(K), (CODES, ROWS)),
        (lambda c, s: torch.where(c > 6, 0.0, c.float()) * s, (CODES, ROWS)),
        (lambda c, s: c.float() * s[:, apart()] + torch.arange(K), (CODES, SCALE[..., 0])),
    ],
)
def test_what_they_do_not_tell(function, inputs):
    structure, _ = read(function, *inputs)
    assert structure is None


STEPS = {
    "shift": lambda w, s: w + 3.0,
    "scaled": lambda w, s: w * s[:, :1],
    "divided": lambda w, s: w / s[:, :1],
    "moved": lambda w, s: w.t().contiguous().t(),
    "apart": lambda w, s: w.reshape(N, -1, G).view(N, K),
    "turned": lambda w, s: torch.cat([w[:, G:], w[:, :G]], 1),
    "narrow": lambda w, s: w.half().float(),
    "clamped": lambda w, s: w.clamp(-200, 200),
    "squared": lambda w, s: w * w,
    "groups": lambda w, s: (w.reshape(N, -1, G) * s[:, :4, None]).view(N, K),
    "along K": lambda w, s: w * torch.arange(1.0, K + 1),
    "groups apart": lambda w, s: w * s[:, apart()],
}
BEFORE = {
    "as they are": lambda c: c,
    "wider": lambda c: c.int() - 5,
    "wrapping": lambda c: c - 125,
    "unsigned": lambda c: (c + 8).to(torch.uint8) - 3,
}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*BEFORE]), st.lists(st.sampled_from([*STEPS]), max_size=4), st.integers(0, 2**31))
def test_it_is_what_every_element_tells(before, steps, seed):
    """Of whatever a weight is made by: the same weight, or nothing said."""

    def function(c, s):
        w = BEFORE[before](c).float()
        for step in steps:
            w = STEPS[step](w, s)
        return w

    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128 if seed % 2 else -8, 128 if seed % 2 else 8, (N, K), generator=generator).to(torch.int8)
    scale = torch.rand(N, K // G, generator=generator) + 0.5
    for tolerance in (1e-9, 1e-6):
        try:
            structure, elements = read(function, codes, scale, tolerance=tolerance)
        except NotByRows:
            return
        assert structure is None or same(structure, elements)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_proof_by_structure(monkeypatch, transposed):
    """A named reading is proved without its elements; with another code, or another scale, it is not."""
    monkeypatch.setattr(weights, "blocks_of", None)  # no element is computed
    monkeypatch.setattr("quantpass.patterns.operands.STRUCTURED", 1)

    def function(c, s):
        return (c.t() if transposed else c).float() * s

    codes = (CODES.t() if transposed else CODES).contiguous()
    t = Traced(function, codes, SCALE[:, 0], known=2)
    found = weights.read_weight(t.reader, t.result, transposed=True)
    assert isinstance(found, Weight) and found.proved and found.codes.origin is t.inputs[0]

    operand = Operand(t.result, True)
    scale = found.scale.tensor
    stored = found.codes.tensor
    arguments = t.values, operand, t.inputs[:1], found
    assert weights.is_proved_by_structure(*arguments, stored, scale, None, t.dialects.rows)
    other = stored.clone()
    other[3, 2] += 1
    assert not weights.is_proved_by_structure(*arguments, other, scale, None, t.dialects.rows)
    off = scale.clone()
    off[-1] *= 1.01
    assert not weights.is_proved_by_structure(*arguments, stored, off, None, t.dialects.rows)
    assert not weights.is_proved_by_structure(*arguments, stored, scale, torch.ones(1), t.dialects.rows)


def test_no_proof_of_a_line_that_meets_integers_which_wrap_around_at_the_ends_alone(monkeypatch):
    monkeypatch.setattr("quantpass.patterns.operands.STRUCTURED", 1)
    codes = torch.arange(0, 201, 8).to(torch.uint8).repeat(4, 1)
    t = Traced(lambda c, s: c.to(torch.int8).float() * s, codes, torch.ones(1), known=2)
    n, k = codes.shape

    def is_proved(codes, scale):
        weight = Weight(Const(codes), True, k, n, Const(scale), None, 0, int(codes.min()), int(codes.max()), True)
        arguments = t.values, Operand(t.result, True), t.inputs[:1], weight, codes, scale, None, t.dialects.rows
        return weights.is_proved_by_structure(*arguments)

    assert not is_proved(codes, torch.tensor([(200 - 256) / 200]))  # right for 0 and 200
    assert not is_proved(codes, torch.ones(1))  # right up to 127
