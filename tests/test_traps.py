"""The traps that real tools set: spellings that look like something else than they are."""

import pytest
import torch
from torch import nn

import quantpass as qp
from tests.helpers import WeightOnly, compiled, rules
from tests.oracle import judge, traced
from tests.spellings import F16, F32, WS, B, K, N, W, X

linear = nn.functional.linear


def judged(f, *args, **options):
    return judge(traced(f, *args), args, **options)


def codes(x, scale=0.03, dtype=torch.int8):
    return torch.clamp(torch.round(x / scale), -128, 127).to(dtype)


def test_weights_folded_before_the_pass_are_named():
    """Constant folding leaves floats on a grid; the report says what to do."""
    folded = W.half() * WS.half()
    report = qp.explain(nn.Linear(K, N).half().requires_grad_(False), (X.half(),), target="ascend910b")
    assert report.total == 0, "an ordinary float weight is no quantized one"
    model = nn.Linear(64, N, bias=False).half().requires_grad_(False)
    grid = torch.randint(-8, 8, (N, 64)).half()
    model.weight.copy_(grid * 0.02)
    x = torch.randn(3, 64).half()
    report = qp.explain(lambda x: model(codes(x).half() * 0.03), (x,), target="ascend910b")
    assert rules(report) == {"read.weight.folded"}
    assert "before constant folding" in report.sites[0].rejects[0].hint
    assert folded.dtype == F16


@pytest.mark.parametrize("dtype", [F16, torch.bfloat16, F32])
@pytest.mark.parametrize("order", ["zero inside", "zero outside"])
@pytest.mark.parametrize("steps", [127.0, 127.5])
@pytest.mark.parametrize("how", ["div", "mul"])
def test_quantize_arithmetic_stays_in_the_graph(dtype, order, steps, how):
    """Another order, divisor or precision changes codes: the graph's own nodes go on making them."""

    def f(x):
        s = x.abs().amax(-1, keepdim=True) / steps
        r = x / s if how == "div" else x * (1 / s)
        q = torch.round(r + 3) if order == "zero inside" else torch.round(r) + 3
        q = torch.clamp(q, -128, 127).to(torch.int8)
        return linear((q.to(dtype) - 0) * s, W.to(dtype) * WS.to(dtype))

    x = X.to(dtype)
    gm = traced(f, x)
    quantize = [n.target for n in gm.graph.nodes if "round" in str(n.target) or "clamp" in str(n.target)]
    assert judge(gm, (x,)).verdict == "fused"
    qp.fuse(gm, target="cpu")
    assert [n.target for n in gm.graph.nodes if "round" in str(n.target) or "clamp" in str(n.target)] == quantize


@pytest.mark.parametrize("clamp_first", [True, False])
def test_clamp_before_round_gives_the_same_codes(clamp_first):
    def f(x):
        r = x / 0.03
        q = torch.round(torch.clamp(r, -128, 127)) if clamp_first else torch.clamp(torch.round(r), -128, 127)
        return linear(q * 0.03, W.float() * WS, B)

    assert judged(f, X * 3).verdict == "fused"


def test_clamp_to_a_fraction_before_round_may_reach_another_integer():
    def f(x):
        return linear(torch.round(torch.clamp(x / 0.03, -128.6, 127.6)) * 0.03, W.float() * WS, B)

    judged(f, X * 9)


def test_integers_past_the_mantissa_of_a_float_container():
    """In bfloat16, 127 + 200 is 328: taking 200 off again gives 128, one beyond int8."""

    def f(x):
        q = (torch.clamp(torch.round(x / 0.03), -128, 127) + 200) - 200
        return linear(q * 0.03, W.bfloat16() * WS.bfloat16())

    judged(f, (X * 9).bfloat16())


def test_float16_scale_after_the_matmul_does_not_overflow():
    """The graph's float16 product of codes is infinite where the fused operator is finite."""
    w = torch.full((N, K), 127, dtype=torch.int8)

    def f(x):
        return linear(torch.full_like(codes(x), 127).half(), w.half()) * (WS.half().flatten() * 0.01)

    assert torch.isinf(torch.full((1, K), 127.0).half() @ w.half().t()).any()
    f(X.half())
    fused = traced(lambda x: linear(codes(x, 1e-4).half(), w.half()) * (WS.half().flatten() * 0.01), X.abs().half())
    report = qp.fuse(fused, target="cpu")
    assert report.fused == 1
    assert torch.isfinite(fused(X.abs().half())).all()


ZEROS = {
    "int8": lambda: torch.randint(-9, 9, (N, 1), dtype=torch.int8),
    "uint8": lambda: torch.randint(0, 9, (N, 1), dtype=torch.uint8),
    "int32": lambda: torch.randint(-9, 9, (N, 1), dtype=torch.int32),
    "int64": lambda: torch.randint(-9, 9, (N, 1)),
    "float16": lambda: torch.randint(-9, 9, (N, 1)).half(),
    "float32": lambda: torch.randint(-9, 9, (N, 1)).float(),
    "float64": lambda: torch.randint(-9, 9, (N, 1)).double(),
    "one": lambda: torch.tensor(5),
}


@pytest.mark.parametrize("kind", ZEROS)
@pytest.mark.parametrize("dtype", [F16, F32])
def test_zero_points_of_every_dtype(kind, dtype):
    z = ZEROS[kind]()

    def f(x):
        return linear(x, ((W.to(dtype) - z) * WS.to(dtype)).to(dtype))

    assert judged(f, X.to(dtype)).verdict == "fused"


def test_packed_and_computed_zero_points():
    packed = torch.randint(0, 256, (N, 1), dtype=torch.uint8)

    def nibbles(x):
        return linear(x, (W.float() - (packed >> 4)) * WS)

    def computed(x):
        return linear(x, (W.float() - torch.zeros_like(WS)) * WS)

    assert judged(nibbles, X).verdict == judged(computed, X).verdict == "fused"


def test_no_cast_node_at_all():
    """``mul(int8, float16)`` converts by itself."""
    assert judged(lambda x: linear(x, W * WS.half()), X.half()).verdict == "fused"
    assert judged(lambda x: linear(x, (W - torch.ones(1, dtype=torch.int32)) * WS), X).verdict == "fused"


@pytest.mark.parametrize("storage", [torch.uint8, torch.int16, torch.int32])
def test_wider_storage_of_8_bit_codes(storage):
    stored = (W.to(torch.int32) + 128).to(storage)
    assert judged(lambda x: linear(x, (stored.float() - 128) * WS), X).verdict == "fused"


def test_int4_in_int8_containers_is_found_by_value():
    model = WeightOnly(n=64)
    model.codes.data = torch.randint(-8, 8, (64, 64), dtype=torch.int8)
    _, report = compiled(model, torch.randn(4, 64).half(), target="ascend910b")
    assert report.sites[0].plan.call["weight"].dtype == torch.int32


def test_dtype_ping_pong():
    """float32 scale times bfloat16 weight, back to bfloat16; float16 first, then bfloat16; float32 clamps between."""

    def promoted(x):
        return linear(x, (W.bfloat16() * WS).bfloat16())

    def through_half(x):
        return linear(x, ((W.half() - 3) * WS.half()).bfloat16())

    def sandwich(x):
        q = torch.clamp_max(torch.clamp_min(torch.round(x / 0.03).float(), -128), 127).bfloat16().to(torch.int8)
        return linear(q.bfloat16() * 0.03, (W.bfloat16() * WS).bfloat16())

    for f in (promoted, through_half, sandwich):
        assert judged(f, X.bfloat16()).verdict == "fused"


def test_dequantized_weight_used_by_several():
    def f(x, tokens):
        w = W.float() * WS
        table = nn.functional.embedding(tokens, w)
        return linear(x, w), linear(x * 2, w), table

    outcome = judged(f, X, torch.arange(4))
    assert outcome.report.fused == 2


def test_one_quantize_with_many_dequantizes():
    def f(x):
        q = codes(x)
        return tuple(linear(q.float() * 0.03, W.float() * WS, B) for _ in range(3))

    assert judged(f, X).report.fused == 3


def test_metadata_asserts_are_no_readers():
    """Exported programs assert the dtype of what they cast."""

    class Cast(nn.Module):
        def forward(self, x):
            return (linear(x.half(), W.half() * WS.half()).float() * 2).half()

    program = torch.export.export(Cast(), (X.half(),))
    assert qp.fuse(program.module(), target="cpu").fused == 1


def test_dead_zero_points():
    """torchao keeps a zero point that nobody reads."""

    class Dead(WeightOnly):
        def __init__(self):
            super().__init__(zero_point=True)

        def forward(self, x):
            self.zero * 2
            return linear(x, self.codes.half() * self.scale, self.bias)

    _, report = compiled(Dead(), torch.randn(4, 64).half())
    assert report.fused == 1
    assert report.sites[0].plan.call["antiquant_offset"] is None


def test_bias_added_in_three_dimensions_between_views():
    def f(x):
        y = torch.mm(x.view(-1, K), (W.float() * WS).t())
        y = y.view(2, 3, N) + B
        return y.view(6, N).view(2, 3, N)

    outcome = judged(f, torch.randn(2, 3, K))
    assert outcome.verdict == "fused"
    assert outcome.report.sites[0].plan.call["bias"] is not None


@pytest.mark.parametrize("size", [[-1, K], [6, K], [6, -1]])
def test_sizes_that_are_left_to_be_found(size):
    def f(x):
        q = codes(x).view(size).float() * 0.03
        return torch.mm(q, (W.float() * WS).permute(-1, -2)).view(2, 3, N)

    assert judged(f, torch.randn(2, 3, K)).verdict == "fused"


@pytest.mark.parametrize("fill", [3.7, -3.7, 300])
def test_filled_tensors_are_read_in_their_own_dtype(fill):
    """``full_like(int8, 3.7)`` holds threes."""

    def f(x):
        q = codes(x)
        return linear((q.float() - torch.full_like(q, fill, dtype=torch.int16)) * 0.03, W.float() * WS)

    assert judged(f, X).verdict == "fused"


def test_round_is_half_to_even():
    x = torch.arange(-16, 16).float().repeat(4, 1) * 0.5 * 0.03125

    def f(x):
        return linear(torch.clamp(torch.round(x / 0.03125), -128, 127).to(torch.int8).float() * 0.03125, W.float() * WS)

    assert judged(f, x).verdict == "fused"


def test_floor_of_a_half_more_is_another_rounding():
    """Its codes are taken as the graph makes them."""

    def f(x):
        q = torch.clamp(torch.floor(x / 0.03125 + 0.5), -128, 127).to(torch.int8)
        return linear(q.float() * 0.03125, W.float() * WS)

    assert judged(f, torch.arange(-16, 16).float().repeat(4, 1) * 0.5 * 0.03125).verdict == "fused"


@pytest.mark.parametrize(
    ("spelled", "turned"),
    [
        (lambda v, n: v - n, lambda v, n: n - v),
        (lambda v, n: v / n, lambda v, n: n / v),
        (lambda v, n: torch.add(v, n, alpha=3), lambda v, n: torch.add(n, v, alpha=3)),
    ],
)
def test_a_value_and_a_number_that_cannot_change_places(spelled, turned):
    """A tensor full of one number is a number, but no value that codes are the scale of."""

    for way, reads in ((spelled, True), (turned, False)):

        def f(x):
            value = codes(x).float() * 0.03
            return linear(way(value, torch.full_like(value, 0.06)), W.float() * WS, B)  # noqa: B023

        gm = traced(f, X)
        found = qp.explain(gm, (X,), target="cpu").sites
        assert judge(gm, (X,)).verdict == "fused"
        assert [s.plan.op for s in found] == ["npu_quant_matmul" if reads else "npu_weight_quant_batchmatmul"]
