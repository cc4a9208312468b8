"""Capture the graphs of the tools that the tests do not install: ``python -m tests.coverage.store [tool ...]``.

Run it where they are installed; a tool that is missing or fails is left as it is stored, and named.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch

from tests.coverage.captured import Captured, capture, store
from tests.coverage.elsewhere import schemes

CAPTURES = Path(__file__).parent / "captures"


def main(tools: list[str]) -> int:
    """Store the captures of the named tools, or of all."""
    failed = 0
    for scheme in schemes():
        if tools and scheme.tool not in tools:
            continue
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                graphs = [c for c in capture(*scheme.build()) if _is_plain(c)]
            if not graphs:
                raise RuntimeError("no graph of plain tensors")
            about = {"tool": scheme.tool, "version": version(scheme.package), "torch": str(torch.__version__)}
            store(CAPTURES / f"{scheme.slug}.pt", graphs, about)
            print(f"{scheme.tool} {about['version']}, {scheme.name}: {len(graphs)} graphs")
        except Exception as error:
            failed += 1
            print(f"{scheme.tool}, {scheme.name}: {type(error).__name__}: {str(error)[:200]}")
    return failed


def _is_plain(c: Captured) -> bool:
    """False for graphs with symbolic sizes and for those that only wrap and unwrap a tool's own tensor type."""
    tensors = [t for t in (*c.inputs, *c.outputs, *c.graph.buffers()) if isinstance(t, torch.Tensor)]
    # Graph breaks leave small graphs around the one with the matmul.
    values = [n.meta.get("val") for n in c.graph.graph.nodes]
    sizes = [s for v in values if isinstance(v, torch.Tensor) for s in v.shape]
    return all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors) and all(type(s) is int for s in sizes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
