"""The layers, from the ground up: each file imports only from its own layer and from those below it."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LAYERS = (
    "quantpass/basics",
    "quantpass/chips",
    "quantpass/checkpoints",
    "quantpass/messages",
    "quantpass/graph",
    "patterns",
    "quantpass/operators",
    "lowering",
    "quantpass/planning",
    "quantpass/report",
    "the pass",
    "quantpass/adoption",
    "quantpass/doors",
)
THE_PASS = {"pipeline.py", "rewrite.py", "nn.py", "verify_graph.py"}
DOORS = {"testing.py"}
EVERYWHERE = {"quantpass.version"}


def layer_of(path):
    """The layer that a file belongs to; None for the package's own ``__init__``, which gathers the public names."""
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "quantpass" and len(relative.parts) == 2:
        if relative.name in DOORS:
            return LAYERS.index("quantpass/doors")
        return LAYERS.index("the pass") if relative.name in THE_PASS else None
    return LAYERS.index("/".join(relative.parts[:2] if relative.parts[0] == "quantpass" else relative.parts[:1]))


def modules():
    """Every module's dotted name and its file."""
    found = {}
    for folder, package in (("quantpass", ()), ("patterns", ("quantpass",)), ("lowering", ("quantpass",))):
        for path in (ROOT / folder).rglob("*.py"):
            parts = (*package, *path.relative_to(ROOT).with_suffix("").parts)
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


def imported(path, known):
    """The modules that a file imports, inside functions and for type checking too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


def test_no_file_imports_from_above():
    known = modules()
    upward = []
    for name, path in sorted(known.items()):
        if name in EVERYWHERE or (own := layer_of(path)) is None:
            continue
        for other in sorted({m for m in imported(path, known) if m in known} - EVERYWHERE):
            above = layer_of(known[other])
            if above is None or above > own:
                upward.append(f"{name} ({LAYERS[own]}) imports {other}")
    assert not upward, "\n".join(upward)


def test_every_file_has_a_layer():
    flat = {p.name for p in (ROOT / "quantpass").glob("*.py")} - THE_PASS - DOORS
    assert flat <= {"__init__.py", "__main__.py", "version.py"}
