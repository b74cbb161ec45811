"""kill -9 of one process of a run, and what is left of it afterwards."""

from __future__ import annotations

import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from pipelines.cli import STAGE_NAMES
from tests.faults.tiny import Tiny, printed

KINDS = ("driver", "jvm", "ray worker", "raylet", "gcs_server")
LINE = re.compile(r"\s*([0-9.]+)s  (\w+)  (.*)")
PATIENCE = 240.0  # seconds until a run whose process was killed must have ended
LINGER = 30.0  # seconds that processes below it may take to end
# Where the whole of a local Ray dies at once, its agents call its dead GCS for a minute, and then end.
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


def below(driver: int) -> list[psutil.Process]:
    """The processes of a run: the driver and all below it."""
    try:
        process = psutil.Process(driver)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kind_of(process: psutil.Process, driver: int) -> str | None:
    if process.pid == driver:
        return "driver"
    try:
        name, command = process.name(), process.cmdline()
    except psutil.Error:
        return None
    if name == "java":
        return None if "-version" in command else "jvm"
    if name in KINDS:
        return name
    return "ray worker" if command and command[0].startswith("ray::") else None


def victim(run: subprocess.Popen[str], kinds: tuple[str, ...], chance: random.Random) -> tuple[str, psutil.Process] | None:
    """A process of one of `kinds`, each kind that is there as likely as another; None where there is none."""
    found: dict[str, list[psutil.Process]] = {}
    for process in below(run.pid):
        kind = kind_of(process, run.pid)
        if kind in kinds:
            found.setdefault(kind, []).append(process)
    if not found:
        return None
    kind = chance.choice(sorted(found))
    return kind, chance.choice(found[kind])


def stage_now(deployment: Tiny, log: str = "log") -> str:
    """The stage that the lines of progress show last; AFTER NAME between two."""
    now = "before the first"
    for _, stage, ends in stage_lines(deployment, log):
        now = f"after {stage}" if ends else stage
    return now


def stage_seconds(deployment: Tiny, log: str = "log") -> dict[str, float]:
    """How long each stage took by the lines of progress."""
    begun: dict[str, float] = {}
    taken = {}
    for moment, stage, ends in stage_lines(deployment, log):
        if ends and stage in begun:
            taken[stage] = moment - begun[stage]
        begun.setdefault(stage, moment)
    return taken


def stage_lines(deployment: Tiny, log: str = "log") -> Iterator[tuple[float, str, bool]]:
    """Seconds since the start, the stage, and whether it ends, of each line that tells of a stage's begin or end."""
    for line in printed(deployment, log):
        match = LINE.fullmatch(line)
        if match and match[2] in STAGE_NAMES:
            yield float(match[1]), match[2], match[3].startswith(("done", "skipped"))


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def kill(process: psutil.Process, run: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Kills a process of `run` and waits for the run's end; its exit code, and the processes that outlived it."""
    family = [member for member in below(run.pid) if not name_of(member).startswith(AGENTS)]
    process.kill()
    run.wait(PATIENCE)
    wait_until(lambda: not any(map(lives, family)), LINGER)
    living = [name_of(process) for process in family if lives(process)]
    return run.returncode, [name for name in living if not name.startswith(AGENTS)]  # one may have got its name since


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:60] or process.name()
    except psutil.Error:
        return str(process.pid)


def last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
