"""``qp.adopt``: tools' Linears exchanged for plain modules that every door sees whole, and back.

The tools themselves are not installed here: :mod:`tests.adoption_standins` holds modules with their tensors.
"""

import pytest
import torch
from torch import nn

import quantpass as qp
from quantpass.adoption.plain import PlainLinear
from tests import adoption_standins as tools
from tests.adoption_standins import HALF, K, N, args, compressed, with_decompression
from tests.helpers import WeightOnly, assert_close

X = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(0)).half()
DYNAMIC, STATIC = args(strategy="token", dynamic=True), args(strategy="tensor")


@pytest.fixture(autouse=True)
def tools_are_there(monkeypatch):
    torch._dynamo.reset()
    tools.install(monkeypatch)


MODULES = {
    "GPTQ 2 bits": lambda: tools.TorchLinear(2),
    "GPTQ 4 bits": lambda: tools.TorchLinear(4),
    "GPTQ 4 bits, act-order": lambda: tools.TorchLinear(4, act_order=True),
    "GPTQ 4 bits, per channel, no bias": lambda: tools.TorchLinear(4, -1, bias=False),
    "GPTQ 8 bits": lambda: tools.TorchLinear(8),
    "GPTQ 8 bits, bfloat16": lambda: tools.TorchLinear(8, dtype=torch.bfloat16),
    "AWQ 4 bits": lambda: tools.AwqTorchLinear(4),
    "AWQ 8 bits": lambda: tools.AwqTorchLinear(8, bias=False),
    "AutoAWQ 4 bits": lambda: tools.WQLinear_GEMM(),
    "LLM.int8()": lambda: tools.Linear8bitLt(),
    "LLM.int8(), bfloat16, no bias": lambda: tools.Linear8bitLt(dtype=torch.bfloat16, bias=False),
    "modelopt int8": lambda: tools.QuantLinear(),
    "modelopt int8 weights": lambda: tools.QuantLinear(static=False),
    "modelopt SmoothQuant": lambda: tools.QuantLinear(smooth=True),
    "modelopt int4 blocks": lambda: tools.QuantLinear(4, block=32, static=False),
    "quark W8A16": lambda: tools.QParamsLinear(),
    "quark W8A16 per tensor, asymmetric, bfloat16": lambda: tools.QParamsLinear("int8", "per_tensor", False, dtype=torch.bfloat16),
    "quark W8A16 uint8, per channel": lambda: tools.QParamsLinear("uint8", symmetric=False, bias=False),
    "quark W8A16 groups": lambda: tools.QParamsLinear("int8", "per_group"),
    "quark W4A16 groups": lambda: tools.QParamsLinear("int4", "per_group"),
    "quark W4A16 groups, asymmetric": lambda: tools.QParamsLinear("int4", "per_group", False),
    "quark W4A16 groups, uint4, in order": lambda: tools.QParamsLinear("uint4", "per_group", False, reorder=False),
    "quark W4A16 per channel, asymmetric": lambda: tools.QParamsLinear("int4", symmetric=False),
    "quark W8A8 static": lambda: tools.QParamsLinear(activation="int8"),
    "quark W8A8 static, uint8, bfloat16": lambda: tools.QParamsLinear(activation="uint8", dtype=torch.bfloat16),
    "compressed-tensors W8A16": lambda: compressed(),
    "compressed-tensors W8A16 per tensor": lambda: compressed(strategy="tensor"),
    "compressed-tensors W8A16 asymmetric": lambda: compressed(symmetric=False),
    "compressed-tensors W8A16 packed": lambda: compressed(packed=True),
    "compressed-tensors W4A16": lambda: compressed(4, "group", group=32),
    "compressed-tensors W4A16 asymmetric": lambda: compressed(4, "group", False, 32),
    "compressed-tensors W4A16 per channel, odd N": lambda: compressed(4, "channel", False, n=36),
    "compressed-tensors W8A8 dynamic": lambda: compressed(activation=DYNAMIC),
    "compressed-tensors W8A8 dynamic, bfloat16": lambda: compressed(activation=DYNAMIC, dtype=torch.bfloat16),
    "compressed-tensors W8A8 static": lambda: compressed(activation=STATIC),
    "compressed-tensors W8A8 static, asymmetric": lambda: compressed(activation=args(strategy="tensor", symmetric=False)),
    "compressed-tensors W4A8": lambda: compressed(4, "group", group=32, activation=DYNAMIC),
}  # fmt: skip


def model_of(name):
    """A model of one module, and its inputs."""
    layer = MODULES[name]()
    x = X.bfloat16() if "bfloat16" in name else X
    model = nn.Sequential(layer).eval()
    return (with_decompression(model) if name.startswith("compressed") else model), x


def tensors_of(module):
    found = {k: t for k, t in module.state_dict(keep_vars=True).items() if t is not None}
    if isinstance(module, nn.Sequential) and hasattr(module[0], "state"):
        found = {"CB": module[0].weight.CB, "SCB": module[0].weight.SCB, "bias": module[0].bias}
    return {t.data_ptr() for t in found.values() if t is not None and t.numel() > 3}


@pytest.mark.parametrize("name", MODULES)
def test_the_whole_model_is_seen_and_gives_the_tools_numbers(name):
    model, x = model_of(name)
    tool, held = model[0], tensors_of(model)
    with qp.adopt(model, drop_outliers=True) as adoption:
        assert [a.name for a in adoption.exchanged] == ["0"], str(adoption)
        (adopted,) = adoption.exchanged
        assert adopted.proof.against == ("weight" if "AutoAWQ" in name else "output")
        assert adopted.proof.exact or adopted.proof.error < 1e-2, str(adoption)
        # No copies: everything that the plain module holds is the tool's.
        assert {t.data_ptr() for t in model.state_dict().values() if t.numel() > 3} <= held
        report = qp.explain(model, (x,), target="ascend910b", numerics="vendor")
        assert (report.fused, report.total, report.hidden) == (1, 1, ()), str(report)
        verified = qp.verify(model, (x,), target="cpu")
        assert verified.report.fused == 1
        verified.report.require(fused=1.0)
        ours = model(x)
    assert model[0] is tool
    if "AutoAWQ" not in name:
        if "LLM" in name:
            assert X.abs().max() < tool.state.threshold  # no outliers: the path that was dropped adds nothing
        with torch.no_grad():
            theirs = model(x)
        assert_close(ours, theirs)
        assert torch.equal(ours, theirs) or "GPTQ" in name or "AWQ" in name


@pytest.mark.parametrize(
    "name",
    [
        "GPTQ 4 bits",
        "AWQ 8 bits",
        "LLM.int8()",
        "modelopt int8",
        "quark W8A8 static",
        "compressed-tensors W8A8 dynamic",
    ],
)
def test_without_it_nothing_is_fused(name):
    model, x = model_of(name)
    report = qp.explain(model, (x,), target=["cpu", "ascend910b"])
    assert report.fused == 0
    if not name.startswith("compressed"):  # a decompressed model is a float model
        assert "qp.adopt(model)" in str(report)


REFUSED = {
    "group size": (lambda: changed(tools.TorchLinear(), group_size=64), "its qzeros has the shape"),
    "odd bits": (lambda: changed(tools.TorchLinear(), bits=3), "3 bits"),
    "bits that do not exist": (lambda: changed(tools.TorchLinear(), bits=5), "its bits is 5; read: 2, 4, 8"),
    "act-order beyond the groups": (lambda: moved(tools.TorchLinear(), "g_idx", 1), "g_idx names groups from 1 to 2 of 2"),
    "another codes' dtype": (lambda: cast(tools.TorchLinear(), "qweight", torch.int64), "its qweight is int64"),
    "scales of float32": (lambda: cast(tools.TorchLinear(), "scales", torch.float32), "its scales is float32"),
    "bias too long": (lambda: replaced(tools.TorchLinear(), "bias", torch.zeros(N + 1).half()), "its bias has the shape"),
    "on meta": (lambda: tools.TorchLinear().to("meta"), "meta device"),
    "an adapter": (lambda: changed(tools.TorchLinear(), adapter=object()), "adapter"),
    "zeros less one": (lambda: changed(tools.TorchLinear(), qzero_format=lambda: 1), "less one"),
    "a hook": (lambda: hooked(tools.TorchLinear()), "forward hooks"),
    "AWQ group size": (lambda: changed(tools.AwqTorchLinear(), group_size=16), "its qzeros has the shape"),
    "AWQ 3 bits": (lambda: changed(tools.AwqTorchLinear(), bits=3), "its bits is 3; read: 4, 8"),
    "AWQ scales missing a group": (lambda: replaced(tools.AwqTorchLinear(), "scales", torch.ones(1, N).half()), "scales"),
    "outliers not dropped": (lambda: tools.Linear8bitLt(), "drop_outliers=True"),
    "no outliers": (lambda: tools.Linear8bitLt(0.0), "captured as it is"),
    "modelopt fp8": (lambda: quantizer(num_bits=(4, 3)), "no integers"),
    "modelopt unsigned": (lambda: quantizer(unsigned=True), "more than a scale"),
    "modelopt dead row": (lambda: dead(tools.QuantLinear()), "a largest magnitude is 0"),
    "modelopt output": (lambda: changed_child(tools.QuantLinear(), "output_quantizer", _disabled=False), "output"),
    "quark floats": (lambda: tools.FakeQuantLinear(), "holds no codes: freeze the model, then put QParamsLinear"),
    "quark rounds codes again": (lambda: changed(tools.FakeQuantLinear(), _weight_quantizer_inv=object()), "rounded again"),
    "quark fp8": (lambda: spec(dtype=Named("fp8_e4m3")), "a quantizer's dtype is fp8_e4m3; read: int8, uint8"),
    "quark along K": (lambda: spec(ch_axis=1), "rounded per_channel along dimension 1"),
    "quark wrong group": (lambda: spec(tools.QParamsLinear(spread="per_group"), group_size=16), "its scale has the shape (2, 96)"),
    "quark transposed codes": (lambda: spec(tools.QParamsLinear(spread="per_group"), qscheme=Named("per_channel"), ch_axis=0), "its weight has the shape"),
    "quark blocks": (lambda: spec(qscheme=Named("per_block")), "its weight is rounded per_block"),
    "quark float zero points": (lambda: spec(zero_point_type=Named("float32")), "its zero point float32"),
    "quark scales in steps": (lambda: changed_child(tools.QParamsLinear(), "weight_quantizer", qspec=None), "several steps"),
    "quark rounded in each forward": (lambda: changed_child(tools.QParamsLinear(), "weight_quantizer", real_quantized=False), "rounded in each forward"),
    "quark dynamic": (lambda: spec(tools.QParamsLinear(activation="int8"), "input", is_dynamic=True), "at run time"),
    "quark rounds down": (lambda: spec(tools.QParamsLinear(activation="int8"), "input", round_method=Named("floor")), "rounded by floor"),
    "quark activation in groups": (lambda: spec(tools.QParamsLinear(activation="int8"), "input", qscheme=Named("per_group")), "its activation is rounded to int8 per_group"),
    "quark output": (lambda: rounded_output(tools.QParamsLinear()), "its output is rounded too (output_quantizer)"),
    "quark tensor parallel": (lambda: changed(tools.QParamsLinear(), _quant_dict={}), "tensor parallelism"),
    "fp8 weights": (lambda: scheme(type="float"), "its weight is float8"),
    "3 bits across words": (lambda: scheme(compressed(4, "channel"), num_bits=3), "3 bits, packed across words"),
    "wrong group": (lambda: scheme(compressed(4, "group", group=32), group_size=16), "its weight_scale has the shape"),
    "no zero point": (lambda: scheme(symmetric=False), "no weight_zero_point"),
    "a scheme of another version": (lambda: scheme(num_bits="eight"), "reading it failed: TypeError"),
    "calibrating": (lambda: changed(compressed(), quantization_status="calibration"), "not final"),
    "switched off": (lambda: changed(compressed(), quantization_enabled=False), "switched off"),
    "output rounded": (lambda: output_rounded(compressed()), "output_activations"),
    "activation in groups": (lambda: compressed(activation=args(strategy="group", dynamic=True)), "strategy is group"),
}  # fmt: skip


def changed(module, **attributes):
    vars(module).update(attributes)
    return module


def changed_child(module, child, **attributes):
    changed(module._modules[child], **attributes)
    return module


def replaced(module, name, tensor):
    module._buffers[name] = tensor
    return module


def cast(module, name, dtype):
    return replaced(module, name, getattr(module, name).to(dtype))


def moved(module, name, by):
    return replaced(module, name, getattr(module, name) + by)


def hooked(module):
    module.register_forward_hook(lambda *given: None)
    return module


def quantizer(**attributes):
    return changed_child(tools.QuantLinear(), "weight_quantizer", **{f"_{k}": v for k, v in attributes.items()})


def dead(module):
    module.weight_quantizer._amax[3] = 0
    return module


def scheme(module=None, **attributes):
    module = compressed() if module is None else module
    vars(module.quantization_scheme.weights).update(attributes)
    return module


class Named:
    """A member of one of quark's enumerations."""

    def __init__(self, name):
        self.name = self.value = name


def spec(module=None, side="weight", **attributes):
    module = tools.QParamsLinear() if module is None else module
    vars(module._modules[f"{side}_quantizer"].qspec).update(attributes)
    return module


def rounded_output(module):
    module.output_quantizer = tools.QParamsLinear(activation="int8").input_quantizer
    return module


def output_rounded(module):
    module.quantization_scheme.output_activations = args()
    return module


@pytest.mark.parametrize("name", REFUSED)
def test_one_edit_and_the_module_stays_with_a_reason(name):
    build, why = REFUSED[name]
    model = nn.Sequential(build(), nn.ReLU()).eval()
    before = list(model)
    adoption = qp.adopt(model)
    assert adoption.exchanged == ()
    (left,) = adoption.left
    assert why in left.why, left.why
    assert left.name == "0"
    assert list(model) == before


def test_a_forward_that_computes_something_else_is_found_by_its_numbers():
    """The tensors fit the table, the tool's zero points start at 1: the proof says no, with ``check=False`` nobody does."""

    class PlusOne(tools.TorchLinear):
        def dequantized(self):
            return super().dequantized() - self.scales[self.g_idx.long()]

    model = nn.Sequential(PlusOne())
    (left,) = qp.adopt(model).left
    assert "other numbers" in left.why
    assert type(model[0]) is PlusOne
    (adopted,) = qp.adopt(model, check=False).exchanged
    assert str(adopted.proof) == "not proven against the tool: check=False"


def test_a_tool_that_can_not_run_here_and_has_no_dequantization_stays():
    class Fails(tools.TorchLinear):
        def forward(self, x):
            raise RuntimeError("no kernel image")

    (left,) = qp.adopt(nn.Sequential(Fails())).left
    assert "its own forward fails here: RuntimeError: no kernel image; check=False" in left.why


def test_a_dequantization_that_differs_is_no_proof(monkeypatch):
    monkeypatch.setattr(tools, "dequantize_gemm", lambda *given: torch.zeros(K, N).half())
    (left,) = qp.adopt(nn.Sequential(tools.WQLinear_GEMM())).left
    assert "not what the tool's own dequantization gives" in left.why


def test_the_models_inputs_as_proof():
    """Each module is compared on what it is given in the model, and put back where it differs there."""

    class OnlySmall(tools.AwqTorchLinear):
        def forward(self, x):
            return super().forward(x.clamp(max=50))

    model = nn.Sequential(tools.TorchLinear(), nn.Linear(N, K).half(), OnlySmall()).eval()
    assert len(qp.adopt(model).exchanged) == 2
    qp.adopt(model).release()
    model = nn.Sequential(tools.TorchLinear(), nn.Linear(N, K).half(), OnlySmall()).eval()
    adoption = qp.adopt(model, inputs=(X * 1000,))
    assert [a.name for a in adoption.exchanged] == ["0"]
    assert [(e.name, e.why) for e in adoption.left] == [
        ("2", "a plain module of its tensors gives other numbers than its own forward")
    ]
    assert type(model[2]) is OnlySmall and isinstance(model[0], PlainLinear)
    adoption.release()
    assert type(model[0]) is tools.TorchLinear
    assert not model[0]._forward_pre_hooks


def test_a_model_that_fails_on_its_inputs_is_left_as_it_was():
    model = with_decompression(nn.Sequential(compressed(), nn.Linear(1, 1)))
    before, hooks = list(model), dict(model._forward_pre_hooks)
    with pytest.raises(RuntimeError):
        qp.adopt(model, inputs=(X,))
    assert list(model) == before
    assert dict(model._forward_pre_hooks) == hooks


def test_shared_modules_and_tied_weights_are_exchanged_once():
    layer = tools.TorchLinear()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.again, self.tied = layer, layer, tools.TorchLinear()
            self.tied.qweight = layer.qweight

        def forward(self, x):
            return self.up(x) + self.again(x) + self.tied(x)

    model = Twice()
    adoption = qp.adopt(model)
    assert [a.names for a in adoption.exchanged] == [("up", "again"), ("tied",)]
    assert model.up is model.again
    assert model.tied.qweight is model.up.qweight
    report = qp.explain(model, (X,), target="ascend910b")
    assert report.fused == report.total and not report.hidden
    adoption.release()
    assert model.up is model.again is layer


def test_twice_is_once_and_release_may_be_called_again():
    model = nn.Sequential(tools.TorchLinear(), WeightOnly(N, K, dtype=HALF))
    tool = model[0]
    first = qp.adopt(model)
    plain = model[0]
    second = qp.adopt(model)
    assert (second.exchanged, model[0]) == ((), plain)
    assert "TorchLinear" not in str(second)
    second.release()
    assert model[0] is plain
    first.release()
    first.release()
    assert model[0] is tool


def test_what_took_a_place_since_then_stays():
    model = nn.Sequential(tools.TorchLinear())
    adoption = qp.adopt(model)
    model[0] = other = nn.Linear(K, N)
    adoption.release()
    assert model[0] is other


def test_unknown_modules_are_named_and_floats_are_not():
    class Acme(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.ones(N, K, dtype=torch.int8))
            self.register_buffer("scale", torch.ones(N, 1))

    model = nn.ModuleDict({"known": tools.TorchLinear(), "unknown": Acme(), "plain": nn.Linear(K, N)})
    adoption = qp.adopt(model)
    assert [(e.name, e.kind, e.tool) for e in adoption.left] == [("unknown", "Acme", "tests")]
    assert repr(adoption) == "<Adoption: 1 module exchanged, 1 left>"
    assert "left: unknown (Acme of tests)" in str(adoption)
    assert "exchanged: known (GPTQ, int4 weight, groups of 32, asymmetric)" in str(adoption)


def test_the_model_itself_has_no_place_to_stand():
    (left,) = qp.adopt(tools.TorchLinear()).left
    assert (left.name, left.why) == ("", "it is the model itself, which nothing holds: put it into a module")


def test_the_hook_that_decompresses_goes_with_the_last_compressed_module_and_comes_back():
    model = with_decompression(nn.Sequential(compressed(), compressed(4)))
    (hook,) = model._forward_pre_hooks.values()
    adoption = qp.adopt(model)
    assert not model._forward_pre_hooks
    adoption.release()
    assert list(model._forward_pre_hooks.values()) == [hook]
    model[1].quantization_enabled = False
    with qp.adopt(model) as adoption:
        assert len(adoption.exchanged) == 1
        assert list(model._forward_pre_hooks.values()) == [hook]  # the other one still has to be decompressed


def test_a_decompressed_model_is_adopted_where_its_codes_can_be_told():
    model = with_decompression(nn.Sequential(compressed(activation=DYNAMIC), compressed(4, "group", group=32))).eval()
    model[1] = nn.Sequential(nn.Linear(N, K).half(), model[1])
    with torch.no_grad():
        theirs = model(X)
    assert model[0].quantization_status == "decompressed"
    with qp.adopt(model) as adoption, torch.no_grad():
        assert len(adoption.exchanged) == 2, str(adoption)
        assert torch.equal(model(X), theirs)
        report = qp.explain(model, (X,), target="ascend910b", numerics="vendor")
        assert (report.fused, report.total) == (2, 2)
    model[0].weight[5, 5] *= 1.01
    adoption = qp.adopt(model)
    assert [a.name for a in adoption.exchanged] == ["1.1"]
    assert "no longer (codes - zero) * scale" in adoption.left[0].why


def test_state_dict_keeps_its_keys():
    for model in (
        with_decompression(nn.Sequential(compressed(4, "group", False, 32), compressed(activation=STATIC))),
        nn.Sequential(tools.TorchLinear(), tools.AwqTorchLinear(), tools.QuantLinear(smooth=True)),
        nn.Sequential(tools.QParamsLinear("int4", "per_group", False), tools.QParamsLinear(activation="uint8")),
    ):
        before = {k: t.data_ptr() for k, t in model.state_dict().items()}
        with qp.adopt(model) as adoption:
            assert len(adoption.exchanged) == len(model), str(adoption)
            assert {k: t.data_ptr() for k, t in model.state_dict().items()} == before


def test_nothing_is_allocated_for_the_weights():
    """The exchange itself takes no memory that grows with the model; the proof takes one layer's at a time."""
    from torch.profiler import ProfilerActivity, profile

    model = nn.Sequential(*(compressed() for _ in range(4)))
    weight = N * K
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        adoption = qp.adopt(model, check=False)
    assert len(adoption.exchanged) == 4
    assert max((e.cpu_memory_usage for e in p.events()), default=0) < weight


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"model": 3}, TypeError, "adopt takes a torch.nn.Module, not a int"),
        ({"tools": ("gtpq",)}, ValueError, "tools names 'gtpq'; known: compressed-tensors, GPTQ, AWQ"),
        ({"inputs": X}, TypeError, "inputs is a Tensor; give the model's inputs as a tuple"),
    ],
)
def test_bad_input(given, error, text):
    with pytest.raises(error, match=text):
        qp.adopt(**{"model": nn.Sequential(), **given})


def test_only_the_tools_asked_for():
    model = nn.Sequential(tools.TorchLinear(), tools.AwqTorchLinear())
    adoption = qp.adopt(model, tools="gptq")
    assert [a.tool for a in adoption.exchanged] == ["GPTQ"]
    assert "no table of the tools asked for" in adoption.left[0].why
