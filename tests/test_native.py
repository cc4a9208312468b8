"""``lowering="native"``: PyTorch's own CPU kernels give what the reference kernels give."""

import json
import logging

import expecttest
import pytest
import torch
from torch import nn

import quantpass as qp
from quantpass.doors.settings import make_options
from quantpass.lowering import cpu_contest
from quantpass.lowering.cpu_products import INTEGER_PRODUCTS, WEIGHT_ONLY_PRODUCTS, Product, StaticWeight, int4_product
from quantpass.operators.int4 import pack_int4
from quantpass.operators.weight_quant_matmul import dequantized_weight
from tests.helpers import IntegerW8A8, StaticW8A8, WeightOnly

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
UNIT = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23}


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def run(model, x, lowering, **options):
    torch._dynamo.reset()
    backend = qp.backend(target="cpu", lowering=lowering, **options)
    with torch.no_grad():
        result = torch.compile(model, backend=backend, dynamic=options.pop("dynamic", None))(x)
    backend.report.require(fused=1.0)
    return result


def lowered(model, x, lowering="native"):
    """The graph that runs."""
    seen = []

    def inner(gm, inputs):
        seen.append(gm)
        return gm

    run(model, x, lowering, inner=inner)
    return seen[-1]


def called(gm):
    return {str(n.target) for n in gm.graph.nodes if n.op == "call_function"}


class IntBias(nn.Module):
    """An int32 bias in the integer sums, and a result of codes."""

    def __init__(self, k=4096, n=64):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.codes = nn.Buffer(torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=g))
        self.bias = nn.Buffer(torch.randint(-(2**24), 2**24, (n,), dtype=torch.int32, generator=g))

    def forward(self, q):
        acc = torch._int_mm(q, self.codes.t()) + self.bias
        return torch.clamp(torch.round(acc.float() * 2e-6), -128, 127).to(torch.int8)


@pytest.mark.parametrize("m", [1, 17, 64])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("module", [StaticW8A8, IntegerW8A8])
def test_integer_matmuls_are_bit_equal(module, dtype, m):
    model, x = module(k=192, n=80, dtype=dtype), torch.randn(m, 192, dtype=dtype)
    assert torch.equal(run(model, x, "native"), run(model, x, "reference"))
    assert not any("quantpass" in t for t in called(lowered(model, x)))


def test_a_cpu_runs_through_its_own_kernels_by_default():
    """What defines the operators stays for verification, and for graphs that follow a chip's rules."""
    for door in ("backend", "torch.compile(backend='quantpass')", "fuse"):
        assert make_options({"target": "cpu"}, door).lowering == "native"
        assert make_options({"target": "ascend310p"}, door).lowering == "reference"
    for door in ("explain", "verify"):
        assert make_options({"target": "cpu"}, door).lowering == "reference"


@pytest.mark.parametrize("codes", [-128, 127])
def test_sums_at_the_edge_of_the_range_are_bit_equal(codes):
    model = IntBias()
    model.codes.fill_(codes)
    q = torch.full((32, 4096), -128, dtype=torch.int8)
    q[1::2] = 127
    assert torch.equal(run(model, q, "native"), run(model, q, "reference"))


@pytest.mark.parametrize("m", [1, 17])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_weight_only_matmuls_differ_by_the_order_of_sums(dtype, m, zero_point, bias):
    model, x = WeightOnly(k=192, n=80, dtype=dtype, zero_point=zero_point, bias=bias), torch.randn(m, 192, dtype=dtype)
    fast, reference = run(model, x, "native").double(), run(model, x, "reference").double()
    weight = (model.codes.double() - (0 if model.zero is None else model.zero.double())) * model.scale.double()
    sums = x.double().abs() @ weight.abs().t()
    product = reference if model.bias is None else reference - model.bias.double()
    # Float32 sums in any order; the weight and the product rounded once each, the result once more.
    allowed = sums * (192 * 2.0**-24 + UNIT[dtype] ** 2) + UNIT[dtype] * (product.abs() + reference.abs() + sums / 8)
    assert bool(((fast - reference).abs() <= allowed).all())
    assert not any("quantpass" in t for t in called(lowered(model, x)))


def weight(k, n, packed=False, group_size=0, offset=False, dtype=torch.bfloat16, transposed=False):
    g = torch.Generator().manual_seed(k + n)
    low, high = (-8, 8) if packed else (-128, 128)
    codes = torch.randint(low, high, (n, k) if transposed else (k, n), dtype=torch.int8, generator=g)
    shape = (k // group_size, n) if group_size else (n,)
    scale = (torch.rand(shape, generator=g) + 0.5).to(dtype)
    shift = torch.randint(-3, 4, shape, generator=g).to(dtype) if offset else None
    return StaticWeight(pack_int4(codes) if packed else codes, transposed, scale, shift, group_size)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("product", INTEGER_PRODUCTS, ids=lambda p: p.name)
def test_every_integer_product_is_exact(product, transposed):
    w, x = weight(96, 48, transposed=transposed), torch.randint(-128, 128, (9, 96), dtype=torch.int8)
    codes = (w.codes.t() if transposed else w.codes).double()
    assert torch.equal(product.run(x, *product.prepare(w, torch.int8)).double(), x.double() @ codes)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("product", "given"),
    [
        *((p, {}) for p in WEIGHT_ONLY_PRODUCTS),
        *((p, {"offset": True}) for p in WEIGHT_ONLY_PRODUCTS[:2]),
        *((p, {"group_size": 32, "packed": True}) for p in (*WEIGHT_ONLY_PRODUCTS[:2], int4_product(32))),
    ],
    ids=lambda v: v.name if isinstance(v, Product) else "-".join(v) or "plain",
)
def test_every_weight_only_product_multiplies_by_the_dequantized_weight(product, given, transposed):
    w, dtype = weight(128, 48, transposed=transposed, **given), torch.bfloat16
    assert product.takes(w, dtype)
    x = torch.randn(9, 128, dtype=dtype)
    real = dequantized_weight(
        w.codes, w.scale.double().to(dtype), w.offset, dtype, group_size=w.group_size, transpose_weight=transposed
    ).double()
    exact, size = x.double() @ real, x.double().abs() @ real.abs()
    assert bool(((product.run(x, *product.prepare(w, dtype)).double() - exact).abs() <= size * 2.0**-8).all())


@pytest.mark.parametrize(
    ("product", "given", "dtype"),
    [
        (WEIGHT_ONLY_PRODUCTS[2], {}, torch.float16),  # a scalar loop there
        (WEIGHT_ONLY_PRODUCTS[2], {"offset": True}, torch.bfloat16),  # no zero points
        (WEIGHT_ONLY_PRODUCTS[2], {"group_size": 32}, torch.bfloat16),  # one scale a channel
        (WEIGHT_ONLY_PRODUCTS[2], {"k": 120}, torch.bfloat16),  # the kernel reads K in steps of 16
        (int4_product(32), {"group_size": 32}, torch.bfloat16),  # int8 codes
        (int4_product(16), {"group_size": 16, "packed": True}, torch.bfloat16),  # groups of 32 at least
        (int4_product(32), {"group_size": 32, "packed": True, "offset": True}, torch.bfloat16),  # a rounded zero point
    ],
    ids=lambda v: v.name if isinstance(v, Product) else "-".join(v) if isinstance(v, dict) else str(v),
)
def test_a_product_says_what_it_does_not_take(product, given, dtype):
    assert not product.takes(weight(**{"k": 128, "n": 48, "dtype": dtype} | given), dtype)


def slow(x, w):
    for _ in range(200):
        torch._int_mm(x, w)
    return torch._int_mm(x, w)


def test_the_fastest_wins_and_is_remembered(tmp_path):
    fast = INTEGER_PRODUCTS[0]
    slower = Product("slow", fast.takes, fast.prepare, slow)
    contest = [slower, fast]
    able = {"products": contest, "weight": weight(256, 128), "shape": (256, 128), "dtype": torch.int8, "m": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_contest, "INTEGER_PRODUCTS", ())  # both are trusted here
        assert cpu_contest.fastest(**able)[0] is fast
        (name,) = json.loads((tmp_path / "quantpass" / "cpu-products.json").read_text()).values()
        assert name == fast.name
        patch.setattr(cpu_contest, "_measured", None)  # not asked again
        assert cpu_contest.fastest(**able)[0] is fast


def test_what_was_measured_beside_other_work_is_measured_anew_once_that_is_over(monkeypatch):
    fast = INTEGER_PRODUCTS[0]
    quick = Product("quick now", fast.takes, fast.prepare, fast.run)
    able = {"weight": weight(256, 128), "shape": (256, 128), "dtype": torch.int8, "m": 4}
    winners: list[Product] = []
    monkeypatch.setattr(cpu_contest, "INTEGER_PRODUCTS", ())

    def measured(products, w, *_):
        winner = winners.pop()  # else nothing was to be measured
        return winner, winner.prepare(w, torch.int8)

    def chosen(load):
        monkeypatch.setattr(cpu_contest.os, "getloadavg", lambda: (load, load, load))
        return cpu_contest.fastest([quick, fast], **able)[0]

    monkeypatch.setattr(cpu_contest, "_measured", measured)
    winners.append(quick)
    assert chosen(load=99.0) is quick and chosen(load=99.0) is quick
    winners.append(fast)
    assert chosen(load=0.5) is fast and chosen(load=0.5) is fast and chosen(load=99.0) is fast


def test_a_product_with_other_numbers_is_left_out(caplog):
    right = INTEGER_PRODUCTS[0]
    wrong = Product("wrong", right.takes, right.prepare, lambda x, w: torch._int_mm(x, w) + 1)
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, "quantpass"):
        patch.setattr(cpu_contest, "INTEGER_PRODUCTS", ())
        won = cpu_contest.fastest([right, wrong], weight(256, 128), (256, 128), torch.int8, 4)
    assert won[0] is right
    assert "'wrong' is not used" in caplog.text


def test_a_large_bias_tells_no_products_apart(caplog):
    given = weight(256, 128)
    biased = StaticWeight(given.codes, given.transposed, given.scale, bias=torch.full((128,), 1e6))
    with caplog.at_level(logging.WARNING, "quantpass"):
        cpu_contest.fastest(WEIGHT_ONLY_PRODUCTS, biased, (256, 128), torch.bfloat16, 4)
    assert not caplog.records


def test_a_tiny_weight_is_not_measured(monkeypatch):
    monkeypatch.setattr(cpu_contest, "_measured", None)
    won = cpu_contest.fastest(WEIGHT_ONLY_PRODUCTS, weight(128, 64), (128, 64), torch.bfloat16, 4)
    assert won[0] is WEIGHT_ONLY_PRODUCTS[0]


@pytest.mark.parametrize(("dtype", "left"), [(torch.bfloat16, "packed int8"), (torch.float16, None)])
def test_a_weight_is_not_dequantized_where_memory_is_short(dtype, left, monkeypatch):
    monkeypatch.setattr(cpu_contest, "available_memory", lambda: 16 * 4 * 256 * 128 - 1)
    won = cpu_contest.fastest(WEIGHT_ONLY_PRODUCTS, weight(256, 128, dtype=dtype), (256, 128), dtype, 4)
    assert (won and won[0].name) == left
    model, x = WeightOnly(k=256, n=128, dtype=dtype), torch.randn(3, 256, dtype=dtype)
    torch.testing.assert_close(run(model, x, "native"), run(model, x, "reference"), rtol=2.0**-6, atol=2.0**-4)


def test_products_that_overflow_in_one_dtype_are_still_compared():
    """What the contest draws is beyond float16 for this weight; what the model is given need not be."""
    torch.manual_seed(0)
    model, x = WeightOnly(k=192, n=80, dtype=torch.float16, bias=False), torch.randn(4, 192).half() * 1e-3
    model.scale.data.fill_(60.0)
    reference = run(model, x, "reference")
    torch.testing.assert_close(run(model, x, "native"), reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()))


def test_an_integer_product_that_saturates_is_not_trusted(monkeypatch):
    exact = INTEGER_PRODUCTS[0]
    pairs = Product(
        "pairs in 16 bits", exact.takes, exact.prepare, lambda x, w: torch._int_mm(x, w).clamp(-(2**15), 2**15)
    )
    monkeypatch.setattr(cpu_contest, "INTEGER_PRODUCTS", (pairs, exact))
    assert not cpu_contest.is_exact("pairs in 16 bits")
    assert cpu_contest.is_exact(exact.name)


def test_broken_memory_is_measured_anew(tmp_path):
    file = tmp_path / "quantpass" / "cpu-products.json"
    file.parent.mkdir()
    for text in ("", "[]", "{", '{"a": '):
        file.write_text(text)
        model, x = WeightOnly(k=256, n=128, dtype=torch.bfloat16), torch.randn(3, 256, dtype=torch.bfloat16)
        run(model, x, "native")
        assert json.loads(file.read_text())


def test_sizes_that_are_known_at_run_time_only():
    model = WeightOnly(dtype=torch.bfloat16)
    compiled = torch.compile(model, backend=qp.backend(target="cpu", lowering="native"), dynamic=True)
    reference = torch.compile(model, backend=qp.backend(target="cpu", lowering="reference"), dynamic=True)
    for m in (5, 1, 130):
        x = torch.randn(2, m, 64, dtype=torch.bfloat16)
        torch.testing.assert_close(compiled(x), reference(x))


def test_a_weight_that_changes():
    model, q = IntBias(k=64), torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=qp.backend(target="cpu", lowering="native"))
    before = compiled(q)
    model.codes.neg_()
    model.bias.neg_()
    after = compiled(q)
    assert torch.equal(after, run(model, q, "reference"))
    assert not torch.equal(before, after)


class Written(IntBias):
    def forward(self, q):
        self.codes.add_(1)
        return super().forward(q)


def test_a_weight_that_the_graph_writes_to_keeps_the_reference():
    model, q = Written(k=64), torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    twin = Written(k=64)
    compiled = torch.compile(model, backend=qp.backend(target="cpu", lowering="native"))
    for _ in range(3):
        assert torch.equal(compiled(q), twin(q))


def test_a_program_can_be_saved(tmp_path):
    model, x = StaticW8A8(dtype=torch.bfloat16), torch.randn(4, 64, dtype=torch.bfloat16)
    program, reference = (torch.export.export(model, (x,)) for _ in range(2))
    qp.fuse(program, target="cpu", lowering="native").require(fused=1.0)
    qp.fuse(reference, target="cpu", lowering="reference")
    torch.export.save(program, tmp_path / "p.pt2")
    loaded = torch.export.load(tmp_path / "p.pt2")
    assert not any("quantpass" in t for t in called(loaded.graph_module))
    assert torch.equal(loaded.module()(x), reference.module()(x))


def test_the_prepared_codes_are_let_go():
    """One copy of the weight, in the form that is read."""
    model, x = WeightOnly(k=256, n=256, dtype=torch.bfloat16), torch.randn(4, 256, dtype=torch.bfloat16)
    program = torch.export.export(model, (x,))
    qp.fuse(program, target="cpu", lowering="native")
    held = [t for t in (*program.state_dict.values(), *program.constants.values()) if t.numel() == 256 * 256]
    assert len(held) == 1


def test_what_is_not_a_matmul_by_a_static_weight_keeps_the_reference():
    class Attention(nn.Module):
        def forward(self, q, k):
            return (torch.matmul(q.float(), k.float()) * 0.01).half()

    q, k = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((2, 5, 16), (2, 16, 7)))
    torch._dynamo.reset()
    fast = torch.compile(Attention(), backend=qp.backend(target="cpu", lowering="native"))(q, k)
    torch._dynamo.reset()
    assert torch.equal(fast, torch.compile(Attention(), backend=qp.backend(target="cpu", lowering="reference"))(q, k))


@pytest.mark.slow
@pytest.mark.parametrize("module", [WeightOnly, StaticW8A8])
def test_inductor_compiles_what_is_left(module):
    model, x = module(dtype=torch.float32), torch.randn(4, 64)
    got, wanted = run(model, x, "native", inner="inductor"), run(model, x, "reference")
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("product", INTEGER_PRODUCTS, ids=lambda p: p.name)
def test_one_row_through_inductor(product, monkeypatch):
    """Inductor gives a view of one row a row stride of 0, by which _int_mm reads other numbers."""
    monkeypatch.setattr("quantpass.lowering.native.INTEGER_PRODUCTS", (product,))
    model, x = IntegerW8A8(dtype=torch.float32), torch.randn(1, 1, 64)
    wanted = run(model, x, "reference")
    torch.testing.assert_close(run(model, x, "native", inner="inductor"), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_inductor_takes_weights_in_onednn_s_own_layout(monkeypatch):
    onednn = next(p for p in INTEGER_PRODUCTS if p.opaque)
    monkeypatch.setattr("quantpass.lowering.native.INTEGER_PRODUCTS", (onednn,))
    model, x = StaticW8A8(dtype=torch.float32), torch.randn(4, 64)
    for inner in ("eager", "inductor"):
        assert torch.equal(run(model, x, "native", inner=inner), run(model, x, "reference"))


class TestGraph(expecttest.TestCase):
    def test_an_integer_matmul(self):
        from quantpass.graph.dump import dump

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("quantpass.lowering.native.INTEGER_PRODUCTS", INTEGER_PRODUCTS[:1])
            gm = lowered(IntegerW8A8(dtype=torch.bfloat16), torch.randn(4, 64, dtype=torch.bfloat16))
        self.assertExpectedInline(
            dump(gm),
            """\
%arg0_1: bf16[4, 64] = input
%quantpass_scale: f32[96] = input
%quant_matmul_0: i8[64, 96] = input
%_to_copy: f32[4, 64] = aten._to_copy(%arg0_1, dtype=float32)
%abs_1: f32[4, 64] = aten.abs(%_to_copy)
%amax: f32[4, 1] = aten.amax(%abs_1, [-1], True)
%div: f32[4, 1] = aten.div.Tensor(%amax, 127)
%view_1: f32[4] = aten.view(%div, [-1])
%div_1: f32[4, 64] = aten.div.Tensor(%_to_copy, %div)
%round_1: f32[4, 64] = aten.round(%div_1)
%clamp: f32[4, 64] = aten.clamp(%round_1, -128, 127)
%_to_copy_1: i8[4, 64] = aten._to_copy(%clamp, dtype=int8)
%_int_mm_1: i32[4, 96] = aten._int_mm(%_to_copy_1, %quant_matmul_0)
%_to_copy_4: f32[4, 96] = aten._to_copy(%_int_mm_1, dtype=float32)
%mul_2: f32[4, 96] = aten.mul.Tensor(%_to_copy_4, %quantpass_scale)
%unsqueeze: f32[4, 1] = aten.unsqueeze(%view_1, -1)
%mul_3: f32[4, 96] = aten.mul.Tensor(%mul_2, %unsqueeze)
%_to_copy_5: bf16[4, 96] = aten._to_copy(%mul_3, dtype=bfloat16)
return [%_to_copy_5]""",
        )


@pytest.mark.parametrize("lowering", ["reference", "native"])
def test_one_row_that_is_a_transposed_view(lowering):
    """A float matmul with its operands in float64's range: what _int_mm makes of strides (1, 1) must not come through."""
    codes = torch.randint(-127, 128, (512, 128), dtype=torch.int8)

    def columns(x):
        return (x.round().clamp(-128, 127).to(torch.int8).t().float() @ codes.float()) * 2.0**-12

    x = torch.randint(-127, 128, (512, 1)).float()
    assert torch.equal(run(columns, x, lowering), columns(x))
