"""A skip is a failure in CI, and a skip elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SKIPPING = {
    "in a test": 'import pytest\n\ndef test_a():\n    pytest.skip("no wheel")\n',
    "in a fixture": 'import pytest\n\n@pytest.fixture\ndef f():\n    pytest.skip("no wheel")\n\ndef test_a(f): ...\n',
    "while collecting": 'import pytest\n\npytest.importorskip("no_such_package")\n\ndef test_a(): ...\n',
    "by a mark": 'import pytest\n\n@pytest.mark.skip("no wheel")\ndef test_a(): ...\n',
}


@pytest.mark.parametrize("in_ci", [True, False])
@pytest.mark.parametrize("where", SKIPPING)
def test_a_skip_fails_in_ci(where, in_ci, tmp_path):
    (tmp_path / "test_it.py").write_text(SKIPPING[where] + "\n\ndef test_b(): ...\n", encoding="utf-8")
    root = Path(__file__).resolve().parent.parent
    env = {k: v for k, v in os.environ.items() if not k.startswith(("QUANTPASS_CI", "PYTEST_"))}
    env |= {"PYTHONPATH": str(root)} | ({"QUANTPASS_CI": "1"} if in_ci else {})
    command = [sys.executable, "-m", "pytest", "-p", "tests.skips", "-p", "no:cacheprovider", "-c", os.devnull]
    done = subprocess.run([*command, str(tmp_path)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode in (0, 5)) != in_ci, done.stdout  # 5: nothing was collected
    assert ("nothing may be skipped" in done.stdout) == in_ci, done.stdout
