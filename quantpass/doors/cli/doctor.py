"""``quantpass doctor``: what is installed here and what works with it."""

from __future__ import annotations

from pathlib import Path

import click

from quantpass.doors.cli.inputs import json_option, tell
from quantpass.doors.doctor import examine


@click.command()
@json_option
def doctor(json_path: Path | None) -> None:
    """Say what is installed here, and which doors work with it."""
    found = examine()
    tell(str(found), found.to_json(), json_path)
