"""The package as it is installed: from a wheel, editable, and from a bare checkout."""

import email.parser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import quantpass
from quantpass.graph.torch_versions import TESTED
from tests.matrix.cells import CELLS

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
USE = (
    "import torch, quantpass as qp, quantpass.patterns.weights, quantpass.lowering.reference\n"
    "spec = qp.explain(torch.nn.Linear(4, 4), (torch.randn(2, 4),), target='cpu')\n"
    "assert spec.total == 0\n"
    "print(qp.__file__, quantpass.patterns.__file__, quantpass.lowering.__file__)\n"
)
WITHOUT_EDITABLE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"


def run(code, cwd, **environment):
    environment = {**os.environ, "PYTHONPATH": "", **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with what ``python -m build`` makes: the archive of sources, and the wheel that is built from it."""
    pytest.importorskip("build", reason="the 'build' package is not installed")
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source") / "quantpass"
    # A copy, so that building leaves nothing behind in the checkout.
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = tracked.stdout.split("\n") if tracked.returncode == 0 else []
    if not names:
        pytest.skip("not a git checkout")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "-q", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built):
    return next(built.glob("*.whl"))


def test_packages_listed_are_the_packages_there():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    inside = {p.parent for p in (ROOT / "quantpass").rglob("__init__.py")}
    there = {".".join(p.relative_to(ROOT).parts) for p in inside} | {"quantpass.patterns", "quantpass.lowering"}
    assert set(settings["packages"]) == there
    for name in ("patterns", "lowering"):
        assert not [p for p in (ROOT / name).rglob("__init__.py") if p.parent.name != name], f"{name}/ stays flat"


@pytest.mark.slow
def test_wheel_holds_every_module_and_nothing_else(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    wanted = {p.relative_to(ROOT).as_posix() for p in (ROOT / "quantpass").rglob("*.py")} | {
        "quantpass/py.typed",
        "quantpass/messages/patterns.tsv",
        "quantpass/report/page.html",
    }
    for folder in ("patterns", "lowering"):
        wanted |= {
            f"quantpass/{p.relative_to(ROOT).as_posix()}"
            for p in (ROOT / folder).iterdir()
            if p.suffix in (".py", ".c")
        }
    assert names == wanted


@pytest.mark.slow
def test_archive_of_sources_has_what_the_wheel_is_built_from(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {n.partition("/")[2] for n in opened.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "patterns/dialect.py", "lowering/lowering.py"} <= names
    assert {"quantpass/messages/patterns.tsv", "quantpass/report/page.html"} <= names


@pytest.mark.slow
def test_what_the_wheel_says_of_itself(wheel):
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (n for n in opened.namelist() if n.endswith(".dist-info/METADATA"))
        said = email.parser.Parser().parsestr(opened.read(name).decode())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (said["Name"], said["Version"]) == ("quantpass", quantpass.__version__)
    assert said.get_all("Project-URL") is None and said["Home-page"] is None, "an address that nobody has checked"
    assert said["License-Expression"] == "Apache-2.0" and said.get_all("License-File") == ["LICENSE"]
    assert set(said.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    pythons = [c.rpartition(" ")[2] for c in said.get_all("Classifier") if c.startswith("Programming Language")]
    assert all(f"{python}.0" in SpecifierSet(said["Requires-Python"]) for python in pythons)
    assert "## Ten lines for each door" in said.get_payload()


def test_every_extra_is_explained():
    """Those that users want by a row of their own, those of the Makefile by name."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (ROOT / "docs" / "quick_start.md").read_text()
    assert not [e for e in extras if f"`.[{e}]`" not in page]


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    # PyTorch looks at the logs' settings while it is imported, and imports what they name.
    places = run(WITHOUT_EDITABLE + USE, tmp_path, PYTHONPATH=str(site), TORCH_LOGS="+quantpass")
    assert all(p.startswith(str(site)) for p in places)


@pytest.mark.slow
def test_installed_package_works_from_anywhere(tmp_path):
    """Whatever way quantpass is installed here (``make test`` installs it editable)."""
    pytest.importorskip("quantpass")
    probe = "import importlib.metadata as m; print(m.version('quantpass'))"
    if subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("quantpass is not installed in this environment")
    run(USE, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("installed", ["", WITHOUT_EDITABLE], ids=["beside an editable install", "alone"])
def test_bare_checkout_works(installed):
    places = run(installed + USE, ROOT)
    assert places == [str(ROOT / p / "__init__.py") for p in ("quantpass", "patterns", "lowering")]


@pytest.mark.slow
def test_a_second_checkout_uses_its_own_folders(tmp_path):
    """Also where this one is installed editable: a test run in a clone has to test the clone."""
    for folder in ("quantpass", "patterns", "lowering"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    places = run(USE, tmp_path)
    assert places == [str(tmp_path / p / "__init__.py") for p in ("quantpass", "patterns", "lowering")]


@pytest.mark.slow
@pytest.mark.parametrize("torch_npu", ["2.10.0.post4", "2.10.0.post6"], ids=["0.23.0", "later"])
def test_installs_beside_what_vllm_ascend_pins(wheel, tmp_path, torch_npu):
    """For the machines it runs on, by the resolver; nothing is installed. Later branches pin a newer post."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if uv is None:
        pytest.skip("uv is not installed")
    wanted = tmp_path / "wanted.txt"
    pins = (ROOT / "tests" / "data" / "vllm_ascend_pins.txt").read_text()
    assert "torch-npu==2.10.0.post4\n" in pins
    pins = pins.replace("torch-npu==2.10.0.post4", f"torch-npu=={torch_npu}")
    wanted.write_text(f"{pins}quantpass[npu] @ {wheel.as_uri()}\n")
    machine = ["--python-version", "3.12", "--python-platform", "aarch64-manylinux_2_28"]
    command = [uv, "pip", "compile", "-q", "--only-binary", ":all:", *machine, str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {line.split("=")[0]: line for line in done.stdout.splitlines() if "==" in line}
    assert (found["torch"], found["torch-npu"]) == ("torch==2.10.0", f"torch-npu=={torch_npu}")


def test_torch_npu_is_never_installed_unasked():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = settings["optional-dependencies"].values()
    named = {
        Requirement(r).name.replace("-", "_") for r in (*settings["dependencies"], *(r for e in extras for r in e))
    }
    assert "torch_npu" not in named


def test_what_is_declared_is_what_is_tested():
    """Every tested PyTorch may be installed, and no other; each Python that is named is one that a cell is run with."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = (r for r in map(Requirement, settings["dependencies"]) if r.name == "torch")
    assert all(f"{version}.0" in torch.specifier for version in TESTED)
    assert "2.7.1" not in torch.specifier and "2.16.0" not in torch.specifier
    named = {c.rpartition(" :: ")[2] for c in settings["classifiers"] if "Python :: 3." in c}
    assert named == {c.python for c in CELLS}
    assert "3.10.0" in SpecifierSet(settings["requires-python"])


def test_the_name_registered_with_dynamo():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert settings["entry-points"]["torch_dynamo_backends"] == {"quantpass": "quantpass.doors.backend:dynamo_backend"}
    assert settings["scripts"] == {"quantpass": "quantpass.doors.cli:main"}


def test_no_module_grows_past_its_purpose():
    longest = {
        p: len(p.read_text().splitlines())
        for d in ("quantpass", "patterns", "lowering")
        for p in (ROOT / d).rglob("*.py")
    }
    assert {str(p.relative_to(ROOT)): n for p, n in longest.items() if n > 520} == {}


def test_public_names_are_documented():
    import quantpass as qp

    for name in qp.__all__:
        assert getattr(qp, name).__doc__, f"qp.{name} has no docstring"
