"""The recipes of CONTRIBUTING.md, carried out in a scratch copy of the checkout as they stand there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"^```(\w+)(?: (.*))?\n(.*?)^```$", re.M | re.S)


def recipes():
    """``{title: [(language, what the block is, its text)]}``."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    sections = re.split(r"^### (.*)$", text[text.index("## Recipes") :], flags=re.M)[1:]
    found = {title: _BLOCK.findall(body) for title, body in zip(sections[::2], sections[1::2], strict=True)}
    return {title: blocks for title, blocks in found.items() if blocks}


@pytest.fixture
def copy(tmp_path):
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in names.stdout.split("\n"):
        if name and (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path


def edited(path, how, place, text):
    before = path.read_text()
    assert before.count(place) == 1, f"{place!r} stands {before.count(place)} times in {path.name}"
    if how == "after":
        end = before.index("\n", before.index(place)) + 1
        path.write_text(before[:end] + text + before[end:])
    else:
        path.write_text(before.replace(place, text.rstrip("\n")))


def ran(command, copy):
    environment = {**os.environ, "PYTHONPATH": str(copy), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("title", recipes())
def test_recipe(title, copy):
    for language, what, text in recipes()[title]:
        given = dict(pair.partition("=")[::2] for pair in shlex.split(what))
        if "file" in given:
            assert not (copy / given["file"]).exists()
            (copy / given["file"]).write_text(text)
        elif "in" in given:
            how = "after" if "after" in given else "replace"
            edited(copy / given["in"], how, given[how], text)
        elif "run" in given:
            ran([sys.executable, "-c", text], copy)
        else:
            assert language == "sh", what
            for line in text.splitlines():
                ran(
                    [
                        "bash",
                        "-o",
                        "pipefail",
                        "-c",
                        line.replace("pytest ", "python -m pytest -q -p no:cacheprovider "),
                    ],
                    copy,
                )


def test_there_is_a_recipe_for_each_kind_of_change():
    assert {"Add a tool", "Add a chip", "Add a rule", "Add an operator", "Add a lowering"} <= set(recipes())
