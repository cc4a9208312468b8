"""The tools whose operators are read by name, each in two versions: ``python -m tests.matrix.tools [torchao ...]``.

Each version is installed, without what it asks for, into a folder of its own under ``build/matrix`` that comes before the
packages of the environment that runs this: nothing there is replaced, PyTorch least of all. In a process of its own the
tool's schemes of ``tests/coverage`` are built, captured and judged. ``tools.json`` keeps what they gave, and
``docs/versions.md`` shows it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.matrix.cells import ROOT

TOOLS = {
    "torchao": ("0.18.0", "0.17.0"),
    "optimum-quanto": ("0.2.7", "0.2.6"),
    "bitsandbytes": ("0.50.2", "0.49.2"),
    "compressed-tensors": ("0.20.0", "0.15.0"),
    "GPTQModel": ("7.7.0", "7.6.0"),
    "autoawq": ("0.2.7.post3", "0.2.6"),
    "nvidia-modelopt": ("0.47.0", "0.43.0"),
}
"""A package, the version that its captures and its reader are of, and an older one."""

_DATA = ("accelerate", "pyarrow", "dill", "multiprocess", "pandas", "python-dateutil", "pytz", "six", "xxhash")
_WEB = ("requests", "urllib3", "certifi")
BESIDE: dict[str, tuple[str, ...]] = {
    "compressed-tensors": ("loguru", "psutil"),
    "GPTQModel": (
        *("device-smi", "pypcre", "tokenicer", "logbar", "defuser", "threadpoolctl", "pillow", "psutil", "datasets"),
        *(*_DATA, *_WEB),
    ),
    "autoawq": (
        *("transformers==4.46.3", "tokenizers==0.20.3", "huggingface_hub==0.36.0", "datasets==3.6.0", "zstandard"),
        *("aiohttp", *_DATA, *_WEB),
    ),
    "nvidia-modelopt": ("nvidia-ml-py", "pulp<4", "omegaconf", "antlr4-python3-runtime==4.9.3", *_WEB),
}
"""What a tool imports and the tests' environment does not have, or has too new."""

NOT_TRIED = (
    (
        "quark",
        "`patterns/quark.py` and its table were looked at with amd-quark 0.13 alone: the first import of each version compiles an "
        "extension, and 0.11.2 was not through with it after 200 seconds on a busy machine",
    ),
    (
        "auto-gptq",
        "0.7.1, of 2024, is its last version, and imports what peft has no more",
    ),
    (
        "PyTorch's own operators (`aten_packed`, `fake_quantize`, `quantized_decomposed`) and torch_npu's (`ascend`)",
        "their versions are the cells above",
    ),
)
"""Readers by name whose tool has no row, and why."""

RESULTS = Path(__file__).with_name("tools.json")
BUILD = ROOT / "build" / "matrix" / "tools"


def judged(package: str) -> dict[str, Any]:
    """Scheme to what is read of it here: the sites, how many of them each target fuses; or to what went wrong."""
    import torch

    import quantpass as qp
    from quantpass.doors.compiled import copied
    from tests.coverage import elsewhere, here
    from tests.coverage.captured import capture
    from tests.coverage.table import DOCUMENTED, TARGETS

    logging.getLogger("quantpass").setLevel(logging.ERROR)
    found: dict[str, Any] = {}
    for scheme in (*here.schemes(), *elsewhere.schemes()):
        if scheme.package != package:
            continue
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            graphs = capture(*scheme.build())
        except Exception as error:
            found[f"{scheme.tool}, {scheme.name}"] = (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:200]
            continue
        counts = dict.fromkeys(("sites", *TARGETS), 0)
        for c in graphs:
            cpu = qp.explain(copied(c.graph), target="cpu")
            npus = qp.explain(copied(c.graph), target=DOCUMENTED, numerics="vendor")
            counts["sites"] += cpu.total
            for target in TARGETS:
                counts[target] += cpu.fused if target == "cpu" else npus[target].fused
        found[f"{scheme.tool}, {scheme.name}"] = counts
    return found


def try_version(package: str, version: str) -> dict[str, Any]:
    """Install one version of a tool in front of this environment's, and judge its schemes."""
    folder = BUILD / f"{package}-{version}"
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps"]
    asked = [f"{package}=={version}", *BESIDE.get(package, ())]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(folder), *asked], check=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.matrix.tools", "--judge", package]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    shutil.rmtree(folder)
    if done.returncode:
        raise SystemExit(f"{package} {version}: {done.stderr[-2000:]}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert told["version"] == version, f"{package} {told['version']} was loaded, not {version}"
    return told


KNOWN = (
    ("torchao", "groups of 32", "0.17's first version of this config takes no granularity: its weights are per row"),
    (
        "torchao",
        "asymmetric per row",
        "0.17 dequantizes such rows in front of a matmul of floats: the weight alone is fused",
    ),
    ("torchao", "PT2E", "0.17's PT2E itself fails with PyTorch 2.13"),
    ("bitsandbytes", "NF4", "0.49's operator fails in PyTorch's fake run, before quantpass sees a graph"),
)
"""A package, part of a scheme's name, and why its versions differ."""


def load_results() -> dict[str, dict[str, Any]]:
    """Package to version to what it gave."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}  # type: ignore[no-any-return]


def section(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The part of the page: one row for each tool and version, and what is read differently in the older one."""
    if not results:
        return ""
    lines = [SECTION]
    for package, versions in results.items():
        for version, told in versions.items():
            counts = [c for c in told["schemes"].values() if isinstance(c, dict)]
            numbers = [str(sum(c[key] for c in counts)) for key in ("sites", "cpu", "ascend310p", "ascend910b")]
            cells = [package, version, told["torch"], f"{len(counts)} of {len(told['schemes'])}", *numbers]
            lines.append(f"| {' | '.join(cells)} |\n")
    different = [f"\n* {line}" for line in differences(results)]
    said = "\nSchemes that the two do not give alike:\n" if different else "\nEvery scheme is read alike."
    left_out = [f"\n* {what}: {why}" for what, why in NOT_TRIED]
    return "".join([*lines, said, *different, "\n\nNot tried in two versions:\n", *left_out, "\n"])


def differences(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Each scheme that two versions of a tool do not give alike."""
    for package, versions in results.items():
        (new, newer), (old, older) = versions.items()
        for scheme, counts in newer["schemes"].items():
            other = older["schemes"].get(scheme, "not there")
            if other != counts:
                why = next((f" ({why})" for of, part, why in KNOWN if of == package and part in scheme), "")
                yield f"{scheme}: {_said(counts)} with {new}; {_said(other)} with {old}{why}"


def _said(counts: Any) -> str:
    if isinstance(counts, str):
        return counts
    return ", ".join(f"{key} {count}" for key, count in counts.items())


SECTION = """
## Tools in two versions

The readers that know a tool's operators by name (`patterns/`), and the tables of its modules (`quantpass/adoption/tools/`), were tried with two versions of the tool, of which one is that of the
captures and of [coverage.md](coverage.md) (`python -m tests.matrix.tools`): its schemes there, built, captured and judged
anew. `sites` is how many quantized matmuls were found, the other columns how many of them are fused.

| tool | version | PyTorch | schemes that could be built | sites | cpu | ascend310p | ascend910b |
|---|---|---|---|---|---|---|---|
"""


def main(arguments: list[str]) -> None:
    """The command line."""
    if arguments[:1] == ["--judge"]:
        from importlib.metadata import version

        import torch

        package = arguments[1]
        told = {"version": version(package), "torch": str(torch.__version__), "schemes": judged(package)}
        print(json.dumps(told))
        return
    from tests.matrix import page

    results = load_results()
    for package in arguments or TOOLS:
        results[package] = {version: try_version(package, version) for version in TOOLS[package]}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{package}: {', '.join(results[package])}", flush=True)
    page.PAGE.write_text(page.page(page.load_results()))


if __name__ == "__main__":
    main(sys.argv[1:])
