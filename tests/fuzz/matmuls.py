"""Matmuls: functions ``(x (..., K), w (N, K)) -> (..., N)``, and what follows them."""

import torch
import torch.ao.quantization.fx._decomposed  # the quantized_decomposed operators
from torch.nn.functional import conv1d, linear

from tests.fuzz.draw import DTYPES


def matmul(d, rank, n, dtype):
    forms = ["linear", "linear", "matmul", "mm", "bias"]
    if rank == 2:
        forms += ["addmm", "swapped", "addmm beta", "mv", "addmv"]
    if rank == 3:
        forms += ["bmm", "einsum", "conv", "baddbmm", "addbmm", "mT"]
    form = d.one_of(*forms)
    factors = d.one_of((1, 1), (0.5, 2), (1, -1), (0, 1))
    b = d.given(d.addend(n).to(dtype))

    def apply(x, w):
        flat = x.reshape(-1, x.shape[-1])
        if form == "mm":
            return torch.mm(flat, w.t()).view(*x.shape[:-1], w.shape[0])
        if form == "bias":
            return linear(x, w, b())
        if form == "matmul":
            return torch.matmul(x, w.t())
        if form == "addmm":
            return torch.addmm(torch.zeros(w.shape[0], dtype=x.dtype), x, w.t())
        if form == "addmm beta":
            return torch.addmm(b(), x, w.t(), beta=factors[0], alpha=factors[1])
        if form == "swapped":
            return torch.mm(w, x.t()).t()
        if form == "mv":
            return torch.mv(w, x[0]).unsqueeze(0)
        if form == "addmv":
            return torch.addmv(b(), w, x[-1], beta=factors[0], alpha=factors[1]).unsqueeze(0)
        if form == "bmm":
            return torch.bmm(x, w.t().unsqueeze(0).expand(x.shape[0], -1, -1))
        if form == "baddbmm":
            right = w.t().unsqueeze(0).expand(x.shape[0], -1, -1)
            return torch.baddbmm(b(), x, right, beta=factors[0], alpha=factors[1])
        if form == "addbmm":
            right = w.t().unsqueeze(0).expand(x.shape[0], -1, -1)
            return torch.addbmm(b(), x, right, beta=factors[0], alpha=factors[1]).unsqueeze(0)
        if form == "einsum" and x.shape[-1] > 1:  # of one row of K it makes an elementwise product
            return torch.einsum("bmk,nk->bmn", x, w)
        if form == "mT":
            return torch.matmul(w, x.mT).mT
        if form == "conv":
            return conv1d(x.transpose(1, 2), w.unsqueeze(-1)).transpose(1, 2)
        return linear(x, w)

    return apply


def epilogue(d, n, dtype):
    """What follows: any of scales, biases, masks, ReLU, casts."""
    kinds = ("bias", "bias", "mask", "scale", "vector", "cast", "alpha", "row", "relu", "divided", "views")
    steps = [_step(d, n, dtype, d.one_of(*kinds)) for _ in range(d.int(0, 4))]

    def apply(y):
        for step in steps:
            y = step(y)
        return y

    return apply


def _step(d, n, dtype, kind):
    if kind == "views":  # traced for the strides that the matmul's result has
        return lambda y: y.flatten().view(y.shape)
    if kind == "bias":
        b = d.given(d.addend(n).to(d.one_of(dtype, dtype, torch.float32)))
        return lambda y: y + b()
    if kind == "mask":
        b = d.floats(n).to(dtype)
        b = (
            d.given(torch.where(b > 0.7, d.one_of(-torch.inf, torch.finfo(dtype).min), 0.0).to(dtype))
            if d.wild
            else d.given(b)
        )
        return lambda y: y + b()
    if kind == "alpha":
        b, a = d.given(d.addend(n, scale=2.0).to(dtype)), d.one_of(2, -1, 0.5)
        return lambda y: torch.sub(y, b(), alpha=a)
    if kind == "scale":
        f = d.one_of(0.5, 1.7, -1.0, 2, *((0, 1e4, 1e-6, 600.0) if d.wild else ()))
        return lambda y: y * f
    if kind == "divided":
        f = d.one_of(2.0, 0.7, *((2e-5, 1e30) if d.wild else ()))
        return lambda y: y / f
    if kind == "vector":
        f, times = d.given(d.scales(n).to(d.one_of(dtype, torch.float32)) * 100), d.maybe()
        return lambda y: y * f() if times else y / f()
    if kind == "row":
        f = d.one_of(0.5, 2.0)
        return lambda y: y * torch.full((*y.shape[:-1], 1), f, dtype=y.dtype)
    if kind == "cast":
        to = d.one_of(*DTYPES)
        return lambda y: y.to(to)
    return torch.relu


def requantize(d):
    """Codes of a result with their scale and zero point, or None."""
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
