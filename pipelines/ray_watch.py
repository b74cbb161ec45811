"""Ends the process with a sentence where a server of its local Ray ends under it.

Ray's own library would abort this process, at once without its raylet and after a minute without its GCS, and print
nothing that says what to do. Nothing can be saved at that moment: the lake holds the last committed versions.

Two look out, from before Ray starts. A thread sees that a server has ended, and ends the process. Where Ray's library was
faster, or the process itself was killed, the last words come from a child that reads a pipe: it sees the pipe's end, and
nobody has told it that all is well.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import suppress

import psutil

from schemas.errors import EXIT_FAILED
from schemas.outages import AGAIN

SERVERS = ("gcs_server", "raylet")
SECONDS = 0.1  # between two looks
LAST_WORDS = (
    f"\nlazyrec: This run, or a server of Ray below it, ended in the middle of the work, killed or out of memory; {AGAIN}\n"
)
CHILD = "import sys\nwords = sys.argv[1]\nsys.stdin.read() or sys.stderr.write(words)"


class RayWatch:
    """Looks after the servers below this process from `start` to `stop`."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._servers: dict[int, psutil.Process] = {}
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """To be called before Ray starts its servers."""
        # A session of its own: an interrupt from the terminal is not meant for it.
        command = [sys.executable, "-S", "-E", "-c", CHILD, LAST_WORDS]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        """To be called before the servers are stopped, or where they could not start."""
        self._stop.set()
        if self._child is not None:
            with suppress(OSError):
                self._child.communicate(b"all is well")

    def _watch(self) -> None:
        import ray

        while not self._stop.wait(SECONDS):
            if len(self._servers) < len(SERVERS):
                self._servers |= {child.pid: child for child in psutil.Process().children() if _name(child) in SERVERS}
            if all(map(_runs, self._servers.values())):
                continue
            # Before Ray is connected, its library says by itself that a server has ended. Whoever shuts Ray down, at the
            # interpreter's end too, disconnects before the servers end.
            if not self._stop.is_set() and ray.is_initialized():
                os._exit(EXIT_FAILED)  # threads of Ray wait for what is gone, and would keep the process


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
