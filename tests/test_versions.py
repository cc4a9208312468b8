"""Versions of PyTorch and generations of torchair: what is tested, what is said of others, what stays the user's."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import config
from torch._subclasses import FakeTensorMode

import quantpass as qp
from quantpass.graph import torch_versions
from quantpass.graph.torch_internals import compile_with_aot
from quantpass.lowering import torchair_versions
from quantpass.lowering.standin_cann import StandinError, find_torch_npu
from tests.helpers import WeightOnly

X = torch.randn(4, 64).half()


# -- PyTorch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.7.1", "2.16.0.dev20261101+cpu", "3.0.0", "unknown"])
def test_an_untested_torch_is_named_at_the_first_use_of_a_door(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.delenv(torch_versions.UNTESTED_VARIABLE, raising=False)
    program = torch.export.export(WeightOnly(), (X,))
    for door in (
        lambda: qp.backend(target="ascend310p"),
        lambda: qp.explain(WeightOnly(), (X,), target="ascend310p"),
        lambda: qp.fuse(program, target="ascend310p"),
        lambda: qp.npugraph_ex_options("ascend910b"),
    ):
        with pytest.raises(RuntimeError, match=rf"tested with PyTorch 2\.8, .*, and this is {version.split('+')[0]}"):
            door()


@pytest.mark.parametrize("version", ["2.7.1", "2.16.0"])
def test_the_user_may_go_on_with_an_untested_torch(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setenv(torch_versions.UNTESTED_VARIABLE, "1")
    qp.explain(WeightOnly(), (X,), target="ascend310p").require()


@pytest.mark.parametrize("version", ["2.8.0", "2.10.0+cpu", "2.14.0a0+git1234"])
def test_builds_of_a_tested_torch_are_tested(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    torch_versions.require_tested()


class Counting:
    """A backend of the user's own."""

    def __init__(self):
        self.compiled = 0

    def __call__(self, gm, inputs):
        self.compiled += 1
        return gm


class Breaking(WeightOnly):
    def forward(self, x):
        y = super().forward(x)
        torch._dynamo.graph_break()
        return y + 1


def test_the_users_own_compilations_outlive_explain_and_verify():
    model, backend = Breaking(), Counting()
    torch._dynamo.reset()
    mine = torch.compile(model, backend=backend, dynamic=False)
    with torch.no_grad():
        mine(X)
        compiled = backend.compiled
        assert compiled == 2, "a graph on each side of the break"
        for _ in range(3):
            assert qp.explain(model, (X,), target="ascend310p").fused == 1
        assert qp.verify(model, (X,), target="ascend310p").report.fused == 1
        mine(X)
    assert backend.compiled == compiled


def test_explain_does_not_count_towards_the_users_limit_of_recompilations():
    model, backend = WeightOnly(), Counting()
    torch._dynamo.reset()
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        assert qp.explain(model, (X,), target="ascend310p").total == 1, "nor does its own"
    mine = torch.compile(model, backend=backend, dynamic=False)
    with torch.no_grad():
        for rows in range(1, 5):
            mine(torch.randn(rows, 64).half())
    assert backend.compiled == 4


def test_explain_where_the_user_has_reached_the_limit():
    """Before 2.13 PyTorch compiles such code for nobody any more, which must not look like a model without matmuls."""
    model = WeightOnly()
    torch._dynamo.reset()
    mine = torch.compile(model, backend="eager", dynamic=False)
    with torch.no_grad():
        for rows in range(1, torch._dynamo.config.recompile_limit + 3):
            mine(torch.randn(rows, 64).half())
    if not torch_versions.isolates():
        with pytest.raises(RuntimeError, match="recompiled too often"):
            qp.explain(model, (X,), target="ascend310p")
        torch._dynamo.reset()
    assert qp.explain(model, (X,), target="ascend310p").total == 1


# -- which input is which weight ---------------------------------------------------------------------------------------


def described(model, x, change=lambda nodes: None):
    """What each placeholder is said to be, before and after quantpass says it in PyTorch's place; None says nothing."""

    def text(desc):
        if type(desc).__name__ == "SubclassGetAttrAOTInput":
            return f"{text(desc.base)}.{desc.attr}"
        return (
            None
            if desc is None
            else f"{type(desc).__name__} {getattr(desc, 'idx', None) or getattr(desc, 'target', 0)}"
        )

    seen = []

    def backend(gm, inputs):
        def compiler(aot, weights, fakes):
            placeholders = list(aot.graph.find_nodes(op="placeholder"))
            seen.append([text(n.meta.get("desc")) for n in placeholders])
            for node in placeholders:
                node.meta.pop("desc", None)
            change(placeholders)
            torch_versions.describe_inputs(aot, gm, inputs)
            seen.append([text(n.meta.get("desc")) for n in placeholders])
            return aot.forward

        return compile_with_aot(gm, inputs, compiler)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=False)(x)
    return seen


def torchao_linear():
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(64, 96).bfloat16().eval()
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer


@pytest.mark.parametrize(
    ("make", "freezing", "x"),
    [
        (WeightOnly, False, X),
        (WeightOnly, True, X),
        (lambda: nn.Sequential(WeightOnly(), WeightOnly(k=96, n=32)), False, X),
        (torchao_linear, False, X.bfloat16()),
    ],
    ids=["inputs", "parameters", "several", "subclass"],
)
def test_inputs_are_described_as_pytorch_describes_them(make, freezing, x):
    """PyTorch 2.8 says nothing: there what is compared was said by quantpass on both sides."""
    with config.patch(freezing=freezing):
        theirs, ours = described(make(), x)
    assert ours == theirs
    assert None not in ours
    assert len(ours) > 1


def test_nothing_is_said_of_inputs_that_do_not_fit():
    def other_shape(placeholders):
        placeholders[0].meta["val"] = placeholders[0].meta["val"].new_empty(3, 3)

    _, ours = described(WeightOnly(), X, other_shape)
    assert set(ours) == {None}


# -- torchair ----------------------------------------------------------------------------------------------------------


def test_the_torchair_that_the_tests_run_with_is_known():
    try:
        package = find_torch_npu() / "torch_npu"
    except StandinError as error:
        pytest.skip(str(error))
    known = torchair_versions.generation_of(package)
    assert known is not None
    assert known.tested
    assert torchair_versions.untested_note(package) == ""
    version = next(package.parent.glob("torch_npu-*.dist-info")).name.split("-")[1].removesuffix(".dist")
    assert version in known.wheels


@pytest.fixture
def unknown(tmp_path, monkeypatch):
    """A torch_npu that is loaded and whose torchair nobody has seen."""
    torchair = tmp_path / "torch_npu" / "dynamo" / "torchair"
    torchair.mkdir(parents=True)
    (torchair / "__init__.py").write_text("")
    monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(__file__=str(tmp_path / "torch_npu" / "__init__.py")))
    return torchair


def test_an_unknown_torchair_is_reported_by_what_is_in_its_files(unknown, caplog):
    config = SimpleNamespace(post_grad_custom_pre_pass=None)
    with caplog.at_level(logging.WARNING, logger="quantpass"):
        registration = qp.register(config, target="ascend910b")
    (note,) = registration.report.notes
    assert note in caplog.text
    assert f"(digest {torchair_versions.digest_of(unknown)})" in note
    assert "tested are C (torch_npu 2.9.0), D (torch_npu 2.10.0)" in note
    before = torchair_versions.digest_of(unknown)
    (unknown / "more.py").write_text("")
    assert torchair_versions.digest_of(unknown) != before


def test_a_torchair_without_the_hook_names_the_door_that_works():
    made = type("CompilerConfig", (), {"__module__": "torch_npu.dynamo.torchair.configs.compiler_config"})()
    with pytest.raises(
        TypeError, match=r"which has no post_grad_custom_pre_pass.*quantpass\.npu_backend needs no hook"
    ):
        qp.register(made, target="ascend910b")


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("pkg_resources", r"No module named 'pkg_resources'.*pip install \"setuptools<82\""),
        ("google", r"torchair does not load: No module named 'google'\. Install torch_npu"),
    ],
)
def test_a_torchair_that_fails_at_its_first_use_says_why(missing, said, monkeypatch):
    """As torch_npu does it: the import works, and the first use raises something else from what went wrong."""

    class Postponed(ModuleType):
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            raise Exception("\nsee above") from ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.setitem(sys.modules, "torchair", Postponed("torchair"))
    with pytest.raises(ImportError, match=said):
        qp.npu_backend(None, target="ascend910b")


def test_an_older_torchair_asks_for_its_compiler_while_it_traces(monkeypatch):
    """Generation C takes no compiler, it makes one; afterwards its own stands where it stood."""
    old = ModuleType("torchair.npu_fx_compiler")
    own = old.get_compiler = lambda config=None: "its own"
    old._npu_backend = lambda gm, inputs, config, decompositions: (old.get_compiler(config), decompositions)
    defaults = {"default": 1}
    old.get_npu_backend = lambda compiler_config, custom_decompositions: SimpleNamespace(
        keywords={"decompositions": defaults | custom_decompositions}
    )
    package = ModuleType("torchair")
    package.npu_fx_compiler = old
    monkeypatch.setitem(sys.modules, "torchair", package)
    monkeypatch.setitem(sys.modules, "torchair.npu_fx_compiler", old)
    decompositions = torchair_versions.merged_decompositions(None, {"mine": 2})
    assert decompositions == {"default": 1, "mine": 2}
    assert torchair_versions.compile_with("ours", None, [], None, decompositions) == ("ours", decompositions)
    assert old.get_compiler is own


def test_a_graph_compiled_after_tracing_has_a_fake_mode_to_find():
    """Older generations look for it, and find none when a changed weight has a graph compiled anew."""
    mode = FakeTensorMode()
    inputs = [mode.from_tensor(X)]
    compiler = lambda gm, inputs: detect_fake_mode(None)  # noqa: E731 - what torchair asks
    assert compiler(None, inputs) is None
    assert torchair_versions.compile_after_tracing(compiler, None, inputs) is mode
    with tracing(TracingContext(other := FakeTensorMode())):
        assert torchair_versions.compile_after_tracing(compiler, None, inputs) is other


def test_npugraph_ex_is_said_not_to_be_for_310p(caplog):
    with caplog.at_level(logging.WARNING, logger="quantpass"):
        options = qp.npugraph_ex_options("ascend310p")
    assert "npugraph_ex is not supported on Ascend 310P" in caplog.text
    assert "npugraph_ex is not supported on Ascend 310P" in str(options.report)
    assert qp.npugraph_ex_options("ascend910b").report.notes == ()


@pytest.mark.parametrize(
    ("version", "line"),
    [
        ("2.10.0+cpu", "pip install torch_npu==2.10.0.post7"),
        ("2.8.0", "pip install torch_npu==2.8.0.post5"),
        ("2.99.1", "pip install torch_npu==2.14.0 beside PyTorch 2.14: none is known for 2.99"),
    ],
)
def test_what_to_install_beside_a_torch(version, line, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert torchair_versions.install_line() == line
