"""What no operator has a term for, moved to where it is exact, or done where the user allowed it by name."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import quantpass as qp
from tests.helpers import StaticW8A8, WeightOnly

K, N = 64, 96
G = torch.Generator().manual_seed(0)
CODES = torch.randint(-128, 128, (N, K), dtype=torch.int8, generator=G)
SCALE = torch.rand(N, 1, generator=G) * 0.01 + 1e-3


class Written(nn.Module):
    """``forward(module, x)`` with the codes and scales above, in ``dtype``."""

    def __init__(self, forward, dtype=torch.float16, **tensors):
        super().__init__()
        self.body = forward
        tensors = {"codes": CODES, "scale": SCALE.to(dtype), **tensors}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, *args):
        return self.body(self, *args)


def rows(dtype=torch.float16, *shape):
    return torch.randn(*(shape or (4, K)), generator=torch.Generator().manual_seed(1)).to(dtype)


def fused(model, *args, target="ascend910b", **options):
    torch._dynamo.reset()
    backend = qp.backend(target=target, **options)
    with torch.no_grad():
        return torch.compile(model, backend=backend)(*args), model(*args), backend.report


def close(actual, expected, relative=4e-3):
    assert actual.dtype == expected.dtype
    assert float((actual.double() - expected.double()).abs().max() / expected.double().abs().max()) < relative


def test_a_scale_along_k_moves_onto_x():
    of_k = torch.rand(K, generator=G).half() * 0.01 + 1e-3
    model = Written(lambda m, x: linear(x, m.codes.half() * m.of_k), of_k=of_k)
    actual, expected, report = fused(model, rows())
    report.require()
    assert report.sites[0].numerics.why == ("x multiplied by the weight's scale along K",)
    assert "aten.mul.Tensor(%" in report.sites[0].after
    close(actual, expected)


def test_a_scale_along_k_and_along_n():
    of_k = torch.rand(K, generator=G).half() + 0.5
    actual, expected, report = fused(
        Written(lambda m, x: linear(x, m.codes.half() * m.of_k * m.scale), of_k=of_k), rows()
    )
    report.require()
    close(actual, expected)


def test_a_scale_along_k_is_refused_for_a_quantized_activation():
    of_k = torch.rand(K, generator=G).half() * 0.01

    def forward(m, x):
        q = torch.clamp(torch.round(x / 0.03), -128, 127).to(torch.int8).half() * 0.03
        return linear(q, m.codes.half() * m.of_k)

    actual, expected, report = fused(Written(forward, of_k=of_k), rows())
    assert report.sites[0].plan.op == "npu_weight_quant_batchmatmul"
    assert any("varies along K" in note for note in report.sites[0].plan.notes)
    close(actual, expected)


def test_groups_in_the_order_of_activation_size():
    order = torch.randperm(K, generator=G) // 32
    groups = torch.rand(2, N, generator=G).half() * 0.01 + 1e-3
    model = Written(lambda m, x: x @ (m.codes.t().half() * m.groups[m.order]), order=order, groups=groups)
    actual, expected, report = fused(model, rows())
    report.require()
    assert report.sites[0].plan.call["antiquant_group_size"] == 32
    assert "aten.index_select" in report.sites[0].after
    close(actual, expected)


def test_a_zero_point_that_is_known_at_run_time_goes_into_the_bias():
    def forward(m, x):
        low, high = x.amin(), x.amax()
        scale = (high - low) / 255
        zero = torch.clamp(torch.round(-low / scale), 0, 255).to(torch.int32)
        q = torch.clamp(torch.round(x / scale) + zero, 0, 255).to(torch.uint8)
        return linear((q.to(torch.float32) - zero) * scale, m.codes.float() * m.scale)

    actual, expected, report = fused(Written(forward, torch.float32), rows(torch.float32), target="cpu")
    report.require()
    assert report.sites[0].plan.op == "npu_quant_matmul"
    assert "activation zero point folded into the bias" in report.sites[0].plan.fixups
    close(actual, expected, 1e-5)


def test_a_zero_point_for_each_row_is_refused():
    def forward(m, x):
        low = x.amin(-1, keepdim=True)
        scale = (x.amax(-1, keepdim=True) - low) / 255
        zero = torch.round(-low / scale)
        q = torch.clamp(torch.round(x / scale) + zero, 0, 255).to(torch.uint8)
        return linear((q.float() - zero) * scale, m.codes.float() * m.scale)

    _, _, report = fused(Written(forward, torch.float32), rows(torch.float32))
    assert "qmm.activation.zero_point" in [r.rule for r in report.sites[0].rejects]


@pytest.mark.parametrize("make", [WeightOnly, StaticW8A8])
def test_float32_on_310p_is_computed_in_float16_where_that_is_named(make):
    model, x = make(K, N, dtype=torch.float32), rows(torch.float32)
    _, _, report = fused(model, x, target="ascend310p")
    assert report.fused == 0
    assert "numerics.float16" in [r.rule for r in report.sites[0].rejects]
    actual, expected, report = fused(model, x, target="ascend310p", allow=("numerics.float16",))
    report.require()
    assert "computed in float16, which overflows above 65504" in report.sites[0].numerics.why
    close(actual, expected)


def test_attention_products_of_codes():
    def quantized(x):
        return torch.clamp(torch.round(x / 0.03), -128, 127).to(torch.int8).to(x.dtype) * 0.03

    model = Written(lambda m, q, k: quantized(q) @ quantized(k).transpose(-1, -2))
    q, k = rows(torch.float16, 2, 3, 8, 16), rows(torch.float16, 2, 3, 5, 16)
    actual, expected, report = fused(model, q, k)
    report.require()
    assert report.sites[0].plan.call["x2"].shape[-2:] == (16, 5)
    close(actual, expected)


def test_an_attention_product_with_a_zero_point_is_refused():
    def quantized(x, zero):
        return (torch.clamp(torch.round(x / 0.03) + zero, -128, 127).to(torch.int8).to(x.dtype) - zero) * 0.03

    model = Written(lambda m, q, k: quantized(q, 0) @ quantized(k, 3).transpose(-1, -2))
    _, _, report = fused(model, rows(torch.float16, 2, 8, 16), rows(torch.float16, 2, 5, 16))
    assert [r.rule for r in report.sites[0].rejects] == ["read.batched.zero_point"]


def test_one_quantization_for_q_k_and_v():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(K, N, dtype=torch.bfloat16) for _ in range(3))

        def forward(self, x):
            return self.q(x), self.k(x), self.v(x)

    model = Heads().eval()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    x = rows(torch.bfloat16)
    actual, expected, report = fused(model, x)
    report.require()
    before, after = report.graphs[0]
    assert (before.count("aten.round("), after.count("aten.round(")) == (3, 1)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_different_quantizations_stay_apart():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = StaticW8A8(K, N, scale=0.03), StaticW8A8(K, N, scale=0.04)

        def forward(self, x):
            return self.a(x), self.b(x)

    _, _, report = fused(Two(), rows())
    before, after = report.graphs[0]
    assert before.count("aten.round(") == after.count("aten.round(") == 2


def test_the_same_quantization_before_and_after_a_write_is_not_one():
    """Two nodes that look alike read different values: the graph writes to their input in between."""
    model = StaticW8A8(K, N)

    def both(x):
        x = x * 2
        first = model(x)
        x.add_(1)
        return first, model(x)

    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        gm = make_fx(both, tracing_mode="fake", _allow_non_fake_inputs=True)(rows())
        (write,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add_.Tensor)
        write.replace_all_uses_with(write.args[0])  # both quantizations read the very same node
        gm.recompile()
        expected = gm(rows())
        report = qp.fuse(gm, target="cpu")
        actual = gm(rows())
    assert report.total == 2
    assert not torch.equal(*expected)
    for a, e in zip(actual, expected, strict=True):
        close(a, e)
