"""Which doors work here? Each is used once; prints a JSON object, door to an empty string or to what went wrong.

``python -m tests.matrix.doors`` starts itself again for the doors that need torch_npu, with stand-ins for CANN;
``python -m tests.matrix.doors without`` leaves them out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import types
import warnings
from collections.abc import Callable

import torch

import quantpass as qp
from quantpass.lowering.standin_cann import child_environment
from tests.helpers import WeightOnly

X = torch.randn(4, 64).half()
CHIP = "ascend910b"


def small() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    """A model for the command line."""
    return WeightOnly(), (X,)


def _ran(compiled: Callable[..., torch.Tensor], model: torch.nn.Module) -> None:
    with torch.no_grad():
        difference = (compiled(X).double() - model(X).double()).abs().max()
    assert float(difference) < 0.1, f"results differ by {float(difference)}"


def _explain() -> None:
    qp.explain(WeightOnly(), (X,), target=CHIP).require()


def _verify() -> None:
    qp.verify(WeightOnly(), (X,), target=CHIP).require()


def _fuse() -> None:
    program = torch.export.export(WeightOnly(), (X,))
    qp.fuse(program, target=CHIP).require()
    _ran(program.module(), WeightOnly())


def _backend() -> None:
    backend = qp.backend(target=CHIP)
    _ran(torch.compile(WeightOnly(), backend=backend), WeightOnly())
    backend.report.require()


def _inductor() -> None:
    _ran(torch.compile(WeightOnly(), backend=qp.backend(target=CHIP, inner="inductor")), WeightOnly())


def _by_name() -> None:
    _ran(torch.compile(WeightOnly(), backend="quantpass", options={"target": CHIP}), WeightOnly())


def _command_line() -> None:
    command = [sys.executable, "-m", "quantpass", "explain", "tests.matrix.doors:small", "--target", CHIP]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def _preview() -> None:
    preview = qp.preview_ge(WeightOnly(), (X,), target=CHIP)
    assert preview.ops == ["WeightQuantBatchMatmulV2"], preview.ops
    assert not preview.report.notes, preview.report.notes
    preview.run()


HERE = {
    "explain": _explain,
    "verify": _verify,
    "fuse": _fuse,
    "backend": _backend,
    "backend, inner='inductor'": _inductor,
    "torch.compile(backend='quantpass')": _by_name,
    "command line": _command_line,
}


def _torchair() -> types.ModuleType:
    from quantpass.lowering.standin_device import install

    torchair: types.ModuleType = install("Ascend910B2", lambda graph, inputs: graph.fx_graph(*inputs))
    if hasattr(torch, "accelerator"):
        torch.accelerator.is_available = lambda: False  # Dynamo would ask the device for its stream
    stream = types.SimpleNamespace(stream_id=0, device_index=0, device_type=20)
    torch.npu.current_stream = lambda *_: stream
    return torchair


def _npu_backend() -> None:
    backend = qp.npu_backend(_torchair().CompilerConfig(), target=CHIP)
    _ran(torch.compile(WeightOnly(), backend=backend, dynamic=False), WeightOnly())
    backend.report.require()


def _register() -> None:
    torchair = _torchair()
    config = torchair.CompilerConfig()
    registration = qp.register(config, target=CHIP)
    _ran(torch.compile(WeightOnly(), backend=torchair.get_npu_backend(compiler_config=config)), WeightOnly())
    registration.report.require()


def _npugraph_ex() -> None:
    _torchair()
    options = qp.npugraph_ex_options(CHIP)
    try:
        with torch.no_grad():
            torch.compile(WeightOnly(), backend="npugraph_ex", options=options)(X)
    except Exception:  # there is no device to capture the graph with
        if not options.report.total:
            raise
    options.report.require()


WITH_TORCH_NPU = {"preview_ge": _preview}
WITH_TORCHAIR = {"npu_backend": _npu_backend, "register": _register, "npugraph_ex_options": _npugraph_ex}


def _tried(doors: dict[str, Callable[[], None]]) -> dict[str, str]:
    found = {}
    for name, use in doors.items():
        torch._dynamo.reset()
        try:
            use()
            found[name] = ""
        except BaseException as error:
            found[name] = (f"{type(error).__name__}: {error}".splitlines() or ["?"])[0][:200]
    return found


def main() -> None:
    """Try the doors that need nothing, then the others in a process of their own."""
    warnings.simplefilter("ignore")
    if sys.argv[1:] == ["torchair"]:
        print(json.dumps(_tried(WITH_TORCHAIR)), flush=True)
        return
    found = _tried(HERE)
    if sys.argv[1:] == ["without"]:
        print(json.dumps(found))
        return
    found |= _tried(WITH_TORCH_NPU)
    command = [sys.executable, "-m", "tests.matrix.doors", "torchair"]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    try:
        found |= json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = done.stderr.splitlines()
        said = next((line for line in lines if "what():" in line), next(iter(lines[-1:]), ""))
        found |= dict.fromkeys(WITH_TORCHAIR, f"the process ended: {said.strip()[:200]}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
