"""The benchmarks run: on small sizes, once."""

import pytest
import torch
from torch._inductor.fx_passes import freezing_patterns

from benchmarks import pass_speed, real_weights


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
