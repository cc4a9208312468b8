"""Stand-in CANN libraries, with which torch_npu and torchair load on a machine that has neither CANN nor an NPU.

torch_npu's wheel carries the whole of torchair, and its libraries want CANN's: about 200 functions. Each of them is
compiled here as a function that returns 0, into libraries with CANN's file names. A child process that finds them
through ``LD_LIBRARY_PATH`` (read when a process starts, so it can't be this one) can ``import torch_npu``. Nothing
computes there; graphs are converted for real. :mod:`quantpass.lowering.standin_device` does the rest in the child.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

from quantpass.basics.user_cache import user_cache
from quantpass.lowering.torchair_versions import install_line

LIBRARIES = (
    "libhccl.so",
    "libascendcl.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
    "libfmk_parser.so",
    "libascend_protobuf.so",
    "libopapi.so",  # loaded, not linked: generation C looks for a function in it when it is imported
)
"""CANN's libraries that torch_npu and torchair are linked with."""

TORCH_NPU_VARIABLE = "QUANTPASS_TORCH_NPU"
"""The environment variable that names the folder holding torch_npu, where it is not installed beside torch."""

_CHILD_VARIABLE = "QUANTPASS_STANDIN_CANN"

_OWN_LIBRARIES = ("_C*.so", "lib/lib*.so", "dynamo/torchair/core/*.so")
_LEFT_OUT = ("libop_plugin_atb.so",)  # loaded on demand, and linked with a library that belongs to no release of CANN
_OTHER_BODIES = {"aclrtGetDeviceCount": "(unsigned int *count) { *count = 1; return 0; }"}
"""One device, or torch_npu's own guards end the process as soon as a fake tensor is on it."""

_PYTHON = re.compile(r"_?Py[A-Z_]")


class StandinError(RuntimeError):
    """torch_npu can't be made to load here; the message says what to install."""


def find_torch_npu(folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds the ``torch_npu`` package, found without importing it.

    Args:
        folder: where to look; None looks at the variable ``QUANTPASS_TORCH_NPU`` and then beside this Python's
            packages.

    Raises:
        StandinError: it is not there.
    """
    named = folder or os.environ.get(TORCH_NPU_VARIABLE)
    if named:
        holder = Path(named).resolve()
        if (holder / "torch_npu" / "dynamo" / "torchair").is_dir():
            return holder
        raise StandinError(f"{holder} holds no torch_npu package with torchair. {_how_to_install()}")
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or not spec.submodule_search_locations:
        raise StandinError(f"torch_npu is not installed. {_how_to_install()}")
    return Path(next(iter(spec.submodule_search_locations))).resolve().parent


def _how_to_install() -> str:
    return (
        f"It needs no NPU here; the version has to match torch's: {install_line('--no-deps --target DIR')}, then set "
        f"{TORCH_NPU_VARIABLE}=DIR (also needed: pip install pyyaml protobuf)."
    )


def ensure_standins(folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the stand-in libraries for one torch_npu; compiled at first use, into the user's cache directory.

    Args:
        folder: as for :func:`find_torch_npu`.

    Raises:
        StandinError: torch_npu, gcc or nm is missing, or compiling failed.
    """
    package = find_torch_npu(folder) / "torch_npu"
    libraries = _own_libraries(package)
    target = cache_folder() / _identity(package, libraries)
    if not target.is_dir():
        symbols = missing_symbols(libraries)
        _make_folder(target.parent)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as scratch:
            built = Path(scratch) / "libraries"
            built.mkdir()
            _compile(symbols, built)
            try:
                built.rename(target)
            except OSError:
                if not target.is_dir():  # another process was faster otherwise
                    raise
    return target


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise StandinError(
            f"the stand-ins for CANN's libraries are kept in {folder}, which can't be written. Set XDG_CACHE_HOME to a "
            "folder that can."
        )


def cache_folder() -> Path:
    """Where the stand-in libraries are kept."""
    return user_cache() / "standin-cann"


def child_environment(
    folder: str | os.PathLike[str] | None = None, base: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment for a Python process in which ``import torch_npu`` works.

    The child imports what this process can import. PyTorch must not load torch_npu by itself (it would before the
    device is replaced), so ``TORCH_DEVICE_BACKEND_AUTOLOAD`` is 0: call
    :func:`quantpass.lowering.standin_device.install` there.

    Args:
        folder: as for :func:`find_torch_npu`.
        base: the environment to start from; None takes this process's.

    Raises:
        StandinError: as :func:`ensure_standins`.
    """
    holder, standins = find_torch_npu(folder), ensure_standins(folder)
    environment = dict(os.environ if base is None else base)
    environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    environment[_CHILD_VARIABLE] = str(standins)
    environment["LD_LIBRARY_PATH"] = _joined(str(standins), environment.get("LD_LIBRARY_PATH"))
    paths = [p or os.getcwd() for p in sys.path if not p.endswith(".zip")]
    environment["PYTHONPATH"] = _joined(*paths, *([] if str(holder) in paths else [str(holder)]))
    return environment


def is_child() -> bool:
    """Whether this process was started with :func:`child_environment`."""
    return _CHILD_VARIABLE in os.environ


def run_again(folder: str | os.PathLike[str] | None = None) -> int:
    """Run this program with its own arguments in a process where torch_npu loads; returns its exit status."""
    command = [sys.executable, *sys.orig_argv[1:]]
    return subprocess.run(command, env=child_environment(folder), check=False).returncode


def _joined(*parts: str | None) -> str:
    return os.pathsep.join(p for p in parts if p)


def _own_libraries(package: Path) -> list[Path]:
    found = sorted(p for pattern in _OWN_LIBRARIES for p in package.glob(pattern) if p.name not in _LEFT_OUT)
    if not any(p.name.startswith("_C") for p in found):
        raise StandinError(f"{package} holds no compiled torch_npu. {_how_to_install()}")
    return found


def _identity(package: Path, libraries: list[Path]) -> str:
    """Version, machine, and size and time of every library: another wheel gets other stand-ins."""
    version = package / "version.py"
    named = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", version.read_text(), re.M) if version.is_file() else None
    facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in libraries]
    digest = hashlib.sha256(
        repr((sysconfig.get_platform(), str(package), facts, LIBRARIES, _OTHER_BODIES)).encode()
    ).hexdigest()
    return f"{named[1] if named else 'unknown'}-{digest[:16]}"


def missing_symbols(libraries: list[Path]) -> list[str]:
    """What the libraries leave undefined and neither torch, Python, the C and C++ runtimes nor they themselves define.

    Names of the C and C++ runtimes carry a version (``memcpy@GLIBC_2.14``); weak names may stay undefined.
    """
    wanted = set()
    for line in _symbols("--undefined-only", libraries):
        kind, name = line
        if kind == "U" and "@" not in name and not _PYTHON.match(name):
            wanted.add(name)
    torch_spec = importlib.util.find_spec("torch")
    assert torch_spec is not None and torch_spec.origin is not None
    torch_libraries = sorted((Path(torch_spec.origin).parent / "lib").glob("lib*.so"))
    return sorted(wanted - {name for _, name in _symbols("--defined-only", [*torch_libraries, *libraries])})


def _symbols(which: str, libraries: list[Path]) -> list[tuple[str, str]]:
    lines = _run(["nm", "-D", which, *map(str, libraries)]).splitlines()
    split = [line.split() for line in lines]
    return [(parts[-2], parts[-1]) for parts in split if len(parts) >= 2 and len(parts[-2]) == 1]


def _compile(symbols: list[str], target: Path) -> None:
    """Every library gets every name: which of CANN's libraries a name is in differs from release to release."""
    source = target / "standin.c"
    bodies = {name: _OTHER_BODIES.get(name, "(void) { return 0; }") for name in symbols}
    source.write_text("".join(f"long {name}{body}\n" for name, body in bodies.items()))
    first = target / LIBRARIES[0]
    _run(["gcc", "-shared", "-fPIC", "-O1", "-w", "-fno-builtin", "-o", str(first), str(source)])
    for name in LIBRARIES[1:]:
        shutil.copy(first, target / name)


def _run(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        raise StandinError(
            f"{command[0]} is missing: stand-ins for CANN's libraries are made with nm, which lists what they have to "
            "define, and gcc, which compiles them (Debian, Ubuntu: apt-get install gcc binutils)."
        )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StandinError(f"{command[0]} failed while making stand-ins for CANN's libraries:\n{done.stderr[-2000:]}")
    return done.stdout
