"""What a person sees while a run goes on: stage by stage on a terminal, plain lines elsewhere. Peak memory as well."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
from rich.console import Console

SAMPLE_SECONDS = 2.0


class Progress:
    """Lines on standard error, so that standard output ends with one JSON object and holds nothing odd."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=not sys.stderr.isatty())
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        elapsed = time.monotonic() - self._started
        self.console.print(f"[dim]{elapsed:7.1f}s[/dim]  {text}")

    @contextmanager
    def stage(self, name: str, summary: str) -> Iterator[None]:
        self.say(f"[bold]{name}[/bold]  {summary}")
        if self.console.is_terminal:
            with self.console.status(f"{name} ..."):
                yield
        else:
            yield


def answer_console(width: int) -> Console:
    """Standard output: as wide as the terminal, or `width` characters in a file or a pipe."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else width)


class MemoryWatch:
    """Peak resident memory of this process and all below it, sampled; shared pages counted once (PSS)."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.peak_bytes = max(self.peak_bytes, tree_bytes())
            self._stop.wait(SAMPLE_SECONDS)


def tree_bytes() -> int:
    """Proportional set size of this process and its descendants, in bytes."""
    own = psutil.Process()
    total = 0
    for process in (own, *own.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended, or is another user's: neither holds memory of this run that can be counted
    return total
