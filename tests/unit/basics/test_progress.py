"""What is counted aloud, and when."""

import io
import sys

import pytest

from quantpass.basics import progress
from quantpass.basics.progress import counted


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stderr", "patience", "installed", "shown"),
    [
        (Terminal(), 0, True, True),
        (Terminal(), 99, True, False),
        (Terminal(), 0, False, False),
        (io.StringIO(), 0, True, False),
    ],
)
def test_who_sees_what(monkeypatch, stderr, patience, installed, shown):
    if installed:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(progress, "_PATIENCE", patience)
    monkeypatch.setattr(sys, "stderr", stderr)
    assert list(counted(iter("abc"), "letters")) == ["a", "b", "c"]
    assert ("letters" in stderr.getvalue()) == shown
