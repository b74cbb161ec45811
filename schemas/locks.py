"""One run a lake, for every way in: a second one says so and ends with the code that makes a scheduler retry."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from schemas.errors import MissingUpstream
from schemas.lake import Lake

NAME = ".lock"
PATIENCE = 0.2  # seconds; longer than `lock_holder` looks


@contextmanager
def lake_lock(lake: Lake) -> Iterator[None]:
    """Held by this process until the block ends, whatever ends it; the system releases it after a kill.

    The file lies beside the artifacts, which every machine that may run the lake must share. Raises MissingUpstream
    where another run holds it.
    """
    lake.home.mkdir(parents=True, exist_ok=True)
    with (lake.home / NAME).open("a+") as handle:
        if not _taken(handle, fcntl.LOCK_EX, PATIENCE):
            raise MissingUpstream(
                f"Another run ({_holder(handle)}) works on {lake.root}; wait until it ends and try again."
            )
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        yield


def lock_holder(lake: Lake) -> str | None:
    """Who works on the lake, in words, or None. Looks for a moment and takes nothing from anyone."""
    path = lake.home / NAME
    if not path.is_file():
        return None
    with path.open("r") as handle:
        return None if _taken(handle, fcntl.LOCK_SH, 0.0) else _holder(handle)


def _taken(handle: IO[str], kind: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(patience / 10)
        else:
            return True


def _holder(handle: IO[str]) -> str:
    handle.seek(0)
    return handle.read().strip() or "unknown"
