"""Descriptions of tensors: a dtype is the same whether PyTorch's object or its name was given."""

import pickle

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from quantpass import TensorSpec, check_op
from quantpass.basics.torch_types import DTYPES, dtype_name
from quantpass.chips import CHIPS

TORCHS = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}


def test_every_dtype_of_pytorch_has_its_name():
    assert {str(d).removeprefix("torch.") for d in TORCHS.values()} == DTYPES
    for name, dtype in TORCHS.items():  # torch.half is float16
        assert dtype_name(name) == dtype_name(f"torch.{name}") == dtype_name(dtype) == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("value", ["int9", "Tensor", "", "pertoken", None, 8, 1.5, torch.strided, int])
def test_what_is_no_dtype(value):
    assert dtype_name(value) is None
    with pytest.raises(TypeError, match=r"give a torch\.dtype such as torch\.int8, or its name"):
        TensorSpec(value, (2,))


def test_a_name_and_the_dtype_itself_make_one_description():
    a, b = TensorSpec(torch.float16, (4, 8), "FRACTAL_NZ", True), TensorSpec("float16", [4, 8], "NZ", True)
    assert a == b
    assert hash(a) == hash(b)
    assert a.dtype is b.dtype is torch.float16
    assert str(a) == str(b) == "float16(4, 8) NZ transposed"
    assert repr(a) == repr(b) == "TensorSpec(dtype='float16', shape=(4, 8), format='NZ', transposed=True)"
    assert eval(repr(a)) == pickle.loads(pickle.dumps(a)) == b
    assert a != TensorSpec("bfloat16", (4, 8), "NZ", True)


def test_a_size_may_be_symbolic():
    size = ShapeEnv().create_unbacked_symint()
    assert TensorSpec("int8", (size, 8)).shape[0] is size
    with pytest.raises(TypeError, match="every size is an int or a SymInt"):
        TensorSpec("int8", (size.node.expr, 8))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("op", "name", "dtype"),
    [("npu_dynamic_quant", "dst_type", torch.quint4x2), ("npu_quantize", "dtype", torch.qint8)]
    + [("npu_quant_matmul", "output_dtype", d) for d in (torch.float16, torch.int64)],
)
def test_rules_compare_an_argument_by_its_name(chip, op, name, dtype):
    assert check_op(op, target=chip, **{name: dtype}) == check_op(op, target=chip, **{name: dtype_name(dtype)})
