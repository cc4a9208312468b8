"""What commands are given: models, calls of operators, paths to write."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from quantpass.basics.tensor_spec import TensorSpec
from quantpass.basics.torch_types import dtype_name
from quantpass.chips import chip_named
from quantpass.doors.cli.failures import BadInput, explained, models_own, users_frames

PATH = click.Path(path_type=Path)

MODEL_HELP = (
    "FACTORY is MODULE:FUNCTION, a function without arguments in an importable MODULE that returns (model, args), or a "
    "file that torch.export.save wrote (.pt2)."
)
factory_argument = click.argument("factory", metavar="FACTORY")
mode_option = click.option(
    "--mode", type=click.Choice(["graph", "eager"]), default="graph", help="Whose rules: GE graphs or aclnn."
)
allow_option = click.option(
    "--allow", multiple=True, metavar="RULE", help="A permission, or a contradicted rule to lift; repeatable."
)
_numerics_option = click.option(
    "--numerics",
    type=click.Choice(["strict", "vendor"]),
    default="strict",
    show_default=True,
    help="Keep the graph's own codes, or let the operators quantize as the doors to an NPU do.",
)

_leave_option = click.option(
    "--leave", multiple=True, metavar="SITE", help="A site to leave as it is, by name, * for anything; repeatable."
)

Command = TypeVar("Command", bound=Callable[..., Any])


def pass_options(command: Command) -> Command:
    """The options of the pass: what the doors take as ``mode``, ``allow``, ``leave`` and ``numerics``."""
    return mode_option(allow_option(_leave_option(_numerics_option(command))))


def chip_name(context: click.Context, parameter: click.Parameter, target: str | None) -> str | None:
    """``target``, looked at before the work starts."""
    del context, parameter
    if target is not None:
        with explained():
            chip_named(target)
    return target


def chip_names(context: click.Context, parameter: click.Parameter, targets: tuple[str, ...]) -> tuple[str, ...]:
    """``targets``, looked at before the work starts."""
    for target in targets:
        chip_name(context, parameter, target)
    return targets


one_target_option = click.option(
    "--target", "-t", required=True, callback=chip_name, help="Chip or SoC name, e.g. ascend310p."
)


def writable(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """``path``, looked at before the work starts: its folder has to be there and to let files be made in it."""
    del context
    if path is None or str(path) == "-":
        return path
    name = parameter.opts[0]
    if not path.parent.is_dir():
        raise click.BadParameter(f"{path}: there is no folder {path.parent}", param_hint=name)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise click.BadParameter(f"{path} can't be written", param_hint=name)
    return path


json_option = click.option(
    "--json", "json_path", type=PATH, callback=writable, help="Also write it as JSON; - prints JSON instead."
)


def in_colour() -> bool:
    """True where a terminal reads what is printed, and nobody has asked for no colour."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def tell(text: str, as_json: str, json_path: Path | None) -> None:
    """Print ``text`` and write ``as_json`` to ``json_path``; where that is ``-``, print the JSON instead."""
    if json_path is not None and str(json_path) == "-":
        click.echo(as_json)
        return
    click.echo(text)
    if json_path is not None:
        json_path.write_text(as_json + "\n", encoding="utf-8")


def as_json(data: dict[str, Any]) -> str:
    """What a command answers, as JSON."""
    return json.dumps({"schema": 1, **data}, indent=2)


def load_model(text: str) -> tuple[Any, tuple[Any, ...]]:
    """The model and the inputs that FACTORY stands for: an exported program's are those that it was saved with."""
    if text.endswith(".pt2"):
        program = load_program(text)
        args, kwargs = program.example_inputs or ((), {})
        if kwargs:
            raise click.BadParameter(
                f"{text} was exported with keyword inputs ({', '.join(kwargs)}); export it with positional ones"
            )
        return program, tuple(args)
    return load_factory(text)


def load_program(text: str) -> Any:
    """What ``torch.export.save`` wrote to the file ``text``."""
    import torch

    path = Path(text)
    if not path.is_file():
        raise click.BadParameter(f"there is no file {text}")
    if not zipfile.is_zipfile(path):  # PyTorch would log a traceback of its own first
        raise click.BadParameter(f"{text} is no program that torch.export.save wrote: it is no zip archive")
    try:
        return torch.export.load(path)
    except Exception as error:
        raise click.BadParameter(f"{text} is no program that torch.export.save wrote: {error}") from error


def load_factory(text: str) -> tuple[Any, tuple[Any, ...]]:
    """Import ``MODULE:FUNCTION`` and call it; it must return ``(model, args)``."""
    module_name, colon, function_name = text.partition(":")
    if not colon or not module_name or not function_name:
        raise click.BadParameter(
            f"{text!r} is not of the form MODULE:FACTORY, e.g. mymodels.llama:small, and no .pt2 file"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise click.BadParameter(f"can't import {module_name!r} from here: {error}") from error
    except Exception as error:
        raise BadInput(f"importing {module_name} raised\n{users_frames(error)}") from error
    factory = getattr(module, function_name, None)
    if not callable(factory):
        raise click.BadParameter(f"{module_name!r} has no function {function_name!r}")
    with models_own(f"{text}()"):
        made = factory()
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[1], tuple | list):
        raise click.BadParameter(f"{text} returned {_shape(made)}; it must return (model, args), args a tuple")
    return made[0], tuple(made[1])


def _shape(made: Any) -> str:
    if not isinstance(made, tuple):
        return type(made).__name__
    return f"({', '.join(type(m).__name__ for m in made)})"


_TENSOR = re.compile(r"(?P<dtype>\w+)\[(?P<sizes>[\d,\s]*)\](?P<marks>(:NZ|:ND|:T)*)$")


def parse_argument(text: str) -> tuple[str, Any]:
    """``x2=int8[512,128]:NZ:T`` as a name and a TensorSpec; others as dtype, number, numbers, truth value, text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"{text!r} is not NAME=VALUE, e.g. x1=int8[16,512] or output_dtype=float16")
    match = _TENSOR.match(value)
    if match:
        dtype = dtype_name(match["dtype"])
        if dtype is None:
            raise ValueError(f"{name}: {match['dtype']!r} is no dtype; use names such as int8, float16, int64")
        sizes = tuple(int(s) for s in match["sizes"].split(",") if s.strip())
        marks = match["marks"].split(":")
        return name, TensorSpec(dtype, sizes, "NZ" if "NZ" in marks else "ND", "T" in marks)
    words = {"None": None, "True": True, "False": False}
    if value in words:
        return name, words[value]
    if re.fullmatch(r"\[-?\d+(,\s*-?\d+)*\]", value):
        return name, [int(v) for v in value.strip("[]").split(",")]
    return name, int(value) if re.fullmatch(r"-?\d+", value) else dtype_name(value) or value
