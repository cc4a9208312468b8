"""Which GE operators torchair can make differs: what one lacks is named, never met as an AttributeError."""

from types import SimpleNamespace

import pytest

from quantpass.operators.ge import GeFunctions, LackingGeOperatorError


def DynamicQuantV2(x, *, dst_type=2, node_name=None):
    return x, dst_type


FUNCTIONS = GeFunctions(SimpleNamespace(DynamicQuantV2=DynamicQuantV2))


def test_what_is_there_is_called():
    assert FUNCTIONS.DynamicQuantV2("x", dst_type=3) == ("x", 3)


def test_a_function_that_is_not_there():
    with pytest.raises(LackingGeOperatorError, match=r"^GE's QuantBatchMatmulV4$"):
        FUNCTIONS.QuantBatchMatmulV4("x1", "x2")


def test_an_argument_that_is_not_there():
    with pytest.raises(LackingGeOperatorError, match=r"^GE's DynamicQuantV2 with is_symmetrical, quant_mode$"):
        FUNCTIONS.DynamicQuantV2("x", dst_type=3, is_symmetrical=True, quant_mode="pertensor")


def test_what_a_function_takes():
    assert FUNCTIONS.takes("DynamicQuantV2", "dst_type")
    assert not FUNCTIONS.takes("DynamicQuantV2", "quant_mode")
    assert not FUNCTIONS.takes("QuantBatchMatmulV4", "dtype")
