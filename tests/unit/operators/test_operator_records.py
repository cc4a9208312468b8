"""What is derived from an operator's record, and what a lowering's name stands for."""

import pytest
from expecttest import TestCase

import quantpass as qp
from quantpass import TensorSpec as T
from quantpass.chips.quant_matmul import QMM
from quantpass.chips.weight_quant_matmul import WQMM
from quantpass.lowering import LOWERINGS
from quantpass.operators import EMULATED, OPERATORS
from quantpass.operators.arguments import bound
from quantpass.operators.operator import vendor_call
from quantpass.operators.quant_matmul import QUANT_MATMUL


class TestSchemas(TestCase):
    """Saved programs hold them: an argument may be added at the end, with a default, and nothing else may change."""

    def test_schemas(self):
        self.assertExpectedInline(
            "\n".join(str(op.overload._schema) for op in OPERATORS),
            """\
quantpass::quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? pertoken_scale=None, Tensor? bias=None, ScalarType? output_dtype=None, int[]? group_sizes=None, bool transpose_x1=False, bool transpose_x2=False, bool saturate=False) -> Tensor
quantpass::weight_quant_matmul(Tensor x, Tensor weight, Tensor antiquant_scale, Tensor? antiquant_offset=None, Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? bias=None, int antiquant_group_size=0, int inner_precise=0, *, bool transpose_x=False, bool transpose_weight=False, str template="custom", bool saturate=False) -> Tensor
quantpass::quant_matmul_dequant(Tensor x, Tensor quantized_weight, Tensor weight_scale, *, Tensor? x_scale=None, Tensor? smooth_scale=None, str quant_mode="pertoken", bool saturate=False) -> Tensor
quantpass::dynamic_quant(Tensor x, Tensor? smooth_scales=None, *, str quant_mode="pertoken") -> (Tensor, Tensor)
quantpass::quantize(Tensor x, Tensor scale, Tensor? offset=None) -> Tensor
quantpass::rms_norm(Tensor x, Tensor gamma, float epsilon=9.9999999999999995e-07) -> (Tensor, Tensor)
quantpass::add_rms_norm(Tensor x1, Tensor x2, Tensor gamma, float epsilon=9.9999999999999995e-07) -> (Tensor, Tensor, Tensor)
quantpass::add_rms_norm_dynamic_quant(Tensor x1, Tensor x2, Tensor gamma, float epsilon=9.9999999999999995e-07) -> (Tensor, Tensor, Tensor, Tensor, Tensor)
quantpass::trans_quant_param(Tensor scale, Tensor? offset=None, int round_mode=0) -> Tensor
quantpass::format_cast(Tensor x, int acl_format) -> Tensor
quantpass::pack_int4(Tensor codes) -> Tensor""",
        )


def test_what_only_the_vendors_operator_has_is_refused_by_its_emulation():
    """An argument of the vendor's that our operator lacks is unjudged, refused, or one that means nothing here."""
    without_meaning = {"inner_k_tiles", "customize_dtype"}  # to a CPU tensor, which has no tiles
    whole = {"dynamic_quant", "quantize"}  # whose emulation is of the vendor's operator, ours being one form of it
    for op in (op for op in OPERATORS if op.name not in whole):
        ours = {a.name for a in op.overload._schema.arguments}
        renamed = {"input": "x", **({} if "weight" in ours else {"weight": "codes"})}
        missing = {renamed.get(a, a) for a in op.vendor.arguments} - ours - without_meaning
        assert missing <= ({"bias", "x_offset"} if op.name == "quant_matmul_dequant" else set()), op.name


def test_arguments_of_a_vendors_operator():
    assert QMM.arguments == ("x1", "x2", "scale", "offset", "pertoken_scale", "bias", "output_dtype", "group_sizes")
    assert QMM.numbers == {"output_dtype", "group_sizes"}
    assert QMM.integers == set()
    assert WQMM.integers == {"antiquant_group_size", "inner_precise"}
    assert str(WQMM) == "npu_weight_quant_batchmatmul"


def test_names_are_unique():
    assert len({op.vendor.name for op in EMULATED}) == len(EMULATED)
    assert len({op.name for op in OPERATORS}) == len(OPERATORS)
    made = [name for op in OPERATORS for name in op.ge_kernels]
    assert len(set(made)) == len(made)


def test_bound_arguments():
    schema = QUANT_MATMUL.overload._schema
    a = bound(schema, (1, 2), {"scale": 3, "bias": 4})
    assert (a.x1, a.x2, a.scale, a.bias, a.offset, a.transpose_x2) == (1, 2, 3, 4, None, False)
    with pytest.raises(AttributeError, match="no argument 'antiquant_scale'"):
        _ = a.antiquant_scale


@pytest.mark.parametrize(
    ("flag", "described"),
    [(False, T("int8", (96, 64))), (True, T("int8", (64, 96), transposed=True))],
)
def test_a_flag_becomes_part_of_the_description(flag, described):
    arguments = {"x1": T("int8", (4, 64)), "x2": T("int8", (96, 64)), "transpose_x2": flag, "saturate": True}
    call = vendor_call(QMM, arguments, "graph")
    assert call.args == {"x1": T("int8", (4, 64)), "x2": described}


def test_lowerings():
    assert {name: (x.mode, x.needs_a_chip, x.keeps_casts) for name, x in LOWERINGS.items()} == {
        "reference": ("graph", False, True),
        "native": ("graph", False, False),
        "aclnn": ("eager", True, False),
        "ge": ("graph", False, True),
    }


def test_a_graph_for_ge_is_torchairs_to_run():
    with pytest.raises(ValueError, match=r"lowering is 'ge'\. Accepted: 'reference', 'native', 'aclnn'"):
        qp.backend("ascend910b", lowering="ge")
