"""Quantized graphs written operator by operator, so that every operator that a reader knows is in one of them.

Each spelling is a function of an activation and of parameters. :func:`graph_of` makes an ATen graph of it, with the
parameters as attributes (their values known) or as inputs (nothing known but their shapes).
"""

import importlib
import operator
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, symbolic_trace

import quantpass as qp
from quantpass.graph.torch_internals import fill_in_values

aten, prims = torch.ops.aten, torch.ops.prims
M, K, N, G = 5, 32, 24, 8
F32, F16 = torch.float32, torch.float16

_rng = torch.Generator().manual_seed(7)


def floats(*shape, scale=1.0):
    return torch.randn(*shape, generator=_rng) * scale


def integers(*shape, low=-127, high=128, dtype=torch.int8):
    return torch.randint(low, high, shape, generator=_rng).to(dtype)


def scales(*shape):
    return torch.rand(*shape, generator=_rng) * 0.01 + 0.002


X, X3 = floats(M, K), floats(2, 3, K)
W, WS, B = integers(N, K), scales(N, 1), floats(N, scale=3.0)
WT = W.t().contiguous()  # (K, N)
SQUARE = integers(K, K)


@dataclass(frozen=True)
class Spelling:
    """``build(x, *parameters)`` returns what the graph returns."""

    name: str
    build: object
    x: torch.Tensor
    parameters: tuple
    static: bool = True

    @property
    def args(self):
        return (self.x,) if self.static else (self.x, *self.parameters)

    def graph(self):
        gm = graph_of(self.build, self.x, *self.parameters)
        return with_attributes(gm, self.parameters) if self.static else gm


def graph_of(f, *args):
    """``f``, which calls operators only, as an ATen graph with shapes."""
    names = [f"p{i}" for i in range(len(args))]
    scope = {"f": f}
    exec(f"def g({', '.join(names)}):\n    return f({', '.join(names)})", scope)
    gm = symbolic_trace(scope["g"])
    mode = FakeTensorMode()
    for node, a in zip(gm.graph.find_nodes(op="placeholder"), args, strict=True):
        node.meta["val"] = mode.from_tensor(a)
    fill_in_values(gm)
    return gm


def with_attributes(gm, parameters):
    """The graph with all inputs but the first made attributes that hold ``parameters``."""
    for node, value in zip(list(gm.graph.find_nodes(op="placeholder"))[1:], parameters, strict=True):
        gm.register_buffer(f"b_{node.name}", value.clone())
        with gm.graph.inserting_before(node):
            attribute = gm.graph.get_attr(f"b_{node.name}")
        node.replace_all_uses_with(attribute)
        attribute.meta["val"] = node.meta["val"]
        gm.graph.erase_node(node)
    gm.recompile()
    return gm


def with_values(gm: GraphModule):
    """Forget all shapes but those of inputs: the graph was changed."""
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            node.meta.pop("val", None)
    gm.recompile()
    return gm


# -- pieces --------------------------------------------------------------------------------------------------------


def to(t, dtype):
    return aten._to_copy.default(t, dtype=dtype)


def deq_weight(w, s):
    return aten.mul.Tensor(to(w, F32), s)


def rounded(x, scale=0.03):
    return aten.round.default(aten.mul.Tensor(x, 1 / scale))


def codes(x, low=-128, high=127, scale=0.03):
    return to(aten.clamp.default(rounded(x, scale), low, high), torch.int8)


def deq_codes(q, scale=0.03):
    return aten.mul.Tensor(to(q, F32), scale)


def linear_t(x, w):
    return aten.mm.default(x, aten.t.default(w))


def scalar(value, dtype=F32):
    return torch.tensor(value, dtype=dtype)


# -- movements: wherever data may be moved -------------------------------------------------------------------------

ROUND_TRIPS = {
    "alias": lambda t, a, b: aten.alias.default(t),
    "detach": lambda t, a, b: aten.detach.default(t),
    "lift_fresh": lambda t, a, b: aten.lift_fresh.default(t),
    "lift_fresh_copy": lambda t, a, b: aten.lift_fresh_copy.default(t),
    "clone": lambda t, a, b: aten.clone.default(t),
    "contiguous": lambda t, a, b: aten.contiguous.default(t),
    "dropout": lambda t, a, b: aten.dropout.default(t, 0.5, False),
    "view": lambda t, a, b: aten.view.default(aten.view.default(t, [1, a, b]), [a, b]),
    "view_copy": lambda t, a, b: aten.view_copy.default(aten.view_copy.default(t, [1, a, b]), [a, b]),
    "_unsafe_view": lambda t, a, b: aten._unsafe_view.default(aten._unsafe_view.default(t, [1, a, b]), [a, b]),
    "reshape": lambda t, a, b: aten.reshape.default(aten.reshape.default(t, [1, a, b]), [a, b]),
    "squeeze": lambda t, a, b: aten.squeeze.default(aten.unsqueeze.default(t, 0)),
    "squeeze.dim": lambda t, a, b: aten.squeeze.dim(aten.unsqueeze.default(t, 1), 1),
    "squeeze.dims": lambda t, a, b: aten.squeeze.dims(aten.unsqueeze.default(t, 0), [0]),
    "flatten": lambda t, a, b: aten.flatten.using_ints(aten.unflatten.int(t, 0, [1, a]), 0, 1),
    "t": lambda t, a, b: aten.t.default(aten.t.default(t)),
    "numpy_T": lambda t, a, b: aten.numpy_T.default(aten.numpy_T.default(t)),
    "mT": lambda t, a, b: aten.mT.default(aten.mT.default(t)),
    "transpose": lambda t, a, b: aten.transpose.int(aten.transpose.int(t, 0, 1), 0, 1),
    "swapaxes": lambda t, a, b: aten.swapaxes.default(aten.swapaxes.default(t, 0, -1), 0, -1),
    "permute": lambda t, a, b: aten.permute.default(aten.permute.default(t, [1, 0]), [-1, 0]),
    "expand": lambda t, a, b: aten.expand.default(t, [a, b]),
}


def _movements():
    for name, move in ROUND_TRIPS.items():

        def on_x(x, w, s, move=move):
            return linear_t(move(deq_codes(codes(x)), M, K), deq_weight(w, s))

        def on_w(x, w, s, move=move):
            return linear_t(x, move(deq_weight(w, s), N, K))

        def on_codes(x, w, s, move=move):
            return linear_t(deq_codes(move(codes(x), M, K)), deq_weight(move(w, N, K), s))

        def on_y(x, w, s, b, move=move):
            return aten.add.Tensor(move(linear_t(x, deq_weight(w, s)), M, N), b)

        yield Spelling(f"{name} of x", on_x, X, (W, WS))
        yield Spelling(f"{name} of w", on_w, X, (W, WS), static=False)
        yield Spelling(f"{name} of codes", on_codes, X, (W, WS))
        yield Spelling(f"{name} of y", on_y, X, (W, WS, B))

    def square(x, w, s):
        return aten.mm.default(x, aten.permute.default(deq_weight(w, s), [1, 0]))

    def repeated(x, w, s):
        w2 = aten.expand.default(aten.unsqueeze.default(aten.t.default(deq_weight(w, s)), 0), [2, K, N])
        return aten.bmm.default(x, w2)

    def per_token(x, w, s, t):
        real = aten.mul.Tensor(to(codes(x), F32), t)
        y = aten.mm.default(aten.view.default(real, [6, K]), aten.t.default(deq_weight(w, s)))
        return aten.view.default(y, [2, 3, N])

    for static in (True, False):
        yield Spelling(f"square weight, static={static}", square, X, (SQUARE, scales(K, 1)), static)
        yield Spelling(f"repeated weight, static={static}", repeated, X3, (W, WS), static)
        yield Spelling(f"rows through views, static={static}", per_token, X3, (W, WS, scales(2, 3, 1)), static)


# -- activations: how codes are made and what they mean --------------------------------------------------------------

QUANTIZERS = {
    "clamp": lambda r: aten.clamp.default(r, -128, 127),
    "clamp.Tensor": lambda r: aten.clamp.Tensor(r, scalar(-128.0), scalar(127.0)),
    "clamp_min, clamp_max": lambda r: aten.clamp_max.default(aten.clamp_min.default(r, -128), 127),
    "clamp_min.Tensor, clamp_max.Tensor": lambda r: aten.clamp_max.Tensor(
        aten.clamp_min.Tensor(r, scalar(-128.0)), scalar(127.0)
    ),
    "minimum, maximum": lambda r: aten.minimum.default(aten.maximum.default(r, scalar(-128.0)), scalar(127.0)),
    "add.Tensor": lambda r: aten.clamp.default(aten.add.Tensor(r, 3), -128, 127),
    "add.Scalar": lambda r: aten.clamp.default(aten.add.Scalar(r, 3), -128, 127),
    "sub.Tensor": lambda r: aten.clamp.default(aten.sub.Tensor(r, scalar(-3.0)), 0, 255),
    "sub.Scalar": lambda r: aten.clamp.default(aten.sub.Scalar(r, -3), 0, 255),
}

CASTS = {
    "_to_copy": lambda t, dtype: aten._to_copy.default(t, dtype=dtype),
    "to.dtype": lambda t, dtype: aten.to.dtype(t, dtype),
    "convert_element_type": lambda t, dtype: prims.convert_element_type.default(t, dtype),
}

CENTRES = {
    "sub.Tensor": lambda t: aten.sub.Tensor(t, 3),
    "sub.Scalar": lambda t: aten.sub.Scalar(t, 3),
    "add.Tensor": lambda t: aten.add.Tensor(t, scalar(-3.0)),
    "add.Scalar": lambda t: aten.add.Scalar(t, -3),
}

SCALINGS = {
    "mul.Tensor": lambda t: aten.mul.Tensor(t, scalar(0.03)),
    "mul.Scalar": lambda t: aten.mul.Scalar(t, 0.03),
    "div.Tensor": lambda t: aten.div.Tensor(t, scalar(33.0)),
    "div.Scalar": lambda t: aten.div.Scalar(t, 33.0),
}


def _activations():
    for name, quantize in QUANTIZERS.items():
        for rounding in ("round", "floor", "ceil", "trunc"):
            if rounding != "round" and name != "clamp":
                continue

            def fake(x, w, s, quantize=quantize, rounding=rounding):
                r = getattr(aten, rounding).default(aten.mul.Tensor(x, 33.0))
                return linear_t(aten.mul.Tensor(aten.sub.Tensor(quantize(r), 3), 0.03), deq_weight(w, s))

            yield Spelling(f"{rounding}, {name}", fake, X, (W, WS))
    for name, cast in CASTS.items():

        def casts(x, w, s, cast=cast):
            q = cast(aten.clamp.default(rounded(x), -128, 127), torch.int8)
            return linear_t(aten.mul.Tensor(cast(q, F32), 0.03), aten.mul.Tensor(cast(w, F32), s))

        def late(x, w, s, cast=cast):
            q = cast(aten.clamp.default(rounded(x), 0, 255), torch.int32)
            whole = aten.sub.Tensor(q, scalar(9, torch.int32))
            return linear_t(aten.mul.Tensor(cast(whole, F32), 0.03), aten.mul.Tensor(cast(w, F32), s))

        yield Spelling(f"{name} to int8", casts, X, (W, WS))
        yield Spelling(f"{name} to int32", late, X, (W, WS))
    for name, centre in CENTRES.items():

        def centred(x, w, s, centre=centre):
            return linear_t(aten.mul.Tensor(centre(to(codes(x), F32)), 0.03), deq_weight(w, s))

        def wide_weight(x, w, s, centre=centre):
            return linear_t(x, aten.mul.Tensor(centre(to(w, F32)), s))

        yield Spelling(f"zero point by {name}", centred, X, (W, WS))
        yield Spelling(f"weight's zero point by {name}", wide_weight, X, (W, WS), static=False)
    for name, scaling in SCALINGS.items():

        def scaled(x, w, s, scaling=scaling):
            return linear_t(scaling(to(codes(x), F32)), deq_weight(w, s))

        def scaled_weight(x, w, s, scaling=scaling):
            return linear_t(x, aten.mul.Tensor(scaling(to(w, F32)), s))

        yield Spelling(f"scale by {name}", scaled, X, (W, WS))
        yield Spelling(f"weight's scale by {name}", scaled_weight, X, (W, WS), static=False)

    def part_of_many(x, w, s):
        many = aten.new_full.default(x, [300, 1, 1], 3.0)
        zero = aten.select.int(aten.slice.Tensor(many, 0, 0, 200, 1), 0, 0)
        return linear_t(aten.mul.Tensor(aten.sub.Tensor(to(codes(x), F32), zero), 0.03), deq_weight(w, s))

    yield Spelling("zero point taken of many", part_of_many, X, (W, WS))

    def asymmetric(x, w, s, z):
        return linear_t(x, aten.mul.Tensor(aten.sub.Tensor(to(w, F32), z), s))

    def shifted(x, w, s, z):
        return linear_t(x, aten.add.Tensor(aten.mul.Tensor(to(w, F32), s), z))

    for dtype, low, high in ((F32, -9, 9), (torch.int8, -9, 9), (torch.uint8, 0, 200), (torch.int32, -9, 9)):
        for static in (True, False):
            zero = integers(N, 1, low=low, high=high, dtype=dtype)
            yield Spelling(f"{dtype} zero points, static={static}", asymmetric, X, (W, WS, zero), static)
    yield Spelling("shift after the scale", shifted, X, (W, WS, floats(N, 1, scale=0.05)))


# -- named operators -----------------------------------------------------------------------------------------------


def _fake_quantize():
    one, zero = scalar(0.03), scalar(2, torch.int32)

    def plain(x, w, s):
        return linear_t(aten.fake_quantize_per_tensor_affine.default(x, 0.03, 2, -128, 127), deq_weight(w, s))

    def tensors(x, w, s):
        q = aten.fake_quantize_per_tensor_affine.tensor_qparams(x, one, zero, -128, 127)
        return linear_t(q, deq_weight(w, s))

    def mask(x, w, s):
        q = aten.fake_quantize_per_tensor_affine_cachemask.default(x, 0.03, 2, 0, 255)
        return linear_t(operator.getitem(q, 0), deq_weight(w, s))

    def enabled(x, w, s):
        on = torch.ones(1, dtype=torch.int64)
        q = aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default(x, one, zero, on, -128, 127)
        return linear_t(operator.getitem(q, 0), deq_weight(w, s))

    def channels(x, w, s, z):
        return linear_t(x, aten.fake_quantize_per_channel_affine.default(w, s, z, 0, -127, 127))

    def channels_mask(x, w, s, z):
        q = aten.fake_quantize_per_channel_affine_cachemask.default(w, s, z, 0, -8, 7)
        return linear_t(x, operator.getitem(q, 0))

    for build in (plain, tensors, mask, enabled):
        yield Spelling(f"fake quantize: {build.__name__}", build, X, (W, WS))
    square, zeros = floats(K, K), integers(K, low=-3, high=4, dtype=torch.int32)
    for build in (channels, channels_mask):
        yield Spelling(f"fake quantize: {build.__name__}", build, X, (square, scales(K) * 3, zeros))


def _decomposed():
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # the operators
    qd = torch.ops.quantized_decomposed
    i8, u8 = torch.int8, torch.uint8
    number, whole = scalar(0.03, torch.float64), scalar(3, torch.int64)

    def per_tensor(x, w, s):
        q = qd.quantize_per_tensor.default(x, 0.03, 3, 0, 255, u8)
        real = qd.dequantize_per_tensor.default(q, 0.03, 3, 0, 255, u8)
        y = linear_t(real, qd.dequantize_per_channel.default(w, s, None, 0, -127, 127, i8))
        return qd.quantize_per_tensor.default(y, 0.1, -4, -128, 127, i8)

    def tensors(x, w, s):
        q = qd.quantize_per_tensor.tensor(x, number, whole, -128, 127, i8)
        real = qd.dequantize_per_tensor.tensor(q, number, whole, -128, 127, i8)
        z = torch.zeros(N, dtype=torch.int64)
        y = linear_t(real, qd.dequantize_per_channel.default(w, s, z, 0, -127, 127, i8))
        return qd.quantize_per_tensor.tensor(aten.relu.default(y), number, scalar(0, torch.int64), 0, 255, u8)

    def tensors2(x, w, s):
        low, high = scalar(-128, torch.int64), scalar(127, torch.int64)
        q = qd.quantize_per_tensor.tensor2(x, number, whole, low, high, i8)
        real = qd.dequantize_per_tensor.tensor2(q, number, whole, low, high, i8)
        return linear_t(real, qd.dequantize_per_channel.default(w, s, None, 0, -127, 127, i8))

    def per_token(x, w, s, t):
        zeros = torch.zeros(M, 1, dtype=torch.int64)
        q = qd.quantize_per_token.default(x, t, zeros, -128, 127, i8)
        real = qd.dequantize_per_token.default(q, t, zeros, -128, 127, i8, F32)
        return linear_t(real, qd.dequantize_per_channel.default(w, s, None, 0, -127, 127, i8))

    def chosen_per_token(x, w, s):
        t, z = qd.choose_qparams_per_token.default(x, i8)
        q = qd.quantize_per_token.default(x, t, z, -128, 127, i8)
        real = qd.dequantize_per_token.default(q, t, z, -128, 127, i8, F32)
        return linear_t(real, qd.dequantize_per_channel.default(w, s, None, 0, -127, 127, i8))

    def chosen(choose, low, high, dtype):
        def build(x, w, s):
            t, z = choose(x, low, high, 1e-5, dtype)
            q = qd.quantize_per_tensor.tensor(x, t, z, low, high, dtype)
            real = qd.dequantize_per_tensor.tensor(q, t, z, low, high, dtype)
            return linear_t(real, qd.dequantize_per_channel.default(w, s, None, 0, -127, 127, i8))

        return build

    def per_group(x, w, s):
        real = qd.dequantize_per_channel_group.default(w, s, None, -127, 127, i8, K // 2, F32)
        return linear_t(x, real)

    yield Spelling("decomposed: groups", per_group, X, (W, scales(N, 2)))
    for build in (per_tensor, tensors, tensors2):
        yield Spelling(f"decomposed: {build.__name__}", build, X, (W, WS.flatten()))
    for name, choose in (("", qd.choose_qparams.tensor), (" symmetrically", qd.choose_qparams_symmetric.tensor)):
        for low, high, dtype in ((-128, 127, i8), (0, 255, u8)):
            spelling = chosen(choose, low, high, dtype)
            yield Spelling(f"decomposed: chosen{name}, {dtype}", spelling, X, (W, WS.flatten()))
    yield Spelling("decomposed: chosen per token", chosen_per_token, X, (W, WS.flatten()))
    yield Spelling("decomposed: square", per_tensor, X, (SQUARE, scales(K)))
    yield Spelling("decomposed: per_token", per_token, X, (W, WS.flatten(), scales(M, 1).double() + 0.02))


def _torchao():
    try:
        importlib.import_module("torchao")  # the operators
    except ImportError:
        return
    dequantize = torch.ops.torchao.dequantize_affine.default

    def rows(x, w, s, z):
        return linear_t(x, dequantize(w, [1, K], s, z, torch.int8, -128, 127, F32))

    def of_x(x, w, s):
        q = torch.ops.torchao.quantize_affine.default(
            x, [M, K], scalar(0.03), scalar(0, torch.int32), torch.int8, -128, 127
        )
        real = dequantize(q, [M, K], scalar(0.03), None, torch.int8, -128, 127, F32)
        return linear_t(real, deq_weight(w, s))

    def chosen(x, w, s):
        t, z = torch.ops.torchao.choose_qparams_affine.default(
            x, "SYMMETRIC", [1, K], torch.int8, -127, 127, 1e-5, torch.float32, torch.int32
        )
        q = torch.ops.torchao.quantize_affine.default(x, [1, K], t, z, torch.int8, -127, 127)
        real = dequantize(q, [1, K], t, None, torch.int8, -127, 127, F32)
        return linear_t(real, deq_weight(w, s))

    def groups(x, w, s):
        return linear_t(x, dequantize(w, [1, G], s, None, torch.int8, -128, 127, F32))

    zeros = integers(N, 1, low=-3, high=4)
    yield Spelling("torchao: rows", rows, X, (W, WS, zeros))
    yield Spelling("torchao: rows, not static", rows, X, (W, WS, zeros), static=False)
    yield Spelling("torchao: square", rows, X, (SQUARE, scales(K, 1), integers(K, 1, low=-3, high=4)))
    yield Spelling("torchao: x", of_x, X, (W, WS))
    yield Spelling("torchao: chosen", chosen, X, (W, WS))
    yield Spelling("torchao: groups", groups, X, (W, scales(N, K // G)))


def _vendor():
    qp.emulate_npu()

    def anti_quant(x, w, s, z):
        w16 = torch.ops.npu.npu_anti_quant.default(w, s, offset=z, dst_dtype=F16)
        return aten.mm.default(x, w16)

    def codes(x):
        rounded = aten.round.default(aten.div.Tensor(x, 0.03))
        return aten._to_copy.default(aten.clamp.default(rounded, -128, 127), dtype=torch.int8)

    def called(x, w, s, b):
        word = torch.ops.npu.npu_trans_quant_param.default(s)
        y = torch.ops.npu.npu_quant_matmul.default(codes(x), w, word, bias=b, output_dtype=5)
        return codes(y)

    def called_by_its_name_here(x, w, s, b):
        y = torch.ops.quantpass.quant_matmul.default(
            codes(x), w, s, bias=b, output_dtype=torch.bfloat16, transpose_x2=True
        )
        return codes(y)

    def rows(x, w, s):
        q, t = torch.ops.npu.npu_dynamic_quant.default(x)
        real = aten.mul.Tensor(aten._to_copy.default(q, dtype=F32), aten.unsqueeze.default(t, 1))
        return linear_t(real, deq_weight(w, s))

    flat, bias = WS.flatten() * 0.01, integers(N, low=-500, high=500, dtype=torch.int32)
    yield Spelling("anti_quant", anti_quant, X.half(), (WT, WS.flatten(), integers(N, low=-3, high=4).float()))
    yield Spelling("npu_quant_matmul, quantized", called, X.half(), (WT, flat, bias))
    yield Spelling("quant_matmul, quantized", called_by_its_name_here, X.half(), (W, flat, bias))
    yield Spelling("npu_dynamic_quant", rows, X.half(), (W, WS))


# -- matmuls -------------------------------------------------------------------------------------------------------


def _matmuls():
    def right(w, s):
        return aten.t.default(deq_weight(w, s))

    def batch(w, s):
        return aten.expand.default(aten.unsqueeze.default(right(w, s), 0), [2, K, N])

    forms = {
        "mm": (lambda x, w, s, b: aten.mm.default(x, right(w, s)), X),
        "matmul": (lambda x, w, s, b: aten.matmul.default(x, right(w, s)), X3),
        "linear": (lambda x, w, s, b: aten.linear.default(x, deq_weight(w, s), b), X3),
        "addmm": (lambda x, w, s, b: aten.addmm.default(b, x, right(w, s)), X),
        "addmm, weighted": (lambda x, w, s, b: aten.addmm.default(b, x, right(w, s), beta=2, alpha=3), X),
        "bmm": (lambda x, w, s, b: aten.bmm.default(x, batch(w, s)), X3),
        "baddbmm": (lambda x, w, s, b: aten.baddbmm.default(b, x, batch(w, s), beta=2, alpha=0.5), X3),
        "conv1d": (lambda x, w, s, b: aten.conv1d.default(x, aten.unsqueeze.default(deq_weight(w, s), 2), b), floats(2, K, 7)),
        "conv2d": (
            lambda x, w, s, b: aten.conv2d.default(x, aten.view.default(deq_weight(w, s), [N, K, 1, 1]), b),
            floats(2, K, 3, 4),
        ),
        "convolution": (
            lambda x, w, s, b: aten.convolution.default(
                x, aten.view.default(deq_weight(w, s), [N, K, 1, 1]), b, [1, 1], [0, 0], [1, 1], False, [0, 0], 1
            ),
            floats(2, K, 3, 4),
        ),
    }  # fmt: skip
    for name, (form, x) in forms.items():

        def weight_only(x, w, s, b, form=form):
            return form(x, w, s, b)

        def both(x, w, s, b, form=form):
            return form(deq_codes(codes(x)), w, s, b)

        yield Spelling(f"{name}, float x", weight_only, x, (W, WS, B))
        yield Spelling(f"{name}, codes", both, x, (W, WS, B))

    def on_the_left(x, w, s, b):
        return aten.addmm.default(b, deq_weight(w, s), aten.t.default(x), beta=2)

    square = floats(N, K)
    yield Spelling("weight on the left, column", on_the_left, square, (W, WS, floats(N, 1)))
    yield Spelling("weight on the left, row", on_the_left, square, (W, WS, floats(N)))

    def int_mm(x, w, s):
        y = aten._int_mm.default(codes(x), w)
        return aten.mul.Tensor(aten.mul.Tensor(to(y, F32), s), 0.03)

    def int_mm_corrected(x, w, s):
        y = aten.sub.Tensor(aten._int_mm.default(codes(x), w), torch.full((N,), 77, dtype=torch.int32))
        return aten.mul.Tensor(to(y, F32), s)

    def mm_dtype(x, w, s):
        return aten.mul.Tensor(to(aten.mm.default(to(codes(x), torch.int32), to(w, torch.int32)), F32), s)

    tall = floats(20, K)
    flat = WS.flatten()
    for build in (int_mm, int_mm_corrected, mm_dtype):
        yield Spelling(build.__name__, build, tall, (WT, flat))

    def int8pack(x, w, s):
        return aten._weight_int8pack_mm.default(x, w, s)

    yield Spelling("int8pack", int8pack, X.bfloat16(), (W, flat.bfloat16()))
    nibbles = integers(32, 64, low=0, high=16, dtype=torch.int32)
    packed = aten._convert_weight_to_int4pack_for_cpu.default(nibbles, 1)
    parameters = torch.stack([scales(2, 32), floats(2, 32, scale=0.05)], dim=-1)

    def int4pack(x, w, sz):
        return aten._weight_int4pack_mm_for_cpu.default(x, w, 32, sz)

    yield Spelling("int4pack", int4pack, floats(M, 64).bfloat16(), (packed, parameters.bfloat16()))


# -- what follows --------------------------------------------------------------------------------------------------


def _epilogues():
    def product(x, w, s):
        return linear_t(deq_codes(codes(x)), deq_weight(w, s))

    flat = WS.flatten() * 100
    steps = {
        "mul.Tensor": lambda y, b: aten.mul.Tensor(y, flat),
        "mul.Tensor, swapped": lambda y, b: aten.mul.Tensor(flat, y),
        "mul.Scalar": lambda y, b: aten.mul.Scalar(y, 0.7),
        "div.Tensor": lambda y, b: aten.div.Tensor(y, flat),
        "div.Scalar": lambda y, b: aten.div.Scalar(y, 0.7),
        "add.Tensor": lambda y, b: aten.add.Tensor(y, b),
        "add.Tensor, swapped": lambda y, b: aten.add.Tensor(b, y),
        "add.Scalar": lambda y, b: aten.add.Scalar(y, 1.5),
        "sub.Tensor": lambda y, b: aten.sub.Tensor(y, b),
        "sub.Scalar": lambda y, b: aten.sub.Scalar(y, 1.5),
        "all": lambda y, b: aten.add.Tensor(aten.mul.Tensor(aten.div.Tensor(y, 2.0), flat), b),
    }
    for name, step in steps.items():

        def scaled(x, w, s, b, step=step):
            return step(product(x, w, s), b)

        def scaled_float(x, w, s, b, step=step):
            return step(linear_t(x, deq_weight(w, s)), b)

        yield Spelling(f"{name} after codes", scaled, X, (W, WS, B))
        yield Spelling(f"{name} after float x", scaled_float, X, (W, WS, B))
    for name, cast in CASTS.items():

        def casts(x, w, s, b, cast=cast):
            return cast(aten.add.Tensor(product(x, w, s), b), F16)

        yield Spelling(f"{name} after", casts, X, (W, WS, B))
    clamps = {
        "clamp": lambda r: aten.clamp.default(r, -128, 127),
        "clamp.Tensor": lambda r: aten.clamp.Tensor(r, scalar(-128.0), scalar(127.0)),
        "clamp_min": lambda r: aten.clamp_max.default(aten.clamp_min.default(r, 0), 255),
        "clamp by tensors": QUANTIZERS["clamp_min.Tensor, clamp_max.Tensor"],
        "clamp by minimum, maximum": QUANTIZERS["minimum, maximum"],
        "relu": lambda r: aten.clamp.default(r, 0, 255),
    }
    for name, clamp in clamps.items():
        for cast in CASTS.values():

            def requantized(x, w, s, b, clamp=clamp, cast=cast, name=name):
                y = aten.add.Tensor(product(x, w, s), b)
                y = aten.relu.default(y) if name == "relu" else y
                r = aten.add.Tensor(aten.round.default(aten.div.Tensor(y, 0.1)), 0)
                return cast(clamp(r), torch.int8 if name.startswith("clamp") and name != "clamp_min" else torch.uint8)

            yield Spelling(f"requantized, {name}, {len(name)}", requantized, X, (W, WS, B))


def all_spellings():
    """Every spelling, names unique."""
    found = {}
    groups = (_movements, _activations, _fake_quantize, _decomposed, _torchao, _vendor, _matmuls, _epilogues)
    for group in groups:
        for spelling in group():
            name = spelling.name
            while name in found:
                name += "'"
            found[name] = spelling
    return found
