"""``quantpass selftest``: the first hour on a device."""

from __future__ import annotations

from pathlib import Path

import click

from quantpass.doors.cli.failures import NO, explained
from quantpass.doors.cli.inputs import chip_names, in_colour, json_option, tell

_FILE = Path("quantpass-selftest.json")


@click.command()
@click.option(
    "--target",
    "-t",
    multiple=True,
    callback=chip_names,
    help="Chip or SoC name; repeatable. Default: this machine's NPU.",
)
@click.option("--only", multiple=True, metavar="PATTERN", help="Cases by id, call or rule alone; repeatable.")
@click.option("--list", "listed", is_flag=True, help="Show the cases, and run none.")
@click.option(
    "--isolate/--no-isolate", default=None, help="A process for each operator. Default: where there is an NPU."
)
@json_option
def selftest(
    target: tuple[str, ...], only: tuple[str, ...], listed: bool, isolate: bool | None, json_path: Path | None
) -> None:
    """Try every operator, dtype, format and rule that quantpass claims.

    On an NPU: through aclnn and through GE, against the reference kernels, with times; the findings go to
    quantpass-selftest.json, the file to send back, unless --json names another. Elsewhere the emulation is tried.
    Exit status 1 where a case is not right.
    """
    from quantpass.doors.selftest import planned
    from quantpass.doors.selftest import selftest as tested

    with explained():
        if listed:
            for case in planned(list(target) or None, only)[1]:
                click.echo(f"{case.id}  {case.words}{f'  [{case.rule}]' if case.rule else ''}")
            return
        found = tested(list(target) or None, only=only, isolate=isolate)
    path = _FILE if json_path is None and found.device else json_path
    tell(found.text(color=in_colour()), found.to_json(), path)
    if path is not None and str(path) != "-":
        click.echo(f"\nwritten: {path}{', the file to send back' if found.device else ''}")
    if not found.passed:
        raise click.exceptions.Exit(NO)
