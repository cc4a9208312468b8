"""The recipes of docs/recipes.md that a laptop can't run as they stand: what of them it can."""

import copy
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import quantpass as qp
from tests.helpers import WeightOnly, assert_close
from tests.run_page import blocks
from tests.test_npu_doors import Config, run_through

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
X = torch.randn(4, 64).half()


@pytest.fixture(scope="module", autouse=True)
def npu_on_cpu():
    qp.emulate_npu()


def block(title):
    (found,) = [b.text for b in blocks(PAGE) if b.info.startswith(title)]
    return found


def executed(title, **names):
    exec(compile(block(title), title, "exec"), names)
    return names


@pytest.fixture
def interface(monkeypatch):
    """A stand-in for the module of vllm-ascend that makes torchair's config."""

    def _configure_backend(config, ascend_compilation_config, vllm_config, process_kwargs_options=None):
        config.mode = "reduce-overhead"

    modules = {name: types.ModuleType(name) for name in ("vllm_ascend", "vllm_ascend.compilation")}
    module = types.ModuleType("vllm_ascend.compilation.compiler_interface")
    module._configure_backend = _configure_backend
    modules["vllm_ascend.compilation"].compiler_interface = module
    for name, made in {**modules, module.__name__: module}.items():
        monkeypatch.setitem(sys.modules, name, made)
    return module


def test_the_plugin_puts_the_pass_into_vllm_ascends_config(interface):
    plugin = executed("vllm-ascend: quantpass_plugin")
    plugin["load"]("ascend910b")
    config, model = Config("max-autotune"), WeightOnly()
    interface._configure_backend(config, None, None, process_kwargs_options=None)
    assert config.mode.value == "reduce-overhead", "what was there is kept"
    actual, targets = run_through(model, config.hook, config, X)
    (registration,) = plugin["registrations"]
    registration.report.require(fused=1.0)
    assert "npu.npu_weight_quant_batchmatmul.default" in targets
    assert_close(actual, model(X))


def test_the_pass_for_vllm_ascends_pass_manager_fuses_an_aten_graph():
    made = executed("vllm-ascend: a pass")["QuantpassPass"]("ascend910b")
    graphs, model = [], WeightOnly()

    def pass_manager(graph, example_inputs):
        if made.is_applicable_for_range(None):
            made(graph)
        graph.recompile()
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        actual = torch.compile(model, backend=aot_autograd(fw_compiler=pass_manager))(X)
    (report,) = made.reports
    report.require(fused=1.0)
    assert "npu.npu_weight_quant_batchmatmul.default" in [str(n.target) for n in graphs[0].graph.nodes]
    assert_close(actual, model(X))


@pytest.mark.slow
def test_a_package_of_aotinductor_runs_without_quantpass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, x = WeightOnly(dtype=torch.float32), torch.randn(4, 64)
    settings = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # compiling is what takes the time
    with torch._inductor.config.patch(settings):
        names = executed("AOTInductor", model=model, x=x)
    assert_close(names["y"], model(x))
    torch.save((x, names["y"]), "expected.pt")
    code = (
        "import torch, sys\n"
        "x, y = torch.load('expected.pt')\n"
        "assert torch.equal(torch._inductor.aoti_load_package('fused.pt2')(x), y)\n"
        "assert 'quantpass' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_copy_of_a_compiled_model_has_weights_of_its_own():

    torch._dynamo.reset()
    model, backend = WeightOnly(), qp.backend(target="cpu")
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        before = compiled(X)
        other = copy.deepcopy(compiled)
        other._orig_mod.scale.mul_(2)
        assert torch.equal(compiled(X), before)
        assert_close(other(X), other._orig_mod(X))
        assert not torch.equal(other(X), before)
    assert backend.report.fused == backend.report.total
    assert copy.deepcopy(backend.report) is backend.report


def test_modules_that_share_a_parameter_share_what_is_prepared():
    torch._dynamo.reset()
    first, second = WeightOnly(64, 64), WeightOnly(64, 64)
    second.codes, second.scale = first.codes, first.scale
    model, backend = torch.nn.Sequential(first, second), qp.backend(target="ascend910b")
    with torch.no_grad():
        assert_close(torch.compile(model, backend=backend)(X), model(X))
    (weight,) = backend.report.formats
    assert weight.copies == 1 and len(weight.sites) == 2
