"""``quantpass fuse`` and ``diff``: exported programs, rewritten and compared."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantpass.doors.cli.failures import BadInput, explained, models_own
from quantpass.doors.cli.inputs import (
    MODEL_HELP,
    PATH,
    as_json,
    chip_name,
    factory_argument,
    in_colour,
    json_option,
    load_model,
    load_program,
    one_target_option,
    pass_options,
    tell,
    writable,
)

if TYPE_CHECKING:
    from quantpass.planning.options import Mode, NumericsContract


@click.command(epilog=MODEL_HELP)
@factory_argument
@one_target_option
@pass_options
@json_option
@click.option("--output", "-o", type=PATH, callback=writable, required=True, help="The fused program (.pt2).")
def fuse(
    factory: str,
    target: str,
    mode: Mode,
    allow: tuple[str, ...],
    leave: tuple[str, ...],
    numerics: NumericsContract,
    json_path: Path | None,
    output: Path,
) -> None:
    """Export a model, fuse it for a chip and save the program.

    What loads it must import quantpass, and holds the weights of the program alone.
    """
    import torch

    from quantpass.doors.explain import fuse as fused

    program = _program(factory)
    with explained():
        report = fused(program, target=target, mode=mode, allow=allow, leave=leave, numerics=numerics)
    torch.export.save(program, output)
    tell(f"{report.text(color=in_colour())}\nwritten: {output}", report.to_json(), json_path)


@click.command(epilog=MODEL_HELP)
@click.argument("before", metavar="FACTORY")
@click.argument("after", metavar="[OTHER.pt2]", required=False)
@click.option("--target", "-t", callback=chip_name, help="What fusing for this chip changes, in place of OTHER.")
@pass_options
@click.option("--context", type=click.IntRange(0), default=2, show_default=True, help="Unchanged lines shown.")
@click.option("--site", help="What fusing changes at one site alone.")
@json_option
def diff(
    before: str,
    after: str | None,
    target: str | None,
    mode: Mode,
    allow: tuple[str, ...],
    leave: tuple[str, ...],
    numerics: NumericsContract,
    context: int,
    site: str | None,
    json_path: Path | None,
) -> None:
    """Show what changed between two programs, or what fusing changes."""
    from quantpass.doors.explain import diff as difference
    from quantpass.doors.explain import fuse as fused

    if site is not None and target is None:
        raise click.UsageError("--site goes with --target")
    if (after is None) == (target is None):
        raise click.UsageError("give either another program to compare with, or --target")
    program = _program(before)
    report = None
    if after is not None:
        other = load_program(after)
    else:
        other = copy.deepcopy(program)
        with explained():
            report = fused(other, target=target, mode=mode, allow=allow, leave=leave, numerics=numerics)
    if report is not None and site is not None:
        with explained():
            text = report.diff(site)
    else:
        text = difference(program, other, context)
    data = {"equal": not text, "diff": text.splitlines(), "report": None if report is None else report.as_dict()}
    tell(_coloured(text) if in_colour() else text or "no difference", as_json(data), json_path)


def _coloured(text: str) -> str:
    colours = {"+": "green", "-": "red", "@": "cyan"}
    return "\n".join(click.style(line, fg=colours.get(line[:1])) for line in text.splitlines()) or "no difference"


def _program(factory: str) -> Any:
    """The program that FACTORY is or, exported, gives."""
    import torch

    model, args = load_model(factory)
    if isinstance(model, torch.export.ExportedProgram):
        return model
    if not isinstance(model, torch.nn.Module):
        raise BadInput(f"{factory} gives a {type(model).__name__}; torch.export takes a module")
    with torch.no_grad(), models_own("torch.export.export"):
        return torch.export.export(model, args)
