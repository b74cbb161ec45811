"""`make soak`: kill -9 at random moments, the same command again, and the same lake in the end; then nights in a row.

    python -m tests.faults.soak --kills 100 --nights 10 --seed 0

An unbroken run into one lake is the reference. Into another, empty one the same command runs and is killed, goes on and is
killed, until it ends before its kill, or has been killed a few times; then the two lakes must hold the same
(`tests.faults.fingerprint`). A kill hits the driver, the Spark JVM or a process of Ray, at a moment that is uniform over
the time that is left by the reference's pace, or over that of one stage that is left, each as likely. Nothing of a killed
run may live on.
The nights follow a whole run, a file a night, with a kill on every third. Exits 1 where anything is not as it must be.
"""

from __future__ import annotations

import argparse
import datetime
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from schemas.errors import EXIT_DONE
from tests.faults.fingerprint import Fingerprint, differences, drafts, fingerprint
from tests.faults.kills import KINDS, PATIENCE, kill, last_line, stage_lines, stage_now, stage_seconds, victim, wait_until
from tests.faults.tiny import BASE, DAYS, USERS, Tiny, start, tiny

TRIES = 3  # of the same command after a kill
CHAIN = 8  # kills of one lake at most


@dataclass
class Seen:
    """What the soak saw, in lines and in counts."""

    faults: int = 0
    killed: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind and stage

    @property
    def kills(self) -> int:
        return sum(self.killed.values())

    def say(self, line: str, faults: Sequence[str] = ()) -> None:
        self.faults += bool(faults)
        sys.stdout.write(f"{line}{'; NOT AS IT MUST BE: ' + ', '.join(faults) if faults else ''}\n")
        sys.stdout.flush()


def finish(deployment: Tiny, arguments: Sequence[str], seen: Seen) -> tuple[int, list[str]]:
    """Runs the command until it ends with 0; how often that took, and what is wrong."""
    for attempt in range(1, TRIES + 1):
        if start(deployment, arguments, log="again").wait() == EXIT_DONE:
            return attempt, []
        seen.say(f"    again: {last_line(deployment.folder / 'again.err')}")
    return TRIES, ["the same command does not end with 0"]


@dataclass(frozen=True)
class Moment:
    """Seconds after the start of a run, or of a stage of it."""

    seconds: float
    stage: str | None = None

    def comes(self, run: subprocess.Popen[str], deployment: Tiny) -> None:
        """Returns then, or at the run's end."""
        if self.stage is not None:
            wait_until(lambda: run.poll() is not None or stage_now(deployment) == self.stage, PATIENCE)
        wait_until(lambda: run.poll() is not None, self.seconds)


def killed_run(
    deployment: Tiny, arguments: Sequence[str], moment: Moment, chance: random.Random, seen: Seen
) -> tuple[str, int, list[str]]:
    """One run with one kill; what is said of it, its exit code, and what is wrong."""
    run = start(deployment, arguments)
    moment.comes(run, deployment)
    found = victim(run, KINDS, chance)
    stage = stage_now(deployment)
    if found is None or run.poll() is not None:
        code = run.wait()
        return "ended before its kill", code, [] if code == EXIT_DONE else [last_line(deployment.folder / "log.err")]
    kind, process = found
    code, living = kill(process, run)
    seen.killed[kind, stage] += 1
    words = last_line(deployment.folder / "log.err")
    faults = [f"lives on: {name}" for name in living]
    if code > 0 and not words.startswith("lazyrec: "):
        faults.append("no sentence")
    return f"kill {seen.kills}: {kind}, {stage}: exit {code}, {words!r}", code, faults


def soak_kills(folder: Path, kills: int, chance: random.Random, seen: Seen) -> None:
    reference = tiny(folder / "reference")
    started = time.monotonic()
    code = start(reference, ["run"]).wait()
    seconds = time.monotonic() - started
    if code != EXIT_DONE:
        seen.say(f"reference: exit {code}", [last_line(reference.folder / "log.err")])
        return
    wanted = fingerprint(reference.lake)
    seen.say(f"reference: exit 0 in {seconds:.1f} s")
    stages = stage_seconds(reference)
    start_up = seconds - sum(stages.values())
    broken = tiny(folder / "broken")
    while seen.kills < kills:
        broken.forget()
        seen.say("an empty lake")
        code, left = 1, stages
        for _ in range(min(CHAIN, kills - seen.kills)):
            said, code, faults = killed_run(broken, ["run"], any_moment(start_up, left, chance), chance, seen)
            seen.say(f"  {said}", faults)
            ended = {stage for _, stage, ends in stage_lines(broken) if ends}
            left = {stage: taken for stage, taken in left.items() if stage not in ended}
            if code == EXIT_DONE or not left:
                break
        unfinished = [] if code == EXIT_DONE else finish(broken, ["run"], seen)[1]
        faults = unfinished or compared(broken, wanted)
        seen.say("  the lake is not the reference's" if faults else "  equal to the reference", faults)


def any_moment(start_up: float, stages: Mapping[str, float], chance: random.Random) -> Moment:
    if chance.random() < 0.5:
        return Moment(chance.uniform(0, start_up + sum(stages.values())))
    stage = chance.choice(sorted(stages))
    return Moment(chance.uniform(0, stages[stage]), stage)


def compared(deployment: Tiny, wanted: Fingerprint) -> list[str]:
    faults = [f"{what} differ(s)" for what in differences(fingerprint(deployment.lake), wanted)]
    return faults + [f"draft {path}" for path in drafts(deployment.lake)]


def soak_nights(folder: Path, nights: int, chance: random.Random, seen: Seen) -> None:
    deployment = tiny(folder / "nights")
    code = start(deployment, ["run"]).wait()
    seen.say(f"nights: whole run over {len(BASE)} days: exit {code}", [] if code == EXIT_DONE else ["no 0"])
    codes, seconds = codes_of(deployment), 60.0
    for number, day in enumerate(DAYS[len(BASE) : len(BASE) + nights], 1):
        deployment.add_day(day)
        arguments, said, faults = ["run", "--date", str(day)], "", []
        if number % 3 == 0:
            said, _, faults = killed_run(deployment, arguments, Moment(chance.uniform(0, seconds)), chance, seen)
            said = f" {said}; then"
        started = time.monotonic()
        attempts, unfinished = finish(deployment, arguments, seen)
        seconds = time.monotonic() - started
        faults += unfinished or night_faults(deployment, day, codes)
        codes = codes_of(deployment)
        seen.say(f"night {number}, {day}:{said} {attempts} run(s), {len(codes)} items", faults)


def codes_of(deployment: Tiny) -> dict[int, str]:
    rows = deployment.lake.open("semantic_ids").to_pyarrow_dataset().to_table().to_pylist()
    return {row["item_id"]: f"{row['codes']} {row['rank']} {row['codebook_version']}" for row in rows}


def night_faults(deployment: Tiny, day: datetime.date, before: dict[int, str]) -> list[str]:
    """What is not as a night must leave it."""
    lake, faults = deployment.lake, []
    now = codes_of(deployment)
    if any(now.get(item) != codes for item, codes in before.items()):
        faults.append("a code moved")
    newest = lake.manifest("align", lake.newest_artifact("align") or "") or {}
    if newest.get("trained_until") != str(day):
        faults.append(f"the candidate is trained until {newest.get('trained_until')}")
    shown = lake.open("recommendations").to_pyarrow_dataset().to_table(columns=["user_id", "date"]).to_pylist()
    users = {row["user_id"] for row in shown if row["date"] == day}
    if len(users) != USERS:
        faults.append(f"{len(users)} of {USERS} users have recommendations")
    return faults + [f"draft {path}" for path in drafts(lake)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.faults.soak", description="kills, nights, and what they leave")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--nights", type=int, default=10, help=f"at most {len(DAYS) - len(BASE)}")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    seen, chance = Seen(), random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="lazyrec_soak_") as folder:
        if options.kills:
            soak_kills(Path(folder), options.kills, chance, seen)
        if options.nights:
            soak_nights(Path(folder), options.nights, chance, seen)
    for (kind, stage), count in sorted(seen.killed.items()):
        seen.say(f"{count:4d}  {kind} in {stage}")
    seen.say(f"{seen.kills} kills, {options.nights} nights, {seen.faults} not as they must be")
    return 1 if seen.faults else 0


if __name__ == "__main__":
    sys.exit(main())
