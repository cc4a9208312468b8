"""Weights: functions of nothing that return ``(N, K)``, dequantized in one of many spellings."""

import torch


def weight(d, n, k, dtype, bits=None, per=None):
    """``bits`` and ``per`` are drawn where they are None: how codes are stored, what has a scale of its own."""
    bits = bits or d.one_of("int8", "int4", "uint8", "nibbles", "int32 nibbles", "shifted int16")
    low, high = {"int8": (-127, 127), "int4": (-8, 7), "uint8": (0, 255), "shifted int16": (-127, 120)}.get(
        bits, (0, 15)
    )
    codes = d.codes(n, k, low=low, high=high, dtype=torch.uint8 if low == 0 else torch.int8)
    wide = d.one_of(dtype, dtype, torch.float32)
    divisors = [g for g in (2, 4, 8, 16, 32) if k % g == 0 and g < k]
    per = per or d.one_of(
        "tensor", "channel", "channel", "group" if divisors else "channel", "k", "k and channel", "element"
    )
    per = "channel" if (per == "element" and not d.wild) or (per == "group" and not divisors) else per
    group = d.one_of(*divisors) if per == "group" else k
    shape = {"tensor": (1,), "group": (n, k // group, 1), "k": (1, k), "element": (n, k)}.get(per, (n, 1))
    scale = d.given(d.scales(*shape).to(wide))
    along_k = _along_k(d, n, k, wide) if per == "k and channel" else None
    zero = _zero_point(d, shape, low, high, codes.dtype, wide)
    spelling = d.one_of("sub, mul", "mul, sub", "div", "sub int")
    stored, read = _stored(d, codes, bits, d.one_of("nk", "nk", "kn", "cat", "slice", "twice transposed"))
    cast_first = d.maybe()
    more = _summed(d, n, k, dtype)

    def build():
        w, s, z = read(stored()), scale(), None if zero is None else zero()
        if per == "group":
            w = w.view(n, k // group, group)
        if spelling == "sub int" and z is not None and not z.is_floating_point():
            w = (w.to(torch.int32) - z.to(torch.int32)).to(wide) * s
        else:
            w = w.to(wide) if cast_first or z is not None else w
            if spelling == "mul, sub" and z is not None:
                w = w * s - z.to(wide) * s
            else:
                w = w if z is None else w - z
                w = w / (1 / s.float()).to(wide) if spelling == "div" else w * s
        w = w if along_k is None else w * along_k()
        return more(w.reshape(n, k).to(dtype))

    return build


def _zero_point(d, shape, low, high, narrow, wide):
    kind = d.one_of("none", "none", "whole", "int", "narrow int", "float")
    if kind == "none" and low == 0 and d.maybe():
        kind = "whole"
    if kind == "none":
        return None
    middle, span = (low + high + 1) // 2, max(2, (high - low) // 6)
    zero = torch.randint(middle - span, middle + span + 1, shape, generator=d.rng).to(torch.int32)
    zero = {"int": zero, "narrow int": zero.to(narrow)}.get(kind, zero.to(wide))
    if d.wild and d.one_of(False, False, True) and zero.is_floating_point():
        zero = zero * d.one_of(1e4, -1e3, 1e-3)
    return d.given(zero + 0.25 if kind == "float" else zero)


def _along_k(d, n, k, wide):
    """A factor along K, rank 1 with what varies along N, or almost."""
    t = d.scales(1, k).to(wide) * 100
    if d.wild and d.maybe():
        t = t * (torch.rand(n, k, generator=d.rng) * 0.5 + 0.75).to(wide)
        if d.maybe():
            t[:, k // 2] = 1e6
    return d.given(t)


def _summed(d, n, k, dtype):
    """A sum of the weight and something else: LoRA factors, noise, a mask."""
    kind = d.one_of(*["nothing"] * 17, "lora", "noise", "mask")
    if kind == "nothing":
        return lambda w: w
    if kind == "lora":
        b, a = d.given(d.floats(n, 2, scale=0.1).to(dtype)), d.given(d.floats(2, k, scale=0.1).to(dtype))
        return lambda w: w + b() @ a()
    if kind == "noise":
        e = d.given(d.floats(n, k, scale=0.1).to(dtype))
        return lambda w: w + e()
    keep = d.given(torch.rand(n, k, generator=d.rng) < 0.7)
    return lambda w: w.masked_fill(~keep(), 0.0)


def _stored(d, codes, bits, layout):
    n, k = codes.shape
    if bits == "nibbles" and k % 2 == 0:
        packed = d.given(codes[:, ::2] | (codes[:, 1::2] << 4), "weights")
        return packed, lambda p: torch.stack([p & 15, p >> 4], dim=-1).view(n, k)
    if bits == "int32 nibbles" and k % 8 == 0:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        packed = (codes.view(n, k // 8, 8).to(torch.int64) << shifts).sum(-1)
        packed = (packed - (packed >= 2**31).to(torch.int64) * 2**32).to(torch.int32)
        return d.given(packed, "weights"), lambda p: ((p.unsqueeze(-1) >> shifts) & 15).view(n, k).to(torch.int8)
    if bits == "shifted int16":
        return d.given(codes, "weights"), lambda p: p.to(torch.int16) + 7
    if layout == "kn":
        return d.given(codes.t().contiguous(), "weights"), lambda p: p.t()
    if layout == "cat" and n > 1:
        a, b = d.given(codes[: n // 2].clone(), "weights"), d.given(codes[n // 2 :].clone(), "weights")
        return lambda: (a(), b()), lambda p: torch.cat([p[0], p[1]])
    if layout == "slice":
        more = torch.cat([codes, d.codes(3, k, low=0, high=7, dtype=codes.dtype)])
        return d.given(more, "weights"), lambda p: p[:n]
    if layout == "twice transposed":
        return d.given(codes, "weights"), lambda p: p.t().contiguous().t()
    return d.given(codes, "weights"), lambda p: p
