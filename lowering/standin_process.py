"""Starting the child process that converts graphs with torchair, and talking to it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from quantpass.lowering.fx_parcel import Parcel
from quantpass.lowering.ge_graph import GeGraph
from quantpass.lowering.standin_cann import child_environment, find_torch_npu
from quantpass.lowering.torchair_versions import untested_note


class PreviewError(RuntimeError):
    """torchair could not convert a graph, or the process that runs it ended; the message says why."""


@dataclass(frozen=True, slots=True)
class Request:
    """One graph to convert, for one chip; torchair's ``CompilerConfig`` as attribute paths and values."""

    parcel: Parcel
    soc_name: str
    config: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """The GE graph and its text form, or what went wrong."""

    graph: GeGraph | None = None
    pbtxt: str = ""
    error: str = ""
    details: str = ""


class TorchairProcess:
    """A child process in which torchair is loaded, for one or many graphs. Starting it takes some seconds.

    Args:
        torch_npu: the folder that holds torch_npu; as for :func:`quantpass.lowering.standin_cann.find_torch_npu`.

    A context manager: leaving it ends the process.
    """

    def __init__(self, torch_npu: str | os.PathLike[str] | None = None) -> None:
        self._folder = torch_npu
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._log = tempfile.TemporaryFile(prefix="quantpass-torchair-")  # noqa: SIM115 - closed by close()

    def convert(self, request: Request) -> Reply:
        """Convert one graph.

        Raises:
            StandinError: torch_npu, gcc or nm is missing.
            PreviewError: torchair refuses the graph, or the process ended.
        """
        connection = self._connected()
        try:
            connection.send(request)
            reply: Reply = connection.recv()
        except (EOFError, OSError) as error:
            raise PreviewError(f"the process that runs torchair ended.\n{self._end_of_log()}") from error
        if reply.error:
            raise PreviewError(f"torchair can't convert this graph: {_told(reply)}")
        return reply

    @property
    def note(self) -> str:
        """What a report says of the torchair that runs here, where quantpass is not tested with it."""
        return untested_note(find_torch_npu(self._folder) / "torch_npu")

    def close(self) -> None:
        """End the process; harmless when called again."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.send(None)
            self._connection.close()
            self._connection = None
        if self._process is not None:
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def __enter__(self) -> TorchairProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._log.close()

    def _connected(self) -> Connection:
        if self._connection is None:
            environment = child_environment(self._folder)
            (own_end, child_end) = _pair()
            command = [sys.executable, "-m", "quantpass.lowering.standin_convert", str(child_end.fileno())]
            self._process = subprocess.Popen(
                command, env=environment, pass_fds=[child_end.fileno()], stdout=self._log, stderr=self._log
            )
            child_end.close()
            self._connection = own_end
        return self._connection

    def _end_of_log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-3000:]


def _pair() -> tuple[Connection, Connection]:
    import socket

    first, second = socket.socketpair()
    return Connection(first.detach()), Connection(second.detach())


def _told(reply: Reply) -> str:
    """torchair's message, with the part of its report that names the operator."""
    lines = [line for line in reply.error.splitlines() if line.strip()]
    where = f"\n--- where ---\n{reply.details[-1500:]}" if reply.details else ""
    return "\n".join(lines[:12]) + where
