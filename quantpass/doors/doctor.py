"""What is installed here, which doors work with it, and what the others need. Imports no PyTorch: it may be broken."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, distributions, version
from importlib.util import find_spec
from pathlib import Path

from quantpass.basics.user_cache import user_cache
from quantpass.version import __version__

_TOOLKITS = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
_TOOLKIT = Path("/usr/local/Ascend/ascend-toolkit/latest")
_CANN_VERSIONS = ("version.cfg", "*/version.info", "*/ascend_*_install.info")
_DRIVER = Path("/usr/local/Ascend/driver/version.info")
_PROBE_SECONDS = 120
_GENERATION = """
from quantpass.lowering.standin_cann import find_torch_npu
from quantpass.lowering.torchair_versions import generation_of, missing_modules
package = find_torch_npu() / "torch_npu"
found = generation_of(package)
print(f"generation {found.name}{'' if found.tested else ', not tested'}" if found else "a generation that is not known")
print(missing_modules(package))
"""
"""What asks for torchair's generation, and what it needs: in a process of its own, for it imports PyTorch."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        name: what it is.
        found: what is there; empty where it is missing.
        needs: what to do where it is missing or does not work; empty where nothing is to be done.
    """

    name: str
    found: str
    needs: str = ""


@dataclass(frozen=True, slots=True)
class Door:
    """Some of the doors.

    Attributes:
        name: which.
        found: ``"works"``, or empty.
        needs: what is missing for them.
    """

    name: str
    found: str
    needs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What :func:`examine` found.

    Attributes:
        parts: what is installed.
        doors: what works with it; ``needs`` says what the others lack.
    """

    parts: tuple[Finding, ...]
    doors: tuple[Door, ...]

    def __str__(self) -> str:
        width = max(map(len, [*(p.name for p in self.parts), *(d.name for d in self.doors)]))
        lines = [f"{f.name:<{width}}  {f.found or 'missing'}" for f in self.parts]
        lines.append("")
        for door in self.doors:
            lines.append(f"{door.name:<{width}}  {door.found or 'needs'}")
            lines += [f"{'':<{width}}    {need}" for need in door.needs]
        return "\n".join(lines)

    def to_json(self) -> str:
        """For an issue: the same as plain data."""
        return json.dumps({"schema": 1, **asdict(self)}, indent=2)


def examine() -> Diagnosis:
    """Look for everything that some door needs."""
    torch = _imported("torch", "print(torch.__version__)")
    npu = _fitting(_torch_npu(), _version("torch"))
    cann, driver, device = _cann(), _driver(), _device()
    gcc, nm, cache = _program("gcc"), _program("nm"), _cache()
    parts = (
        Finding("quantpass", __version__),
        Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        torch,
        *(Finding(name, _version(name)) for name in ("numpy", "torchao", "transformers")),
        npu,
        _torchair(npu),
        cann,
        driver,
        device,
        gcc,
        nm,
        cache,
    )
    return Diagnosis(parts, tuple(_doors({f.name: f for f in parts})))


def _doors(parts: dict[str, Finding]) -> Iterator[Door]:
    for names, wanted in (
        ("check-op, chips, reasons, check-checkpoint", ()),
        ("explain, fuse, diff, verify, backend", ("torch",)),
        ("preview", ("torch", "torch_npu", "torchair", "gcc", "nm", "cache folder")),
        ("npu_backend, register, npugraph_ex", ("torch", "torch_npu", "torchair", "CANN", "driver", "NPU")),
    ):
        missing = [f"{p.name}: {p.needs}" for name in wanted if (p := parts[name]).needs]
        if "NPU" in wanted and parts["torch_npu"].found and find_spec("torch_npu") is None:
            missing.insert(0, "torch_npu: installed beside torch, for the device's CANN")
        yield Door(names, "" if missing else "works", tuple(missing))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _imported(package: str, say: str) -> Finding:
    """A package, imported in a process of its own: an import may fail, or end the process."""
    if find_spec(package) is None:
        return Finding(package, "", f"pip install {package}")
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {package}; {say}"], capture_output=True, text=True, timeout=_PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Finding(package, _version(package), f"import {package} takes more than {_PROBE_SECONDS} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return Finding(package, f"{_version(package)}, import fails", last)
    return Finding(package, done.stdout.strip().splitlines()[-1])


def _torch_npu() -> Finding:
    """Beside torch, or unpacked in a folder of its own."""
    folder = os.environ.get("QUANTPASS_TORCH_NPU", "")
    if folder:
        package = Path(folder) / "torch_npu"
        if not package.is_dir():
            return Finding("torch_npu", "", f"QUANTPASS_TORCH_NPU is {folder}, which holds no torch_npu")
        return Finding("torch_npu", f"{_text(package / 'version.py', r'__version__ = .(.*).$')} in {folder}".strip())
    if find_spec("torch_npu") is None:
        return Finding("torch_npu", "", "its wheel, for preview in a folder of its own (docs/preview.md)")
    return Finding("torch_npu", f"{_version('torch_npu')} beside torch")


def _fitting(npu: Finding, torch: str) -> Finding:
    """The same, with what is to be done where it was built for another PyTorch: its libraries do not load with this."""
    asked = _asked_for() or npu.found
    wanted, there = (re.match(r"\d+\.\d+\.\d+", v) for v in (asked, torch))
    if not npu.found or wanted is None or there is None or wanted[0] == there[0]:
        return npu
    line = f"pip install torch_npu=={there[0]}.* or pip install torch=={wanted[0]}.*"
    return replace(npu, needs=f"the one here is for PyTorch {wanted[0]}, and this is {torch}: {line}")


def _asked_for() -> str:
    """The PyTorch that torch_npu's metadata asks for; empty where they say nothing."""
    folder = os.environ.get("QUANTPASS_TORCH_NPU", "")
    found = distributions(name="torch_npu", path=[folder] if folder else sys.path)
    required = (r for one in found for r in one.requires or ())
    return next((r[1] for r in (re.match(r"torch\s*\(?==+\s*([\d.]+)", text) for text in required) if r), "")


def _torchair(npu: Finding) -> Finding:
    """The generation of torchair inside torch_npu, and what it needs."""
    if not npu.found:
        return Finding("torchair", "")  # torch_npu is what is to be installed
    done = subprocess.run([sys.executable, "-c", _GENERATION], capture_output=True, text=True)
    if done.returncode or "\n" not in done.stdout:
        return Finding("torchair", "of a generation that could not be told")
    generation, needs = done.stdout.split("\n")[:2]
    return Finding("torchair", generation, needs)


def _cann() -> Finding:
    for folder in [*(Path(p) for name in _TOOLKITS if (p := os.environ.get(name))), _TOOLKIT]:
        if folder.is_dir():
            infos = [p for name in _CANN_VERSIONS for p in folder.glob(name)]
            found = next((v for i in infos if (v := _text(i, r"(?i)^version=\[?([\w.]+)"))), "of an unknown version")
            sourced = any(os.environ.get(name) for name in _TOOLKITS)
            return Finding("CANN", f"{found} in {folder}", "" if sourced else f"source {folder}/../set_env.sh")
    return Finding("CANN", "", "CANN's toolkit, and `source set_env.sh` in this shell")


def _driver() -> Finding:
    if not _DRIVER.is_file():
        return Finding("driver", "", "the NPU's driver and firmware")
    return Finding("driver", _text(_DRIVER, r"(?i)^version=(.*)$") or "of an unknown version")


def _device() -> Finding:
    nodes = sorted(p.name for p in Path("/dev").glob("davinci[0-9]*"))
    if not nodes:
        return Finding("NPU", "", "an NPU (/dev/davinci*)")
    listed = _run("npu-smi", "info", "-l") if shutil.which("npu-smi") else ""
    names = re.findall(r"(?i)chip name\s*:\s*(\S+)", listed)
    return Finding("NPU", f"{', '.join(nodes)}{' ' + ', '.join(names) if names else ''}")


def _program(name: str) -> Finding:
    if shutil.which(name) is None:
        return Finding(name, "", "apt-get install gcc binutils")
    said = _run(name, "--version").splitlines()
    return Finding(name, said[0] if said else "there")


def _cache() -> Finding:
    folder = user_cache()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if os.access(there, os.W_OK):
        return Finding("cache folder", str(folder))
    return Finding("cache folder", f"{folder}, not writable", "XDG_CACHE_HOME set to a folder that can be written")


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _text(path: Path, pattern: str) -> str:
    """What ``pattern`` finds in a file; empty where there is none."""
    found = re.search(pattern, path.read_text(errors="replace"), flags=re.M) if path.is_file() else None
    return found[1].strip() if found else ""
