"""Lets a bare checkout be tested and used without installing it.

``quantpass.patterns`` and ``quantpass.lowering`` lie at the top level of the repository; an installed package finds
them through ``package-dir`` in ``pyproject.toml``, a checkout through this finder.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parent


class CheckoutFinder:
    """Finds the two packages beside ``quantpass/`` when the ``quantpass`` in use is this checkout's."""

    @staticmethod
    def find_spec(name: str, *_: object) -> ModuleSpec | None:
        parent, _, child = name.rpartition(".")
        if parent != "quantpass" or child not in ("patterns", "lowering"):
            return None
        package = sys.modules.get("quantpass")
        if package is None or package.__file__ is None or Path(package.__file__).parent != ROOT / "quantpass":
            return None
        spec = PathFinder.find_spec(child, [str(ROOT)])
        if spec is None or spec.origin is None:
            return None
        from importlib.util import spec_from_file_location

        return spec_from_file_location(name, spec.origin, submodule_search_locations=[str(ROOT / child)])


sys.meta_path.append(CheckoutFinder)  # type: ignore[arg-type]
