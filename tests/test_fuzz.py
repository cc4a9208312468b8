"""Differential fuzzing: random quantized graphs, fused and as they were, within the bounds that the sites state.

``QUANTPASS_FUZZ=5000 pytest tests/test_fuzz.py`` draws that many examples of each kind, with random seeds, and prints
what was drawn; without it a few hundred fixed ones are drawn. The kinds are tests of their own: ``-n 2`` shares them.
Hypothesis shrinks a failure and prints how to repeat it. The grammar is in :mod:`tests.fuzz`.
"""

from functools import partial

import pytest
from hypothesis import strategies as st

import quantpass as qp
from tests import helpers
from tests.fuzz import graphs
from tests.fuzz.running import judged, untouched

CHIPS = st.sampled_from(("ascend310p", "ascend310p", *helpers.CHIPS))


def test_layers(fuzz):
    fuzz("layers", graphs.layers(), few=160, least=0.15)


def test_heads(fuzz):
    fuzz("heads", graphs.heads(), few=100, least=0.2)


def test_weights_alone(fuzz):
    fuzz("weights alone", graphs.weights_alone(), few=150, least=0.1)


def test_scaled_sums(fuzz):
    fuzz("scaled sums", graphs.scaled_sums(), few=100, least=0.2)


def test_float_models(fuzz):
    fuzz("float models", graphs.float_models(), untouched, few=60, least=0.0, weight=0.2)


def test_integer_matmuls(fuzz):
    fuzz("integer matmuls", graphs.integer_matmuls(), few=120, least=0.3)


def test_attentions(fuzz):
    fuzz("attentions", graphs.attentions(), few=100, least=0.1)


ALLOW = ("numerics.float16", "weights.refit:0")


@pytest.mark.parametrize("kind", ["layers", "weights_alone", "integer_matmuls"])
def test_with_permissions(fuzz, kind):
    """Sites in float16, and weights re-fitted however badly: the stated bounds hold all the same."""
    cases, check = getattr(graphs, kind)(), partial(judged, allow=ALLOW)
    fuzz(f"{kind}, as allowed", cases, check, few=100, least=0.1, targets=CHIPS, weight=0.5)


@pytest.mark.parametrize("kind", ["layers", "heads"])
def test_vendor_numerics(fuzz, kind):
    """Activations that the operators quantize by their own rule: the stated bounds hold for every output."""
    cases, check = getattr(graphs, kind)(), partial(judged, numerics="vendor")
    fuzz(f"{kind}, vendor numerics", cases, check, few=60, least=0.1, targets=st.sampled_from(helpers.CHIPS))


@pytest.mark.parametrize("numerics", ["strict", "vendor"])
def test_own_calls(fuzz, numerics):
    """Matmuls that the model calls as the vendor's operator, completed where the graph quantizes around them."""
    qp.emulate_npu()
    check = partial(judged, numerics=numerics)
    fuzz(f"own calls, {numerics}", graphs.own_calls(), check, few=40, least=0.3, targets=CHIPS, weight=0.5)


def test_long_sums(fuzz):
    fuzz("long sums", graphs.long_sums(), few=30, least=0.1, weight=0.1)


def test_fused_attentions(fuzz):
    fuzz("fused attentions", graphs.fused_attentions(), few=20, least=0.0, weight=0.1)
