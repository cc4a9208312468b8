"""README and docs are run as they are written: the Python blocks of each page, in order, in one namespace."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
NEEDS_TORCH_NPU = ("preview.md", "preview.py")
EXAMPLES = sorted(p for p in (ROOT / "examples").glob("*.py") if p.name != "minilm.py")  # `make demo` runs that one


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path, request):
    if page.name in NEEDS_TORCH_NPU:
        request.getfixturevalue("torchair")  # skips where it is missing
    code = tmp_path / "blocks.py"
    code.write_text("\n".join(blocks(page)))
    done = subprocess.run([sys.executable, str(code)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_examples_run(example, tmp_path, request):
    if example.name in NEEDS_TORCH_NPU:
        request.getfixturevalue("torchair")
    done = subprocess.run([sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / "README.md").read_text(), flags=re.M)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), f"make {target}"


def test_files_shown_in_the_docs_are_the_files():
    for page in PAGES:
        for name, text in re.findall(r"<!-- (\S+) -->\n```python\n(.*?)^```", page.read_text(), flags=re.M | re.S):
            assert text == (ROOT / name).read_text(), f"{page.name} shows an old {name}"
