"""README and docs: every block does what its fence says, every link leads somewhere, every message is one that exists."""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest
import torch
import yaml

import quantpass as qp
from quantpass.doors.cli import main
from quantpass.doors.settings import TAKEN_BY
from tests.run_page import CHECKED, OUTPUT, RUN, SHOWN, agrees, blocks

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
NEEDS_TORCH_NPU = ("preview.md", "preview.py")
EXAMPLES = sorted(p for p in (ROOT / "examples").glob("*.py") if p.name != "minilm.py")  # `make demo` runs that one
PUBLIC = ("quantpass", "quantpass.nn", "quantpass.patterns", "quantpass.testing")


def named(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda p: p.name)


# -- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@named([p for p in PAGES if any(b.language in RUN for b in blocks(p))])
def test_blocks_run_and_print_what_is_shown(page, tmp_path, request):
    if page.name in NEEDS_TORCH_NPU:
        request.getfixturevalue("torchair")  # skips where it is missing
    command = [sys.executable, "-m", "tests.run_page", str(page)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]


@named(PAGES)
def test_every_block_says_what_it_is(page):
    for block in blocks(page):
        assert block.language in (*RUN, *CHECKED, *SHOWN), f"{page.name}:{block.line}: a fence without a known language"
        assert block.info in ("", OUTPUT) or block.language == "py", f"{page.name}:{block.line}: {block.info}"


@named(PAGES)
def test_blocks_that_are_not_run_are_right_as_far_as_that_shows(page):
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if block.language == "py":
            tree = ast.parse(block.text, where)
            used = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "qp"]
            assert all(hasattr(qp, name) for name in used), f"{where}: {used}"
        elif block.language == "sh":
            done = subprocess.run(["bash", "-n", "-c", block.text], capture_output=True, text=True)
            assert done.returncode == 0, f"{where}: {done.stderr}"
        elif block.language in ("json", "toml", "yaml"):
            {"json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load}[block.language](block.text)


def commands(page):
    """Each line of a page's blocks that calls quantpass, without what the shell does."""
    for block in blocks(page):
        for line in block.text.splitlines() if block.language in ("sh", "console", "text") else ():
            line = re.sub(r"^\$ |^.*\| (?=quantpass)", "", line)
            if line.startswith("quantpass ") and not re.match(r"quantpass \d", line):
                yield f"{page.name}:{block.line}", shlex.split(re.split(r" [|<>] ", line)[0], comments=True)[1:]


@named(PAGES)
def test_commands_and_options_exist(page):
    for where, words in commands(page):
        command = main.commands.get(words[0]) if words else None
        assert command is not None or words[0].startswith("-"), f"{where}: quantpass {words[0]}"
        options = {
            o for p in (command or main).params if isinstance(p, click.Option) for o in (*p.opts, *p.secondary_opts)
        }
        given = {w.partition("=")[0] for w in words[1:] if re.match(r"--?[a-z]", w)}
        assert given <= {*options, "--help", "-h"}, f"{where}: {given - options}"


class Linear8(torch.nn.Module):
    """int8 weights, a scale for each output channel or for each group of rows."""

    def __init__(self, k, n, group=None):
        super().__init__()
        self.group = group or k
        self.codes = torch.nn.Parameter(torch.randint(-127, 128, (n, k), dtype=torch.int8), requires_grad=False)
        self.scale = torch.nn.Parameter(torch.rand(n, k // self.group).half() * 0.01, requires_grad=False)

    def forward(self, x):
        scale = self.scale.repeat_interleave(self.group, 1) if self.group < self.codes.shape[1] else self.scale
        return torch.nn.functional.linear(x, self.codes.to(x.dtype) * scale)


class Model(torch.nn.Module):
    """What the report is of that the README explains."""

    def __init__(self):
        super().__init__()
        self.mlp = torch.nn.Module()
        self.mlp.up, self.mlp.down = Linear8(256, 128), Linear8(128, 256, group=32)

    def forward(self, x):
        return self.mlp.down(self.mlp.up(x))


def test_the_report_that_the_readme_explains_is_a_real_one():
    torch.manual_seed(0)
    report = qp.explain(Model(), (torch.randn(4, 256).half(),), target="ascend310p")
    (shown,) = [b.text for b in blocks(ROOT / "README.md") if "mlp.down" in b.text]
    assert agrees(report.text(width=120), shown), report.text(width=120)


def test_how_output_is_compared():
    assert agrees("a\nb  \nc\n", "a\nb\nc") and agrees("a\nb\nc\n", "a\n...\nc\n") and agrees("a\n", "...\n")
    assert not agrees("a\nb\n", "a\n") and not agrees("a\nc\n", "a\n...\nb\n") and not agrees("ab\n", "a.\n")


# -- examples --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_examples_run(example, tmp_path, request):
    if example.name in NEEDS_TORCH_NPU:
        request.getfixturevalue("torchair")
    done = subprocess.run([sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_check_what_they_show(example):
    """An assertion, or an exit status that a count of failures decides."""
    tree = ast.parse(example.read_text())
    assert ast.get_docstring(tree)
    exits = "sys.exit(main())" in example.read_text()
    assert exits or any(isinstance(n, ast.Assert) for n in ast.walk(tree))


def imported(tree):
    """What a module imports of quantpass: the module and the name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "quantpass":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, None) for a in node.names if a.name.partition(".")[0] == "quantpass")


def code_for_users():
    shown = re.compile(r"<!-- (\S+) -->\n```python\n.*?^```", flags=re.M | re.S)
    for page in PAGES:
        text = shown.sub("", page.read_text())  # a file of the package, shown as it is
        for code in re.findall(r"^```(?:python|py .*|py)\n(.*?)^```", text, flags=re.M | re.S):
            yield page.name, code
    for example in sorted((ROOT / "examples").glob("*.py")):
        yield example.name, example.read_text()


def test_docs_and_examples_use_what_is_public():
    for where, code in code_for_users():
        for module, name in imported(ast.parse(code)):
            assert module in PUBLIC, f"{where} imports {module}"
            assert name is None or name in importlib.import_module(module).__all__, f"{where}: {module}.{name}"


# -- links -----------------------------------------------------------------------------------------------------------

_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")
_CODE = re.compile(r"^ *```.*?^ *```|`[^`\n]*`", re.M | re.S)


def anchors(page):
    """The anchors of a page's headings, as GitHub and the site make them; of the API page those of its objects."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.M):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).strip().lower()).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found | set(re.findall(r"^::: (\S+)$", text, flags=re.M))


@named(LINKING)
def test_links_lead_somewhere(page):
    for target, anchor in _LINK.findall(_CODE.sub("", page.read_text())):
        to = (page.parent / target) if target else page
        assert to.exists(), f"{page.name} links to {target}"
        if anchor:
            assert to.suffix == ".md" and anchor in anchors(to), f"{page.name} links to {target}#{anchor}"


def test_every_claim_of_the_readme_names_what_shows_it():
    """Under "What you can rely on": a test, a benchmark or a page with the evidence for each."""
    claims = (ROOT / "README.md").read_text().partition("## What you can rely on")[2].partition("\n## ")[0]
    for claim in re.split(r"^\* ", claims, flags=re.M)[1:]:
        assert re.search(r"\]\((tests|benchmarks)/\w+\.py\)", claim), claim.split("\n")[0]


def test_every_page_is_in_the_sites_navigation():
    class Loader(yaml.SafeLoader):
        """Tags that name functions are left alone."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)

    def pages(entry):
        return (
            [entry]
            if isinstance(entry, str)
            else [p for v in entry.values() for p in ([v] if isinstance(v, str) else [q for e in v for q in pages(e)])]
        )

    listed = [p for entry in settings["nav"] for p in pages(entry)]
    assert set(listed) == {p.name for p in DOCS} | {"index.md", "contributing.md", "changelog.md"}
    assert len(set(listed)) == len(listed)


def test_nothing_is_fetched_for_the_site():
    """No address of another machine in its settings or in what is added to its pages."""
    for path in (ROOT / "mkdocs.yml", *(ROOT / "docs/site").iterdir()):
        assert "://" not in path.read_text(), path.name
    assert "font: false" in (ROOT / "mkdocs.yml").read_text()


def test_the_api_page_has_every_public_name_and_no_other():
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), flags=re.M)
    wanted = {f"quantpass.{name}" for name in qp.__all__ if name not in ("nn", "__version__")}
    wanted |= {f"quantpass.{room}.{name}" for room in ("nn", "testing") for name in getattr(qp, room).__all__}
    internal = ("Dialects", "default_dialects")
    wanted |= {
        f"quantpass.patterns.{n}" for n in importlib.import_module("quantpass.patterns").__all__ if n not in internal
    }
    assert set(listed) == wanted
    assert len(set(listed)) == len(listed)


def test_the_table_of_options_is_right():
    table = (ROOT / "docs/doors.md").read_text().partition("## Options")[2].partition("\n## ")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| `")]
    listed = {}
    for name, _, _, doors in rows:
        listed[name.strip("`")] = set(re.findall(r"`(\w+)`", doors)) if not doors.startswith("all") else None
    assert set(listed) == {f.name for f in fields(qp.Options)}
    for name, doors in listed.items():
        taken = {d for d, types in TAKEN_BY.items() if name in (*types.__optional_keys__, "target") and "(" not in d}
        assert doors == taken or (doors is None and len(taken) == len(TAKEN_BY) - 1), name


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / "README.md").read_text(), flags=re.M)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), f"make {target}"


def test_files_shown_in_the_docs_are_the_files():
    for page in PAGES:
        for name, text in re.findall(r"<!-- (\S+) -->\n```python\n(.*?)^```", page.read_text(), flags=re.M | re.S):
            assert text == (ROOT / name).read_text(), f"{page.name} shows an old {name}"


# -- troubleshooting -------------------------------------------------------------------------------------------------

TROUBLE = (ROOT / "docs/troubleshooting.md").read_text()
IN_PYTORCH = {
    "Failed to load the backend extension": "torch/__init__.py",
    "We failed to resolve": "torch/_export/serde/serialize.py",
    "Invalid backend": "torch/_dynamo/exc.py",
    "Unable to call ExportedProgram directly": "torch/export/exported_program.py",
    "torch._dynamo hit config.": "torch/_dynamo/convert_frame.py",
}


def entries(section):
    """``(texts in the heading, body)`` of each entry of a section."""
    text = TROUBLE.partition(f"## {section}\n")[2].partition("\n## ")[0]
    parts = re.split(r"^### (.*)$", text, flags=re.M)[1:]
    return [(re.findall(r"`([^`]+)`", h), body) for h, body in zip(parts[::2], parts[1::2], strict=True)]


def test_every_entry_says_what_it_means_and_what_to_do():
    all_entries = [e for s in re.findall(r"^## (What .*)$", TROUBLE, flags=re.M) for e in entries(s)]
    assert len(all_entries) > 30
    for heading, body in all_entries:
        assert heading and "* **means**:" in body and "* **do**:" in body, heading


def literals():
    """The texts in the package's code, those of one expression in one piece."""
    for folder in ("quantpass", "patterns", "lowering"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_our_messages_are_in_the_code():
    said = list(literals())
    for (text,), _ in entries("What quantpass says"):
        assert any(text in literal for literal in said), text


@pytest.mark.parametrize(("heading", "body"), entries("What the operators say"), ids=lambda x: x[-1][:40])
def test_explain_error_says_the_same_of_the_operators_messages(heading, body):
    (answer,) = re.findall(r"^\* \*\*rule\*\*: (.*)$", body, flags=re.M)
    names = heading[0].isidentifier()
    log = f"call {heading[0]} failed\nAclNN_Parameter_Error(EZ1001): {heading[1]}" if names else " ".join(heading)
    (found,) = qp.explain_error(log)
    assert found.known
    rules = re.findall(r"`([a-z0-9_]+\.[a-z0-9_.]+)`", answer)
    assert [found.rule] == (rules[:1] or [None])
    for chip, rule in re.findall(r"with `-t (\w+)` `([\w.]+)`", answer):
        assert [e.rule for e in qp.explain_error(log, target=chip)] == [rule]


def test_pytorchs_messages_are_in_pytorch():
    folder = Path(torch.__file__).parent.parent
    headings = [h[0] for h, _ in entries("What PyTorch and torch_npu say")]
    for text, path in IN_PYTORCH.items():
        assert any(h.startswith(text) for h in headings), text
        assert text.rstrip(".") in (folder / path).read_text(), f"{text} is not in {path}"
