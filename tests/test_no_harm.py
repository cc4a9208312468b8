"""Models without anything quantized: no exception, no site, no node changed."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import nn

import quantpass as qp
from quantpass.graph.dump import dump
from tests.helpers import CHIPS

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (pip install 'quantpass[test]')"
)

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TOKENS = torch.arange(12).reshape(2, 6) % 50


class Residual(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 1)
        self.norm = nn.BatchNorm2d(c)

    def forward(self, x):
        return torch.relu(x + self.b(torch.relu(self.norm(self.a(x)))))


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), Residual(8), nn.MaxPool2d(2), Residual(8))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class UNetBlock(nn.Module):
    """A residual block with a time embedding, self-attention over pixels, and a skip connection."""

    def __init__(self, c=16):
        super().__init__()
        self.n1, self.n2, self.n3 = (nn.GroupNorm(4, c) for _ in range(3))
        self.c1, self.c2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.time, self.qkv, self.out = nn.Linear(32, c), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)
        self.skip = nn.Conv2d(2 * c, c, 1)

    def forward(self, x, t):
        h = self.c1(nn.functional.silu(self.n1(x))) + self.time(t)[:, :, None, None]
        h = x + self.c2(nn.functional.silu(self.n2(h)))
        q, k, v = (p.flatten(2) for p in self.qkv(self.n3(h)).chunk(3, dim=1))
        weights = torch.softmax(q.transpose(1, 2) @ k / q.shape[1] ** 0.5, dim=-1)
        h = h + self.out((v @ weights.transpose(1, 2)).unflatten(2, h.shape[2:]))
        return self.skip(torch.cat([nn.functional.interpolate(h, scale_factor=0.5), x[..., ::2, ::2]], dim=1))


def bert():
    model = transformers.BertModel(transformers.BertConfig(vocab_size=64, **TINY))
    return model, (TOKENS,), {}


def llama():
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, **TINY)
    return transformers.LlamaForCausalLM(config), (TOKENS,), {"use_cache": False}


def qwen_moe():
    config = transformers.Qwen2MoeConfig(
        vocab_size=64, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, **TINY,
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config), (TOKENS,), {"use_cache": False}


def t5():
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    kwargs = {"decoder_input_ids": TOKENS, "use_cache": False}
    return transformers.T5ForConditionalGeneration(config), (TOKENS,), kwargs


def vit():
    model = transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=4, **TINY))
    return model, (torch.randn(2, 3, 16, 16),), {}


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=10,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    kwargs = {"decoder_input_ids": TOKENS, "use_cache": False}
    return transformers.WhisperForConditionalGeneration(config), (torch.randn(2, 8, 20),), kwargs


def conv_net():
    return ConvNet(), (torch.randn(2, 3, 16, 16),), {}


def unet_block():
    return UNetBlock(), (torch.randn(2, 16, 8, 8), torch.randn(2, 32)), {}


MODELS = [bert, llama, qwen_moe, t5, vit, whisper, conv_net, unet_block]


def built(make):
    torch.manual_seed(0)
    model, args, kwargs = make()
    return model.eval().requires_grad_(False), args, kwargs


@pytest.mark.parametrize("make", MODELS)
def test_compiled_graphs_stay_as_they_are(make):
    model, args, kwargs = built(make)
    for target in (*CHIPS, "cpu") if make in (conv_net, unet_block) else ("ascend910b",):
        torch._dynamo.reset()
        backend = qp.backend(target=target)
        with torch.no_grad():
            expected = model(*args, **kwargs)
            actual = torch.compile(model, backend=backend)(*args, **kwargs)
        assert backend.report.total == 0, str(backend.report)
        assert backend.report.graphs
        for before, after in backend.report.graphs:
            assert before == after
        tensors = [t for t in _tensors(expected) if t.is_floating_point()]
        for a, e in zip([t for t in _tensors(actual) if t.is_floating_point()], tensors, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [bert, vit, conv_net, unet_block])
def test_exported_programs_stay_as_they_are(make):
    model, args, kwargs = built(make)
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs)
    for graph in (program.run_decompositions({}), program.run_decompositions(), program.module()):
        before = dump(graph if isinstance(graph, torch.fx.GraphModule) else graph.graph)
        nodes = len((graph.graph).nodes)
        report = qp.fuse(graph, target="ascend910b")
        assert report.total == 0
        assert dump(graph if isinstance(graph, torch.fx.GraphModule) else graph.graph) == before
        assert len((graph.graph).nodes) == nodes


def _tensors(out):
    if isinstance(out, torch.Tensor):
        return [out]
    values = out.values() if hasattr(out, "values") else out if isinstance(out, list | tuple) else []
    return [t for v in values for t in _tensors(v)]
