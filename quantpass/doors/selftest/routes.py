"""How a case is run: the vendor's operator (aclnn), or quantpass's through torchair (GE); here or on a device."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import getitem
from typing import Any, Protocol

import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule

from quantpass.chips import CHIPS
from quantpass.doors.selftest.cases import Case
from quantpass.doors.selftest.reference import BY_VENDOR, kernel_arguments, vendor_arguments
from quantpass.doors.selftest.tensors import Tensors
from quantpass.lowering import GE
from quantpass.lowering.aclnn import called_there, lacking, npu_operator
from quantpass.lowering.emulation import emulate_npu
from quantpass.lowering.format_casts import NpuFormats
from quantpass.lowering.fx_parcel import pack
from quantpass.lowering.ge_interpreter import interpret
from quantpass.lowering.standin_cann import StandinError
from quantpass.lowering.standin_process import Request, TorchairProcess
from quantpass.operators.arguments import NZ, bound, dtype_number
from quantpass.operators.operator import Operator


class NotHere(Exception):
    """A case that can't be run on this machine; the message says why."""


class Route(Protocol):
    """A way to run cases."""

    def run(self, case: Case, stored: Tensors) -> tuple[Any, ...]:
        """The results, on the CPU."""

    def close(self) -> None:
        """Let go of what the route holds."""


def route_named(name: str, device: str) -> Route:
    """The route ``"aclnn"`` or ``"ge"``, on ``"npu"`` or without a device (``"cpu"``)."""
    if device == "npu":
        return Aclnn("npu") if name == "aclnn" else GeOnDevice()
    return Aclnn("cpu") if name == "aclnn" else GeInterpreted()


class Aclnn:
    """``torch.ops.npu.*`` on tensors of a device; on a CPU the emulation's."""

    def __init__(self, device: str) -> None:
        self._device = device
        if device == "cpu":
            emulate_npu()
        else:
            import torch_npu  # noqa: F401  - which defines the operators

    def run(self, case: Case, stored: Tensors) -> tuple[Any, ...]:
        """Call the vendor's operator as the document says: matrices as views, dtypes as numbers."""
        there = {name: self._placed(case, name, t) for name, t in stored.items()}
        given = vendor_arguments(case.call, there)
        operator = npu_operator(case.call.op.name)
        if missing := lacking(case.call.op, given):
            raise NotHere(f"aclnn: this torch_npu's {case.call.op} has no {', '.join(missing)}")
        named = called_there(case.call.op, {k: _as_number(v) for k, v in given.items()})
        whole = vars(bound(operator._schema, (), named))
        positional = [whole.pop(a.name) for a in operator._schema.arguments if not a.kwarg_only]
        with torch.no_grad():
            return on_cpu(operator(*positional, **whole))

    def _placed(self, case: Case, name: str, t: torch.Tensor) -> torch.Tensor:
        grouped = name.startswith("antiquant") and case.call.args.get("antiquant_group_size")
        weight = case.call.tensor("weight")
        if grouped and weight is not None and weight.transposed:
            t = t.t().contiguous().t()  # scales of a transposed weight are transposed views as well
        if self._device == "cpu":
            return t
        t = t.to(self._device)
        return NpuFormats().cast(t, NZ) if is_nz(case, name) else t

    def close(self) -> None:
        """Nothing is held."""


def is_nz(case: Case, name: str) -> bool:
    """Whether a tensor of the call is in FRACTAL_NZ."""
    spec = case.call.tensor(name)
    return spec is not None and spec.format == "NZ"


def on_cpu(results: Any) -> tuple[Any, ...]:
    """What an operator returns, as a tuple of tensors that any machine has."""
    values = results if isinstance(results, tuple | list) else (results,)
    return tuple(v.cpu().contiguous() if isinstance(v, torch.Tensor) else v for v in values)


def _as_number(value: Any) -> Any:
    return dtype_number(value) if isinstance(value, torch.dtype) else value


class _Held(torch.nn.Module):
    """A model that is one of quantpass's operators, all of its operands parameters."""

    def __init__(self, case: Case, stored: Tensors) -> None:
        super().__init__()
        op, arguments = BY_VENDOR[case.call.op], kernel_arguments(case)
        assert isinstance(op, Operator) and arguments is not None
        self.operator = op.overload
        self.tensors = {ours: name for ours, name in arguments.items() if isinstance(name, str) and name in stored}
        self.others = {ours: value for ours, value in arguments.items() if ours not in self.tensors}
        if CHIPS[case.chip].saturates and any(a.name == "saturate" for a in op.overload._schema.arguments):
            self.others["saturate"] = True
        for name in self.tensors.values():
            self.register_parameter(name, torch.nn.Parameter(stored[name], requires_grad=False))

    def forward(self) -> Any:
        return self.operator(**{ours: getattr(self, name) for ours, name in self.tensors.items()}, **self.others)


def _graph(case: Case, model: _Held) -> tuple[GraphModule, list[torch.Tensor]]:
    """The model as an ATen graph, and its inputs."""
    graph, mode = Graph(), FakeTensorMode()
    nodes = {ours: graph.placeholder(name) for ours, name in model.tensors.items()}
    inputs = [getattr(model, name).detach() for name in model.tensors.values()]
    for (ours, name), tensor in zip(model.tensors.items(), inputs, strict=True):
        nodes[ours].meta["val"] = mode.from_tensor(tensor)
        if is_nz(case, name):
            nodes[ours].meta["acl_format"] = NZ
    node = graph.call_function(model.operator, (), {**nodes, **model.others})
    with mode:
        made = model.operator(**{ours: n.meta["val"] for ours, n in nodes.items()}, **model.others)
    node.meta["val"] = made
    results = [node]
    if not isinstance(made, torch.Tensor):
        results = [graph.call_function(getitem, (node, i)) for i in range(len(made))]
        for result, value in zip(results, made, strict=True):
            result.meta["val"] = value
    graph.output(tuple(results))
    return GraphModule(torch.nn.Module(), graph), inputs


@dataclass(slots=True)
class GeInterpreted:
    """torchair's own conversion, then the GE graph interpreted on the CPU: what can be known without a device."""

    _process: TorchairProcess = field(default_factory=TorchairProcess)

    def run(self, case: Case, stored: Tensors) -> tuple[Any, ...]:
        """Convert and interpret."""
        gm, inputs = _graph(case, _Held(case, stored))
        try:
            reply = self._process.convert(Request(pack(gm), CHIPS[case.chip].typical_soc))
            assert reply.graph is not None
            return interpret(reply.graph, inputs, target=case.chip)
        except (StandinError, NotImplementedError) as error:  # no wheel; what the interpreter does not know
            raise NotHere(f"GE: {error}") from error

    def close(self) -> None:
        """End the process that runs torchair."""
        self._process.close()


class GeOnDevice:
    """torchair compiles and runs the operator on the NPU."""

    def run(self, case: Case, stored: Tensors) -> tuple[Any, ...]:
        """Compile a function that calls quantpass's operator; weights are parameters, in the format of the case."""
        import torchair

        GE.prepare(CHIPS[case.chip])
        model = _Held(case, stored).to("npu")
        for name, parameter in model.named_parameters():
            if is_nz(case, name):
                parameter.data = NpuFormats().cast(parameter.data, NZ)
        torch.compiler.reset()
        backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
        with torch.no_grad():
            return on_cpu(torch.compile(model, backend=backend, dynamic=False, fullgraph=True)())

    def close(self) -> None:
        """Let go of what Dynamo compiled."""
        torch.compiler.reset()
