"""Whole graphs: layers, integer matmuls, attention, long sums."""

import torch
from hypothesis import strategies as st
from torch.nn.functional import linear, scaled_dot_product_attention

from tests.fuzz.activations import activation, moved
from tests.fuzz.draw import DTYPES, Draw
from tests.fuzz.matmuls import epilogue, matmul, requantize
from tests.fuzz.weights import weight


@st.composite
def layers(draw):
    """One or two quantized layers and their input."""
    d = Draw(draw)
    dtype = d.one_of(*DTYPES)
    rank = d.one_of(2, 2, 3, 3, 4, 5, 6)
    k, n = d.one_of(1, 3, 8, 16, 32, 64), d.one_of(1, 2, 5, 8, 16, 32)
    sizes = [d.int(1, 3) for _ in range(rank - 2)] + [d.one_of(1, 2, 3, 4, 5, 6, k)]
    capture = d.one_of("fake", "fake", "pre_dispatch", "keywords", "symbolic")
    x = d.activation(*sizes, k).to(dtype)
    strided = d.one_of("plain", "plain", "transposed", "strided")
    if strided == "transposed" and rank > 2:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif strided == "strided":
        x = torch.cat([x, x], dim=-1)[..., :k]
    # The rows that are worth something, as a mixture of experts takes them: their number is known at run time only.
    chosen = capture == "symbolic" and rank < 4 and d.maybe()
    if chosen:
        x[(0,) * rank] = 1  # a row is left
    pieces = [_layer(d, rank, n, k, dtype, square=sizes[-1] == k and not chosen)]
    if d.maybe():
        pieces.append(_layer(d, rank, d.one_of(2, 8, n), n, dtype))
    residual = d.maybe() and not chosen

    def graph(x):
        if chosen:
            x = x[(x.reshape(x.shape[0], -1)[:, 0] > 0).nonzero().squeeze(-1)]
        outputs, value = [], x
        for move, quantized, again, w, product, after, codes in pieces:
            result = after(product(again(quantized(move(value))), w()))
            if codes is not None:
                q, s, z = codes(result)
                outputs.append(q)
                result = (q.to(dtype) - z) * s
            y = result.to(dtype)
            if residual and y.dim() == value.dim() and y.shape == value.shape:
                y = y + value
            outputs.append(y)
            value = y
        return tuple(outputs)

    return d.case(graph, x, matmuls=len(pieces), capture=capture)


def _layer(d, rank, n, k, dtype, square=False):
    return (
        moved(d, rank, square),
        activation(d),
        moved(d, rank, square),
        weight(d, n, k, dtype),
        matmul(d, rank, n, dtype),
        epilogue(d, n, dtype),
        requantize(d),
    )


@st.composite
def weights_alone(draw):
    """Weights whose scales lie far apart, read by value where they can't be read otherwise, and a plain matmul."""
    d = Draw(draw)
    d.wild, d.run_time = True, d.one_of("nothing", "nothing", "nothing", "some")
    dtype = d.one_of(torch.bfloat16, torch.float32, torch.float16)
    k, n = d.one_of(8, 16, 64), d.one_of(4, 8, 32)
    x = d.floats(d.int(1, 4), k).to(dtype)
    if d.maybe():
        x[:, k // 2] = 0  # what the largest column hides is seen
    bits, per = d.one_of("nibbles", "int32 nibbles", None), d.one_of("group", "k and channel", None)
    w = weight(d, n, k, dtype, bits, per)
    return d.case(lambda x: linear(x, w()), x, matmuls=1)


@st.composite
def scaled_sums(draw):
    """Bare codes, and all of the scale behind the matmul: a factor that a weight of few digits may not hold."""
    d = Draw(draw)
    dtype = d.one_of(*DTYPES)
    m, k, n = d.int(1, 4), d.one_of(16, 64), d.one_of(8, 32)
    x = (d.floats(m, k) * d.one_of(1e-3, 1e-2, 1.0)).to(dtype)
    w = d.given(d.codes(n, k, low=-127, high=127), "weights")
    factors = [torch.full((n,), size) for size in (600.0, 30.0, 1.0, 5e4, 1e-3, 1e-7)]
    f = d.given(d.distorted(d.one_of(*factors), ("plain", "plain", "outlier", "0")).to(d.one_of(dtype, torch.float32)))
    divisor, again = d.one_of(None, None, 2e-5, 1e-3, 64.0), d.one_of(None, None, 100.0, 1e-4)
    b = d.given(d.addend(n).to(dtype)) if d.maybe() else None
    scale = d.given(d.scales(n, 1).to(dtype)) if d.maybe() else None

    def graph(x):
        real = w().to(dtype) if scale is None else w().to(dtype) * scale()
        y = x @ real.t()
        y = y * f() if divisor is None else y / divisor
        y = y if again is None else y * again
        return y if b is None else y + b()

    return d.case(graph, x, matmuls=1)


@st.composite
def float_models(draw):
    """Matrices of integers that nobody quantized: none of them may be touched, or counted."""
    d = Draw(draw)
    d.wild, d.run_time = False, "nothing"
    k, n, dtype = d.one_of(4, 16), d.one_of(4, 16), d.one_of(torch.float32, torch.float32, torch.float16)
    kind = d.one_of("adjacency", "one-hot", "permutation", "pooling", "fourier", "powers", "hash", "triangle")
    x, powers = d.floats(3, k).to(dtype), torch.arange(n)[:, None] * torch.arange(k)
    matrix = {
        "adjacency": (torch.rand(n, k, generator=d.rng) < 0.3).to(d.one_of(torch.int64, torch.bool, torch.int8)),
        "one-hot": torch.nn.functional.one_hot(torch.randint(0, k, (n,), generator=d.rng), k),
        "permutation": torch.eye(k, dtype=torch.int64)[torch.randperm(k, generator=d.rng)],
        "pooling": torch.eye(n, dtype=torch.int64).repeat_interleave(max(1, k // n), 1)[:, :k],
        "triangle": torch.ones(k, k, dtype=torch.int64).tril(),
        "hash": torch.randint(0, 2**31, (n, k), generator=d.rng),
    }.get(kind, powers)
    matrix = torch.nn.functional.pad(matrix, (0, k - matrix.shape[1]))
    given = d.given(matrix, "weights")

    def graph(x):
        if kind == "fourier":
            return torch.view_as_real(
                x.to(torch.complex64) @ torch.exp(-2j * torch.pi * given() / k).t().to(torch.complex64)
            )
        return linear(x, given().to(dtype))

    return d.case(graph, x, matmuls=0)


@st.composite
def heads(draw):
    """The last layer of a language model: W8A8 or weight-only, with a mask, a bias or a scale that the run brings."""
    d = Draw(draw)
    d.wild, d.run_time = True, d.one_of("parameters", "parameters", "nothing")
    dtype = d.one_of(*DTYPES)
    m, k, n = d.int(1, 4), d.one_of(16, 64), d.one_of(8, 32)
    x = d.floats(m, k).to(dtype)
    w = d.codes(n, k, low=-127, high=127)
    scale = torch.rand(n, 1, generator=d.rng) * 1e-3 + 2e-4
    scale = d.given(d.distorted(scale, ("plain", "plain", "plain", "0", "outlier", 600.0, 1e-6)).to(dtype))
    b = d.given(d.distorted(d.floats(n), ("plain", "-inf", "-inf", "nan", "inf", "outlier", "-65504", 1e4)).to(dtype))
    quantized, codes = d.maybe(), requantize(d)
    last = d.maybe()

    def graph(x):
        q = torch.clamp(torch.round(x / 0.02), -128, 127).to(torch.int8).to(dtype) * 0.02 if quantized else x
        y = linear(q, w.to(dtype) * scale(), None if last else b())
        y = y + b() if last else y
        return (y,) if codes is None else (codes(y)[0],)

    return d.case(graph, x, matmuls=1)


@st.composite
def integer_matmuls(draw):
    """A matmul of integers, scaled afterwards."""
    d = Draw(draw)
    m, k, n = d.int(17, 24), d.one_of(8, 16, 32), d.one_of(8, 16, 32)
    out = d.one_of(*DTYPES)
    x = d.activation(m, k).to(d.one_of(*DTYPES))
    w = d.given(d.codes(k, n, low=-127, high=127), "weights")
    form = d.one_of("_int_mm", "int32 mm", "float codes", "out_dtype", "int8 mm", "int64 mm")
    per = d.one_of("tensor", "token", "runtime tensor")
    zero, correct = d.int(-9, 9), d.maybe()
    scale = d.given(d.scales(*d.one_of((n,), (1,), (1, n))))
    most = d.one_of(999, 999, 2**30) if d.wild else 999
    bias = d.one_of(None, d.given(d.codes(n, low=-most, high=most, dtype=torch.int32)))
    addend = d.one_of(None, d.addend(n, scale=2.0), d.addend(n, scale=2.0).half())
    addend = None if addend is None else d.given(addend)
    cast_between, swapped = d.maybe(), d.maybe()
    wide = {"int32 mm": torch.int32, "float codes": torch.float32, "int8 mm": torch.int8, "int64 mm": torch.int64}

    def graph(x):
        xf = x.float()
        t = 0.03 if per == "tensor" else xf.abs().amax(*(() if per == "runtime tensor" else (-1, True))) / 127 + 1e-6
        q = torch.clamp(torch.round(xf / t) + (zero if correct else 0), -128, 127).to(torch.int8)
        if form == "_int_mm":
            acc = torch._int_mm(q, w())
        elif form == "out_dtype":
            acc = torch.ops.higher_order.out_dtype(torch.ops.aten.mm.default, torch.int32, q, w())
        else:
            acc = torch.mm(q.to(wide[form]), w().to(wide[form]))
        if correct:
            acc = acc - zero * w().sum(0, dtype=torch.int32)
        if bias is not None:
            acc = acc + bias()
        y = acc.float() * scale() * t if swapped else acc.float() * t * scale()
        y = y.to(out) if cast_between else y
        y = y if addend is None else y + addend()
        return y.to(out)

    return d.case(graph, x, matmuls=1)


@st.composite
def own_calls(draw):
    """The vendor's quantized matmul as the model calls it, its operands and its result quantized by hand or not."""
    d = Draw(draw)
    d.wild = False
    dtype = d.one_of(torch.float16, torch.bfloat16)
    m, k, n = d.int(1, 6), d.one_of(16, 64), d.one_of(16, 32)
    x = d.floats(m, k).to(dtype)
    w = d.given(d.codes(n, k, low=-127, high=127), "weights")
    per = d.one_of("token", "token", "floor", "operator", "smoothed operator", "static", "static", "static along K")
    rows = per not in ("static", "static along K")
    out = d.one_of(torch.float16, torch.bfloat16) if rows else d.one_of(torch.float16, torch.bfloat16, torch.int8)
    out = torch.int32 if d.one_of(False, False, False, True) else out
    word = not rows and out in (torch.float16, torch.int8) and d.maybe()
    # Codes that are not all at the ends of their range; a bias that no bound hides.
    scale = d.given(d.scales(*d.one_of((n,), (n,), (1,))) * (0.05 if out == torch.int8 else 1.0))
    offset = d.int(-20, 20)
    added = d.one_of(None, torch.int32, *((torch.float32,) if rows and out.is_floating_point else ()))
    bias = None if added is None else d.given(d.floats(n, scale=d.one_of(200.0, 2e5)).to(added))
    s, z, narrow = d.one_of(0.03, 0.0625), d.one_of(0, 0, 9), d.one_of(False, False, False, True)
    smooth, codes = torch.linspace(0.5, 2, k).to(dtype), requantize(d)
    swapped = rows and d.one_of(False, False, False, True)
    npu = torch.ops.npu

    def quantized(x):
        if per == "operator":
            return npu.npu_dynamic_quant(x)
        if per == "smoothed operator":
            return npu.npu_dynamic_quant(x, smooth_scales=smooth)
        if rows:
            t = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5 if per == "floor" else 0.0) / 127
            return (x.float() / t).round().clamp(-128, 127).to(torch.int8), t.squeeze(-1)
        x = x * smooth if per == "static along K" else x
        return ((x.float() / s).round() + z).clamp(-127 if narrow else -128, 127).to(torch.int8), None

    def graph(x):
        q, t = quantized(x)
        t = t.flip(0) if swapped else t
        by = npu.npu_trans_quant_param(scale(), torch.full((1,), float(offset))) if word else scale()
        last = npu.npu_quant_matmul(
            q, w().t(), by, output_dtype=out, bias=None if bias is None else bias(),
            offset=torch.full((1,), float(offset)) if out == torch.int8 and not word else None,
            pertoken_scale=t if out.is_floating_point else None,
        )  # fmt: skip
        if out == torch.int8:
            return (last,)
        y = last if out.is_floating_point else (last.float() * scale() * (0.02 if t is None else t[:, None])).to(dtype)
        return (y,) if codes is None else (codes(y)[0],)

    return d.case(graph, x, matmuls=1, capture=d.one_of("fake", "keywords"))


@st.composite
def attentions(draw):
    """Two operands that are quantized when the graph runs."""
    d = Draw(draw)
    dtype = d.one_of(*DTYPES)
    b, m, k, n = d.int(1, 3), d.int(1, 5), d.one_of(1, 8, 16), d.int(1, 5)
    lead = (b, d.int(1, 2)) if d.maybe() else (b,)
    a, c = d.activation(*lead, m, k).to(dtype), d.activation(*lead, n, k).to(dtype)
    sa, sc = d.one_of(0.03, "token"), d.one_of(0.02, "token")
    za = d.one_of(0, 0, 3)
    after = d.one_of(None, 0.5, d.scales(n).to(dtype), d.scales(m, 1).to(dtype), d.scales(*lead, 1, 1).to(dtype))
    after = d.given(after) if isinstance(after, torch.Tensor) else after
    mask = d.one_of(None, None, d.given(torch.where(d.floats(m, n) > 0.3, -torch.inf, 0.0).to(dtype)))

    def quantized(x, s, z):
        s = x.abs().amax(-1, keepdim=True).float() / 127 + 1e-6 if s == "token" else s
        q = torch.clamp(torch.round(x.float() / s) + z, -128, 127).to(torch.int8)
        return ((q.float() - z) * s).to(dtype)

    def graph(a, c):
        y = torch.matmul(quantized(a, sa, za), quantized(c, sc, 0).transpose(-1, -2))
        if after is not None:
            y = y * (after() if callable(after) else after)
        return y if mask is None else y + mask()

    return d.case(graph, a, c, matmuls=1, capture=d.one_of("fake", "fake", "keywords", "symbolic"))


@st.composite
def long_sums(draw):
    """K at and beyond the ends of what an int32 accumulator and the chips take."""
    d = Draw(draw)
    k = d.one_of(65535, 65536, 131071, 131072, 140000)
    m, n, dtype = d.int(1, 2), d.int(1, 2), d.one_of(torch.bfloat16, torch.float32)
    sign = d.one_of(127, -128)
    x = torch.full((m, k), float(d.one_of(sign, 127, 3))).to(dtype)
    w = d.given(torch.full((n, k), d.one_of(sign, 127, 5), dtype=torch.int8), "weights")
    scale = d.given(torch.rand(n, 1, generator=d.rng) * 1e-3 + 1e-3)
    form, s = d.one_of("linear", "mm", "_int_mm", "weight only"), d.one_of(1.0, 0.5)

    def graph(x):
        if form == "weight only":
            return linear(x, (w().float() * scale()).to(dtype))
        q = torch.clamp(torch.round(x.float() / s), -128, 127).to(torch.int8)
        if form == "_int_mm":
            return torch.mm(q.to(torch.int32), w().t().to(torch.int32)).float() * scale().t() * s
        real = w().float() * scale()
        return (q.float() * s) @ real.t() if form == "mm" else linear(q.float() * s, real)

    return d.case(graph, x, matmuls=1)


@st.composite
def fused_attentions(draw):
    """``scaled_dot_product_attention`` of dequantized operands: an int8 cache."""
    d = Draw(draw)
    dtype = d.one_of(*DTYPES)
    b, h, m, n, k = d.int(1, 2), d.int(1, 2), d.int(1, 4), d.int(1, 5), d.one_of(8, 16)
    q = d.floats(b, h, m, k).to(dtype)
    key = d.given(d.codes(b, h, n, k, low=-127, high=127), "weights")
    value = d.given(d.codes(b, h, n, k, low=-127, high=127), "weights")
    scale = d.given(torch.rand(b, h, n, 1, generator=d.rng) * 0.01 + 1e-3)

    def graph(q):
        return scaled_dot_product_attention(
            q, (key().float() * scale()).to(dtype), (value().float() * scale()).to(dtype)
        )

    return d.case(graph, q, matmuls=1, capture=d.one_of("fake", "pre_dispatch"))
