"""The benchmarks run: on small sizes, once."""

import pytest

from benchmarks import real_weights


@pytest.mark.parametrize("name", [*real_weights.SPELLINGS, real_weights.LM_HEAD])
def test_real_weights(name):
    found = real_weights.measure(name, 64, 256, 1, "ascend910b")
    assert found["run"] > 0 and found["fuse"] > 0 and (found["n"], found["k"]) == (64, 256)
