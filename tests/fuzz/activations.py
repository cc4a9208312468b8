"""Activations: functions of a float ``(..., K)`` that return it quantized and dequantized, or as it is."""

import torch
import torch.ao.quantization.fx._decomposed  # the quantized_decomposed operators


def activation(d):
    kind = d.one_of(
        *("float", "static", "static", "asymmetric", "uint8", "token", "tensor", "fake", "operator"),
        *("asymmetric token", "token without epsilon", "smoothed token", "smoothed static"),
    )
    if kind == "float":
        return lambda x: x
    s, z = d.one_of(0.03, 0.0625, 0.11), d.int(-40, 40)
    if d.wild and d.one_of(False, False, True):
        s = d.one_of(1e-3, 1.0, 30.0, 1e-6)
    given = None
    if kind == "static":  # one number, or a tensor that a calibration left, or one that is known at run time only
        given = d.one_of(None, d.given(torch.tensor(s)), d.given(torch.tensor([s])))
    rounding = d.one_of("div", "mul", "after")
    low, high = d.one_of((-128, 127), (-128, 127), (-127, 127), (-8, 7))
    container = d.one_of(torch.int8, torch.int8, torch.int32, None)

    def quantized(x, scale, zero, low, high, container):
        q = torch.round(x * (1 / scale) if rounding == "mul" else x / scale)
        q = q + zero if rounding == "after" or isinstance(zero, torch.Tensor) or zero else q
        q = torch.clamp(q, low, high)
        return q if container is None else q.to(container)

    def static(x):
        scale = s if given is None else given().to(x.dtype)
        return quantized(x, scale, 0, low, high, container).to(x.dtype) * scale

    def asymmetric(x):
        return (quantized(x, s, z, low, high, container).to(x.dtype) - z) * s

    def unsigned(x):
        return (quantized(x, s, 128 + z, 0, 255, torch.uint8 if container else None).to(x.dtype) - (128 + z)) * s

    def token(x):
        t = x.float().abs().amax(-1, keepdim=True) / 127 + (1e-6 if kind == "token" else 0)
        return (quantized(x.float(), t, 0, -128, 127, torch.int8).float() * t).to(x.dtype)

    def smoothed(x):
        return token(x * torch.linspace(0.5, 2, x.shape[-1]).to(x.dtype))

    def smoothed_static(x):
        return static(x * torch.linspace(0.5, 2, x.shape[-1]).to(x.dtype))

    def tensor(x):
        t = x.float().abs().amax() / 127 + 1e-6
        return (quantized(x.float(), t, 0, -128, 127, torch.int8).float() * t).to(x.dtype)

    def asymmetric_token(x):
        least, most = x.float().amin(-1, keepdim=True), x.float().amax(-1, keepdim=True)
        t = (most - least) / 255 + 1e-6
        zero = torch.clamp(torch.round(-least / t) - 128, -128, 127)
        q = torch.clamp(torch.round(x.float() / t) + zero, -128, 127).to(torch.int8)
        return ((q.float() - zero) * t).to(x.dtype)

    def fake(x):
        return torch.fake_quantize_per_tensor_affine(x, s, z, low, high) if low <= z <= high else static(x)

    def operator(x):
        qd = torch.ops.quantized_decomposed
        q = qd.quantize_per_tensor.default(x, s, z, -128, 127, torch.int8)
        return qd.dequantize_per_tensor.default(q, s, z, -128, 127, torch.int8, out_dtype=x.dtype)

    forms = {"static": static, "asymmetric": asymmetric, "uint8": unsigned, "token": token, "tensor": tensor}
    forms |= {"fake": fake, "operator": operator, "asymmetric token": asymmetric_token, "token without epsilon": token}
    forms |= {"smoothed token": smoothed, "smoothed static": smoothed_static}
    return forms[kind]


def moved(d, rank, square):
    """A movement of ``x`` that leaves it ``(..., K)``, spelled in ways that only some graphs keep.

    ``square``: its last two sizes are the same number, so that it may stay transposed.
    """
    if rank < 3:
        return lambda x: x
    kind = d.one_of("as it is", "as it is", "as it is", "mT", "swapaxes", "transpose", "permute", "movedim")
    *lead, a, b = range(rank)

    def apply(x):
        if kind == "mT":
            return x.mT if square and x.shape[-1] == x.shape[-2] else x.mT.contiguous().mT
        if kind == "swapaxes":
            return x.swapaxes(0, 1)
        if kind == "transpose":
            return x.transpose(0, -2).contiguous().transpose(0, -2)
        if kind == "permute":
            return x.permute(*lead, b, a).contiguous().permute(*lead, b, a)
        if kind == "movedim":
            return x.movedim(0, 1)
        return x

    return apply
