"""The oracle notices: fused graphs that were made wrong on purpose."""

from dataclasses import replace

import pytest
import torch

import quantpass as qp
from tests import oracle
from tests.oracle import Wrong, judge
from tests.spellings import F16, WS, N, Spelling, W, X, all_spellings, to

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


ENDS = {
    "an infinity that became the largest number": lambda y: torch.ops.aten.clamp.default(y, -65504.0, 65504.0),
    "what is no number became one": lambda y: torch.ops.aten.nan_to_num.default(y, 0.0, float("inf"), float("-inf")),
    "an infinity of the other sign": lambda y: torch.ops.aten.where.self(torch.ops.aten.isinf.default(y), -y, y),
    "a number that is none any more": lambda y: torch.ops.aten.where.self(y < 0, y * float("nan"), y),
}


@pytest.mark.parametrize("fault", ENDS)
@pytest.mark.parametrize("target", ["ascend310p", "ascend910b"])
def test_values_that_are_not_finite_are_judged(fault, target, monkeypatch):
    """A mask of banned tokens, and what is no number, have to come out as they are, on a saturating chip as well."""
    mask = torch.zeros(N)
    mask[1], mask[2], mask[3] = -torch.inf, torch.inf, torch.nan

    def build(x, w, s, m):
        weight = torch.ops.aten.mul.Tensor(to(w, F16), s)
        return torch.ops.aten.add.Tensor(torch.ops.aten.mm.default(x, torch.ops.aten.t.default(weight)), m)

    spelling = Spelling("mask", build, X.half(), (W, WS.half(), mask.half()))
    assert judge(spelling.graph(), spelling.args, target=target).verdict == "fused"

    def fuse_and_break(gm, **options):
        report = fuse(gm, **options)
        broken = ENDS[fault]
        run = gm.forward
        gm.forward = lambda *args: broken(run(*args))
        return report

    fuse = qp.fuse
    monkeypatch.setattr(oracle.qp, "fuse", fuse_and_break)
    with pytest.raises(Wrong):
        judge(spelling.graph(), spelling.args, target=target)


def test_the_slack_of_an_operators_own_quantization_is_no_more_than_what_it_states(monkeypatch):
    """Without what the site states for its own codes the same result is wrong."""
    from quantpass.planning import quant_matmul

    codes, scales = torch.randint(-127, 128, (8, 16), dtype=torch.int8), torch.rand(8) * 1e-2 + 1e-3

    def f(x):
        s = x.abs().amax(-1, keepdim=True).float() / 127.5
        q = (x / s).round().clamp(-128, 127).to(torch.int8)
        return (torch.nn.functional.linear(q.float() * s, codes.float() * scales[:, None])).to(x.dtype)

    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).half()
    gm, options = oracle.traced(f, x), {"target": "ascend910b", "numerics": "vendor"}
    assert judge(gm, [x], **options).verdict == "fused"
    stated = quant_matmul._numerics
    monkeypatch.setattr(quant_matmul, "_numerics", lambda *a, **k: replace(stated(*a, **k), of_step=0.0, of_w=0.0))
    with pytest.raises(Wrong):
        judge(gm, [x], **options)
