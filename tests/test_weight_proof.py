"""The weight that the operator computes with is the graph's own, in every element.

Each case spells a weight; the fused result is compared column by column with the spelling evaluated in float64, within
what the site promises for that column. Cases come in pairs: one that has a fused form and the same with one edit that
has none, often hidden beside an outlier many orders of magnitude larger.
"""

import pytest
import torch
from torch import nn

import quantpass as qp
from tests.helpers import compiled, rules

N, K, G = 32, 64, 32
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
HALF_UNIT = {F16: 2.0**-11, BF16: 2.0**-8, F32: 2.0**-24}


def drawn(*shape, low=-127, high=128, dtype=torch.int8, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def uniform(*shape, low=1e-3, high=1e-2, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64) * (high - low) + low


class Spelled(nn.Module):
    """``linear(x, weight(tensors))``; floating tensors are held in ``dtype``."""

    def __init__(self, weight, dtype, tensors):
        super().__init__()
        self.weight, self.names = weight, list(tensors)
        for name, t in tensors.items():
            self.register_buffer(name, t.to(dtype) if t.is_floating_point() else t)

    def tensors(self, wide):
        held = ((name, getattr(self, name)) for name in self.names)
        return {name: t.double() if wide and t.is_floating_point() else t for name, t in held}

    def forward(self, x):
        return nn.functional.linear(x, self.weight(x.dtype, **self.tensors(False)).to(x.dtype))

    def exactly(self):
        """The weight ``(K, N)`` in float64."""
        return self.weight(F64, **self.tensors(True)).double().t()


def judged(weight, dtype, x=None, *, held=None, target="cpu", **tensors):
    """Compile, run, and hold every column to the bound that the site states; the report."""
    model = Spelled(weight, held or dtype, tensors)
    x = torch.randn(4, K, generator=torch.Generator().manual_seed(5)).to(dtype) if x is None else x
    actual, report = compiled(model, x, target=target)
    w, wide = model.exactly(), x.double()
    wanted, magnitude = wide @ w, wide.abs() @ w.abs()
    unit, tiny = HALF_UNIT[dtype], torch.finfo(dtype).tiny
    if report.fused:
        promised = report.sites[0].numerics
        slack = promised.relative * magnitude + promised.of_x * wide.abs().sum(1, keepdim=True) + promised.absolute
    else:
        slack = (K + 2) * unit * magnitude  # the graph's own arithmetic
    far = (actual.double() - wanted).abs() - slack - unit * wanted.abs() - tiny
    finite = torch.isfinite(model(x))  # what overflows in the graph's own dtype may end anywhere
    assert bool((far <= 0)[finite].all()), f"columns {(~(far <= 0)).any(0).nonzero().flatten().tolist()}: {report}"
    return report


def nibbles(dtype, p, s):
    """uint4 pairs with the zero point 8 in groups along K."""
    codes = torch.stack([p & 15, p >> 4], -1).view(N, K // G, G)
    return ((codes.to(dtype) - 8) * s).reshape(N, K)


PACKED = drawn(N, K // 2, low=0, high=256, dtype=torch.uint8)


@pytest.mark.parametrize("held", [F16, BF16, F32, F64])
@pytest.mark.parametrize("ratio", [1.0, 3.0, 1.001])
@pytest.mark.parametrize("outlier", [None, 1e3, 1e9])
def test_groups_beside_an_outlier_column(held, ratio, outlier):
    """Groups whose scales differ little are groups, however large another column is."""
    s = torch.tensor([1e-3, 1e-3 * ratio], dtype=F64).view(1, 2, 1).repeat(N, 1, 1)
    if outlier:
        s[5] *= min(outlier, 1e7 if held == F16 else outlier)
    s[9] = 0
    report = judged(nibbles, F32, held=held, p=PACKED, s=s)
    assert report.fused == 1
    one = bool((s.to(held)[:, 0] == s.to(held)[:, 1]).all())
    assert report.sites[0].plan.call["antiquant_group_size"] == (0 if one else G)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("target", ["cpu", "ascend910b"])
def test_small_groups_beside_a_huge_column(dtype, target):
    s = torch.tensor([1e-7, 3e-7], dtype=F64).view(1, 2, 1).repeat(N, 1, 1)
    s[5] = 900.0
    report = judged(nibbles, dtype, target=target, p=PACKED, s=s)
    assert report.total == 1
    assert not report.fused or report.sites[0].plan.call["antiquant_group_size"] == G


def products(dtype, c, s, k, e):
    return c.to(dtype) * s * k * e


@pytest.mark.parametrize("outlier", [1.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("rank", ["one", "full", "full in one element", "full by 1e-4"])
def test_a_scale_of_rows_and_columns_has_rank_one(outlier, rank):
    k = torch.ones(1, K, dtype=F64)
    k[0, 3], k[0, 7] = outlier, -1.0
    e = torch.ones(N, K, dtype=F64)
    if rank == "full":
        e = uniform(N, K, low=0.75, high=1.25)
        e[:, 3] = 1
    elif rank != "one":
        e[4, 6] = 2.0 if rank == "full in one element" else 1.0001
    x = torch.randn(4, K, generator=torch.Generator().manual_seed(6))
    x[:, 3] = 0
    report = judged(products, F32, x, c=drawn(N, K), s=uniform(N, 1), k=k, e=e)
    assert report.fused == (rank == "one")
    assert rank == "one" or rules(report) == {"read.weight.along_k"}


@pytest.mark.parametrize("factor", [1.0, 1e9])
@pytest.mark.parametrize("edited", [False, True])
def test_act_order_beside_an_outlier_group(factor, edited):
    """Rows are shuffled; one row of the small group has a scale of its own."""
    order = torch.randperm(K, generator=torch.Generator().manual_seed(2))
    s = uniform(K // G, N)
    s[1] *= factor
    of_row = s[order // G].t().clone()
    if edited:
        row = int((order < G).nonzero()[0])
        of_row[3, row] *= 1.01
    report = judged(lambda dtype, c, s: c.to(dtype) * s, F32, c=drawn(N, K), s=of_row)
    assert report.fused == (not edited)


@pytest.mark.parametrize("zero", [0.0, 3.0, 0.25, 1e3, 1e6])
@pytest.mark.parametrize("step", [0.0, 1.0, 0.125])
@pytest.mark.parametrize("far", [0.0, 1e9])
def test_zero_points_of_groups(zero, step, far):
    """A group's zero point may differ from another's by one beside offsets of a million."""
    z = torch.full((N, K // G, 1), zero, dtype=F64)
    z[:, 1] += step
    z[2] += far
    report = judged(
        lambda dtype, c, s, z: ((c.view(N, K // G, G).to(dtype) - z) * s).reshape(N, K),
        F32, held=F64, c=drawn(N, K), s=uniform(N, K // G, 1), z=z,
    )  # fmt: skip
    assert report.total == 1
    if zero <= 1e3 and not far:
        assert report.fused == 1


@pytest.mark.parametrize("table", ["straight", "bent", "bent a little", "bent at one code"])
def test_codes_through_a_table(table):
    """A table that is a line in its first three entries need not be one."""
    t = torch.arange(16, dtype=F64) - 8
    if table == "bent":
        t[3:] += 0.3
    elif table == "bent a little":
        t[3:] += 5e-4
    elif table == "bent at one code":
        t[11] += 1e-4
    report = judged(
        lambda dtype, c, t, s: t[c.to(torch.int64)] * s,
        F32, held=F64, c=drawn(N, K, low=0, high=16, dtype=torch.uint8), t=t, s=uniform(N, 1),
    )  # fmt: skip
    assert report.fused == (table == "straight")


@pytest.mark.parametrize("scale", [0.0, -1.0, 6e-8, 1e-7, 60000.0])
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize("per", ["column", "group"])
def test_scales_at_the_edges(scale, dtype, per):
    """Zero, negative, subnormal and huge scales in single columns; the small columns keep their precision."""
    s = uniform(N, K // G if per == "group" else 1, 1)
    s[::3, -1] = scale
    c = drawn(N, K, low=-8, high=8)
    report = judged(
        lambda dtype, c, s: (c.view(N, s.shape[1], -1).to(dtype) * s).reshape(N, K), dtype, held=dtype, c=c, s=s
    )
    assert report.total == 1


def test_a_column_without_a_step_must_be_zero():
    """The scale 0 leaves an offset that no zero point can express."""
    s, b = uniform(N, 1), torch.zeros(N, 1, dtype=F64)
    s[4] = 0
    kept = judged(lambda dtype, c, s, b: c.to(dtype) * s + b, F32, c=drawn(N, K), s=s, b=b.clone())
    assert kept.fused == 1
    b[4] = 1e-9
    refused = judged(lambda dtype, c, s, b: c.to(dtype) * s + b, F32, c=drawn(N, K), s=s * 1e6, b=b)
    assert refused.fused == 0


@pytest.mark.parametrize("low", [-8, -5, 0, 90, -128])
@pytest.mark.parametrize("zero", [0.0, 0.5, -3.25, 1e6])
@pytest.mark.parametrize("grouped", [False, True])
def test_codes_moved_into_four_bits(low, zero, grouped):
    """Codes and zero point move together, whatever the zero point is."""
    c = drawn(N, K, low=low, high=low + 16)
    z = torch.full((N, K // G if grouped else 1, 1), zero, dtype=F64) + drawn(N, 1, 1, low=-2, high=3).double()
    report = judged(
        lambda dtype, c, s, z: ((c.view(N, s.shape[1], -1).to(dtype) - z) * s).reshape(N, K),
        F16, held=F64, target="ascend910b", c=c, s=uniform(N, K // G if grouped else 1, 1), z=z,
    )  # fmt: skip
    assert report.total == 1
    if abs(zero) < 4 and abs(low) < 10:
        assert report.fused == 1
        assert report.sites[0].plan.call["weight"].dtype == torch.int32


def test_noise_on_a_dequantized_weight_is_not_the_weight():
    """A sum with something small that is known: not even a thousandth of a step goes unnoticed."""
    noise = torch.randn(N, K, generator=torch.Generator().manual_seed(8), dtype=F64) * 1e-7
    report = judged(lambda dtype, c, s, e: c.to(dtype) * s + e, F32, held=F64, c=drawn(N, K), s=uniform(N, 1), e=noise)
    assert report.total == 1
    assert not report.fused


def test_explaining_says_the_same():
    s = torch.tensor([1e-7, 3e-7]).view(1, 2, 1).repeat(N, 1, 1)
    s[5] = 900.0
    model = Spelled(nibbles, BF16, {"p": PACKED, "s": s})
    site = qp.explain(model, (torch.randn(4, K).bfloat16(),), target="ascend910b").sites[0]
    assert "per group of 32" in site.reading
