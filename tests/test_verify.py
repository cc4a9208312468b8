"""``qp.verify``: each fused site beside the graph's own arithmetic."""

import pytest
import torch
from torch import nn

import quantpass as qp
from tests.helpers import StaticW8A8, WeightOnly


def two():
    return nn.Sequential(StaticW8A8(64, 96, dtype=torch.float16), nn.ReLU(), WeightOnly(96, 32)).eval()


def x():
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).half()


def test_every_fused_site_and_every_result_is_compared():
    found = qp.verify(two(), (x(),), target="ascend310p")
    assert [d.name for d in found.sites] == [s.name for s in found.report.sites if s.fused]
    assert len(found.sites) == 2
    assert all(d.cosine > 0.9999 for d in (*found.sites, *found.outputs))
    assert [d.name for d in found.outputs] == ["output 0"]
    found.require()
    assert "largest difference" in str(found)


def test_a_wrong_site_is_seen_and_does_not_spoil_the_next(monkeypatch):
    """A scale made wrong while planning: its own site says so, the site after it stays clean."""
    from quantpass import plan_quant_matmul

    right = plan_quant_matmul._scale_word
    monkeypatch.setattr(
        plan_quant_matmul, "_scale_word", lambda s, offset: right(plan_quant_matmul.ex.mul(s, s), offset)
    )
    found = qp.verify(two(), (x(),), target="ascend310p")
    assert found.sites[0].relative > 0.5
    assert found.sites[1].relative < 0.01
    with pytest.raises(AssertionError, match="1 of 2 sites differ"):
        found.require()


def test_nothing_quantized():
    found = qp.verify(nn.Linear(8, 8).eval(), (torch.randn(2, 8),), target="ascend910b")
    assert found.sites == ()
    assert [d.largest for d in found.outputs] == [0.0]


def test_bad_input():
    with pytest.raises(TypeError, match="as a tuple"):
        qp.verify(two(), x(), target="cpu")
    with pytest.raises(ValueError, match="ascend310"):
        qp.verify(two(), (x(),), target="ascend311")
