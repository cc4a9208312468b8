"""``qp.verify``: each fused site beside the graph's own arithmetic."""

import json
import math

import pytest
import torch
from torch import nn

import quantpass as qp
from quantpass.doors.bisect import bisected
from quantpass.doors.differences import difference
from tests.helpers import IntegerW8A8, StaticW8A8, WeightOnly
from tests.schemes import all_schemes


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
    from quantpass.planning import quant_matmul as plan_quant_matmul

    right = plan_quant_matmul.scale_word
    monkeypatch.setattr(
        plan_quant_matmul, "scale_word", lambda s, offset: right(plan_quant_matmul.ex.mul(s, s), offset)
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


class Readme(nn.Module):
    """The model on the first page."""

    def __init__(self, k=256, n=128):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.codes = nn.Parameter(torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=g), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(n, 1, generator=g).half() * 0.01, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale)


class Requantized(nn.Module):
    """Linears that hand integer codes to each other: each takes the quantization of its result in."""

    def __init__(self, unsigned=False):
        super().__init__()
        zero = 130 if unsigned else 3
        self.layers = nn.ModuleList(
            StaticW8A8(k, n, dtype=torch.float16, zero_point=zero, unsigned=unsigned, scale=0.05)
            for k, n in ((64, 96), (96, 64), (64, 32))
        )

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def torchao(config, dtype=torch.bfloat16):
    def build():
        quantization = pytest.importorskip("torchao.quantization")
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 64)).to(dtype).eval()
        quantization.quantize_(model, config(quantization))
        return model, (torch.randn(5, 128).to(dtype),)

    return build


def pt2e():
    pytest.importorskip("torchao")
    from tests.test_tools import MLP, X, x86_quantizer
    from tests.test_tools import pt2e as converted

    return converted(MLP(), x86_quantizer(), X), (X,)


def tied():
    layer = WeightOnly(64, 64)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), WeightOnly(64, 64)), (x(),)


MODELS = {
    "README": lambda: (Readme(), (torch.randn(4, 256).half(),)),
    "torchao int4 groups": torchao(
        lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32))
    ),
    "torchao int8": torchao(lambda q: q.Int8WeightOnlyConfig(), torch.float16),
    "torchao W8A8 dynamic": torchao(lambda q: q.Int8DynamicActivationInt8WeightConfig()),
    "PT2E static": pt2e,
    "integer matmuls": lambda: (nn.Sequential(IntegerW8A8(64, 96), IntegerW8A8(96, 32)), (x().bfloat16(),)),
    "requantized": lambda: (Requantized(), (x(),)),
    "requantized, uint8": lambda: (Requantized(unsigned=True), (x(),)),
    "tied": tied,
    "zero points": lambda: (WeightOnly(zero_point=True), (x(),)),
    **{s.name: lambda s=s: (s.plain(), (s.x,)) for s in all_schemes() if s.plain is not None},
}


def planned(report):
    """What a report says was planned, site by site."""
    return [
        (s.name, s.op, s.reading, s.fused, s.rejects, s.numerics)
        + ((str(s.plan), s.plan.fixups, s.plan.weight_format, s.plan.nd_reason, s.plan.notes) if s.plan else ())
        for s in report.sites
    ]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", ["ascend310p", "ascend910b"])
def test_the_plans_that_are_verified_are_those_that_are_compiled(name, target):
    """verify, the backend and explain read the same weights, and plan the same calls."""
    model, args = MODELS[name]()
    torch._dynamo.reset()
    backend = qp.backend(target=target)
    with torch.no_grad():
        torch.compile(model, backend=backend)(*args)
    found = qp.verify(model, args, target=target)
    assert backend.report.total
    assert planned(found.report) == planned(backend.report)
    assert planned(qp.explain(model, args, target=target)) == planned(backend.report)
    assert found.missed == ()
    assert len(found.sites) == found.report.fused
    if found.report.fused:
        found.require()


def test_weights_by_value_are_verified_with_their_values():
    """int4 codes packed in bytes and group scales are read on the real weights only."""
    model, args = MODELS["torchao int4 groups"]()
    found = qp.verify(model, args, target="ascend910b")
    assert [d.numerics.kind for d in found.sites] == ["exact", "exact"]
    assert {s.plan.call["weight"].dtype for s in found.report.sites} == {torch.int32}
    model, args = MODELS["README"]()
    assert [str(d.numerics) for d in qp.verify(model, args, target="ascend310p").sites] == ["exact"]


@pytest.mark.parametrize("decompositions", [None, {}])
def test_a_program_is_verified_as_fuse_rewrites_it(decompositions):
    program = torch.export.export(two(), (x(),))
    if decompositions is not None:
        program = program.run_decompositions(decompositions)
    text = str(program.graph)
    found = qp.verify(program, (x(),), target="ascend310p")
    assert str(program.graph) == text
    assert len(found.sites) == 2
    found.require()
    assert planned(found.report) == planned(qp.explain(program, (x(),), target="ascend310p"))
    assert planned(found.report) == planned(qp.fuse(program, target="ascend310p"))


def test_require_fails_where_nothing_was_compared():
    nothing = qp.verify(nn.Linear(8, 8).eval(), (torch.randn(2, 8),), target="ascend910b")
    with pytest.raises(AssertionError, match="no site was compared: no quantized matmul was found"):
        nothing.require()
    refused = qp.verify(WeightOnly(dtype=torch.float32), (x().float(),), target="ascend910b")
    with pytest.raises(AssertionError, match="no site was compared: none is fused"):
        refused.require()
    own = qp.nn.LinearWeightQuant.from_linear(nn.Linear(64, 32, dtype=torch.float16))
    called = qp.verify(own, (x(),), target="ascend910b")
    assert called.report.fused == 1
    with pytest.raises(AssertionError, match="no site was compared: the fused operators are the model's own calls"):
        called.require()


def test_refusals_are_printed():
    found = qp.verify(nn.Sequential(WeightOnly(dtype=torch.float32)), (x().float(),), target="ascend910b")
    assert "Not fused, so not compared:\n  0 (aten.addmm)\n    numerics.float16: the activation is float32" in str(
        found
    )
    assert "Not fused" not in str(qp.verify(two(), (x(),), target="ascend310p"))


def test_require_fails_where_a_fused_site_was_not_compared(monkeypatch):
    """A site whose fused node is not met when the graph runs is named."""
    from quantpass.doors import verification

    class Blind(verification._Forced):
        def run_node(self, n):
            if n.meta.get("quantpass_replaces") == self.first:
                n.meta.pop("quantpass_replaces")
            return super().run_node(n)

        def run(self, *args):
            self.first = next(iter(self._expected))
            return super().run(*args)

    monkeypatch.setattr(verification, "_Forced", Blind)
    found = qp.verify(two(), (x(),), target="ascend310p")
    assert found.missed == ("0",)
    assert "not compared: 0" in str(found)
    with pytest.raises(AssertionError, match="1 of 2 fused sites were not compared: 0"):
        found.require()


def test_a_graph_that_runs_several_times_is_compared_at_its_worst():
    """One layer called on three inputs behind graph breaks: one site, and the largest of its differences."""

    class Looped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = StaticW8A8(64, 64, dtype=torch.float16)

        def forward(self, x):
            for _ in range(3):
                x = self.layer(x)
                torch._dynamo.graph_break()
            return x

    found = qp.verify(Looped(), (x(),), target="ascend310p")
    assert found.report.fused == found.report.total == len(found.sites)
    found.require()


def test_what_a_model_writes_stays_written():
    """A step counter and a cache in buffers: behind a graph break the next graph sees what the first one wrote."""

    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = WeightOnly(64, 32)
            self.register_buffer("cache", torch.zeros(3, 32, dtype=torch.float16))

        def forward(self, x):
            self.cache.add_(self.layer(x))
            torch._dynamo.graph_break()
            return self.cache * 2

    model, plain = Cached(), Cached()
    found = qp.verify(model, (x(),), target="ascend910b")
    assert torch.equal(plain(x()), model.cache * 2)
    assert len(found.sites) == 1
    assert all(d.relative < 0.01 for d in found.outputs)


def test_random_operators_draw_the_same_numbers_in_both_graphs():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = WeightOnly(64, 32)

        def forward(self, x):
            return self.layer(x) + torch.rand(3, 32).half()

    found = qp.verify(Noisy(), (x(),), target="ascend910b")
    assert found.outputs[0].relative < 0.01


@pytest.mark.parametrize("site", [0, 1, 2])
def test_codes_that_one_site_hands_to_the_next_are_compared_too(site, monkeypatch):
    """The uint8 codes between two sites are not in the fused graph, only the int8 ones; a wrong scale still shows."""
    from quantpass.planning import quant_matmul as plan_quant_matmul

    right, calls = plan_quant_matmul.scale_word, []

    def wrong(s, offset):
        calls.append(s)
        return right(plan_quant_matmul.ex.mul(s, s) if len(calls) == site + 1 else s, offset)

    model = Requantized(unsigned=True)
    found = qp.verify(model, (x(),), target="ascend310p")
    assert len(found.sites) == 3
    found.require()
    monkeypatch.setattr(plan_quant_matmul, "scale_word", wrong)
    off = qp.verify(model, (x(),), target="ascend310p")
    assert [d.relative > 0.1 for d in off.sites] == [i == site for i in range(3)]


# -- how far, and from what --------------------------------------------------------------------------------------------


def test_a_difference_is_told_in_units_of_the_last_place():
    graph = torch.tensor([1.0, 2.0, 4.0, -3.0]).half()
    ulp = torch.tensor([1 / 1024, 2 / 1024, 4 / 1024, 2 / 1024]).half()
    d = difference("s", None, graph + ulp * torch.tensor([0, 1, 0, -2]).half(), graph)
    assert d.units == 2
    assert d.mean_units == 0.75
    assert d.histogram == (2, 0, 1, 1, 0, 0, 0)
    assert sum(d.histogram) == 4


def test_codes_differ_in_codes_and_saturate():
    graph = torch.tensor([-128, 5, 127, 0], dtype=torch.int8)
    d = difference("s", None, torch.tensor([-128, 6, 127, 127], dtype=torch.int8), graph)
    assert (d.units, d.largest, d.saturated) == (127, 127, 0.75)
    assert difference("s", None, graph, graph).sqnr == float("inf")
    noise = difference("s", None, torch.tensor([1.1, 1.0]), torch.tensor([1.0, 1.0])).sqnr
    assert noise == pytest.approx(10 * math.log10(2 / 0.01), abs=1e-4)


def test_several_batches_leave_the_largest_difference():
    small, large = x(), x() * 100
    one = qp.verify(two(), (small,), target="ascend310p")
    both = qp.verify(two(), (small,), target="ascend310p", batches=[(large,)])
    assert [d.name for d in both.sites] == [d.name for d in one.sites]
    assert all(b.relative >= a.relative for a, b in zip(one.sites, both.sites, strict=True))
    assert len(both.outputs) == 2


def test_the_layer_that_breaks_the_accuracy_shows_beside_the_float_model():
    """Half of one layer's codes are lost; the others follow the float model."""
    model = nn.Sequential(WeightOnly(64, 64), WeightOnly(64, 64), WeightOnly(64, 64))
    floats = nn.Sequential(*(nn.Linear(64, 64) for _ in model))
    for plain, quantized in zip(floats, model, strict=True):
        plain.weight.data = quantized.codes.float() * quantized.scale.float().reshape(-1, 1)
        plain.bias.data = quantized.bias.float()
    model[1].codes[::2] = 0
    given = torch.randn(4, 64, generator=torch.Generator().manual_seed(3)).half()
    found = qp.verify(model, (given,), target="ascend910b", reference=floats)
    by_name = {d.name: d.sqnr for d in found.reference}
    assert list(by_name) == ["0", "1", "2", "output 0"]
    assert by_name["0"] > 40
    assert by_name["1"] < 10
    found.require()  # fused and unfused are alike: the model itself is broken
    assert "against the float model" in str(found)
    assert json.loads(found.to_json())["reference"][1]["name"] == "1"


# -- which site breaks the results ---------------------------------------------------------------------------------


def measured(harm, names="abcdefgh", within=1.0):
    """A bisection where each site adds what ``harm`` says to the difference of the results; the subsets measured."""
    asked = []

    def measure(fused):
        asked.append("".join(fused))
        return sum(harm.get(n, 0.0) for n in fused)

    return bisected(tuple(names), measure, sum(harm.values()), within), asked


def test_bisection_finds_the_one_site():
    for culprit in "abcdefgh":
        found, asked = measured({culprit: 5.0, "h" if culprit != "h" else "a": 0.1})
        assert (found.site, found.is_single) == (culprit, True), found
        assert found.runs == len(asked) == len(set(asked)) <= 3 + 2
        assert f"leave=('{culprit}',)" in str(found)


def test_bisection_says_where_there_is_no_one_site():
    found, _ = measured(dict.fromkeys("bdfh", 0.4))
    assert (found.prefix, found.site, found.is_single) == (6, "f", False)
    assert "no single culprit" in str(found)
    found, _ = measured({"b": 5.0, "g": 5.0})
    assert (found.site, found.alone, found.without, found.is_single) == ("b", 5.0, 5.0, False)


def test_bisection_has_nothing_to_find():
    found, asked = measured({"c": 0.5})
    assert (found.site, found.runs, asked) == ("", 0, [])
    assert str(found) == "all 8 sites fused, the results differ by 0.5, within 1"
    assert bisected((), lambda fused: 0.0, math.inf, 1.0).site == ""
    assert measured({"a": math.nan})[0].site == "a"


class OneBadLayer(torch.nn.Module):
    """Five layers; the third has groups of very different scales, which one scale a channel can't follow."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = torch.nn.ModuleList(GroupedLinear(i == 2, generator) for i in range(5))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class GroupedLinear(torch.nn.Module):
    """Two groups along K; where ``bad``, the inputs of one are as small as its scale is large."""

    def __init__(self, bad, generator):
        super().__init__()
        codes = torch.randint(-127, 128, (64, 2, 32), dtype=torch.int8, generator=generator)
        large = torch.tensor([100.0 if bad else 1.0, 1.0])
        self.codes = torch.nn.Parameter(codes, requires_grad=False)
        self.scale = torch.nn.Parameter((large * 2e-3).half().reshape(1, 2, 1), requires_grad=False)
        self.gain = torch.nn.Parameter((1 / large).half().repeat_interleave(32), requires_grad=False)

    def forward(self, x):
        weight = (self.codes.half() * self.scale).reshape(64, 64)
        return torch.nn.functional.linear(x * self.gain, weight)


@pytest.mark.parametrize("exported", [False, True])
def test_verify_bisects_a_model(exported):
    model, x = OneBadLayer().eval(), torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).half()
    options = {"target": "ascend310p", "allow": ("weights.refit:0",)}
    given = torch.export.export(model, (x,)) if exported else model
    found = qp.verify(given, (x,), batches=[(-x,)], bisect=True, within=0.05, **options)
    assert found.report.fused == 5
    assert found.bisection.site == "layers.2", found.text(histogram=True)
    assert found.bisection.is_single, found
    assert found.as_dict()["bisection"]["single"]
    again = qp.verify(given, (x,), leave=("layers.[2]",), bisect=True, within=0.05, **options)
    assert (again.report.fused, again.bisection.site) == (4, "")
    (left,) = [s for s in again.report.sites if not s.fused]
    assert (left.name, left.rejects[0].rule) == ("layers.2", "plan.left")
