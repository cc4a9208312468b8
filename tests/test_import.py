"""What ``import quantpass`` does and does not do: no PyTorch before it is needed, the operators as soon as it is there."""

import ast
import importlib
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

import quantpass as qp
from tests.helpers import WeightOnly

INIT = Path(qp.__file__)
NO_TORCH = """
import importlib, pkgutil, sys
class Refused:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torch_npu", "numpy"):
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)
sys.meta_path.insert(0, Refused)
"""


def run(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_basics_and_chips_work_where_torch_is_not_installed():
    said = run(
        NO_TORCH
        + """
import quantpass as qp, quantpass.basics, quantpass.chips, quantpass.checkpoints
for package in (quantpass.basics, quantpass.chips, quantpass.checkpoints):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
T = qp.TensorSpec
call = dict(x1=T("int8", (16, 512)), x2=T("int8", (512, 128), "FRACTAL_NZ", True), scale=T("int64", (128,)))
for target in ("ascend310p", "Ascend910B2"):
    print(qp.check_op("npu_quant_matmul", target=target, output_dtype="float16", **call))
verdict = qp.check_op("npu_quant_matmul", target="ascend310p", output_dtype="float16", **call, bias=T("float16", (127,)))
print(verdict)
assert qp.check_op("npu_quant_matmul", target="ascend310p", **{"output_dtype": "float16", **call, **verdict.nearest}).legal
try:
    qp.explain
except ImportError as error:
    print(error)
"""
    )
    assert said.splitlines()[:3] == ["legal", "legal", "illegal"]
    assert "nearest legal: bias=int32(128)" in said
    assert said.splitlines()[-1] == "torch is not installed here"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], "check-op"),
        (["explain", "--help"], "MODULE:FUNCTION"),
        (["chips"], "ascend310p"),
        (["chips", "ascend310p"], "qmm.310p.dtypes"),
        (["chips", "--markdown"], "What each chip supports"),
        (["check-checkpoint", "--help"], "safetensors"),
        (["check-op", "npu_trans_quant_param", "-t", "ascend910b", "scale=float32[64]"], "legal"),
    ],
)
def test_commands_that_need_no_torch(arguments, shown):
    assert shown in run(NO_TORCH + "from quantpass.doors.cli import main; main()", *arguments)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    program = torch.export.export(WeightOnly(), (torch.ones(2, 64, dtype=torch.float16),))
    assert qp.fuse(program, target="cpu", lowering="reference").fused == 1
    path = tmp_path_factory.mktemp("saved") / "fused.pt2"
    torch.export.save(program, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import torch, quantpass",
        "import quantpass, torch",
        "import quantpass, importlib.util; importlib.util.find_spec('torch'); import torch",
        "import quantpass, torch.export",
        "import quantpass.chips, torch",
        "import quantpass; quantpass.nn; import torch",
        "import quantpass; quantpass.check_op; import torch",
    ],
)
def test_a_saved_program_loads_whatever_was_imported_first(saved, imports):
    run(
        f"""
{imports}
import sys
program = torch.export.load(sys.argv[1])
assert "quantpass.weight_quant_matmul" in str(program.graph)
assert program.module()(torch.ones(2, 64, dtype=torch.float16)).isfinite().all()
assert not [f for f in sys.meta_path if "quantpass" in type(f).__module__]
""",
        str(saved),
    )


@pytest.mark.slow
def test_the_name_for_torch_compile_needs_no_import():
    if not entry_points(group="torch_dynamo_backends", name="quantpass"):
        pytest.skip("quantpass is not installed in this environment")
    run("import torch; torch._dynamo.lookup_backend('quantpass'); torch.ops.quantpass.quant_matmul.default")


@pytest.mark.slow
def test_no_warning_is_shown_when_importing():
    run(
        "import torch, warnings; warnings.simplefilter('error'); import quantpass as qp; [getattr(qp, n) for n in qp.__all__]"
    )


def test_public_names_are_those_that_a_type_checker_sees():
    tree = ast.parse(INIT.read_text())
    checked = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {a.name: n.module for n in checked.body for a in n.names}
    assert {*seen, "__version__"} == set(qp.__all__)
    for name, module in seen.items():
        assert getattr(qp, name) is getattr(importlib.import_module(module), name)


def test_names_are_listed_before_their_first_use():
    assert set(run("import quantpass; print(*dir(quantpass))").split()) >= {*qp.__all__, "patterns", "lowering"}
    run("from quantpass import *; explain, nn.LinearQuant, __version__")
    folder = INIT.parent
    modules = {p.stem for p in (*folder.glob("*.py"), *folder.glob("*/__init__.py"))}
    packages = {p.parent.name for p in folder.glob("*/__init__.py")}
    for name in (modules | packages | {"patterns", "lowering"}) - {"__init__", "__main__"}:
        assert getattr(qp, name).__name__ == f"quantpass.{name}"
    with pytest.raises(AttributeError, match="module 'quantpass' has no attribute 'explian'"):
        qp.explian  # noqa: B018
