"""Ends the process with a sentence where a server of its local Ray ends under it.

Ray's own library would abort this process, at once without its raylet and after a minute without its GCS, and print
nothing that says what to do. Nothing can be saved at that moment: the lake holds the last committed versions.
"""

from __future__ import annotations

import os
import sys
import threading

import psutil

from schemas.errors import EXIT_FAILED

SERVERS = ("gcs_server", "raylet")
SECONDS = 0.1  # between two looks


class RayWatch:
    """Looks after the servers below this process from `start` to `stop`."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._servers: list[psutil.Process] = []

    def start(self) -> None:
        self._servers = [child for child in psutil.Process().children() if _name(child) in SERVERS]
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _watch(self) -> None:
        import ray

        while not self._stop.wait(SECONDS):
            for server in self._servers:
                # Whoever shuts Ray down, at the interpreter's end too, disconnects before the servers end.
                if not _runs(server) and ray.is_initialized() and not self._stop.is_set():
                    end(server)


def end(server: psutil.Process) -> None:
    sys.stderr.write(
        f"\nlazyrec: Ray's server (process {server.pid}) ended in the middle of the work, killed or out of memory; "
        "the tables are at their last committed version, and the same command goes on from there.\n"
    )
    sys.stderr.flush()
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
