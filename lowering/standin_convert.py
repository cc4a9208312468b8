"""The child process of a preview: takes FX graphs as plain data, converts them with torchair, returns GE graphs.

Started as ``python -m quantpass.lowering.standin_convert FD`` with the environment of
:func:`quantpass.lowering.standin_cann.child_environment`; requests and replies go through the connection ``FD``.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch

from quantpass.chips import chip_of_device
from quantpass.lowering.fx_parcel import TensorValue, unpack
from quantpass.lowering.ge_graph import GeGraph, from_proto
from quantpass.lowering.standin_process import Reply, Request
from quantpass.operators.arguments import ND
from quantpass.operators.ge import LackingGeOperatorError

_NEEDED = ("torch.ao.quantization.fx._decomposed",)
"""Modules that define operators a graph may hold."""


def convert(request: Request, torchair: Any) -> Reply:
    """Convert one graph; torchair is loaded, without a device."""
    from google.protobuf.text_format import MessageToString
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode

    from quantpass.lowering.torchair_graphs import hand_over

    mode, device = FakeTensorMode(), torch.device("npu:0")

    def make_fake(v: TensorValue) -> Any:
        with mode:
            return torch.empty_strided(v.shape, v.stride, dtype=v.dtype, device=device)

    gm = unpack(request.parcel, make_fake, device)
    config = torchair.CompilerConfig()
    for path, value in request.config:
        *parents, last = path.split(".")
        owner = config
        for name in parents:
            owner = getattr(owner, name)
        setattr(owner, last, value)
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    inputs = [n.meta.get("val") for n in placeholders]
    with tracing(TracingContext(mode)), torch.no_grad():
        concrete = hand_over(torchair.get_compiler(config), config, len(inputs))(gm, inputs).runner  # type: ignore[attr-defined]
    positions = tuple(info.func.fx_input_idx for info in concrete._input_info_list)
    formats = {i: n.meta["acl_format"] for i, n in enumerate(placeholders) if "acl_format" in n.meta}
    shapes = {i: n.meta["val"].shape for i, n in enumerate(placeholders) if i in formats}
    _set_formats(concrete.graph, positions, formats, shapes)
    names = {number: name for name, number in _dtype_enum().items()}
    graph = GeGraph(from_proto(concrete.graph._proto, names), positions, _results(concrete))
    return Reply(graph, MessageToString(concrete.graph._proto))  # which sorts attributes; str() does not


def _set_formats(graph: Any, positions: tuple[int, ...], formats: dict[int, int], shapes: dict[int, Any]) -> None:
    """What torchair does to a ``Data`` operator when it sees its tensor: note the format that it has in memory."""
    for op in graph.op:
        if op.type not in ("Data", "RefData"):
            continue
        position = positions[op.attr["index"].i]
        desc = op.output_desc[0]
        desc.attr["format_for_int"].i = op.input_desc[0].attr["format_for_int"].i = formats.get(position, ND)
        if position not in formats:
            continue
        op.attr["_enable_storage_format_spread"].b = False
        desc.attr["origin_format_for_int"].i = ND
        desc.shape.dim[:] = []
        desc.attr["origin_shape"].list.val_type = 2
        desc.attr["origin_shape"].list.i.extend(shapes[position])
        desc.attr["origin_shape_initialized"].b = True
        desc.attr["origin_format_is_set"].b = True
        op.input_desc[0].CopyFrom(desc)
        op.input_desc[0].name = "x"


def _results(concrete: Any) -> tuple[Any, ...]:
    results: list[Any] = []
    for i, value in enumerate(concrete._fx_outputs):
        if i in concrete._fx_outputs_mapping:
            results.append(concrete._fx_outputs_mapping[i])
        elif type(value).__name__ == "ViewOfInput":
            view = (tuple(value._ori_meta_shape), tuple(value._ori_meta_stride), value._ori_meta_offset)
            results.append(("view", value._fx_input_index, view))
        else:
            results.append(("value", value if isinstance(value, int | float | bool | None) else None))
    return tuple(results)


def _dtype_enum() -> dict[str, int]:
    from torchair._ge_concrete_graph.ge_ir_pb2 import DataType

    return dict(DataType.items())


def serve(connection: Connection) -> None:
    """Answer requests until ``None`` comes."""
    import torch_npu  # noqa: F401

    from quantpass.lowering import GE
    from quantpass.lowering.standin_device import install

    for module in _NEEDED:
        importlib.import_module(module)
    torchair = install()
    while (request := connection.recv()) is not None:
        try:
            install(request.soc_name)
            GE.prepare(chip_of_device(request.soc_name))
            reply = convert(request, torchair)
        except LackingGeOperatorError as error:
            reply = Reply(error=str(error))
        except Exception as error:
            reply = Reply(error=f"{type(error).__name__}: {error}", details=traceback.format_exc())
        connection.send(reply)


def main() -> None:
    """Serve, then leave without torch_npu's clean-up: there is no device to close."""
    connection = Connection(int(sys.argv[1]))
    try:
        serve(connection)
    except EOFError:
        pass
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
