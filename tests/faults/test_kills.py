"""A run that is broken off, anywhere, and the same command again: the lake of an unbroken run.

Two real kills on the way of one lake (the driver, Spark's JVM), and on another lake failpoints one after the other: the
run goes on from each to the next. `make soak` kills at random moments.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jobs import tables
from pipelines import embed
from schemas.errors import EXIT_FAILED
from schemas.lake import Lake
from tests.faults.fingerprint import Fingerprint, differences, drafts, fingerprint
from tests.faults.kills import kill, last_line, stage_now, victim, wait_until
from tests.faults.observed import versions
from tests.faults.tiny import Tiny, start, tiny
from tests.pipelines.command_line import answer_of, shared_engines

pytestmark = pytest.mark.long


class BrokenOff(BaseException):
    """Stands for a kill: nothing of the program catches it."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path, engines: Any) -> Fingerprint:
    made = tiny(tmp_path_factory.mktemp("unbroken"), database=migrated_database)
    finish(made, engines)
    return fingerprint(made.lake)


def finish(deployment: Tiny, engines: Any) -> None:
    with shared_engines(engines, deployment.folder):
        answer_of(["run", "--quiet", *deployment.arguments], deployment.folder)


@contextmanager
def breaking(owner: Any, name: str, *words: str, after: bool = False) -> Iterator[None]:
    """The function `owner.name` is broken off where its arguments name one of `words`: before its work, or after it."""
    whole = getattr(owner, name)

    def broken(*arguments: Any, **named: Any) -> Any:
        meant = any(isinstance(argument, str) and argument in words for argument in arguments)
        answer = None if meant and not after else whole(*arguments, **named)
        if meant:
            raise BrokenOff
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, broken)
        yield


def test_broken_off_between_any_two_steps_the_same_command_ends_in_the_same_lake(
    unbroken: Fingerprint, engines: Any, tmp_path: Path, migrated_database: Path
) -> None:
    deployment = tiny(tmp_path / "tiny", database=migrated_database)
    failpoints = [
        breaking(tables, "replace_days", "impressions", after=True),  # of one stage, the first table is there
        breaking(Lake, "write_manifest", "ingest"),  # every table is there, its memory is not
        breaking(embed, "replace_days", "item_embeddings", after=True),  # a table is there, MLflow has no run
        breaking(Lake, "write_manifest", "tokenize", after=True),  # the codebook is there, no item has codes
        breaking(Lake, "write_manifest", "align", after=True),  # complete, MLflow has no run
        breaking(Lake, "write_manifest", "register"),  # the version is champion, the artifact is not complete
    ]
    for failpoint in failpoints:
        with failpoint, shared_engines(engines, deployment.folder), pytest.raises(BrokenOff):
            answer_of(["run", "--quiet", *deployment.arguments], deployment.folder)
    finish(deployment, engines)
    assert differences(fingerprint(deployment.lake), unbroken) == []
    assert drafts(deployment.lake) == []


def test_a_killed_jvm_and_a_killed_driver_leave_nothing_that_the_same_command_does_not_mend(
    unbroken: Fingerprint, engines: Any, tmp_path: Path, migrated_database: Path
) -> None:
    deployment = tiny(tmp_path / "tiny", database=migrated_database)
    assert killed(deployment, "jvm", "ingest") == EXIT_FAILED
    sentence = last_line(deployment.folder / "log.err")
    assert sentence.startswith("lazyrec: Spark's JVM ended")
    assert "the same command goes on" in sentence
    assert "Traceback" not in (deployment.folder / "log.err").read_text()
    assert killed(deployment, "driver", "sequences") == -signal.SIGKILL
    finish(deployment, engines)
    assert differences(fingerprint(deployment.lake), unbroken) == []
    assert drafts(deployment.lake) == []


def killed(deployment: Tiny, kind: str, stage: str) -> int:
    """The exit code of a run of which `kind` is killed in `stage`; every process of it is gone."""
    run = start(deployment, ["run"])

    def in_stage() -> bool:
        return run.poll() is not None or (stage_now(deployment) == stage and bool(versions(deployment.lake)))

    try:
        assert wait_until(in_stage, 240)
        found = None
        while found is None and run.poll() is None:
            found = victim(run, (kind,), random.Random(0))
        assert found is not None, "the run ended before the kill"
        code, living = kill(found[1], run)
    finally:
        run.kill()
    assert living == []
    return code
