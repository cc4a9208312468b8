"""Cases in processes of their own: a kernel that fails on a device may end the process, or leave it unusable.

The parent starts ``python -m quantpass.doors.selftest.isolation FD`` for a group of cases and hears of each when it is
done. Where the process ends, or says nothing for too long, the case that was running is noted, and the next process
goes on behind it.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from multiprocessing.connection import Connection
from typing import Any

from quantpass.doors.selftest.cases import Case, cases_of
from quantpass.doors.selftest.run import ENDED, RAISED, Outcome, outcomes
from quantpass.doors.selftest.speed import Time, times

SECONDS = 600.0
"""How long one case may take: GE compiles it, on a busy machine."""

_STARTING = 120.0
"""How long a process may take to be ready, beside that."""

_WORKER = (sys.executable, "-m", "quantpass.doors.selftest.isolation")
_SAID = 2000


def isolated(
    cases: Iterable[Case], device: str, seconds: float = SECONDS, worker: Sequence[str] = _WORKER
) -> Iterator[Outcome]:
    """Run cases, those of one operator and route in one process; each about a contradicted rule in one of its own.

    Args:
        cases: in order.
        device: ``"npu"`` or ``"cpu"``.
        seconds: how long a case may take.
        worker: what starts a process; the number of its end of the connection is added.
    """
    for _, group in groupby(cases, lambda c: (c.chip, c.route, c.call.op.name, c.contradicted and c.id)):
        left = list(group)
        while left:
            done = list(_one_process(left, device, seconds, worker))
            yield from done
            left = left[len(done) :]


def isolated_times(chip: str, device: str, seconds: float = SECONDS) -> Iterator[Time]:
    """The times of :func:`quantpass.doors.selftest.speed.times`, as far as their process comes."""
    with _Process((device, chip), _WORKER) as process:
        while isinstance(found := process.heard(seconds + _STARTING), Time):
            yield found


def _one_process(cases: Sequence[Case], device: str, seconds: float, worker: Sequence[str]) -> Iterator[Outcome]:
    """Outcomes of the first cases, up to one that is no good for the process; at least one."""
    first = cases[0]
    with _Process((device, first.chip, first.route, first.call.op.name, [c.id for c in cases]), worker) as process:
        for number, case in enumerate(cases):
            outcome = process.heard(seconds if number else seconds + _STARTING)
            yield outcome or Outcome(case.id, ENDED, said=process.end(seconds))
            if outcome is None or (device != "cpu" and outcome.outcome == RAISED):
                return  # a kernel that failed may have left nothing behind that works


class _Process:
    """A process that answers one request."""

    def __init__(self, request: Any, worker: Sequence[str]) -> None:
        self._request, self._worker = request, worker

    def __enter__(self) -> _Process:
        self._connection, theirs = (Connection(s.detach()) for s in socket.socketpair())
        self._log = tempfile.TemporaryFile(prefix="quantpass-selftest-")
        command, kept = [*self._worker, str(theirs.fileno())], [theirs.fileno()]
        self._process = subprocess.Popen(command, pass_fds=kept, stdout=self._log, stderr=self._log)
        theirs.close()
        self._connection.send(self._request)
        return self

    def heard(self, seconds: float) -> Any:
        """What it says next; None where it says nothing any more."""
        try:
            return self._connection.recv() if self._connection.poll(seconds) else None
        except (EOFError, OSError):
            return None

    def end(self, seconds: float) -> str:
        """How it ended, and its last words."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        code = self._process.poll()
        self._log.seek(0)
        said = self._log.read().decode(errors="replace")[-_SAID:]
        return f"{f'nothing came for {seconds:g} s' if code is None else f'exit status {code}'}\n{said}".strip()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()
        self._log.close()


def serve(connection: Connection) -> None:
    """Run the cases that are asked for, and tell what became of each; or the times."""
    device, chip, *of_cases = connection.recv()
    if not of_cases:
        for time in times(chip, device):
            connection.send(time)
        return
    route, operator, ids = of_cases
    wanted = set(ids)
    for outcome in outcomes((c for c in cases_of(chip, route, operator) if c.id in wanted), device):
        connection.send(outcome)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
