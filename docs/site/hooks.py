"""What the site does beyond Markdown: pages from outside ``docs/``, links into the code, titles of code blocks.

Links lead where they lead in the repository. A page of the top folder becomes a page of the site, and a file of code
that a page links to becomes a page that shows it, so that every claim's test can be read there.
"""

import posixpath
import re
import shutil
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
HOME = {page: name for name, page in TOP.items()}

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(?=[)#])")
_FENCE = re.compile(r"^```(\w+) (.+)$")
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):<code>~?([\w.]+)</code>")
_EDGE = re.compile(r'^\s*(\w+)(?:\["(.*?)"\])? -->(?:\|"(.*?)"\|)? (\w+)(?:\["(.*?)"\])?$')


def on_startup(**_):
    """Copy the package into one folder, as it is installed, before the reader of docstrings looks for it."""
    package = ROOT / "build" / "api" / "quantpass"
    shutil.rmtree(package, ignore_errors=True)
    for folder, name in (("quantpass", "."), ("patterns", "patterns"), ("lowering", "lowering")):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, package / name, ignore=ignored, dirs_exist_ok=True)


def on_files(files, config):
    """Add the pages of the top folder, and a page for each file that a page links to."""
    for name, page in TOP.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    for path in sorted(_linked(files)):
        files.append(File.generated(config, _page_of(path), content=_shown(ROOT / path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Links, fences and diagrams as the site wants them."""
    source = page.file.src_uri
    if source.startswith("source/"):
        return markdown
    if source == "index.md":
        page.meta["hide"] = ["navigation"]  # nothing but itself
    folder = posixpath.dirname(HOME.get(source, f"docs/{source}"))
    lines, fenced = [], ""
    for line in markdown.split("\n"):
        if line.startswith("```"):
            fenced = "" if fenced else line
            lines.append(_titled(line))
        elif fenced:
            lines.append(line)
        else:
            lines.append(_LINK.sub(lambda m: _page_of(posixpath.normpath(posixpath.join(folder, m[1]))), line))
    return re.sub(r"^```mermaid\n(.*?)^```$", _as_table, "\n".join(lines), flags=re.M | re.S)


def on_page_content(html, **_):
    """Sphinx's roles in docstrings as links within the page, where it has what they name."""

    def linked(match):
        last = match[1].rpartition(".")[2]
        anchor = next((a for a in (match[1], f"quantpass.{last}") if f'id="{a}"' in html), None)
        return f'<a href="#{anchor}"><code>{last}</code></a>' if anchor else f"<code>{last}</code>"

    return _ROLE.sub(linked, html)


def _linked(files: Files) -> set[str]:
    """Files of the repository, beside pages, that pages link to."""
    pages = [(f.src_uri, f.content_string) for f in files.documentation_pages()]
    found = set()
    for source, text in pages:
        folder = posixpath.dirname(HOME.get(source, f"docs/{source}"))
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        found |= {posixpath.normpath(posixpath.join(folder, target)) for target in _LINK.findall(prose)}
    return {path for path in found if _page_of(path).startswith("source/") and (ROOT / path).exists()}


def _page_of(path: str) -> str:
    """The site's page, relative to its root, for a path of the repository."""
    if path in TOP:
        return TOP[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}.md"


def _shown(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    head = f"---\ntitle: {name}\nsearch:\n  exclude: true\nhide:\n  - navigation\n---\n\n# `{name}`\n\n"
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if not p.name.startswith(("_", ".")))
        return head + "".join(f"* `{name}`\n" for name in inside)
    language = {".py": "python", ".sh": "sh", ".toml": "toml"}.get(path.suffix, "text")
    return f"{head}~~~~~ {{.{language}}}\n{path.read_text()}\n~~~~~\n"


def _titled(line: str) -> str:
    """A fence that says what is done with its block (``file=...``, ``in=... after=...``), with that as its title."""
    match = _FENCE.match(line)
    return f"```{match[1]} title='{match[2].replace(chr(39), '')}'" if match else line


def _as_table(match: re.Match[str]) -> str:
    """A Mermaid flowchart as a table of its edges: no library is fetched to draw it."""
    labels, rows = {}, []
    for line in match[1].splitlines():
        edge = _EDGE.match(line)
        if edge:
            start, start_label, said, end, end_label = edge.groups()
            labels |= {name: label for name, label in ((start, start_label), (end, end_label)) if label}
            rows.append((start, said or "", end))
    labels = {name: label.replace("|", "\\|") for name, label in labels.items()}
    named = [f"| {labels.get(a, a)} | {said} | {labels.get(b, b)} |" for a, said, b in rows]
    return "\n".join(["| from | what goes there | to |", "|---|---|---|", *named])
