"""The command line: ``quantpass COMMAND``, a file for each command or group of commands.

A module of this package imports PyTorch, and what needs it, inside its functions: ``--help`` and the commands that ask
only about chips answer at once, also where PyTorch is not installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from quantpass.doors.cli import checkpoint, doctor, errors, explain, graphs, preview, rules, selftest, verify
from quantpass.doors.cli.failures import Failing
from quantpass.version import __version__

COMMANDS: tuple[click.Command, ...] = (
    explain.explain,
    verify.verify,
    graphs.fuse,
    graphs.diff,
    preview.preview,
    checkpoint.check_checkpoint,
    rules.check_op,
    errors.explain_error,
    rules.chips,
    rules.reasons,
    doctor.doctor,
    selftest.selftest,
)
"""Every command, in the order of ``--help``; a command of another file is a line here."""


@click.group(
    cls=Failing,
    commands={c.name: c for c in COMMANDS if c.name},
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done; 1 not fused, legal, equal or known; 2 bad input; 3 a fault of quantpass.",
)
@click.version_option(__version__, prog_name="quantpass")
def main() -> None:
    """Fuse dequantize -> matmul -> (quantize) into Ascend's quantized matmul operators."""
    sys.path.insert(0, str(Path.cwd()))
