"""A command with all processes below it: wall seconds, CPU seconds, peak memory."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

EVERY_S = 0.2
MIB = 2**20


def measured(command: Sequence[str], output: Path, env: Mapping[str, str]) -> dict[str, Any]:
    """Runs `command`, its standard output into `output`. Raises RuntimeError where it fails.

    CPU seconds and memory are sampled over all processes below the command, so that those of a daemon that nobody waits for
    count as well; what happens within the last fifth of a second of a process, or a shorter peak, may be missed. Of CPU the
    kernel's own account counts where it is higher. PSS, summed over the processes, counts a shared page once.
    """
    started = time.monotonic()
    with output.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, env={**os.environ, **env})
    peak: dict[str, float] = {"peak_pss_mib": 0.0, "peak_rss_mib": 0.0}
    used: dict[tuple[int, float], float] = {}
    ended = threading.Event()
    watcher = threading.Thread(target=watch, args=(process.pid, peak, used, ended), daemon=True)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)  # else Popen would wait for a child that is gone
    ended.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}; its last lines are above.")
    return {"wall_seconds": seconds, "cpu_seconds": max(usage.ru_utime + usage.ru_stime, sum(used.values())), **peak}


def watch(pid: int, peak: dict[str, float], used: dict[tuple[int, float], float], ended: threading.Event) -> None:
    """Keeps the peaks, and in `used` the CPU seconds of each process so far."""
    while not ended.wait(EVERY_S):
        found = {"peak_pss_mib": 0.0, "peak_rss_mib": 0.0}
        for process in tree(pid):
            try:
                memory, times = process.memory_full_info(), process.cpu_times()
            except psutil.Error:  # it ended between the two calls
                continue
            found["peak_pss_mib"] += memory.pss / MIB
            found["peak_rss_mib"] += memory.rss / MIB
            used[process.pid, process.create_time()] = times.user + times.system
        for name, value in found.items():
            peak[name] = max(peak[name], value)


def tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []
