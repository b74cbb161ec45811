"""A run that is broken off, again and again, and the same command each time: in the end the lake of an unbroken run.

One lake on its way meets two real kills (Spark's JVM in mid-write, the driver in mid-step) and failpoints between any two
steps of a stage. `make soak` kills at random moments.
"""

from __future__ import annotations

import random
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from jobs import rewards, tables
from pipelines import embed
from schemas.errors import EXIT_FAILED
from schemas.lake import Lake
from tests.faults.fingerprint import Fingerprint, differences, drafts, fingerprint
from tests.faults.kills import kill, last_line, victim, wait_until
from tests.faults.observed import versions
from tests.faults.tiny import Tiny, start, tiny
from tests.pipelines.command_line import answer_of, shared_engines


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


@pytest.mark.long
@pytest.mark.timeout(1_200)
def test_killed_and_broken_off_all_the_way_a_lake_ends_as_that_of_an_unbroken_run(
    unbroken: Fingerprint, engines: Any, tmp_path: Path, migrated_database: Path
) -> None:
    deployment = tiny(tmp_path / "tiny", database=migrated_database)
    assert killed(deployment, "jvm", when=lambda: bool(versions(deployment.lake))) == EXIT_FAILED
    sentence = last_line(deployment.folder / "log.err")
    assert sentence.startswith("lazyrec: Spark's JVM ended")
    assert "the same command goes on" in sentence
    assert "Traceback" not in (deployment.folder / "log.err").read_text()
    for failpoint in (
        breaking(tables, "replace_days", "impressions", after=True),  # of one stage, the first table is there
        breaking(Lake, "write_manifest", "ingest"),  # every table is there, its memory is not
        breaking(embed, "replace_days", "item_embeddings", after=True),  # a table is there, MLflow has no run
        breaking(Lake, "write_manifest", "tokenize", after=True),  # the codebook is there, no item has codes
        breaking(rewards, "replace_days", "rewards", after=True),  # the last table before training
    ):
        break_off(deployment, engines, failpoint)
    assert killed(deployment, "driver", when=lambda: bool(checkpoints(deployment))) == -signal.SIGKILL
    for failpoint in (
        breaking(Lake, "write_manifest", "align", after=True),  # complete, MLflow has no run
        breaking(Lake, "write_manifest", "register"),  # the version is champion, the artifact is not complete
    ):
        break_off(deployment, engines, failpoint)
    with closing(sqlite3.connect(deployment.database)) as database, database:
        # As a kill leaves it: MLflow ends the run with the model that is logged, and nobody is left to say that it failed.
        assert database.execute("UPDATE runs SET status = 'FINISHED' WHERE name = 'register'").rowcount == 1
    finish(deployment, engines)
    assert differences(fingerprint(deployment.lake), unbroken) == []
    assert drafts(deployment.lake) == []


def break_off(deployment: Tiny, engines: Any, failpoint: AbstractContextManager[None]) -> None:
    with failpoint, shared_engines(engines, deployment.folder), pytest.raises(BrokenOff):
        answer_of(["run", "--quiet", *deployment.arguments], deployment.folder)


def checkpoints(deployment: Tiny) -> list[Path]:
    """The states of training on the way."""
    return list(deployment.lake.artifact("train", "any").parent.glob("*/checkpoints"))


def killed(deployment: Tiny, kind: str, when: Callable[[], bool]) -> int:
    """The exit code of a run of which `kind` is killed then; every process of it is gone."""
    run = start(deployment, ["run"])
    try:
        assert wait_until(lambda: run.poll() is not None or when(), 240)
        found = None
        while found is None and run.poll() is None:
            found = victim(run, (kind,), random.Random(0))
        assert found is not None, "the run ended before the kill"
        code, living = kill(found[1], run)
    finally:
        run.kill()
    assert living == []
    return code
