"""Something to be done as soon as a module is imported, by whomever."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, do: Callable[[], object]) -> None:
    """Call ``do`` once: now where the module is imported already, else right after its own code has run."""
    if sys.modules.get(name) is not None:
        do()
    else:
        sys.meta_path.insert(0, _Waiting(name, do))


class _Waiting(MetaPathFinder):
    """Finds a module as the other finders do, and adds to what its loader does.

    It stays until the module's code has run: ``importlib.util.find_spec`` asks as an import does, and imports nothing.
    """

    def __init__(self, name: str, do: Callable[[], object]) -> None:
        self._name, self._do = name, do

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        others = (f for f in sys.meta_path if f is not self)
        spec = next((s for f in others if (s := f.find_spec(fullname, path, target)) is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_do(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self._do()

        spec.loader.exec_module = execute_and_do  # type: ignore[method-assign]  # this import's own loader
        return spec
