"""The two module documents' modules."""

import inspect

import pytest
import torch
from torch import nn

import quantpass as qp
from quantpass.nn import LinearQuant, LinearWeightQuant, quantize_weight
from tests.helpers import assert_close

ops = torch.ops.quantpass
G = torch.Generator().manual_seed(0)


def test_signatures_are_the_documents():
    parameters = inspect.signature(LinearWeightQuant.__init__).parameters
    documented = {
        "bias": True, "device": None, "dtype": None, "antiquant_offset": False, "quant_scale": False,
        "quant_offset": False, "antiquant_group_size": 0, "inner_precise": 0,
    }  # fmt: skip
    assert list(parameters)[1:3] == ["in_features", "out_features"]
    assert {k: parameters[k].default for k in documented} == documented
    parameters = inspect.signature(LinearQuant.__init__).parameters
    documented = {
        "bias": True, "offset": False, "pertoken_scale": False, "output_dtype": None, "x1_dtype": None,
        "x2_dtype": None, "group_size": None,
    }  # fmt: skip
    assert {k: parameters[k].default for k in documented} == documented
    assert all(parameters[k].kind is inspect.Parameter.KEYWORD_ONLY for k in documented)


def test_variables_are_the_documents():
    m = LinearWeightQuant(64, 32, antiquant_offset=True, quant_scale=True, quant_offset=True)
    assert [n for n, _ in m.named_parameters()] == [
        "weight", "antiquant_scale", "antiquant_offset", "quant_scale", "quant_offset", "bias",
    ]  # fmt: skip
    assert m.weight.shape == (32, 64)
    assert LinearWeightQuant(64, 32, bias=False).bias is None
    q = LinearQuant(64, 32, offset=True)
    assert (q.weight.shape, q.scale.shape, q.offset.shape, q.bias.dtype) == ((32, 64), (32,), (32,), torch.int32)
    assert not any(p.requires_grad for p in (*m.parameters(), *q.parameters()))


def weight_quant_module(**options):
    m = LinearWeightQuant(64, 32, antiquant_offset=True, dtype=torch.float16, **options)
    m.weight.data = torch.randint(-128, 128, (32, 64), dtype=torch.int8, generator=G)
    m.antiquant_scale.data = (torch.rand(32, 1, generator=G) * 0.01).half()
    m.antiquant_offset.data = torch.randint(-5, 5, (32, 1), generator=G).half()
    if m.bias is not None:
        m.bias.data = torch.randn(32, generator=G).half()
    return m


def test_linear_weight_quant_computes_the_formula():
    m, x = weight_quant_module(), torch.randn(5, 64, generator=G).half()
    real = (m.weight.half() + m.antiquant_offset) * m.antiquant_scale
    assert_close(m(x), (x.float() @ real.float().t() + m.bias.float()).half())


def quant_module(**options):
    m = LinearQuant(64, 32, **options)
    m.weight.data = torch.randint(-128, 128, (32, 64), dtype=torch.int8, generator=G)
    m.scale.data = torch.rand(32, generator=G) * 1e-3
    if m.bias is not None:
        m.bias.data = torch.randint(-1000, 1000, (32,), dtype=torch.int32, generator=G)
    if m.offset is not None:
        m.offset.data = torch.full((32,), 3.0)
    return m


@pytest.mark.parametrize("output_dtype", [None, torch.int8, torch.float16, torch.bfloat16, torch.int32])
def test_linear_quant_computes_the_formula(output_dtype):
    word = output_dtype in (None, torch.int8)
    m, x = (
        quant_module(offset=word, output_dtype=output_dtype),
        torch.randint(-128, 128, (5, 64), dtype=torch.int8, generator=G),
    )
    expected = ops.quant_matmul(
        x, m.weight, m.scale, offset=m.offset, bias=m.bias, output_dtype=output_dtype, transpose_x2=True
    )
    assert torch.equal(m(x), expected)
    packed = quant_module(offset=word, output_dtype=output_dtype)
    packed.load_state_dict(m.state_dict())
    if output_dtype not in (torch.bfloat16, torch.int32):
        packed.scale.data = ops.trans_quant_param(m.scale, m.offset)
        assert torch.equal(packed(x), expected), "an int64 scale is taken as it is"


def test_int4():
    float_linear = nn.Linear(64, 32).half()
    m, x = (
        LinearWeightQuant.from_linear(float_linear, bits=4, granularity="group", group_size=32),
        torch.randn(3, 64).half(),
    )
    assert m.weight.shape == (32, 8)
    assert m.weight.dtype == torch.int32
    assert m.antiquant_scale.shape == (32, 2)
    assert torch.nn.functional.cosine_similarity(m(x).float(), float_linear(x).float()).min() > 0.98


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_from_linear_stays_within_half_a_step(granularity, bits, symmetric):
    torch.manual_seed(0)
    linear = nn.Linear(128, 48).to(torch.float32)
    codes, scale, zero = quantize_weight(
        linear.weight.detach(), bits=bits, granularity=granularity, group_size=64, symmetric=symmetric
    )
    spread = scale.repeat_interleave(64, 1) if granularity == "group" else scale
    zeros = 0 if zero is None else zero.repeat_interleave(64, 1) if granularity == "group" else zero
    real = (codes.float() - zeros) * spread
    assert int(codes.abs().max()) <= 2 ** (bits - 1)
    assert ((real - linear.weight).abs() <= 0.5001 * spread + (0 if symmetric else 0.5001) * spread).all()
    module = LinearWeightQuant.from_linear(
        nn.Linear(128, 48).half(), bits=bits, granularity=granularity, group_size=64, symmetric=symmetric
    )
    x = torch.randn(3, 128).half()
    assert module(x).shape == (3, 48)


def test_linear_quant_from_linear():
    torch.manual_seed(0)
    linear, x = nn.Linear(128, 48), torch.randn(7, 128)
    step = x.abs().max() / 127
    codes = (x / step).round().to(torch.int8)
    for dtype in (torch.float16, torch.bfloat16):
        static = LinearQuant.from_linear(linear, input_scale=float(step), output_dtype=dtype)
        assert torch.nn.functional.cosine_similarity(static(codes).float(), linear(x)).min() > 0.998
        dynamic = LinearQuant.from_linear(linear, output_dtype=dtype)
        dynamic.pertoken_scale.data = step.expand(7).contiguous()
        assert torch.nn.functional.cosine_similarity(dynamic(codes).float(), linear(x)).min() > 0.998


def test_state_dict_keeps_what_was_assigned():
    source = weight_quant_module()
    fresh = LinearWeightQuant(64, 32, antiquant_offset=True)
    fresh.load_state_dict(source.state_dict())
    assert fresh.weight.dtype == torch.int8
    assert fresh.antiquant_scale.shape == (32, 1)
    x = torch.randn(3, 64).half()
    assert torch.equal(fresh(x), source(x))


@pytest.mark.parametrize("module", [weight_quant_module, lambda: quant_module(output_dtype=torch.float16)])
def test_modules_compile_to_the_operator(module):
    m = module()
    x = (
        torch.randn(5, 64).half()
        if isinstance(m, LinearWeightQuant)
        else torch.randint(-128, 128, (5, 64), dtype=torch.int8)
    )
    torch._dynamo.reset()
    seen = []

    def backend(gm, inputs):
        seen.append([n.target for n in gm.graph.nodes if n.op == "call_function"])
        return gm

    with torch.no_grad():
        assert torch.equal(torch.compile(m, backend=backend, fullgraph=True)(x), m(x))
    assert any("quantpass" in str(t) for t in seen[0])
    exported = torch.export.export(m, (x,))
    assert torch.equal(exported.module()(x), m(x))


X, XI = torch.ones(4, 64).half(), torch.ones(4, 64, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "x", "rule"),
    [
        ({"weight": torch.ones(32, 64)}, X, "wqmm.a2.dtypes.weight"),
        ({"antiquant_scale": torch.ones(32)}, X, "wqmm.scale.dtype"),
        ({"antiquant_scale": torch.ones(31).half()}, X, "wqmm.scale.shape"),
        ({"antiquant_offset": torch.ones(32).half()}, X, "wqmm.offset.shape"),
        ({"bias": torch.ones(1).half()}, X, "wqmm.bias.shape"),
        ({"bias": torch.ones(32)}, X, "wqmm.a2.dtypes.bias"),
        ({"antiquant_group_size": 48}, X, "wqmm.group"),
        ({}, X[None], "wqmm.x.rank"),
        ({}, X[:0], "wqmm.empty"),
        ({}, X[:, :60], "wqmm.k"),
    ],
)
def test_constraints_of_linear_weight_quant(change, x, rule):
    m = weight_quant_module()
    for name, value in change.items():
        if isinstance(value, torch.Tensor):
            getattr(m, name).data = value
        else:
            setattr(m, name, value)
    with pytest.raises(ValueError, match=rule):
        m(x)


@pytest.mark.parametrize(
    ("change", "x", "rule"),
    [
        ({"weight": torch.ones(32, 64, dtype=torch.int32)}, XI, "qmm.same_dtype"),
        ({"scale": torch.ones(32).half()}, XI, "qmm.a2.dtypes.scale"),
        ({"scale": torch.ones(2)}, XI, "qmm.scale.shape"),
        ({"bias": torch.ones(32).half()}, XI, "qmm.a2.dtypes.bias"),
        ({"bias": torch.ones(31, dtype=torch.int32)}, XI, "qmm.bias.shape"),
        ({}, XI[0], "qmm.x1.rank"),
        ({}, XI[:, :32], "qmm.k"),
    ],
)
def test_constraints_of_linear_quant(change, x, rule):
    m = quant_module(output_dtype=torch.float16)
    for name, value in change.items():
        getattr(m, name).data = value
    with pytest.raises(ValueError, match=rule):
        m(x)


def test_arguments_that_make_no_sense():
    with pytest.raises(ValueError, match="needs quant_scale=True"):
        LinearWeightQuant(8, 8, quant_offset=True)
    with pytest.raises(ValueError, match="x1_dtype is 1"):
        LinearQuant(8, 8, x1_dtype=1)
    with pytest.raises(ValueError, match="bits is 3"):
        LinearWeightQuant.from_linear(nn.Linear(8, 8).half(), bits=3)
    with pytest.raises(ValueError, match="must divide K = 64"):
        LinearWeightQuant.from_linear(nn.Linear(64, 8).half(), granularity="group", group_size=48)
    with pytest.raises(ValueError, match="takes float16 or bfloat16"):
        LinearWeightQuant.from_linear(nn.Linear(8, 8))
    assert qp.nn.LinearQuant is LinearQuant


def test_linear_quant_takes_the_newer_groups():
    x, w = (torch.randint(-8, 8, shape, generator=G) for shape in ((4, 512), (32, 512)))
    m = LinearQuant(
        512, 32, bias=False, pertoken_scale=True, output_dtype=torch.bfloat16, group_size=[0, 0, 256],
        x1_dtype=torch.quint4x2, x2_dtype=torch.int32,
    )  # fmt: skip
    m.weight.data, m.scale.data, m.pertoken_scale.data = ops.pack_int4(w), torch.rand(2, 32), torch.rand(4)
    groups = torch.stack([x[:, k : k + 256] @ w[:, k : k + 256].t() for k in (0, 256)])
    expected = (groups * m.scale[:, None]).sum(0) * m.pertoken_scale[:, None]
    assert_close(m(ops.pack_int4(x)), expected.bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x1_dtype": torch.float16}, "x1_dtype is torch.float16; accepted"),
        ({"group_size": [256]}, r"\[gm, gn, gk\]"),
    ],
)
def test_linear_quant_refuses_what_means_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        LinearQuant(64, 32, **options)


def test_linear_quant_compares_what_is_said_with_what_comes():
    m = quant_module(output_dtype=torch.float16, x1_dtype=torch.quint4x2)
    with pytest.raises(ValueError, match=r"x1_dtype is torch\.quint4x2, which comes as torch\.int32"):
        m(torch.zeros(3, 64, dtype=torch.int8))
