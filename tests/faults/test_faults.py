"""Bad input and a broken surrounding: one sentence, the right exit code, and a lake as it was."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from schemas.config import Config
from schemas.errors import EXIT_FAILED
from schemas.lake import Lake
from schemas.outages import outage_of
from tests.faults.cases import CASES, FILES, LAKES, NIGHTS, USAGE, WAITING, Case
from tests.faults.full_disk import NoSmallDisk
from tests.faults.observed import deployment_of, play
from tests.faults.tiny import DAYS, Tiny, printed, start, tiny
from tests.pipelines.command_line import answer_of, shared_engines


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory, engines: Any, migrated_database: Path) -> Tiny:
    """Three days of the log."""
    made = tiny(tmp_path_factory.mktemp("ingested"), DAYS[:3], migrated_database)
    with shared_engines(engines, made.folder):
        answer_of(["ingest", "--quiet", *made.arguments], made.folder)
    return made


@pytest.mark.parametrize(
    "case",
    [*USAGE, *FILES, *WAITING, *LAKES, *(pytest.param(case, marks=pytest.mark.long) for case in NIGHTS)],
    ids=lambda case: case.name,
)
def test_a_fault_is_one_sentence_with_its_code_and_changes_no_table(
    case: Case, ingested: Tiny, tmp_path: Path, engines: Any
) -> None:
    try:
        seen = play(case, deployment_of(case, tmp_path / "tiny", ingested), engines)
    except NoSmallDisk as reason:
        pytest.skip(f"this machine allows no small disk: {reason}")
    assert seen.code == case.code, seen.printed
    assert seen.printed.startswith("lazyrec: ")
    assert re.search(case.words, seen.printed), seen.printed
    assert not seen.traceback
    if not case.writes:
        assert seen.after == seen.before


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_without_java_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    deployment = tiny(tmp_path / "tiny", DAYS[:1])
    environment = {name: value for name, value in os.environ.items() if name != "JAVA_HOME"}
    run = start(deployment, ["ingest"], {**environment, "PATH": str(Path(sys.executable).parent), "JAVA_HOME": ""})
    assert run.wait() == EXIT_FAILED
    (sentence,) = [line for line in printed(deployment) if line.startswith("lazyrec: ")]
    assert "Spark needs Java" in sentence
    assert deployment.lake.tables() == []


def test_a_table_whose_creation_was_broken_off_is_created(lake: Lake) -> None:
    log = Path(lake.path("impressions")) / "_delta_log"
    log.mkdir(parents=True)
    (log / f".{0:020}.json.draft.tmp").write_text("{")
    assert not lake.exists("impressions")
    lake.create("impressions")
    assert lake.exists("impressions")
    assert lake.open("impressions").metadata().configuration["delta.constraints.ids_not_negative"]


def test_a_defect_keeps_its_traceback() -> None:
    assert outage_of(ValueError("an index out of range"), Config()) is None
    assert "No space" in str(outage_of(OSError(28, "No space left on device"), Config()))
