"""``quantpass verify``: every fused site beside the graph's own arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantpass.doors.cli.failures import NO, explained, running
from quantpass.doors.cli.inputs import (
    MODEL_HELP,
    factory_argument,
    in_colour,
    json_option,
    load_model,
    one_target_option,
    pass_options,
    tell,
)

if TYPE_CHECKING:
    from quantpass.planning.options import Mode, NumericsContract


@click.command(epilog=MODEL_HELP)
@factory_argument
@one_target_option
@pass_options
@json_option
@click.option("--reference", metavar="FACTORY", help="The float model that this one was quantized from.")
@click.option("--bisect", is_flag=True, help="Where the results differ by more, find the site that makes them.")
@click.option("--histogram", is_flag=True, help="Also how many elements differ by how much.")
@click.option(
    "--within", type=click.FloatRange(0), default=0.02, show_default=True, help="The largest relative difference."
)
def verify(
    factory: str,
    target: str,
    mode: Mode,
    allow: tuple[str, ...],
    leave: tuple[str, ...],
    numerics: NumericsContract,
    json_path: Path | None,
    reference: str | None,
    bisect: bool,
    histogram: bool,
    within: float,
) -> None:
    """Compare each fused site with the graph's own arithmetic.

    Exit status 1 where one is off, or none was compared.
    """
    from quantpass.doors.verification import verify as verified

    model, args = load_model(factory)
    plain = load_model(reference)[0] if reference is not None else None
    with explained(), running(model, args):
        found = verified(
            model,
            args,
            target=target,
            mode=mode,
            allow=allow,
            leave=leave,
            numerics=numerics,
            reference=plain,
            bisect=bisect,
            within=within,
        )
    tell(found.text(color=in_colour(), histogram=histogram), found.to_json(), json_path)
    try:
        found.require(within)
    except AssertionError as error:
        click.echo(f"\n{str(error).splitlines()[0]}", err=True)
        raise click.exceptions.Exit(NO) from error
