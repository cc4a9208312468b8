"""Differential fuzzing: random quantized graphs, fused and as they were, within the bounds that the sites state.

``QUANTPASS_FUZZ=5000 pytest tests/test_fuzz.py`` runs that many examples of each test, with random seeds; without it a
few hundred fixed ones run. Hypothesis shrinks a failure and prints how to repeat it.
"""

import collections
import os

import torch
import torch.ao.quantization.fx._decomposed  # the quantized_decomposed operators
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers import CHIPS
from tests.oracle import judge, traced

EXAMPLES = int(os.environ.get("QUANTPASS_FUZZ", "0"))
PROFILE = settings(
    max_examples=EXAMPLES or 120,
    deadline=None,
    derandomize=not EXAMPLES,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
outcomes = collections.Counter()


class Draw:
    """A source of choices and of tensors that depend on nothing else."""

    def __init__(self, draw):
        self._draw = draw
        self.rng = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def one_of(self, *choices):
        return self._draw(st.sampled_from(choices))

    def maybe(self):
        return self._draw(st.booleans())

    def int(self, low, high):
        return self._draw(st.integers(low, high))

    def floats(self, *shape, scale=1.0):
        return torch.randn(*shape, generator=self.rng) * scale

    def codes(self, *shape, low, high, dtype=torch.int8):
        return torch.randint(low, high + 1, shape, generator=self.rng).to(dtype)

    def scales(self, *shape):
        return torch.rand(*shape, generator=self.rng) * 0.01 + 0.002


# -- weights: functions of nothing that return (N, K) ---------------------------------------------------------------


def weight(d, n, k, dtype):
    """A weight ``(N, K)`` in ``dtype``, dequantized in one of many spellings, and what it can't be combined with."""
    bits = d.one_of("int8", "int4", "uint8", "nibbles", "int32 nibbles")
    low, high = {"int8": (-127, 127), "int4": (-8, 7), "uint8": (0, 255)}.get(bits, (0, 15))
    codes = d.codes(n, k, low=low, high=high, dtype=torch.uint8 if low == 0 else torch.int8)
    wide = d.one_of(dtype, dtype, torch.float32)
    divisors = [g for g in (2, 4, 8, 16, 32) if k % g == 0 and g < k]
    per = d.one_of("tensor", "channel", "channel", "group" if divisors else "channel", "k")
    group = d.one_of(*divisors) if per == "group" else k
    shape = {"tensor": (1,), "channel": (n, 1), "group": (n, k // group, 1), "k": (1, k)}[per]
    scale = d.scales(*shape).to(wide)
    zero_kind = d.one_of("none", "none", "whole", "int", "narrow int", "float")
    if zero_kind == "none" and low == 0 and d.maybe():
        zero_kind = "whole"
    middle = (low + high + 1) // 2
    zero = None
    if zero_kind != "none":
        span = max(2, (high - low) // 6)
        zero = d.codes(*shape, low=middle - span, high=middle + span, dtype=torch.int32)
        zero = {"int": zero, "narrow int": zero.to(codes.dtype)}.get(zero_kind, zero.to(wide))
        zero = zero + 0.25 if zero_kind == "float" else zero
    spelling = d.one_of("sub, mul", "mul, sub", "div", "sub int")
    moved = None if zero is None else zero.to(wide) * scale
    layout = d.one_of("nk", "nk", "kn", "cat", "slice", "twice transposed")
    stored, read = _stored(d, codes, bits, layout)
    cast_first = d.maybe()

    def build():
        w = read(stored)
        if per == "group":
            w = w.view(n, k // group, group)
        if spelling == "sub int" and zero is not None and not zero.is_floating_point():
            w = (w.to(torch.int32) - zero.to(torch.int32)).to(wide) * scale
        else:
            w = w.to(wide) if cast_first or zero is not None else w
            if spelling == "mul, sub" and zero is not None:
                w = w * scale - moved
            else:
                w = w if zero is None else w - zero
                w = w / (1 / scale.float()).to(wide) if spelling == "div" else w * scale
        return w.reshape(n, k).to(dtype)

    return build


def _stored(d, codes, bits, layout):
    n, k = codes.shape
    if bits == "nibbles" and k % 2 == 0:
        packed = codes[:, ::2] | (codes[:, 1::2] << 4)
        return packed, lambda p: torch.stack([p & 15, p >> 4], dim=-1).view(n, k)
    if bits == "int32 nibbles" and k % 8 == 0:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        packed = (codes.view(n, k // 8, 8).to(torch.int64) << shifts).sum(-1)
        packed = (packed - (packed >= 2**31).to(torch.int64) * 2**32).to(torch.int32)
        return packed, lambda p: ((p.unsqueeze(-1) >> shifts) & 15).view(n, k).to(torch.int8)
    if layout == "kn":
        return codes.t().contiguous(), lambda p: p.t()
    if layout == "cat" and n > 1:
        a, b = codes[: n // 2].clone(), codes[n // 2 :].clone()
        return (a, b), lambda p: torch.cat([p[0], p[1]])
    if layout == "slice":
        more = torch.cat([codes, d.codes(3, k, low=0, high=7, dtype=codes.dtype)])
        return more, lambda p: p[:n]
    if layout == "twice transposed":
        return codes, lambda p: p.t().contiguous().t()
    return codes, lambda p: p


# -- activations ---------------------------------------------------------------------------------------------------


def activation(d):
    """A function of a float ``(..., K)`` that returns it quantized and dequantized (or as it is)."""
    kind = d.one_of(
        "float", "static", "static", "asymmetric", "uint8", "token", "tensor", "fake", "operator", "asymmetric token"
    )
    if kind == "float":
        return kind, lambda x: x
    s, z = d.one_of(0.03, 0.0625, 0.11), d.int(-40, 40)
    rounding = d.one_of("div", "mul", "after")
    low, high = d.one_of((-128, 127), (-128, 127), (-127, 127), (-8, 7))
    container = d.one_of(torch.int8, torch.int8, torch.int32, None)

    def quantized(x, scale, zero, low, high, container):
        q = torch.round(x * (1 / scale) if rounding == "mul" else x / scale)
        q = q + zero if rounding == "after" or zero else q
        q = torch.clamp(q, low, high)
        return q if container is None else q.to(container)

    def static(x):
        return (quantized(x, s, 0, low, high, container).to(x.dtype)) * s

    def asymmetric(x):
        return (quantized(x, s, z, low, high, container).to(x.dtype) - z) * s

    def unsigned(x):
        return (quantized(x, s, 128 + z, 0, 255, torch.uint8 if container else None).to(x.dtype) - (128 + z)) * s

    def token(x):
        t = x.float().abs().amax(-1, keepdim=True) / 127 + 1e-6
        return (quantized(x.float(), t, 0, -128, 127, torch.int8).float() * t).to(x.dtype)

    def tensor(x):
        t = x.float().abs().amax() / 127 + 1e-6
        return (quantized(x.float(), t, 0, -128, 127, torch.int8).float() * t).to(x.dtype)

    def asymmetric_token(x):
        low_, high_ = x.float().amin(-1, keepdim=True), x.float().amax(-1, keepdim=True)
        t = (high_ - low_) / 255 + 1e-6
        zero = torch.clamp(torch.round(-low_ / t) - 128, -128, 127)
        q = torch.clamp(torch.round(x.float() / t) + zero, -128, 127).to(torch.int8)
        return ((q.float() - zero) * t).to(x.dtype)

    def fake(x):
        return torch.fake_quantize_per_tensor_affine(x, s, z, low, high) if low <= z <= high else static(x)

    def operator(x):
        qd = torch.ops.quantized_decomposed
        q = qd.quantize_per_tensor.default(x, s, z, -128, 127, torch.int8)
        return qd.dequantize_per_tensor.default(q, s, z, -128, 127, torch.int8, out_dtype=x.dtype)

    forms = {"static": static, "asymmetric": asymmetric, "uint8": unsigned, "token": token, "tensor": tensor}
    forms |= {"fake": fake, "operator": operator, "asymmetric token": asymmetric_token}
    return kind, forms[kind]


# -- matmuls and what follows ----------------------------------------------------------------------------------------


def matmul(d, rank):
    """A function ``(x (..., K), w (N, K)) -> (..., N)``."""
    forms = ["linear", "matmul", "mm", "linear"]
    if rank == 2:
        forms += ["addmm", "swapped"]
    if rank == 3:
        forms += ["bmm", "einsum", "conv"]
    form = d.one_of(*forms)

    def apply(x, w):
        flat = x.reshape(-1, x.shape[-1])
        if form == "mm":
            return torch.mm(flat, w.t()).view(*x.shape[:-1], w.shape[0])
        if form == "matmul":
            return torch.matmul(x, w.t())
        if form == "addmm":
            return torch.addmm(torch.zeros(w.shape[0], dtype=x.dtype), x, w.t())
        if form == "swapped":
            return torch.mm(w, x.t()).t()
        if form == "bmm":
            return torch.bmm(x, w.t().unsqueeze(0).expand(x.shape[0], -1, -1))
        if form == "einsum":
            return torch.einsum("bmk,nk->bmn", x, w)
        if form == "conv":
            return torch.nn.functional.conv1d(x.transpose(1, 2), w.unsqueeze(-1)).transpose(1, 2)
        return torch.nn.functional.linear(x, w)

    return apply


def epilogue(d, n, dtype):
    """What follows: any of scales, biases, ReLU, casts."""
    steps = []
    for kind in [
        d.one_of("bias", "bias", "scale", "vector", "cast", "alpha", "row", "relu") for _ in range(d.int(0, 4))
    ]:
        if kind == "bias":
            b = d.floats(n, scale=3.0).to(d.one_of(dtype, dtype, torch.float32))
            steps.append(lambda y, b=b: y + b)
        elif kind == "alpha":
            b, a = d.floats(n, scale=2.0).to(dtype), d.one_of(2, -1, 0.5)
            steps.append(lambda y, b=b, a=a: torch.sub(y, b, alpha=a))
        elif kind == "scale":
            f = d.one_of(0.5, 1.7, -1.0, 2)
            steps.append(lambda y, f=f: y * f)
        elif kind == "vector":
            f = d.scales(n).to(d.one_of(dtype, torch.float32)) * 100
            steps.append(d.one_of(lambda y, f=f: y * f, lambda y, f=f: y / f))
        elif kind == "row":
            f = d.one_of(0.5, 2.0)
            steps.append(lambda y, f=f: y * torch.full((*y.shape[:-1], 1), f, dtype=y.dtype))
        elif kind == "relu":
            steps.append(torch.relu)
        elif kind == "cast":
            to = d.one_of(*DTYPES)
            steps.append(lambda y, to=to: y.to(to))

    def apply(y):
        for step in steps:
            y = step(y)
        return y

    return apply


def requantize(d):
    """Codes of a result, or the result itself."""
    kind = d.one_of("no", "no", "int8", "uint8", "narrow", "relu", "operator")
    s, z = d.one_of(0.1, 0.07), d.one_of(0, 0, 5, -128)
    if kind == "no":
        return None

    def apply(y):
        if kind == "operator":
            return torch.ops.quantized_decomposed.quantize_per_tensor.default(y, s, z, -128, 127, torch.int8), s, z
        if kind in ("uint8", "relu"):
            y = torch.relu(y) if kind == "relu" else y
            return torch.clamp(torch.round(y / s) + max(z, 0), 0, 255).to(torch.uint8), s, max(z, 0)
        low = -64 if kind == "narrow" else -128
        return torch.clamp(torch.round(y / s) + z, low, 127).to(torch.int8), s, z

    return apply


# -- graphs ----------------------------------------------------------------------------------------------------------


@st.composite
def layers(draw):
    """A graph of one or two quantized layers and its input."""
    d = Draw(draw)
    dtype = d.one_of(*DTYPES)
    rank = d.one_of(2, 2, 3, 3, 4, 5, 6)
    sizes = [d.int(1, 3) for _ in range(rank - 2)] + [d.int(1, 6)]
    k, n = d.one_of(1, 3, 8, 16, 32, 64), d.one_of(1, 2, 5, 8, 16, 32)
    x = d.floats(*sizes, k).to(dtype)
    strided = d.one_of("plain", "plain", "transposed", "strided")
    if strided == "transposed" and rank > 2:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif strided == "strided":
        x = torch.cat([x, x], dim=-1)[..., :k]
    pieces = [_layer(d, rank, n, k, dtype)]
    if d.maybe():
        pieces.append(_layer(d, rank, d.one_of(2, 8, n), n, dtype))
    residual = d.maybe()

    def graph(x):
        outputs, value = [], x
        for quantized, w, product, after, codes in pieces:
            y = after(product(quantized(value), w())) if codes is None else None
            if codes is not None:
                q, s, z = codes(after(product(quantized(value), w())))
                outputs.append(q)
                y = (q.to(dtype) - z) * s
            y = y.to(dtype)
            if residual and y.shape == value.shape:
                y = y + value
            outputs.append(y)
            value = y
        return tuple(outputs)

    return graph, x


def _layer(d, rank, n, k, dtype):
    _, quantized = activation(d)
    return quantized, weight(d, n, k, dtype), matmul(d, rank), epilogue(d, n, dtype), requantize(d)


@st.composite
def integer_matmuls(draw):
    """A matmul of integers, scaled afterwards."""
    d = Draw(draw)
    m, k, n = d.int(17, 24), d.one_of(8, 16, 32), d.one_of(8, 16, 32)
    out = d.one_of(*DTYPES)
    x = d.floats(m, k).to(d.one_of(*DTYPES))
    w = d.codes(k, n, low=-127, high=127)
    form = d.one_of("_int_mm", "int32 mm", "float codes", "out_dtype", "int8 mm", "int64 mm")
    per = d.one_of("tensor", "token", "runtime tensor")
    zero, correct = d.int(-9, 9), d.maybe()
    scale = d.scales(*d.one_of((n,), (1,), (1, n)))
    bias = d.one_of(None, d.codes(n, low=-999, high=999, dtype=torch.int32))
    addend = d.one_of(None, d.floats(n, scale=2.0), d.floats(n, scale=2.0).half())
    cast_between, swapped = d.maybe(), d.maybe()

    def graph(x):
        xf = x.float()
        t = 0.03 if per == "tensor" else xf.abs().amax(*(() if per == "runtime tensor" else (-1, True))) / 127 + 1e-6
        q = torch.clamp(torch.round(xf / t) + (zero if correct else 0), -128, 127).to(torch.int8)
        if form == "_int_mm":
            acc = torch._int_mm(q, w)
        elif form == "out_dtype":
            acc = torch.ops.higher_order.out_dtype(torch.ops.aten.mm.default, torch.int32, q, w)
        else:
            to = {
                "int32 mm": torch.int32,
                "float codes": torch.float32,
                "int8 mm": torch.int8,
                "int64 mm": torch.int64,
            }[form]
            acc = torch.mm(q.to(to), w.to(to))
        if correct:
            acc = acc - zero * w.sum(0, dtype=torch.int32)
        if bias is not None:
            acc = acc + bias
        y = acc.float() * scale * t if swapped else acc.float() * t * scale
        y = y.to(out) if cast_between else y
        y = y if addend is None else y + addend
        return y.to(out)

    return graph, x


@st.composite
def attentions(draw):
    """Two operands that are quantized when the graph runs."""
    d = Draw(draw)
    dtype = d.one_of(*DTYPES)
    b, m, k, n = d.int(1, 3), d.int(1, 5), d.one_of(1, 8, 16), d.int(1, 5)
    lead = (b, d.int(1, 2)) if d.maybe() else (b,)
    a, c = d.floats(*lead, m, k).to(dtype), d.floats(*lead, n, k).to(dtype)
    sa, sc = d.one_of(0.03, "token"), d.one_of(0.02, "token")
    za = d.one_of(0, 0, 3)
    after = d.one_of(None, 0.5, d.floats(n).to(dtype), d.floats(m, 1).to(dtype), d.floats(*lead, 1, 1).to(dtype))

    def quantized(x, s, z):
        s = x.abs().amax(-1, keepdim=True).float() / 127 + 1e-6 if s == "token" else s
        q = torch.clamp(torch.round(x.float() / s) + z, -128, 127).to(torch.int8)
        return ((q.float() - z) * s).to(dtype)

    def graph(a, c):
        y = torch.matmul(quantized(a, sa, za), quantized(c, sc, 0).transpose(-1, -2))
        return y if after is None else y * after

    return graph, a, c


def check(kind, graph, args, target):
    gm = traced(graph, *args)
    judged = judge(gm, args, target=target)
    assert judged.verdict != "dropped", f"the graph does not run\n{gm.graph}"
    outcomes[kind, judged.verdict, target] += 1


TARGETS = st.sampled_from(("cpu", "cpu", *CHIPS))


@PROFILE
@given(layers(), TARGETS)
def test_layers(case, target):
    check("layers", case[0], case[1:], target)


@PROFILE
@given(integer_matmuls(), TARGETS)
def test_integer_matmuls(case, target):
    check("integers", case[0], case[1:], target)


@PROFILE
@given(attentions(), TARGETS)
def test_attentions(case, target):
    check("attentions", case[0], case[1:], target)


def test_fuzzing_fuses_something():
    """Runs last: what was drawn has to be read, or nothing was tested."""
    if not outcomes:
        return  # the tests before it ran in another process
    print(dict(outcomes))
    for kind in {k for k, _, _ in outcomes}:
        fused = sum(v for (k, verdict, _), v in outcomes.items() if k == kind and verdict == "fused")
        assert 5 * fused >= sum(v for (k, _, _), v in outcomes.items() if k == kind), (kind, outcomes)
