"""``quantpass explain-error``: what a log says, explained. Needs no PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

import click

from quantpass.doors.cli.failures import NO, BadInput
from quantpass.doors.cli.inputs import chip_name, json_option, tell
from quantpass.messages.explain import explain_error as explained_error
from quantpass.messages.explain import to_json


@click.command()
@click.argument("log", type=click.File(errors="replace"), default="-")
@click.option("--target", "-t", callback=chip_name, help="Chip or SoC name, where the text names none.")
@json_option
def explain_error(log: TextIO, target: str | None, json_path: Path | None) -> None:
    """Say what an error message of CANN, torch_npu, torchair or quantpass is about.

    LOG is a file, or - (the default) for what is piped in: one line, or a whole log with several errors.

    \b
      quantpass explain-error < log.txt
    Exit status 1 where an error is not known.
    """
    text = log.read()
    if not text.strip():
        raise BadInput("nothing to explain: the text is empty. Give a log as a file, or pipe it in")
    found = explained_error(text, target)
    tell("\n\n".join(map(str, found)), to_json(found), json_path)
    if not all(e.known for e in found):
        raise click.exceptions.Exit(NO)
