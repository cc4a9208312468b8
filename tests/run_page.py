"""Runs the code blocks of a page of the documentation in order, and compares what they print with what the page shows.

    python -m tests.run_page docs/quick_start.md

What a block is, its fence says; CONTRIBUTING.md ("Documentation") lists the kinds. Exit status 1 where a block fails or prints
something else.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

RUN = ("python", "console")
CHECKED = ("py", "sh", "json", "toml", "yaml")
SHOWN = ("text", "mermaid")
OUTPUT = "output"

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*) ?(?P<info>.*)\n(?P<text>(?:.*\n)*?)(?P=indent)```$", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block: ``info`` is what stands behind the language, ``line`` where it begins."""

    language: str
    info: str
    text: str
    line: int


def blocks(page):
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    return [
        Block(m["language"], m["info"], textwrap.dedent(m["text"]), text.count("\n", 0, m.start()) + 1)
        for m in _FENCE.finditer(text)
    ]


def agrees(printed, shown):
    """Whether a text is the one that is shown; a line of ``...`` stands for any lines."""
    parts = re.split(r"^ *\.\.\.\n", "\n".join(line.rstrip() for line in shown.rstrip().split("\n")) + "\n", flags=re.M)
    pattern = r"(?:.*\n)*?".join(map(re.escape, parts))
    lines = "\n".join(line.rstrip() for line in printed.rstrip().split("\n")) + "\n"
    return re.fullmatch(pattern, lines) is not None


def run_python(page, block, names):
    """What a block prints."""
    path = Path(f"{page.stem}_line_{block.line}.py")
    path.write_text(block.text)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.text, str(path.resolve()), "exec"), names)
    return printed.getvalue()


def run_console(block):
    """Each ``$`` line of a block with what it has to print, and what it prints."""
    shell = 'quantpass() { "$PYTHON" -m quantpass "$@"; }; set -o pipefail; '
    environment = {**os.environ, "PYTHON": sys.executable}
    for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block.text, flags=re.M):
        done = subprocess.run(["bash", "-c", shell + command], capture_output=True, text=True, env=environment)
        yield command, shown, done.stdout + (done.stderr if done.returncode not in (0, 1) else "")


def main(page):
    """Run all blocks of a page in the current folder; the number of those that print something else."""
    wrong, printed, names = 0, "", {"__name__": "__main__"}
    for block in blocks(page):
        pairs = []
        if block.language == "python" and not block.info:
            printed = run_python(page, block, names)
        elif block.info == OUTPUT:
            pairs = [("what the block before prints", block.text, printed)]
        elif block.language == "console":
            pairs = list(run_console(block))
        for what, shown, said in pairs:
            if not agrees(said, shown):
                wrong += 1
                print(f"{page.name}, line {block.line}: {what}\n--- shown\n{shown}--- printed\n{said}", file=sys.stderr)
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(Path(sys.argv[1]).resolve()), 1))
