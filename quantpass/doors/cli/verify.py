"""``quantpass verify``: every fused site beside the graph's own arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from quantpass.doors.cli.failures import NO, explained, running
from quantpass.doors.cli.inputs import (
    MODEL_HELP,
    factory_argument,
    load_model,
    one_target_option,
    pass_options,
)

if TYPE_CHECKING:
    from quantpass.planning.options import Mode, NumericsContract


@click.command(epilog=MODEL_HELP)
@factory_argument
@one_target_option
@pass_options
@click.option(
    "--within", type=click.FloatRange(0), default=0.02, show_default=True, help="The largest relative difference."
)
def verify(
    factory: str, target: str, mode: Mode, allow: tuple[str, ...], numerics: NumericsContract, within: float
) -> None:
    """Compare each fused site with the graph's own arithmetic.

    Exit status 1 where one is off, or none was compared.
    """
    from quantpass.doors.verification import verify as verified

    model, args = load_model(factory)
    with explained(), running(model, args):
        found = verified(model, args, target=target, mode=mode, allow=allow, numerics=numerics)
    click.echo(str(found))
    try:
        found.require(within)
    except AssertionError as error:
        click.echo(f"\n{str(error).splitlines()[0]}", err=True)
        raise click.exceptions.Exit(NO) from error
