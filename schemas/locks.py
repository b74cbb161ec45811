"""One run a lake: a second one says so and ends with the code that makes a scheduler retry."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from schemas.errors import MissingUpstream


@contextmanager
def lake_lock(root: str) -> Iterator[None]:
    """Held by this process until the block ends, whatever ends it; the system releases it after a kill."""
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with path.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            raise MissingUpstream(
                f"Another run (process {holder}) works on {root}; wait until it ends and try again."
            ) from error
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield
