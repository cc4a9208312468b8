"""Handing fused graphs to torchair, and the stand-ins with which it loads; what of it needs no torch_npu."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from quantpass.doors.preview import compile_for_npu
from quantpass.doors.settings import make_options
from quantpass.lowering import standin_cann
from tests.helpers import StaticW8A8, WeightOnly

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).half()


class Recorder:
    """Stands for torchair: keeps the graphs and runs them as they are."""

    def __init__(self, target="ascend310p", **settings):
        self.options, self.settings = make_options({"target": target}), settings
        self.graphs, self.reports = [], []

    def compiler(self, gm, inputs):
        assert len(inputs) == len(gm.graph.find_nodes(op="placeholder"))
        self.graphs.append(gm)
        return gm.forward

    def __call__(self, gm, example_inputs):
        return compile_for_npu(
            gm, example_inputs, self.options, self.compiler, gather=self.reports.append, **self.settings
        )

    def formats(self):
        """Inputs that torchair is to take in another format than ND: name, shape, number of the format."""
        nodes = [n for n in self.graphs[0].graph.nodes if "acl_format" in n.meta]
        return [(n.name, tuple(n.meta["val"].shape), n.meta["acl_format"]) for n in nodes]


def run(model, recorder, x=X):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=recorder)
    with torch.no_grad():
        return compiled, compiled(x)


@pytest.mark.parametrize("make", [WeightOnly, StaticW8A8])
def test_a_cast_of_a_weight_leaves_the_graph_and_marks_the_input(make):
    model, recorder = make(64, 96), Recorder()
    compiled, first = run(model, recorder)
    with torch.no_grad():
        second = compiled(X)
    assert [f[1:] for f in recorder.formats()] == [((96, 64), 29)]
    assert len(recorder.graphs) == 1
    assert not recorder.graphs[0].graph.find_nodes(op="call_function", target=torch.ops.quantpass.format_cast.default)
    assert torch.equal(first, second)


def test_a_weight_of_two_sites_is_one_input():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = WeightOnly(64, 64)

        def forward(self, x):
            return self.inner(self.inner(x))

    recorder = Recorder()
    run(Tied(), recorder)
    assert recorder.reports[0].fused == 2
    assert [f[1:] for f in recorder.formats()] == [((64, 64), 29)]


def test_a_constant_made_by_the_pass_is_cast():
    class Turned(WeightOnly):  # stored (K, N); this chip wants (N, K)
        def __init__(self):
            super().__init__(64, 96, bias=False)
            self.codes = nn.Parameter(self.codes.t().contiguous(), requires_grad=False)

        def forward(self, x):
            return x @ (self.codes.to(x.dtype) * self.scale.t())

    recorder = Recorder()
    model = Turned()
    before = model.codes.clone()
    run(model, recorder)
    ((name, *_),) = recorder.formats()
    assert name.startswith("quantpass_")
    assert torch.equal(model.codes, before)


def test_without_fusing():
    recorder = Recorder(fuse=False)
    _, result = run(WeightOnly(64, 96), recorder)
    assert recorder.reports == []
    assert torch.equal(result, WeightOnly(64, 96)(X))


def test_training_is_refused():
    recorder = Recorder()
    model = nn.Linear(64, 8).half()
    with pytest.raises(Exception, match="autograd is recording"):
        torch.compile(model, backend=recorder)(X)


def test_standins_are_built_once(torchair):
    first = standin_cann.ensure_standins()
    times = {p.name: p.stat().st_mtime_ns for p in first.iterdir()}
    assert {*standin_cann.LIBRARIES} <= times.keys()
    assert standin_cann.ensure_standins() == first
    assert {p.name: p.stat().st_mtime_ns for p in first.iterdir()} == times
    assert not list(first.parent.glob(".building-*"))


def test_child_environment(torchair):
    environment = standin_cann.child_environment(base={"LD_LIBRARY_PATH": "/somewhere", "HOME": os.environ["HOME"]})
    assert environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
    assert environment["LD_LIBRARY_PATH"].split(os.pathsep)[1] == "/somewhere"
    assert environment["HOME"] == os.environ["HOME"]


def test_torch_npu_does_not_load_without_the_environment(torchair):
    """The error says how the process has to be started."""
    holder = standin_cann.find_torch_npu()
    code = "from quantpass.lowering.standin_device import install; install()"
    paths = os.pathsep.join([p for p in sys.path if p] + [str(holder)])
    environment = {**os.environ, "PYTHONPATH": paths, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        pytest.skip("CANN is installed here")
    assert "child_environment()" in done.stderr


def test_a_folder_without_torch_npu(tmp_path, monkeypatch):
    monkeypatch.setenv(standin_cann.TORCH_NPU_VARIABLE, str(tmp_path))
    with pytest.raises(standin_cann.StandinError, match="holds no torch_npu"):
        standin_cann.find_torch_npu()
