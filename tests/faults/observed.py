"""One case played within this process on shared engines, and what came of it."""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main
from schemas.lake import Lake
from tests.faults.cases import Case
from tests.faults.tiny import DAYS, Tiny, tiny
from tests.pipelines.command_line import shared_engines

Versions = dict[str, int]


@dataclass(frozen=True)
class Observed:
    code: int
    printed: str  # the last line on standard error, without what differs from machine to machine
    traceback: bool
    before: Versions
    after: Versions
    rows: str  # where they went


def deployment_of(case: Case, folder: Path, ingested: Tiny) -> Tiny:
    """Three days; with the lake of `ingested` where the case asks for it."""
    made = tiny(folder, DAYS[:3])
    if case.ingested:
        shutil.copytree(ingested.folder / "lake", folder / "lake")
    return made


def play(case: Case, deployment: Tiny, engines: Any) -> Observed:
    with ExitStack() as stack:
        stack.enter_context(shared_engines(engines, deployment.folder))
        case.make(deployment, stack)
        before = versions(deployment.lake)
        error = io.StringIO()
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sys, "stderr", error)
        patch.setattr(sys, "stdout", io.StringIO())
        code = main([*case.command, *deployment.arguments])
        after = versions(deployment.lake)
        text = error.getvalue()
        rows = rows_of(deployment) if code == 0 and case.writes else ""
    lines = [line for line in text.splitlines() if line.strip()]
    line = general(lines[-1] if lines else "", deployment.folder)
    return Observed(code, line, "Traceback" in text, before, after, rows)


def versions(lake: Lake) -> Versions:
    """By the names of the newest files of the logs, since a table may be one that cannot be opened."""
    found = {}
    for log in sorted(Path(lake.root).glob("*/_delta_log")):
        found[log.parent.name] = max((int(path.stem) for path in log.glob("*.json")), default=-1)
    return found


def rows_of(deployment: Tiny) -> str:
    """Rows in = kept + duplicates + rejected, with the reasons."""
    lake = deployment.lake
    read = sum(len(path.read_text().splitlines()) - 1 for path in deployment.source.glob("day_*.csv"))
    kept = lake.row_count("impressions")
    refused = lake.open("rejected_rows").to_pyarrow_dataset().to_table(columns=["reason"]).column("reason").to_pylist()
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(Counter(refused).items()))
    duplicates = read - kept - len(refused)
    sums = f"{read} rows = {kept} kept + {duplicates} duplicates + {len(refused)} rejected"
    return f"{sums} ({reasons})" if reasons else sums


def general(line: str, folder: Path) -> str:
    """Without this machine's folders, hosts, process numbers and times."""
    for path in (str(folder.resolve()), str(folder)):
        line = line.replace(path, "FOLDER")
    line = re.sub(r"process \d+ on \S+?([)\s])", r"process N on HOST\1", line)
    line = re.sub(r"temporary files in \S+;", "temporary files in TMP;", line)
    line = re.sub(r"^ *\d+\.\d+s  ", "", line)
    return re.sub(r"in \d+\.\d s", "in N s", line)


def state(observed: Observed) -> str:
    """What the lake is like afterwards, in words."""
    if observed.rows:
        return observed.rows
    if not observed.after:
        return "no table"
    if observed.after == observed.before:
        return "every table as before"
    changed = [name for name, version in observed.after.items() if version != observed.before.get(name)]
    return f"{', '.join(changed)} committed, the others as before"
