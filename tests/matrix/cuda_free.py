"""A CUDA build of PyTorch without CUDA: ``python -m tests.matrix.cuda_free FOLDER_OF_TORCH``.

Wheels of older versions are CUDA builds, and CUDA's own libraries are several times their size. On a machine without
a GPU nothing of them is ever called; they only have to be there when PyTorch is loaded. So each of them is compiled
here from nothing but the names that PyTorch's libraries want, and every function returns 0: there are no devices.

One thing more: a CUDA build registers names of allocator settings while it is loaded, newer torch_npus register some of
the same, and the second to do so ends the process. Nothing here allocates on a device, so CUDA's part of PyTorch gets a
set of its own: the name of PyTorch's is changed in it, and the stand-in for CUDA's runtime defines the changed one.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

_CUDA = re.compile(r"(__cuda|cu|nccl|nv)\w*$")
_NO_DEVICES = {"cudaGetDeviceCount": "(int *count) { *count = 0; return 0; }"}
_RUNTIME = "libcudart."
_REGISTERS, _KEYS, _OWN_KEYS = "libc10_cuda.so", b"14getMutableKeysB5cxx11", b"14getMutableKeyzB5cxx11"
_SETTINGS = """#include <string>
#include <unordered_set>
namespace c10::CachingAllocator {
struct AcceleratorAllocatorConfig {
  __attribute__((used)) static std::unordered_set<std::string> &getMutableKeyz() {
    static std::unordered_set<std::string> keys;
    return keys;
  }
};
}
"""


def make_standins(lib: Path) -> list[str]:
    """Compile what is missing into ``torch/lib``, where PyTorch looks first; returns the names."""
    libraries = sorted(lib.glob("lib*.so"))
    needed, versions = _needed(libraries)
    absent = [name for name in sorted(needed) if not (lib / name).exists()]
    missing = [name for name in absent if name.startswith(_RUNTIME) or not _loads(name)]
    symbols = _wanted(libraries)
    for name in missing:
        _compile(lib / name, symbols[""], {v: symbols[v] for v in versions[name]})
    _keep_settings_apart(lib / _REGISTERS)
    return missing


def _keep_settings_apart(library: Path) -> None:
    """Rename where a library keeps the names of its settings; written beside it first, for it may be loaded."""
    if library.exists():
        renamed = library.with_suffix(".renamed")
        renamed.write_bytes(library.read_bytes().replace(_KEYS, _OWN_KEYS))
        renamed.replace(library)


def _needed(libraries: list[Path]) -> tuple[set[str], dict[str, set[str]]]:
    """The libraries that these are linked with, and the symbol versions that they want of each."""
    needed: set[str] = set()
    versions: dict[str, set[str]] = defaultdict(set)
    for library in libraries:
        needed |= set(re.findall(r"NEEDED.*\[(.+)\]", _run("readelf", "-d", str(library))))
        of = ""
        for line in _run("readelf", "-VW", str(library)).splitlines():
            if found := re.search(r"File: (\S+)", line):
                of = found[1]
            elif of and (found := re.search(r"Name: (\S+)\s+Flags", line)):
                versions[of].add(found[1])
    return needed, versions


def _defined(libraries: Iterable[Path]) -> set[str]:
    lines = (line for p in libraries for line in _run("nm", "-D", "--defined-only", str(p)).splitlines())
    return {line.split()[-1].partition("@")[0] for line in lines}


def _wanted(libraries: list[Path]) -> dict[str, set[str]]:
    """Version to the names of CUDA's functions that are left undefined."""
    defined = _defined(libraries)
    found: dict[str, set[str]] = defaultdict(set)
    for library in libraries:
        for line in _run("nm", "-D", "--undefined-only", str(library)).splitlines():
            kind, name = line.split()[-2:]
            name, _, version = name.partition("@")
            if kind == "U" and name not in defined and _CUDA.match(name):
                found[version.lstrip("@")].add(name)
    return found


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _compile(library: Path, plain: set[str], versioned: dict[str, set[str]]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source, script = Path(scratch) / "standin.cpp", Path(scratch) / "versions"
        names = sorted(plain.union(*versioned.values()))
        functions = "".join(f"long {n}{_NO_DEVICES.get(n, '(void) { return 0; }')}\n" for n in names)
        settings = _SETTINGS if library.name.startswith(_RUNTIME) else ""
        source.write_text(f'{settings}extern "C" {{\n{functions}}}\n')
        blocks = (f"{v} {{ global: {' '.join(f'{n};' for n in sorted(ns))} }};\n" for v, ns in versioned.items())
        script.write_text("".join(blocks))
        options = ["-shared", "-fPIC", "-O1", "-w", "-fno-builtin", f"-Wl,-soname,{library.name}"]
        if versioned:
            options.append(f"-Wl,--version-script,{script}")
        _run("g++", *options, "-o", str(library), str(source))


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    print("stand-ins for", *make_standins(Path(sys.argv[1]) / "lib"))
