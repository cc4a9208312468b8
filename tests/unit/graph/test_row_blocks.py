"""Static values computed some rows at a time are what they are when computed whole."""

import pytest
import torch

from quantpass.graph import row_blocks
from quantpass.graph.row_blocks import RowBlocks
from quantpass.graph.row_rules import NotByRows
from tests.unit.graphs import Traced

aten = torch.ops.aten
CODES = torch.arange(-96, 96, dtype=torch.int8).reshape(16, 12)
BYTES = torch.arange(192, dtype=torch.uint8).reshape(16, 12)
SCALE = torch.arange(1.0, 17.0)[:, None] / 7
TABLE = torch.arange(16.0).sin()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(row_blocks, "ELEMENTS", 40)
    monkeypatch.setattr(row_blocks, "_SIDE_BY_SIDE", 1)


def blocks(function, *inputs, dim=0, **more):
    t = Traced(function, *inputs, known=len(inputs))
    return t, RowBlocks(t.values, t.result, dim, t.dialects.rows, **more)


def check(function, *inputs, dim=0, parts=None):
    for wide in (True, False):
        t, found = blocks(function, *inputs, dim=dim, wide=wide)
        pieces = [found.value(rows) for rows in found]
        whole = t.values.widened(t.result) if wide else t.values.value(t.result)
        assert len(pieces) > 1 if parts is None else len(pieces) == parts
        got = torch.cat(pieces, dim)
        assert got.dtype == whole.dtype and torch.equal(got, whole)


def refuses(function, *inputs, dim=0):
    with pytest.raises(NotByRows):
        blocks(function, *inputs, dim=dim)


def unpacked(p, dim):
    return torch.stack([p & 15, p >> 4], dim)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    "function",
    [
        lambda c, s: c.float() * s,
        lambda c, s: (c.half() - 3) * s.half(),
        lambda c, s: (c.float().view(16, 3, 4) * s[..., None]).view(16, 12),
        lambda c, s: c.float().t().contiguous().t() * s,
        lambda c, s: torch.where(c > 3, c.float(), s),
        lambda c, s: c.float().repeat_interleave(2, dim=1) * s,
    ],
)
def test_elementwise_and_moved(function, dim):
    check(function, CODES, SCALE, dim=dim)


def test_unpacked_along_the_row_and_across_rows():
    check(lambda p, s: unpacked(p, -1).reshape(16, 24).float() * s, BYTES, SCALE)
    check(lambda p, s: unpacked(p, 1).reshape(32, 12).float() * s.repeat_interleave(2, 0), BYTES, SCALE)
    check(lambda p: unpacked(p, 1).reshape(32, 12).float(), BYTES, dim=1)
    check(lambda p: p.view(torch.int32).float(), BYTES)


def test_looked_up():
    check(lambda p, t: t[(p & 15).long()], BYTES, TABLE)
    groups = torch.arange(12) // 4
    check(lambda c, s, g: c.float() * s[:, :3][:, g], CODES, SCALE.expand(16, 12).contiguous(), groups)
    check(lambda c, s, g: c.float() * s.index_select(0, g), CODES, SCALE, torch.arange(16).flip(0))


def test_rows_that_change_places_nearby():
    order = torch.arange(16).view(-1, 4)[:, [2, 0, 3, 1]].reshape(-1)
    check(lambda c, o: c[o].float(), CODES.repeat(1, 800), order, parts=4)
    refuses(lambda c, o: c[o].float(), CODES.repeat(1, 16000), order.flip(0))
    negative = order.clone()
    negative[-1] -= 16
    refuses(lambda c, o: c[o].float(), CODES.repeat(1, 16000), negative)


def test_a_part_of_each_row():
    check(lambda c, s: c[:, ::2].float() * s, CODES, SCALE)
    refuses(lambda c, s: c[:, ::2].float() * s, CODES, SCALE, dim=1)
    check(lambda c, s: c.view(16, 3, 4)[:, 1].float() * s, CODES, SCALE)


def test_what_mixes_rows():
    refuses(lambda c: c.float().cumsum(0), CODES)
    refuses(lambda c: torch.cat([c, c]).float(), CODES)
    refuses(lambda c: c.float() @ c.float().t(), CODES)
    refuses(lambda c: c.float().reshape(12, 16).t().reshape(16, 12), CODES.repeat(1, 1))
    check(lambda c: torch.cat([c, c], 1).float(), CODES)


def test_what_is_a_copy_of_one_row():
    refuses(lambda s: s.t().expand(16, 16).clone(), SCALE)


def test_a_view_whose_rows_do_not_line_up_goes_in_larger_blocks():
    # 16 rows of 12 out of 6 rows of 32: two of the one for three quarters of the other
    check(lambda c: c.float().reshape(16, 12), CODES.reshape(6, 32), parts=2)


def test_what_rounds_to_integers_is_computed_as_the_graph_does():
    check(lambda w, s: (w / s).round().clamp(-128, 127).to(torch.int8).float() * s, CODES.half() / 3, SCALE.half())


def test_codes_in_place_of_the_cuts():
    t = Traced(lambda c, s: (c.float().view(16, 3, 4) * s[..., None] + 1).view(16, 12), CODES, SCALE, known=2)
    found = RowBlocks(t.values, t.result, 0, cuts=[t.inputs[0]])
    for rows in found:
        held = found.with_codes(rows, 2)
        assert held.tensor.numel() == rows.stop - rows.start  # one for each row
        assert torch.equal(held.dense(), (2 * SCALE.double() + 1)[rows].expand(-1, 12))
    assert found.ahead(slice(0, 3)) == slice(0, 16)


@pytest.mark.parametrize(("scale", "ahead"), [((4096, 1), 64), ((4096, 1024), 1)])
def test_as_many_rows_ahead_as_what_they_hold_allows(scale, ahead):
    codes = torch.ones(4096, 1024, dtype=torch.int8)
    t = Traced(lambda c, s: c.float() * s, codes, torch.ones(scale), known=2)
    found = RowBlocks(t.values, t.result, 0, cuts=[t.inputs[0]])
    assert found.ahead(slice(0, 1)) == slice(0, ahead)


def test_a_leaf_that_was_read_is_one_that_decisions_rest_on():
    t, found = blocks(lambda c, s: c.float() * s, CODES, SCALE)
    found.value(slice(0, 1))
    assert t.values.read_leaves == set(t.inputs)


def test_what_is_looked_up_several_times_in_a_row_is_held_once():
    """Scales by the index of a group, or repeated for each of its rows."""
    groups, scale = torch.arange(12) // 4, torch.arange(48.0).reshape(16, 3)
    for function, *inputs in [
        (lambda c, s, g: c.float() * s[:, g], CODES, scale, groups),
        (lambda c, s, g: c.float() * s.index_select(1, g), CODES, scale, groups),
        (lambda c, s: c.float() * aten.repeat_interleave.self_int(s, 4, 1), CODES, scale),
    ]:
        check(function, *inputs)
        t = Traced(function, *inputs, known=len(inputs))
        found = RowBlocks(t.values, t.result, 0, cuts=[t.inputs[0]])
        held = found.with_codes(slice(0, 2), 1)
        assert held.tensor.numel() == 6 and torch.equal(held.dense(), scale[:2].repeat_interleave(4, 1).double())
    order = torch.tensor([0, 0, 0, 0, 2, 2, 1, 1, 1, 1, 2, 2])
    t, found = blocks(lambda c, s, g: c.float() * s[:, g], CODES, scale, order)
    assert torch.equal(found.value(slice(0, 2)), CODES[:2].double() * scale[:2, order])
    negative = groups - 3
    assert torch.equal(scale[:, negative], scale[:, groups])
    check(lambda c, s, g: c.float() * s[:, g], CODES, scale, negative)


def test_columns_of_what_is_stored_come_several_at_a_time(monkeypatch):
    """A line of the cache holds many of them."""
    monkeypatch.setattr(row_blocks, "_SIDE_BY_SIDE", 5)
    _, found = blocks(lambda c: c.float(), CODES, dim=1)
    assert next(iter(found)) == slice(0, 5)
    _, found = blocks(lambda c: c.float(), CODES, dim=0)
    assert next(iter(found)) == slice(0, 3)
    _, found = blocks(lambda c: c.float().t(), CODES, dim=0)
    assert next(iter(found)) == slice(0, 5)
