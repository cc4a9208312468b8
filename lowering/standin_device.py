"""In a child process with stand-in CANN libraries: import torch_npu and torchair, and replace the device.

The environment comes from :func:`quantpass.lowering.standin_cann.child_environment`. After :func:`install`, schemas,
fake kernels and converters are the real ones; there is no device, ``torch_npu.npu.get_device_name()`` is the chosen
chip, and a compiled GE graph keeps its ``GraphDef`` instead of running.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from quantpass.chips import chip_named
from quantpass.chips.ascend910b import ASCEND910B
from quantpass.lowering.torchair_versions import load_torchair

GraphListener = Callable[[Any, tuple[Any, ...]], Any]


def install(soc_name: str = ASCEND910B.typical_soc, on_graph: GraphListener | None = None) -> Any:
    """Import torch_npu and torchair without a device.

    Args:
        soc_name: the chip to pretend to be, e.g. ``"Ascend310P3"``.
        on_graph: called with torchair's ``GeConcreteGraph`` (its ``graph`` is the GE ``GraphDef``) and the inputs when
            a compiled graph is called; its result is the call's. Without it the result is an empty tuple.

    Returns:
        The torchair module.

    Raises:
        RuntimeError: torch_npu does not load; the message says how the process has to be started.
    """
    try:
        import torch_npu

        torchair = load_torchair()
    except (ImportError, OSError) as error:
        raise RuntimeError(
            f"torch_npu does not load in this process ({error}). Start it with the environment of "
            "quantpass.lowering.standin_cann.child_environment()."
        ) from error
    from torchair._ge_concrete_graph import compat_ir, fx2ge_converter
    from torchair.core import _backend

    torch_npu.npu.get_device_name = lambda *_, **__: soc_name
    torch_npu.npu.current_device = lambda: 0
    torch_npu.npu.device_count = lambda: 1
    _backend._get_device_id = lambda: 0
    nothing = lambda *_, **__: None  # noqa: E731
    torch_npu.npu.is_available = lambda: False  # or Dynamo asks for the current stream, which starts the device
    fx2ge_converter.initialize_graph_engine = nothing
    _backend.initialize_graph_engine = nothing
    # An empty string says that the installed CANN knows every operator and attribute.
    compatible = lambda *_, **__: ""  # noqa: E731
    original = compat_ir.is_cann_compat
    for module in list(sys.modules.values()):
        if getattr(module, "is_cann_compat", None) is original:
            module.is_cann_compat = compatible  # type: ignore[attr-defined]
    _stop_finalizers(_backend)

    def keep(self: Any, *inputs: Any) -> Any:
        return on_graph(self, inputs) if on_graph is not None else ()

    fx2ge_converter.GeConcreteGraph.__call__ = keep
    return torchair


def install_for(target: str) -> Any:
    """:func:`install` for a chip or SoC name of the kind that ``target`` options take."""
    return install(chip_named(target).soc_name(target))


def _stop_finalizers(backend: Any) -> None:
    """Nothing was started, so nothing is to be stopped when the process ends."""
    import atexit

    atexit.unregister(backend.finalize_graph_engine)
