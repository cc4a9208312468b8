"""The benchmarks run: on small sizes, once."""

import pytest
import torch
from torch._inductor.fx_passes import freezing_patterns

from benchmarks import compile_share, pass_speed, real_weights, sharded


def test_layers_of_a_model():
    found = real_weights.measure_model("int4 groups, torchao", 2, "ascend910b", ((64, 256), (128, 128)))
    assert "4 Linears" in found and "in 2 of 32 layers" in found


@pytest.mark.parametrize("name", [*real_weights.SPELLINGS, real_weights.LM_HEAD])
def test_real_weights(name):
    found = real_weights.measure(name, 64, 256, 1, "ascend910b")
    assert found["run"] > 0 and found["fuse"] > 0 and (found["n"], found["k"]) == (64, 256)


def test_pass_speed_says_what_it_is_beside():
    """Up to PyTorch 2.13 Inductor fuses these graphs; where it does not, no site may count as fused by it."""
    freezing_patterns.lazy_init()
    assert pass_speed.time_inductor(pass_speed.graph(3), 3) > 0
    assert pass_speed.time_quantpass(pass_speed.graph(3), 3) > 0
    before_2_14 = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)
    wanted = "fuses every site" if before_2_14 else "only its search is timed"
    assert wanted in pass_speed.anchor() and torch.__version__ in pass_speed.anchor()


@pytest.mark.usefixtures("without_autograd")
def test_share_of_a_compilation():
    whole, own, fused = compile_share.share(lambda: compile_share.minilm(1, "W8A16"))
    assert 0 < own < whole and fused == 6


@pytest.mark.usefixtures("without_autograd")
def test_explain_beside_a_capture():
    found = compile_share.explains("W8A16", 1, hidden_size=96, intermediate_size=128)
    assert found["sites"] == 7 and found["weights"] > 4 * 96 * 96
    assert found["several"] > 0 and found["aot"] > 0


@pytest.mark.usefixtures("without_autograd")
def test_nodes_where_nothing_is_quantized():
    nodes, each = compile_share.per_node(lambda: compile_share.minilm(1, None), 1)
    assert nodes > 50 and each > 0


@pytest.mark.parametrize("kind", sharded.KINDS)
def test_a_model_in_one_process(kind):
    found = sharded.measure(kind, 64, 128, 1, ranks=1)
    assert found["seconds"] > 0
    packed = 3 * 64 * 128 // 2  # of three weights with codes of four bits; those of eight are taken as they are
    assert (found["prepared"] >= packed) == (kind == "W4A16 g32")


@pytest.fixture
def without_autograd():
    with torch.no_grad():
        yield
