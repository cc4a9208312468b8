"""A few cases of each parametrized test: ``pytest -p tests.matrix.few --few 4``.

Versions of PyTorch differ in what their API takes and in how they spell graphs, which one case of a test meets as well as
hundreds; its numbers are the same. So a cell of the matrix has all tests, and of each the first cases, the last one and
some between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

import pytest

_T = TypeVar("_T")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option."""
    parser.addoption("--few", type=int, default=0, help="so many cases of each parametrized test; 0 for all")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the other cases out, after markers have left out theirs."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept = {item.nodeid for of_one in cases.values() for item in spread(of_one, config.getoption("few"))}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]


def spread(cases: Sequence[_T], few: int) -> list[_T]:
    """``few`` of the cases, the first and the last among them, the others at equal distances; 0 for all."""
    if not few or len(cases) <= few:
        return list(cases)
    return [cases[round(i * (len(cases) - 1) / max(few - 1, 1))] for i in range(few)]
