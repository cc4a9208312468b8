"""``python -m quantpass``: the command line."""

from quantpass.doors.cli import main

main(prog_name="python -m quantpass")
