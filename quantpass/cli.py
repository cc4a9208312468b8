"""The command line: ``quantpass explain MODULE:FACTORY``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import click

from quantpass import doors
from quantpass.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="quantpass")
def main() -> None:
    """Fuse dequantize -> matmul -> (quantize) into Ascend's quantized matmul operators."""
    sys.path.insert(0, str(Path.cwd()))


@main.command()
@click.argument("factory", metavar="MODULE:FACTORY")
@click.option("--target", "-t", multiple=True, help="Chip or SoC name; repeat for several. Default: all three.")
@click.option("--mode", type=click.Choice(["graph", "eager"]), default="graph", help="Whose rules: GE graphs or aclnn.")
@click.option("--dynamic", is_flag=True, help="Capture with dynamic shapes.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the report as JSON.")
@click.option("--html", "html_path", type=click.Path(path_type=Path), help="Also write the report as an HTML page.")
@click.option("--require-all", is_flag=True, help="Exit with status 1 unless every quantized matmul is fused.")
def explain(
    factory: str,
    target: tuple[str, ...],
    mode: str,
    dynamic: bool,
    json_path: Path | None,
    html_path: Path | None,
    require_all: bool,
) -> None:
    """Say for every quantized matmul of a model whether it can be fused, and if not, why.

    FACTORY is a function without arguments in MODULE that returns (model, args).
    """
    model, args = load_factory(factory)
    try:
        report = doors.explain(model, args, target=list(target) or None, mode=mode, dynamic=dynamic or None)
    except (TypeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(str(report))
    if json_path is not None:
        report.to_json(json_path)
    if html_path is not None:
        report.to_html(html_path)
    if require_all and (report.fused < report.total or not report.total):
        raise click.exceptions.Exit(1)


def load_factory(text: str) -> tuple[Any, tuple[Any, ...]]:
    """Import ``MODULE:FACTORY`` and call it; it must return ``(model, args)``."""
    module_name, colon, function_name = text.partition(":")
    if not colon or not module_name or not function_name:
        raise click.BadParameter(f"{text!r} is not of the form MODULE:FACTORY, e.g. mymodels.llama:small")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise click.BadParameter(f"can't import {module_name!r} from here: {error}") from error
    factory = getattr(module, function_name, None)
    if not callable(factory):
        raise click.BadParameter(f"{module_name!r} has no function {function_name!r}")
    made = factory()
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[1], tuple | list):
        raise click.BadParameter(f"{text} returned {type(made).__name__}; it must return (model, args), args a tuple")
    return made[0], tuple(made[1])
