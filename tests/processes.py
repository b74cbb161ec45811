"""Servers that a test starts and is sure to end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on now; skips the test where none can be bound."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]
    except OSError as error:
        pytest.skip(f"no port can be bound on this machine: {error}")
    finally:
        for held in sockets:
            held.close()


@contextmanager
def server(
    command: Sequence[str],
    ready: Callable[[], bool],
    log: Path,
    seconds: float = 60,
    env: Mapping[str, str] | None = None,
    user: str | None = None,
    cwd: Path | None = None,
) -> Iterator[None]:
    """A process that is `ready` when the block begins, and that ends, with all below it, when the block does."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=env, user=user, cwd=cwd, start_new_session=True
        )
        try:
            deadline = time.monotonic() + seconds
            while not ready():
                assert process.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < deadline, f"not ready in {seconds} s: {log.read_text()[-2000:]}"
                time.sleep(0.1)
            yield
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGINT, signal.SIGKILL):  # SIGINT is PostgreSQL's fast shutdown
        try:
            os.killpg(process.pid, sign)
            process.wait(5)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
