"""The oracle notices: fused graphs that were made wrong on purpose."""

import pytest
import torch

import quantpass as qp
from tests import oracle
from tests.oracle import Wrong, judge
from tests.spellings import all_spellings

SPELLINGS_TO_BREAK = ("all after codes", "all after float x", "addmm, float x", "linear, codes", "int_mm_corrected")

FAULTS = {
    "a scale off by 2%": ("scale", lambda t: t * 1.02),
    "one channel's scale": ("scale", lambda t: torch.where(torch.arange(t.shape[-1]) == 3, t * 1.05, t)),
    "a bias off by 2%": ("bias", lambda t: (t * 1.02).to(t.dtype)),
    "no bias": ("bias", torch.zeros_like),
    "a flipped bias": ("bias", lambda t: t.flip(-1)),
    "one code": ("b_p1", lambda t: t + (torch.arange(t.numel()) == 5).view(t.shape).to(t.dtype) * 20),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", SPELLINGS_TO_BREAK)
def test_faults_are_noticed(name, fault, monkeypatch):
    spelling = all_spellings()[name]
    what, change = FAULTS[fault]
    broken = []

    def fuse_and_break(gm, **options):
        report = fuse(gm, **options)
        for attribute, tensor in list(gm.named_buffers()):
            used = any(n.op == "get_attr" and n.target == attribute and n.users for n in gm.graph.nodes)
            if what in attribute and used and "word" not in attribute:
                if not torch.equal(change(tensor.clone()), tensor):
                    broken.append(attribute)
                setattr(gm, attribute, change(tensor.clone()))
        return report

    fuse = qp.fuse
    monkeypatch.setattr(oracle.qp, "fuse", fuse_and_break)
    try:
        verdict = judge(spelling.graph(), spelling.args).verdict
    except Wrong:
        assert broken
    else:
        assert verdict == "fused" and not broken, f"{broken} changed, and the oracle did not see it"
