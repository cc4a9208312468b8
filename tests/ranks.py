"""Two processes that communicate through gloo."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def outputs_of_two_ranks(code, folder, *arguments, timeout):
    """What each rank prints that runs ``code`` with its rank, the file to meet at and ``arguments``; all must succeed."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(folder / "meeting"), *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, (_, error) in zip(processes, results, strict=True):
        assert p.returncode == 0, error[-3000:]
    return [out for out, _ in results]
