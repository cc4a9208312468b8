"""Exported programs: their tensors, and how new constants are added to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule, Node

from quantpass.graph.constants import Constants, refuse_to_load
from quantpass.graph.torch_internals import StaticInputs
from quantpass.graph.torch_versions import updated_inputs

_STATIC = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def program_values(program: ExportedProgram) -> dict[Node, torch.Tensor]:
    """The lifted parameters, buffers and constants of a program that hold data."""
    return program_inputs(program).known


def program_inputs(program: ExportedProgram) -> StaticInputs:
    """The lifted parameters, buffers and constants of a program."""
    # A program that updates a buffer returns its next value: the buffer holds for one call only.
    updated = updated_inputs(program.graph_signature)
    specs = {
        s.arg.name: s for s in program.graph_signature.input_specs if s.kind in _STATIC and s.target not in updated
    }
    found = StaticInputs({}, {})
    for node in program.graph.find_nodes(op="placeholder"):
        spec = specs.get(node.name)
        target = spec.target if spec else None
        value = program.state_dict.get(target) if target else None
        if value is None and target:
            value = program.constants.get(target)
        if isinstance(value, torch.Tensor):
            found.add(node, value)
    return found


def flat_inputs(program: ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What the program's graph is called with: its parameters, buffers and constants, then the flattened inputs.

    Raises:
        ValueError, TypeError: the inputs do not have the structure that the program was exported with.
    """
    return list(program._graph_module_flat_inputs(tuple(args), dict(kwargs)))


class ProgramConstants(Constants):
    """New tensors become lifted inputs of a program, which is the form its verifier wants."""

    def __init__(self, program: ExportedProgram, given: Mapping[Node, torch.Tensor]) -> None:
        super().__init__(given)
        self._program = program
        # Programs that were made of each other share these.
        program._state_dict, program._constants = dict(program.state_dict), dict(program.constants)

    def _add(self, name: str, tensor: torch.Tensor) -> Node:
        """A new lifted constant, placed before the user's inputs."""
        program, graph = self._program, self._program.graph
        specs = program.graph_signature.input_specs
        position = next((i for i, s in enumerate(specs) if s.kind not in _STATIC), len(specs))
        placeholders = list(graph.find_nodes(op="placeholder"))
        before = (
            placeholders[position]
            if position < len(placeholders)
            else next(n for n in graph.nodes if n.op != "placeholder")
        )
        with graph.inserting_before(before):
            node: Node = graph.placeholder(name)
        node.target = node.name  # unique, as the parameter of a function must be
        specs.insert(position, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), node.name))
        program.constants[node.name] = tensor
        return node

    def _store(self, node: Node, tensor: torch.Tensor) -> None:
        self._program.constants[node.name] = tensor

    def _drop(self, node: Node) -> None:
        program = self._program
        specs = program.graph_signature.input_specs
        # By position: a replacement renames what the signature says of a node.
        spec = specs.pop(list(program.graph.find_nodes(op="placeholder")).index(node))
        program.graph.erase_node(node)
        if not any(s.target == spec.target for s in specs):
            program.state_dict.pop(spec.target, None)
            program.constants.pop(spec.target, None)

    def update_signature(self) -> None:
        """Make the signature name the nodes that the graph now returns."""
        (output,) = self._program.graph.find_nodes(op="output")
        for spec, node in zip(self._program.graph_signature.output_specs, output.args[0], strict=True):
            if isinstance(spec.arg, TensorArgument) and isinstance(node, Node):
                spec.arg.name = node.name


def targets_of(program: ExportedProgram, nodes: Iterable[Node]) -> list[str]:
    """The names that the tensors behind some placeholders have in a state dict."""
    targets = {s.arg.name: s.target for s in program.graph_signature.input_specs}
    return [target for n in nodes if (target := targets.get(n.name))]


@dataclass
class _Module:
    """``program.module`` of a fused program: a module that other weights can't be loaded into."""

    program: ExportedProgram
    names: list[str]

    def __call__(self, *args: Any, **kwargs: Any) -> GraphModule:  # 2.9 brought an argument
        gm: GraphModule = ExportedProgram.module(self.program, *args, **kwargs)
        refuse_to_load(gm, self.names)
        return gm


def refuse_to_load_into(program: ExportedProgram, names: list[str]) -> None:
    """Make ``load_state_dict`` of every module that the program makes refuse ``names``."""
    before = program.module.names if isinstance(program.module, _Module) else []
    program.module = _Module(program, [*before, *names])  # type: ignore[method-assign]
