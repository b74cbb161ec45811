"""`make faults`: every case played, and the page docs/faults.md on standard output.

It takes some minutes. The page names no time, process or folder of the machine that made it, so that it changes only
with what the program does. Where no small disk may be mounted, that row says so.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipelines.engines import Engines
from schemas.config import ResourceConfig
from schemas.errors import EXIT_DONE
from tests.faults.cases import CASES, Case
from tests.faults.full_disk import NoSmallDisk
from tests.faults.kills import below, kill, kind_of, last_line, wait_until
from tests.faults.observed import deployment_of, general, play, state, versions
from tests.faults.tiny import DAYS, Tiny, printed, start, tiny

HEAD = """# When something goes wrong

Made by `make faults`; `tests/faults/cases.py` says what each fault is, `make soak` kills whole runs at random moments.
The commands run on a small log of three days. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 75 retry later.
A run that failed or was killed is repaired by the same command.

| fault | what was done | command | exit | last line printed | state after |
|---|---|---|---|---|---|
"""
RESOURCES = ResourceConfig(spark_master="local[2]", spark_heap="1g", spark_partitions=2, ray_cpus=2, object_store_mb=100)
Line = tuple[str, str, str, int, str, str]


def main() -> int:
    engines = Engines(RESOURCES)
    sys.stdout.write(HEAD)
    with tempfile.TemporaryDirectory(prefix="lazyrec_faults_") as name:
        for line in lines(Path(name), engines):
            cells = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in line)
            sys.stdout.write(f"| {' | '.join(cells)} |\n")
            sys.stdout.flush()
    return 0


def lines(folder: Path, engines: Engines) -> Iterator[Line]:
    ingested = tiny(folder / "ingested", DAYS[:3])
    start(ingested, ["ingest"]).wait()
    try:
        for number, case in enumerate(CASES):
            yield played(case, folder / str(number), ingested, engines)
    finally:
        engines.stop()
    yield without_java(tiny(folder / "no_java", DAYS[:3]))
    for kind in ("jvm", "driver"):
        yield killed(kind, tiny(folder / kind, DAYS[:3]))


def played(case: Case, folder: Path, ingested: Tiny, engines: Engines) -> Line:
    command = f"`lazyrec {' '.join(case.command)}`"
    try:
        seen = play(case, deployment_of(case, folder, ingested), engines)
    except NoSmallDisk:
        return case.name, case.done, command, case.code, "(not played: no small disk may be mounted here)", ""
    return case.name, case.done, command, seen.code, seen.printed, state(seen)


def without_java(deployment: Tiny) -> Line:
    environment = {"PATH": str(Path(sys.executable).parent), "JAVA_HOME": ""}
    code = start(deployment, ["ingest"], {**os.environ, **environment}).wait()
    sentence = general(last_line(deployment.folder / "log.err"), deployment.folder)
    return "no Java", "a PATH without java", "`lazyrec ingest`", code, sentence, "no table"


def killed(kind: str, deployment: Tiny) -> Line:
    """Kills a process in the middle of ingest and runs the same command again."""
    run = start(deployment, ["ingest"])

    def victims() -> list[psutil.Process]:
        return [process for process in below(run.pid) if kind_of(process, run.pid) == kind]

    wait_until(lambda: bool(victims()) and any("ingest" in line for line in printed(deployment)), 120)
    wait_until(lambda: bool(versions(deployment.lake)) or run.poll() is not None, 120)  # the first table is begun
    time.sleep(0.2)
    code, living = kill(victims()[0], run)
    sentence = general(last_line(deployment.folder / "log.err"), deployment.folder)
    if code < 0:  # as a shell says it; a killed program has no last word
        code, sentence = 128 - code, "(its progress up to the kill)"
    again = start(deployment, ["ingest"]).wait()
    rows = deployment.lake.row_count("impressions") if again == EXIT_DONE else 0
    after = f"{len(living)} processes left; the same command again: exit {again}, {rows} impressions"
    return f"killed {kind}", f"kill -9 of the {kind} in the middle of ingest", "`lazyrec ingest`", code, sentence, after


if __name__ == "__main__":
    sys.exit(main())
