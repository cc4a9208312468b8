"""A large weight, read some columns at a time, is the one that the whole operand would be read as."""

import pytest
import torch

from quantpass.graph import row_blocks
from quantpass.graph.records import Weight
from quantpass.graph.row_rules import NotByRows
from quantpass.patterns import operands, weights_by_value
from quantpass.patterns.operands import Operand, OperandBlocks
from quantpass.patterns.weights_by_value import weight_by_value
from quantpass.patterns.weights_in_blocks import read_in_blocks
from tests.unit.graphs import Traced

N, K, G = 12, 32, 8
CODES = torch.arange(N * K).mul(11).remainder(15).sub(7).reshape(N, K).to(torch.int8)
SCALE = torch.arange(1.0, N * K // G + 1).reshape(N, -1, 1) / 7
ZERO = torch.arange(N * K // G).remainder(5).reshape(N, -1, 1).float()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(row_blocks, "ELEMENTS", 3 * K)
    monkeypatch.setattr(row_blocks, "_SIDE_BY_SIDE", 1)


def both(monkeypatch, function, *inputs, transposed=True):
    """What is read in blocks, whether operators are asked first or not, and what is read of the whole."""
    t = Traced(function, *inputs, known=len(inputs))
    found = []
    for least, asked in ((1, False), (1, True), (1 << 60, False)):
        with monkeypatch.context() as patched:
            patched.setattr(operands, "BLOCKWISE", least)
            if not asked:
                patched.setattr(weights_by_value, "read_by_structure", lambda *_: None)
            found.append(weight_by_value(t.values, Operand(t.result, transposed), t.dialects.rows))
    blocks, by_structure, whole = found
    assert same(by_structure, blocks)
    return blocks, whole


def same(a, b):
    if isinstance(a, Weight) and isinstance(b, Weight):
        plain = [(w.transposed, w.k, w.n, w.group_size, w.low, w.high, w.proved, w.codes.label) for w in (a, b)]
        assert plain[0] == plain[1] and (a.codes.origin is None) == (b.codes.origin is None)
        tensors = [(w.codes, w.scale, w.zero_point) for w in (a, b)]
        for x, y in [*zip(*tensors, strict=True), (a.k_order, b.k_order), (a.k_scale, b.k_scale)]:
            x, y = (getattr(e, "tensor", e) for e in (x, y))
            assert (x is y is None) or (x.dtype == y.dtype and torch.equal(x, y))
        return True
    return a == b


def grouped(c, s, z=None):
    codes = c.reshape(N, -1, G).float()
    return ((codes if z is None else codes - z) * s).view(N, K)


def in_blocks(function, *inputs):
    """What :func:`read_in_blocks` says of a weight whose first input holds its codes."""
    t = Traced(function, *inputs, known=len(inputs))
    cuts = t.inputs[:1]
    operand = OperandBlocks(t.values, Operand(t.result, True), t.dialects.rows, cuts)
    return read_in_blocks(t.values, operand, cuts, (K, N), 1e-9)


@pytest.mark.parametrize(
    "inputs",
    [
        (CODES, SCALE, ZERO),
        (CODES, SCALE, torch.zeros_like(ZERO)),
        (CODES, SCALE.half().float(), ZERO / 3),
        (CODES, SCALE, ZERO.float().clamp(max=0) - 20),
        (CODES.int() + 120, SCALE, ZERO),  # beyond int8, and moved down
        ((CODES + 8).to(torch.uint8), SCALE, ZERO),
        (CODES, SCALE[:, :1].expand_as(SCALE).contiguous(), torch.zeros_like(ZERO)),  # one group after all
        (CODES, torch.ones_like(SCALE), torch.ones_like(ZERO)),  # one scale after all
    ],
)
def test_groups(monkeypatch, inputs):
    blocks, whole = both(monkeypatch, grouped, *inputs)
    assert isinstance(whole, Weight) and same(blocks, whole)
    assert isinstance(in_blocks(grouped, *inputs), Weight)


def test_as_it_is_stored(monkeypatch):
    blocks, whole = both(monkeypatch, lambda c, s: grouped(c.t(), s), CODES.t().contiguous(), SCALE)
    assert same(blocks, whole) and blocks.codes.origin is not None and not blocks.transposed
    square = CODES[:, :N].contiguous()
    for f in (lambda c, s: c.float() * s, lambda c, s: c.t().float() * s):
        blocks, whole = both(monkeypatch, f, square, SCALE[:, 0])
        assert same(blocks, whole) and blocks.codes.origin is not None
    # (K, N)
    blocks, whole = both(monkeypatch, lambda c, s: (grouped(c, s)).t(), CODES, SCALE, transposed=False)
    assert same(blocks, whole) and blocks.transposed


def test_a_later_block_has_smaller_groups(monkeypatch):
    fine = SCALE.clone()
    fine[:4] = fine[:4, :1]
    fine[4:8] = fine[4:8, ::2].repeat_interleave(2, dim=1)
    blocks, whole = both(monkeypatch, grouped, CODES, fine, torch.zeros_like(ZERO))
    assert same(blocks, whole) and blocks.group_size == G
    assert in_blocks(grouped, CODES, fine, torch.zeros_like(ZERO)).group_size == G


def test_a_later_block_has_larger_codes(monkeypatch):
    codes = (CODES + 8).to(torch.uint8)
    codes[-1] += 200
    blocks, whole = both(monkeypatch, grouped, codes, SCALE, ZERO)
    assert same(blocks, whole) and (blocks.low, blocks.high) == (-127, 87)


def test_an_order_of_rows(monkeypatch):
    which = torch.arange(K).mul(7).remainder(K // G)
    blocks, whole = both(monkeypatch, lambda c, s, g: c.float() * s[:, g], CODES, SCALE[..., 0].contiguous(), which)
    assert same(blocks, whole) and blocks.k_order is not None


def test_what_is_left_to_the_whole(monkeypatch):
    """An empty column, codes of one bit, and a scale along K."""
    empty = SCALE.clone()
    empty[-1] = 0.0
    along_k = torch.arange(1.0, K + 1)
    for f, *inputs in [
        (grouped, CODES, empty, torch.zeros_like(ZERO)),
        (lambda c, s: c.float() * s, CODES, along_k),
        (lambda c, s: (2 * c.float() - 1) * s, CODES % 2, SCALE[:, 0]),
    ]:
        blocks, whole = both(monkeypatch, f, *inputs)
        assert same(blocks, whole)
        assert in_blocks(f, *inputs) is None


def test_no_line(monkeypatch):
    for f in (lambda c, s: grouped(c, s) ** 2, lambda c, s: grouped(c, s).sin()):
        blocks, whole = both(monkeypatch, f, CODES, SCALE)
        assert blocks.rule == whole.rule == "read.weight.nonlinear"


@pytest.mark.parametrize("at", [(0, 0), (5, 17), (N - 1, K - 1)])
def test_one_element_that_is_none_of_its_codes(monkeypatch, at):
    """Whichever block it is in."""
    more = torch.zeros(N, K)
    assert isinstance(in_blocks(lambda c, s, m: c.float() * s + m, CODES, SCALE[:, 0], more), Weight)
    more[at] = 0.3 * float(SCALE[at[0], 0])
    blocks, whole = both(monkeypatch, lambda c, s, m: c.float() * s + m, CODES, SCALE[:, 0], more)
    assert not isinstance(blocks, Weight) and same(blocks, whole)


def test_values_that_are_not_finite(monkeypatch):
    for bad in (float("inf"), float("nan")):
        for row in (0, -1):
            scale = SCALE.clone()
            scale[row] = bad
            blocks, whole = both(monkeypatch, grouped, CODES, scale)
            assert not isinstance(whole, Weight) and same(blocks, whole)


def test_what_mixes_rows_is_read_whole(monkeypatch):
    def mixed(c, s):
        return c.flip(0).float().flip(0) * s

    blocks, whole = both(monkeypatch, mixed, CODES, SCALE[:, 0])
    assert isinstance(whole, Weight) and same(blocks, whole)
    with pytest.raises(NotByRows):
        in_blocks(mixed, CODES, SCALE[:, 0])
