"""The fused operators' arithmetic, against integer and float64 oracles written here from the documents."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpass.graph.scale_words import fp19, pack_scale_word, unpack_scale_word
from quantpass.lowering.fractal_nz import from_fractal_nz, nz_bytes, pack_int4_nz, tile_columns, to_fractal_nz
from quantpass.operators.anti_quant import npu_anti_quant
from quantpass.operators.dynamic_quant import npu_dynamic_quant
from quantpass.operators.int4 import pack_int4, unpack_int4
from quantpass.operators.quantize import npu_quantize
from quantpass.operators.weight_quant_matmul import chosen_template

ops = torch.ops.quantpass
SEEDS = st.integers(0, 2**31)
SIZES = st.integers(1, 33)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def codes(g, *shape, low=-128, high=128):
    return torch.randint(low, high, shape, dtype=torch.int8, generator=g)


def scales(g, *shape):
    return (torch.rand(shape, generator=g) + 0.1) * 10.0 ** float(torch.randint(-4, 1, (1,), generator=g))


# -- the scale word ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "offset", "word"),
    [
        (1.0, None, 0x40003F800000),
        (0.1, None, 0x40003DCCC000),
        (0.1, 3.5, 0x40803DCCC000),
        (-0.5, -1.0, 0x7FE0BF000000),
        (0.0123, 300.0, 0x5FE03C498000),
        (0.0123, -300.0, 0x60003C498000),
    ],
)
def test_golden_words(scale, offset, word):
    given_offset = None if offset is None else torch.tensor([offset])
    assert ops.trans_quant_param(torch.tensor([scale]), given_offset).item() == word


def test_rounding_mode_1_is_half_to_even_in_the_mantissa():
    mode = lambda s, m: ops.trans_quant_param(torch.tensor([s]), None, m).item() & 0xFFFFFFFF  # noqa: E731
    assert mode(0.1, 1) == 0x3DCCC000
    exact = np.array([0x3F801000, 0x3F803000, 0x3F801001, 0x00001234, 0x7F7FF000], dtype=np.uint32).view(np.float32)
    assert [hex(mode(float(s), 1)) for s in exact] == ["0x3f800000", "0x3f804000", "0x3f802000", "0x0", "0x7f800000"]
    assert [hex(mode(float(s), 0)) for s in exact] == ["0x3f800000", "0x3f802000", "0x3f800000", "0x0", "0x7f7fe000"]


def packed_by_numpy(scale, offset):
    bits = np.float32(scale).view(np.uint32) & np.uint32(0xFFFFE000)
    word = int(bits) | 1 << 46
    if offset is not None:
        word |= (int(np.clip(np.rint(np.float32(offset)), -256, 255)) & 0x1FF) << 37
    return word


@given(st.floats(width=32, allow_nan=False), st.none() | st.floats(-1000, 1000, width=32))
def test_words_pack_and_unpack(scale, offset):
    given_offset = None if offset is None else torch.tensor([offset], dtype=torch.float32)
    word = pack_scale_word(torch.tensor([scale], dtype=torch.float32), given_offset)
    assert word.item() == packed_by_numpy(scale, offset)
    back, back_offset = unpack_scale_word(word)
    assert torch.equal(back, fp19(torch.tensor([scale], dtype=torch.float32)))
    assert back_offset.item() == (0 if offset is None else int(np.clip(np.rint(np.float32(offset)), -256, 255)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, dtype=torch.float16),), "scale is torch.float16; it must be float32"),
        ((torch.ones(2, dtype=torch.int64),), "scale is torch.int64"),
        ((torch.ones(2), None, 2), "round_mode is 2"),
        ((torch.ones(0),), "may not be empty"),
        ((torch.ones(4), torch.ones(2, 2)), "2-D ones must be equal"),
    ],
)
def test_trans_quant_param_with_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.trans_quant_param(*arguments)


# -- packing and layout --------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 6), SEEDS)
def test_int4_packing_round_trip(rows, words, seed):
    c = codes(generator(seed), rows, words * 8, low=-8, high=8)
    packed = pack_int4(c)
    assert torch.equal(unpack_int4(packed), c)
    expected = np.zeros((rows, words), dtype=np.uint32)
    for i in range(8):
        expected |= (c.numpy()[:, i::8].astype(np.int64) & 0xF).astype(np.uint32) << np.uint32(4 * i)
    assert np.array_equal(packed.numpy().view(np.uint32), expected), "element i in bits 4i to 4i+3"


def test_int4_packing_with_bad_input():
    with pytest.raises(ValueError, match="multiple of 8"):
        ops.pack_int4(torch.zeros(2, 12, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"codes lie in \[1, 8\]"):
        ops.pack_int4(torch.arange(9, dtype=torch.int8)[:8].reshape(1, 8) + 1)


NZ_DTYPES = [torch.int8, torch.float16, torch.bfloat16, torch.int32]


@given(st.integers(1, 40), st.integers(1, 70), st.sampled_from(NZ_DTYPES), st.sampled_from([(), (2,), (2, 3)]), SEEDS)
def test_fractal_nz_round_trip(rows, columns, dtype, batch, seed):
    x = torch.randint(-100, 100, (*batch, rows, columns), generator=generator(seed)).to(dtype)
    tiles = to_fractal_nz(x)
    c0 = tile_columns(dtype)
    assert tiles.shape == (*batch, -(-columns // c0), -(-rows // 16), 16, c0)
    assert torch.equal(from_fractal_nz(tiles, rows, columns), x)
    assert tiles.numel() * tiles.element_size() == nz_bytes(x.shape, dtype)
    r, c = rows - 1, columns - 1
    assert torch.equal(tiles[..., c // c0, r // 16, r % 16, c % c0], x[..., r, c])
    assert int((tiles != 0).sum()) == int((x != 0).sum()), "padding is zero"


def test_fractal_nz_of_packed_int4_has_tiles_of_8_columns():
    c = codes(generator(0), 40, 72, low=-8, high=8)
    tiles = pack_int4_nz(c)
    assert tiles.shape == (2, 3, 16, 8)
    assert torch.equal(unpack_int4(from_fractal_nz(tiles, 40, 9)), c)


# -- quant_matmul --------------------------------------------------------------------------------------------------


def exact_acc(a, b):
    return np.matmul(a.numpy().astype(np.int64), b.numpy().astype(np.int64))


def numpy_fp19(scale):
    return (scale.numpy().astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def quant_matmul_oracle(x1, x2, scale, *, offset=None, pertoken_scale=None, bias=None, output_dtype=None):
    """Spec 2.5, step by step in numpy."""
    acc = exact_acc(x1, x2)
    out = output_dtype or torch.int8
    if bias is not None and bias.dtype == torch.int32:
        acc, bias = acc + bias.numpy().astype(np.int64), None
    if out == torch.int32:
        return torch.from_numpy(acc).to(torch.int32)
    a = acc.astype(np.float32)
    word = out == torch.int8 or (out == torch.float16 and pertoken_scale is None and bias is None)
    if word:
        t = a * numpy_fp19(scale)
        if out == torch.float16:
            return torch.from_numpy(t).to(torch.float16)
        shift = 0 if offset is None else np.clip(np.rint(offset.numpy()), -256, 255).astype(np.int64)
        q = np.clip(np.rint(t), -256, 255).astype(np.int64)
        return torch.from_numpy(np.clip(q + shift, -128, 127)).to(torch.int8)
    t = a * scale.float().numpy()
    if pertoken_scale is not None:
        t = t * pertoken_scale.numpy()[:, None]
    if bias is not None:
        t = t + bias.float().numpy()
    return torch.from_numpy(t.astype(np.float32)).to(out)


@st.composite
def quant_matmul_calls(draw):
    g = generator(draw(SEEDS))
    m, k, n = draw(SIZES), draw(SIZES), draw(SIZES)
    lead1, lead2 = draw(st.sampled_from([((), ()), ((2,), ()), ((), (2,)), ((2, 1), (3,)), ((1, 2, 1, 3), (3,))]))
    out = draw(st.sampled_from([torch.int8, torch.float16, torch.bfloat16, torch.int32, torch.float32]))
    x1 = codes(g, *lead1, m, k)
    transpose = draw(st.booleans())
    x2 = codes(g, *lead2, n, k) if transpose else codes(g, *lead2, k, n)
    arguments = {"scale": scales(g, draw(st.sampled_from([1, n]))), "output_dtype": out}
    if out.is_floating_point and draw(st.booleans()):
        arguments["pertoken_scale"] = scales(g, m)
    bias = draw(st.sampled_from([None, torch.int32, torch.float16, torch.bfloat16, torch.float32]))
    if bias == torch.int32:
        arguments["bias"] = torch.randint(-(2**20), 2**20, (n,), dtype=torch.int32, generator=g)
    elif bias is not None and out.is_floating_point:
        arguments["bias"] = torch.randn(n, generator=g).to(bias)
    if out == torch.int8 and draw(st.booleans()):
        arguments["offset"] = (torch.rand(draw(st.sampled_from([1, n])), generator=g) - 0.5) * 300
    return x1, x2, transpose, arguments


@settings(max_examples=150, deadline=None)
@given(quant_matmul_calls())
def test_quant_matmul_is_the_formula_bit_for_bit(call):
    x1, x2, transpose, arguments = call
    actual = ops.quant_matmul(x1, x2, transpose_x2=transpose, **arguments)
    expected = quant_matmul_oracle(x1, x2.transpose(-1, -2) if transpose else x2, **arguments)
    assert torch.equal(actual, expected)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 4), st.integers(1, 4), SEEDS, st.booleans())
def test_quant_matmul_of_packed_int4(m, kw, nw, seed, transpose):
    g = generator(seed)
    x1, x2 = codes(g, m, kw * 8, low=-8, high=8), codes(g, kw * 8, nw * 8, low=-8, high=8)
    stored = pack_int4(x2.t().contiguous()) if transpose else pack_int4(x2)
    arguments = {"scale": scales(g, nw * 8), "output_dtype": torch.float16}
    actual = ops.quant_matmul(pack_int4(x1), stored, transpose_x2=transpose, **arguments)
    assert torch.equal(actual, quant_matmul_oracle(x1, x2, **arguments))


def test_scale_word_with_and_without_its_offset():
    g = generator(3)
    x1, x2, s, o = codes(g, 4, 32), codes(g, 32, 8), scales(g, 8) * 1e-3, torch.full((8,), 17.0)
    packed = ops.trans_quant_param(s, o)
    both = ops.quant_matmul(x1, x2, s, offset=o)
    assert torch.equal(ops.quant_matmul(x1, x2, packed), both)
    assert torch.equal(ops.quant_matmul(x1, x2, packed, offset=o * 5), both), "the offset tensor is not read"
    lost = ops.quant_matmul(x1, x2, ops.trans_quant_param(s), offset=o)
    assert torch.equal(lost, ops.quant_matmul(x1, x2, s)), "an offset outside the word is lost"


def test_float16_overflow():
    big = torch.full((1, 64), 127, dtype=torch.int8)
    call = lambda **kw: ops.quant_matmul(big, big.t(), torch.ones(1), output_dtype=torch.float16, **kw)  # noqa: E731
    assert call().item() == float("inf"), "A2/A3 run in INF/NAN mode"
    assert call(saturate=True).item() == 65504.0, "310P saturates"


def test_per_group_int4():
    g = generator(5)
    m, k, n, group = 3, 512, 16, 256
    x1, x2 = codes(g, m, k, low=-8, high=8), codes(g, k, n, low=-8, high=8)
    s, o, pt = scales(g, 2, n), torch.randint(-7, 8, (2, n), generator=g).half(), scales(g, m, 1)
    actual = ops.quant_matmul(
        pack_int4(x1),
        pack_int4(x2),
        s,
        offset=o,
        pertoken_scale=pt,
        output_dtype=torch.bfloat16,
        group_sizes=[0, 0, group],
    )
    real = torch.zeros(m, n, dtype=torch.float64)
    for i in range(2):
        rows = slice(i * group, (i + 1) * group)
        real += x1[:, rows].double() @ (x2[rows].double() - o[i].double()) * s[i].double()
    assert torch.allclose(actual.double(), real * pt.double(), rtol=2**-8)


def test_int8_by_int4_needs_the_callers_correction():
    g = generator(6)
    m, k, n = 2, 512, 16
    x1, x2 = codes(g, m, k), codes(g, k, n, low=-8, high=8)
    s = torch.rand(2, n, generator=g) * 1e-2
    words = ops.trans_quant_param(s.reshape(-1)).reshape(2, n)
    spread = fp19(s).double().repeat_interleave(256, 0)
    correction = (8 * spread * x2.double()).sum(0)
    actual = ops.quant_matmul(
        x1,
        pack_int4(x2),
        words,
        offset=correction.float(),
        pertoken_scale=torch.ones(m, 1),
        output_dtype=torch.float16,
        group_sizes=[0, 0, 256],
    )
    real = x1.double() @ (x2.double() * spread)
    # The vendor's own acceptance: 2^-8 of max(|golden|, 1) for float16 and K below 2048; sums are kept in float16.
    assert ((actual.double() - real).abs() <= 2**-7 * real.abs().clamp(min=1) + 0.5).all()


A, B, S = torch.ones(2, 8, dtype=torch.int8), torch.ones(8, 4, dtype=torch.int8), torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((A.float(), B, S), "x1 is torch.float32"),
        ((A[0], B, S), "x1 has rank 1"),
        ((A, B[:7], S), "x1 has K = 8 and x2 has K = 7"),
        ((A, B, torch.ones(3)), r"scale has shape \(3,\)"),
        ((A, B, S.half()), "scale is torch.float16"),
        ((A, B, S, {"bias": torch.ones(4).half()}), "it must be int32"),
        ((A, B, S, {"bias": torch.ones(5, dtype=torch.int32)}), r"bias has shape \(5,\)"),
        (
            (A, B, S, {"pertoken_scale": torch.ones(3), "output_dtype": torch.float16}),
            r"pertoken_scale has shape \(3,\)",
        ),
        ((A, B, S, {"pertoken_scale": torch.ones(2)}), "needs a floating output"),
        ((A, B, S, {"output_dtype": torch.int64}), "output_dtype is torch.int64"),
        ((A, B, torch.ones(4, dtype=torch.int64), {"output_dtype": torch.bfloat16}), "an int64 scale gives"),
    ],
)
def test_quant_matmul_with_bad_input(arguments, message):
    *positional, keywords = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ValueError, match=message):
        ops.quant_matmul(*positional, **keywords)


# -- weight_quant_matmul -------------------------------------------------------------------------------------------


@st.composite
def weight_quant_calls(draw):
    g = generator(draw(SEEDS))
    dtype = draw(st.sampled_from(FLOATS))
    m, kw, nw = draw(SIZES), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    k, n = kw * 8, nw * 8
    int4, transpose = draw(st.booleans()), draw(st.booleans())
    group = draw(st.sampled_from([0, 8, 16]))
    group = group if group and k % group == 0 and group < k else 0
    w = codes(g, k, n, low=-8, high=8) if int4 else codes(g, k, n)
    shape = (k // group, n) if group else draw(st.sampled_from([(1,), (n,), (1, n)]))
    scale = (torch.rand(shape, generator=g) * 0.05 + 1e-3).to(dtype)
    offset = torch.randint(-9, 9, shape, generator=g).to(dtype) if draw(st.booleans()) else None
    bias = torch.randn(n, generator=g).to(dtype) if draw(st.booleans()) else None
    x = torch.randn(m, k, generator=g).to(dtype)
    return x, w, scale, offset, bias, group, int4, transpose


def stored(w, int4, transpose):
    w = w.t().contiguous() if transpose else w
    return pack_int4(w) if int4 else w


@settings(max_examples=100, deadline=None)
@given(weight_quant_calls())
def test_weight_quant_matmul_against_its_roundings(call):
    x, w, scale, offset, bias, group, int4, transpose = call
    actual = ops.weight_quant_matmul(
        x, stored(w, int4, transpose), scale, offset, bias=bias, antiquant_group_size=group, transpose_weight=transpose
    )
    spread = lambda p: p.repeat_interleave(group, 0) if group else p.reshape(1, -1)  # noqa: E731
    if x.dtype == torch.float16:  # two roundings in float16
        real = w.half() if offset is None else w.half() + spread(offset)
        real = real * spread(scale)
    else:
        real = w.float() if offset is None else w.float() + spread(offset).float()
        real = (real * spread(scale).float()).to(x.dtype)
    exact = x.double() @ real.double() + (0 if bias is None else bias.double())
    size = x.double().abs() @ real.double().abs() + (0 if bias is None else bias.double().abs())
    half_unit = torch.finfo(x.dtype).eps / 2
    assert ((actual.double() - exact).abs() <= (w.shape[0] + 2) * 2**-24 * size + half_unit * exact.abs() + 1e-7).all()


@settings(max_examples=60, deadline=None)
@given(weight_quant_calls(), st.sampled_from(["msd", "auto"]), st.sampled_from([0, 1]))
def test_other_templates_compute_the_same_product(call, template, inner_precise):
    x, w, scale, offset, bias, group, int4, transpose = call
    actual = ops.weight_quant_matmul(
        x, stored(w, int4, transpose), scale, offset, bias=bias, antiquant_group_size=group,
        inner_precise=inner_precise if int4 and group else 0, transpose_weight=transpose, template=template,
    )  # fmt: skip
    spread = lambda p: p.repeat_interleave(group, 0).double() if group else p.reshape(1, -1).double()  # noqa: E731
    real = (w.double() if offset is None else w.double() + spread(offset)) * spread(scale)
    exact = x.double() @ real + (0 if bias is None else bias.double())
    # What the decomposition drops is relative to each row's largest element.
    size = x.double().abs().amax(-1, keepdim=True) * real.abs().sum(0) + (0 if bias is None else bias.double().abs())
    loose = {torch.float16: 2**-9, torch.bfloat16: 2**-7, torch.float32: 2**-9}[x.dtype]
    assert ((actual.double() - exact).abs() <= loose * size + 1e-6).all()


def test_msd_decomposes_into_planes():
    """One row worked out by hand: K = 1, so that x / max = +-1 and both planes are known."""
    x, w = torch.tensor([[-0.75]], dtype=torch.float16), torch.tensor([[100]], dtype=torch.int8)
    s1, s2 = 127.499, 2 * 127.499**2
    a1 = np.sign(-1.0) * np.floor(127.499 + 0.5)
    rest = np.float32(-1.0) - np.float32(a1 / s1)
    a2 = np.sign(rest) * np.floor(abs(rest * s2) + 0.5)
    expected = (np.float32(a1 * 100 / s1) + np.float32(a2 * 100 / s2)) * 0.75 * 0.5
    actual = ops.weight_quant_matmul(x, w, torch.tensor([0.5]).half(), template="msd")
    assert actual.item() == pytest.approx(float(expected), rel=2**-11)


def test_fixpipe_template_with_int64_scale():
    g = generator(8)
    x, w = torch.randn(4, 64, generator=g).half(), codes(g, 64, 64)
    s, o = scales(g, 64) * 0.01, torch.randint(-128, 128, (64,), dtype=torch.int32, generator=g)
    actual = ops.weight_quant_matmul(x, w, ops.trans_quant_param(s), o)
    real = ((w.int() + o).float() * torch.from_numpy(numpy_fp19(s))).half()
    assert torch.equal(actual, (x.float() @ real.float()).half())


def test_quantized_output():
    g = generator(9)
    x, w, s = torch.randn(4, 32, generator=g).half(), codes(g, 32, 16), torch.full((16,), 0.01).half()
    qs, qo = torch.full((16,), 9.0), torch.full((16,), 3.0)
    acc = x.float() @ (w.half() * s).float()
    expected = (torch.clamp((acc * 9.0).round(), -256, 255) + 3).clamp(-128, 127).to(torch.int8)
    assert torch.equal(ops.weight_quant_matmul(x, w, s, quant_scale=qs, quant_offset=qo), expected)
    assert torch.equal(ops.weight_quant_matmul(x, w, s, quant_scale=ops.trans_quant_param(qs, qo)), expected)


def test_auto_follows_the_library():
    half = lambda m, k: torch.empty(m, k, dtype=torch.float16)  # noqa: E731
    int8, int4 = (lambda k, n: torch.empty(k, n, dtype=torch.int8)), (lambda k, n: torch.empty(k, n, dtype=torch.int32))
    s, word = torch.empty(1).half(), torch.empty(64, dtype=torch.int64)
    pick = lambda x, w, scale=s, group=0, tx=False, tw=False, q=None: chosen_template(x, w, scale, q, group, tx, tw)  # noqa: E731
    assert pick(half(16, 256), int8(256, 128)) == "msd"
    assert pick(half(65, 256), int8(256, 128)) == "custom", "M above 64"
    assert pick(half(16, 250), int8(250, 128)) == "custom", "K no multiple of 32"
    assert pick(half(16, 256), int8(256, 128), q=torch.empty(1)) == "custom", "int8 output"
    assert pick(half(16, 256), int8(256, 128), scale=word) == "fixpipe"
    assert pick(half(8, 256), int4(256, 16), group=64) == "msd"
    assert pick(half(9, 256), int4(256, 16), group=64) == "custom", "M above group / 8"
    assert pick(half(16, 256), int4(128, 32), tw=True) == "msd"
    assert pick(half(16, 256), int4(256, 16)) == "custom", "per-channel int4 wants a transposed weight"


X, W = torch.ones(2, 8).half(), torch.ones(8, 16, dtype=torch.int8)
WS = torch.ones(16).half()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.double(), W, WS), "x is torch.float64"),
        ((X, W[:7], WS), "x has K = 8 and weight has K = 7"),
        ((X, W.float(), WS), "weight is torch.float32"),
        ((X, W, WS.float()), "it must have the dtype of x"),
        ((X, W, WS[:3]), r"antiquant_scale has shape \(3,\)"),
        ((X, W, WS, WS[:1]), "they must have one shape"),
        ((X, W, WS, WS.int()), "antiquant_offset is torch.int32"),
        ((X, W, WS, {"bias": WS[:1]}), r"bias has shape \(1,\)"),
        ((X, W, WS, {"quant_offset": torch.ones(1)}), "without quant_scale"),
        ((X, W, WS, {"antiquant_group_size": 4}), r"it must be \(2, 16\)"),
        ((X, W, WS, {"template": "fast"}), "template is 'fast'"),
        ((X, W, WS, {"inner_precise": 2}), "inner_precise is 2"),
    ],
)
def test_weight_quant_matmul_with_bad_input(arguments, message):
    *positional, keywords = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ValueError, match=message):
        ops.weight_quant_matmul(*positional, **keywords)


# -- quantize and dequantize ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 9), st.sampled_from([0, 1]), st.sampled_from([torch.qint8, torch.quint8]), SEEDS
)
def test_npu_quantize_divides_like_torch(rows, columns, axis, dtype, seed):
    g = generator(seed)
    x, n = torch.randn(rows, columns, generator=g) * 3, (rows, columns)[axis]
    scale = 2.0 ** torch.randint(-6, 1, (n,), generator=g)  # powers of two: division and reciprocal agree
    low = -10 if dtype == torch.qint8 else 0
    zero = torch.randint(low, 10, (n,), dtype=torch.int32, generator=g)
    actual = npu_quantize(x, scale, zero, dtype, axis)
    expected = torch.quantize_per_channel(x, scale.double(), zero.long(), axis, dtype).int_repr()
    ties = ((x / scale.reshape((-1, 1) if axis == 0 else (1, -1))) % 1).abs() == 0.5
    assert torch.equal(actual[~ties], expected[~ties]), "torch adds the zero point after rounding, which moves ties"


def test_npu_quantize_multiplies_and_packs():
    x = torch.tensor([[-9.0, -8.0, -0.5, 0.5, 1.5, 2.5, 7.4, 100.0]])
    packed = npu_quantize(x, torch.ones(1), None, torch.quint4x2, -1, False)
    assert unpack_int4(packed).tolist() == [[-8, -8, 0, 0, 2, 2, 7, 7]]
    int8 = npu_quantize(x, torch.tensor([20.0]), torch.tensor([1.0]), torch.qint8, -1, False)
    assert int8.tolist() == [[-128, -128, -9, 11, 31, 51, 127, 127]]
    with pytest.raises(ValueError, match=r"dtype is torch.quint4x2; with div_mode=True"):
        npu_quantize(x, torch.ones(1), None, torch.quint4x2)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.booleans(),
    st.booleans(),
    SEEDS,
)
def test_npu_dynamic_quant(rows, words, dtype, int4, smooth, seed):
    g = generator(seed)
    x = torch.randn(rows, words * 8, generator=g).to(dtype)
    x[0] = 0
    smooth_scales = (torch.rand(words * 8, generator=g) + 0.5).to(dtype) if smooth else None
    levels = 7 if int4 else 127
    y, s = npu_dynamic_quant(x, smooth_scales=smooth_scales, dst_type=torch.quint4x2 if int4 else torch.int8)
    c = (unpack_int4(y) if int4 else y).double()
    wide = x.double() if smooth_scales is None else x.double() * smooth_scales.double()
    assert s.shape == (rows,)
    assert torch.allclose(s.double(), wide.abs().amax(-1) / levels, rtol=1e-6)
    assert not c[0].any(), "a row of zeros"
    assert s[0] == 0
    # Within half a step, but for the last digits of float32.
    assert ((c * s.double()[:, None] - wide).abs() <= (0.5 + 1e-4) * s.double()[:, None]).all()


def test_npu_dynamic_quant_per_tensor():
    x = torch.tensor([[1.0, -2.0], [4.0, 0.5]]).half()
    y, s = npu_dynamic_quant(x, quant_mode="pertensor")
    assert s.shape == (1,)
    assert y.tolist() == [[32, -64], [127, 16]]


def test_npu_anti_quant():
    x = codes(generator(1), 3, 8, low=-8, high=8)
    s, o = torch.rand(8) + 0.5, torch.randint(-3, 3, (8,)).float()
    expected = ((x.float() + o) * s).half()
    assert torch.equal(npu_anti_quant(x, s, offset=o), expected)
    assert torch.equal(npu_anti_quant(pack_int4(x), s, offset=o), expected)
    assert npu_anti_quant(x, s[:1], dst_dtype=torch.bfloat16).dtype == torch.bfloat16


# -- registration --------------------------------------------------------------------------------------------------

G = generator(11)
X8, W8 = codes(G, 4, 16), codes(G, 24, 16)
OPCHECKS = {
    "quant_matmul": (ops.quant_matmul.default, (X8, W8.t(), scales(G, 24)), {"output_dtype": torch.float16}),
    "quant_matmul batched": (
        ops.quant_matmul.default,
        (codes(G, 2, 1, 4, 16), codes(G, 3, 24, 16), scales(G, 1)),
        {"transpose_x2": True, "output_dtype": torch.bfloat16, "pertoken_scale": scales(G, 4)},
    ),
    "quant_matmul int4": (
        ops.quant_matmul.default,
        (pack_int4(codes(G, 4, 16, low=-8, high=8)), pack_int4(codes(G, 24, 16, low=-8, high=8)), scales(G, 24)),
        {"transpose_x2": True},
    ),
    "weight_quant_matmul": (
        ops.weight_quant_matmul.default,
        (torch.randn(4, 16).half(), W8, scales(G, 24).half()),
        {"transpose_weight": True, "bias": torch.randn(24).half()},
    ),
    "weight_quant_matmul rank 3": (
        ops.weight_quant_matmul.default,
        (torch.randn(2, 4, 16).bfloat16(), W8.t(), scales(G, 24).bfloat16()),
        {},
    ),
    "weight_quant_matmul int8 out": (
        ops.weight_quant_matmul.default,
        (torch.randn(4, 16).half(), W8, scales(G, 24).half()),
        {"transpose_weight": True, "quant_scale": torch.ones(1)},
    ),
    "trans_quant_param": (ops.trans_quant_param.default, (scales(G, 5), scales(G, 1)), {}),
    "format_cast": (ops.format_cast.default, (W8, 29), {}),
    "pack_int4": (ops.pack_int4.default, (codes(G, 3, 16, low=-8, high=8),), {}),
}


@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name):
    op, args, kwargs = OPCHECKS[name]
    torch.library.opcheck(op, args, kwargs)


@pytest.mark.parametrize("n", [1, 128])
def test_one_row_that_is_a_transposed_view(n):
    """Strides (1, 1) are those of a contiguous row as well, and PyTorch's _int_mm takes them for another matrix."""
    g = generator(0)
    x, w = codes(g, 512, 1), codes(g, 512, n)
    scale = torch.full((n,), 2.0**-12)
    y = ops.quant_matmul(x.t(), w, scale, output_dtype=torch.float32)
    assert torch.equal(y, (x.t().double() @ w.double() * 2.0**-12).float())
    assert torch.equal(ops.quant_matmul(x, w, scale, output_dtype=torch.float32, transpose_x1=True), y)
