"""``quantpass doctor``: what is installed, and what each door lacks."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from quantpass.doors import doctor
from quantpass.doors.cli import main


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of which every part can be taken away; nothing is started on it."""
    packages = {"torch": "2.13.0", "torch_npu": "2.13.0"}
    monkeypatch.setattr(doctor, "find_spec", lambda name: object() if name in packages else None)
    monkeypatch.setattr(doctor, "_version", lambda name: packages.get(name, ""))
    monkeypatch.setattr(doctor, "_imported", lambda name, say: doctor.Finding(name, packages[name]))
    monkeypatch.setattr(doctor, "_torchair", lambda npu: doctor.Finding("torchair", "generation F"))
    monkeypatch.setattr(doctor, "_run", lambda *command: f"{command[0]} 1.0\n")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor, "_device", lambda: doctor.Finding("NPU", "davinci0"))
    for name in ("QUANTPASS_TORCH_NPU", "ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    toolkit = tmp_path / "toolkit"
    toolkit.mkdir()
    (toolkit / "version.cfg").write_text("# CANN\nversion=8.5.0\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(toolkit))
    (tmp_path / "version.info").write_text("Version=25.2.0\n")
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path / "version.info")
    return packages


def doors():
    return {d.name.partition(",")[0]: d for d in doctor.examine().doors}


def test_where_everything_is_there_everything_works(machine):
    found = doctor.examine()
    assert {d.found for d in found.doors} == {"works"}
    parts = {p.name: p.found for p in found.parts}
    assert parts["CANN"].startswith("8.5.0 in ")
    assert parts["driver"] == "25.2.0"


@pytest.mark.parametrize(
    ("taken", "lacking", "needs"),
    [
        ("torch_npu", ("preview", "npu_backend"), "torch_npu: its wheel"),
        ("CANN", ("npu_backend",), "source set_env.sh"),
        ("gcc", ("preview",), "apt-get install gcc"),
        ("driver", ("npu_backend",), "the NPU's driver"),
    ],
)
def test_each_missing_part_is_named_by_the_doors_that_need_it(machine, monkeypatch, taken, lacking, needs):
    if taken == "torch_npu":
        del machine["torch_npu"]
    elif taken == "CANN":
        monkeypatch.delenv("ASCEND_HOME_PATH")
    elif taken == "gcc":
        monkeypatch.setattr(doctor.shutil, "which", lambda name: None if name == "gcc" else name)
    else:
        monkeypatch.setattr(doctor, "_DRIVER", Path("/no/such/file"))
    found = doors()
    assert {name for name, d in found.items() if not d.found} == set(lacking)
    assert all(any(needs in need for need in found[name].needs) for name in lacking)


@pytest.mark.parametrize(
    ("asks", "of", "torch", "wanted"),
    [
        ("torch==2.10.0+cpu", "2.10.0.post4", "2.10.0+cu128", ""),
        ("torch==2.10.0.*", "2.10.0.post4", "2.13.0+cpu", "2.10.0"),
        ("torch (==2.9.1)", "2.9.1", "2.9.0", "2.9.1"),
        ("numpy", "2.10.0.post4", "2.10.0", ""),
        ("numpy", "2.10.0.post4", "2.11.0", "2.10.0"),
        ("torch==2.12.0", "of nobody knows which version", "2.13.0", "2.12.0"),
    ],
    ids=["a build of it", "another one", "another patch", "by its version", "not by its version", "by its metadata"],
)
def test_a_torch_npu_of_another_pytorch(machine, tmp_path, monkeypatch, asks, of, torch, wanted):
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "version.py").write_text(f"__version__ = '{of}'\n")
    about = tmp_path / "torch_npu-1.dist-info"
    about.mkdir()
    about.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torch_npu\nVersion: 1\nRequires-Dist: {asks}\n"
    )
    monkeypatch.setenv("QUANTPASS_TORCH_NPU", str(tmp_path))
    machine["torch"] = torch
    line = f"pip install torch_npu=={torch.partition('+')[0]}.* or pip install torch=={wanted}.*"
    said = f"torch_npu: the one here is for PyTorch {wanted}, and this is {torch}: {line}"
    assert doors()["preview"].needs == ((said,) if wanted else ())


def test_a_torch_npu_of_another_pytorch_where_import_torch_fails(machine, monkeypatch):
    """Installed beside it, it is loaded with every ``import torch``."""
    machine["torch_npu"] = "2.9.0.post2"
    broken = doctor.Finding("torch", "2.13.0, import fails", "RuntimeError: Failed to load the backend extension")
    monkeypatch.setattr(doctor, "_imported", lambda name, say: broken)
    needs = doors()["npu_backend"].needs
    assert any("the one here is for PyTorch 2.9.0, and this is 2.13.0" in need for need in needs)


def test_a_torchair_that_lacks_a_module_is_what_its_doors_need(machine, monkeypatch):
    needs = 'it imports pkg_resources: pip install "setuptools<82"'
    monkeypatch.setattr(doctor, "_torchair", lambda npu: doctor.Finding("torchair", "generation C", needs))
    found = doors()
    assert {name for name, d in found.items() if not d.found} == {"preview", "npu_backend"}
    assert found["preview"].needs == (f"torchair: {needs}",)


@pytest.mark.parametrize("imports", [True, False])
def test_a_torchair_older_than_setuptools_82(tmp_path, monkeypatch, imports):
    """Generation C: its files are looked at, in a process that has no ``pkg_resources``."""
    torchair = tmp_path / "torch_npu" / "dynamo" / "torchair"
    torchair.mkdir(parents=True)
    (torchair / "__init__.py").write_text("import pkg_resources\n" if imports else "")
    hidden = "import importlib.util\nfound = importlib.util.find_spec\n"
    hidden += "importlib.util.find_spec = lambda name, *of: None if name == 'pkg_resources' else found(name, *of)\n"
    monkeypatch.setattr(doctor, "_GENERATION", hidden + doctor._GENERATION)
    monkeypatch.setenv("QUANTPASS_TORCH_NPU", str(tmp_path))
    told = doctor._torchair(doctor._torch_npu())
    assert told.found == "a generation that is not known"
    wanted = 'it imports pkg_resources, which setuptools has no more since 82: pip install "setuptools<82"'
    assert told.needs == (wanted if imports else "")


def test_a_broken_package_says_how_it_breaks(tmp_path, monkeypatch):
    (tmp_path / "brokenpackage.py").write_text("raise OSError('libascendcl.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = doctor._imported("brokenpackage", "pass")
    assert "import fails" in found.found
    assert found.needs == "OSError: libascendcl.so: cannot open shared object file"


def test_text_and_json_on_this_machine():
    """The one that the tests run on: PyTorch works, and there is no NPU."""
    run = CliRunner().invoke(main, ["doctor", "--json", "-"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.output)
    assert next(p for p in found["parts"] if p["name"] == "torch")["found"]
    assert next(d for d in found["doors"] if d["name"].startswith("explain"))["found"] == "works"
