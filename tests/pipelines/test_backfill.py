"""Late and corrected days: a backfill leaves the Spark tables of a lake that was built from the right log in one pass,
touches no earlier day, and gives no day another role than the runs gave it."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from pipelines import steps
from pipelines.backfill import stages_to_run
from pipelines.engines import Engines
from pipelines.progress import Progress
from pipelines.runner import Runner
from pipelines.steps import whole_run
from schemas.calendar import before_training, log_calendar
from schemas.config import Config, OrganiseConfig
from schemas.errors import EXIT_DONE, EXIT_FAILED, EXIT_RETRY, EXIT_USAGE
from schemas.lake import Lake
from schemas.lineage import FEATURES, STAGES, StagePlan, plan
from schemas.tables import PARTITION
from tests.faults.fingerprint import artifacts, rows_digest
from tests.faults.tiny import DAYS, Tiny, day_rows, tiny, write_rows
from tests.pipelines.command_line import answer_of, shared_engines
from tests.pipelines.test_plan_view import config_of
from tests.schemas import test_lineage as invented

LATE, CORRECTED = DAYS[1], DAYS[2]
LOG = DAYS[:4]
SPARK = [spec for spec in FEATURES if spec.engine == "spark"]
BUILT = ["ingest", *(spec.name for spec in SPARK if not spec.switch)]
TABLES = ["impressions", "rejected_rows", "items", "users"]
TABLES += [table for spec in SPARK if not spec.switch for table in spec.outputs]
PICKY = ["--set", "guard.enabled=true", "--set", "guard.days=1", "--set", "guard.rows_at_least=1.0"]  # refuses LATE
FEW = 300  # rows of LATE; other days have 360
Row = dict[str, Any]


class BrokenOff(BaseException):
    """Stands for a kill: nothing of the program catches it."""


def broken_off(*arguments: Any, **named: Any) -> None:
    raise BrokenOff


def rows_of(day: datetime.date) -> list[Row]:
    """The right log. A user and an item that no catalogue knows come on LATE and on the last day alone."""
    rows = day_rows(day)[: FEW if day == LATE else None]
    strange = rows[0] | {"user_id": 770, "item_id": 9000, "ts": f"{day}T12:00:00Z"}
    return [*rows, strange] if day in (LATE, LOG[-1]) else rows


def deployment_of(folder: Path, database: Path, days: Iterable[datetime.date] = LOG) -> Tiny:
    made = tiny(folder, (), database)
    for day in days:
        write_day(made, day, rows_of(day))
    return made


def write_day(deployment: Tiny, day: datetime.date, rows: list[Row]) -> None:
    write_rows(deployment.source / f"day_{day}.csv", rows)


def build(deployment: Tiny) -> None:
    """Each stage in one pass."""
    for stage in BUILT:
        answer_of([stage, "--quiet", *deployment.arguments], deployment.folder)


def backfill(deployment: Tiny, *arguments: str, code: int = EXIT_DONE) -> dict[str, Any]:
    return answer_of(["backfill", "--quiet", *deployment.arguments, *arguments], deployment.folder, code)


def files_of(lake: Lake, days: Container[datetime.date]) -> dict[str, set[str]]:
    """The data files of each table in the partitions of `days`."""
    found = {}
    for table in lake.tables():
        files = lake.open(table).get_add_actions(flatten=True)
        dates, paths = (files.column(name).to_pylist() for name in (f"partition.{PARTITION}", "path"))
        found[table] = {path for date, path in zip(dates, paths, strict=True) if date in days}
    return found


def assert_same(lake: Lake, other: Lake) -> None:
    """Equal identities and rows in every Spark table."""
    for table in TABLES:
        assert lake.identities(table) == other.identities(table), table
        assert rows_digest(lake, table) == rows_digest(other, table), table


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path, engines: Any) -> Lake:
    """The right log in one pass."""
    made = deployment_of(tmp_path_factory.mktemp("complete") / "tiny", migrated_database)
    with shared_engines(engines, made.folder):
        build(made)
    return made.lake


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path, engines: Any) -> Iterator[dict[str, Any]]:
    """A lake that was built without LATE and with half of CORRECTED. Its backfill is refused by the guard, twice, accepted,
    broken off, and then goes on to its end."""
    made = deployment_of(tmp_path_factory.mktemp("late") / "tiny", migrated_database, (LOG[0], LOG[3]))
    write_day(made, CORRECTED, day_rows(CORRECTED)[::2])
    arguments = ["--from", str(LATE), "--to", str(CORRECTED), "--set", "lifelong.enabled=true"]
    found: dict[str, Any] = {"deployment": made, "lake": made.lake}
    with shared_engines(engines, made.folder):
        build(made)
        found["before"] = files_of(made.lake, LOG[:1])
        for day in (LATE, CORRECTED):
            write_day(made, day, rows_of(day))
        for _ in range(2):
            assert backfill(made, *arguments, *PICKY, code=EXIT_FAILED) == {}
            assert LATE in made.lake.identities("impressions") and LATE not in made.lake.identities("user_sequences")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(BrokenOff):
            patch.setattr("jobs.organise.replace_days", broken_off)
            backfill(made, *arguments)
        found["answer"] = backfill(made, *arguments)
        found["again"] = backfill(made, *arguments, *PICKY)
        yield found


@pytest.mark.long
def test_the_lake_is_that_of_the_right_log_in_one_pass(late: dict[str, Any], complete: Lake) -> None:
    """Days after the range too, whose context, users and items have changed."""
    assert_same(late["lake"], complete)


@pytest.mark.long
def test_no_day_before_the_range_is_written_again(late: dict[str, Any]) -> None:
    assert late["before"] == files_of(late["lake"], LOG[:1])
    assert all(late["before"][table] for table in TABLES if table not in ("rejected_rows", "item_pairs"))


@pytest.mark.long
def test_the_answer_says_what_was_written_and_what_is_stale_now(late: dict[str, Any]) -> None:
    answer = late["answer"]
    assert (answer["stage"], answer["status"]) == ("backfill", "done")
    assert set(answer["seconds"]) == {"ingest", *(spec.name for spec in SPARK), "total"}
    # What was made before the kill stays, so that this command had the last two tables to make.
    assert answer["days"] == {table: list(map(str, LOG[1:])) for table in ("training_examples", "rewards")}
    for table, days in answer["days"].items():
        by_day = late["lake"].rows_by_day(table)
        assert answer["rows"][table] == sum(by_day[datetime.date.fromisoformat(day)] for day in days)
        assert answer["tables"][table] == late["lake"].version(table)
    assert answer["left"]["lifelong"] == f"item_embeddings has no partition {LOG[1]}"
    on = [spec.name for spec in STAGES if spec.switch in ("", "lifelong")]
    assert answer["would_run"] == [name for name in on if name not in BUILT]


@pytest.mark.long
def test_the_same_again_is_skipped_and_asks_the_guard_no_more(late: dict[str, Any]) -> None:
    again = late["again"]
    assert again["status"] == "skipped"
    assert again["days"] == again["rows"] == again["tables"] == {}
    assert set(again["seconds"]) == set(late["answer"]["seconds"])


@pytest.mark.long
def test_every_stage_is_a_nested_run_of_one_parent(late: dict[str, Any]) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{late['deployment'].database}")
    experiment = client.get_experiment_by_name("tiny").experiment_id
    stages = client.search_runs([experiment], "tags.stage != ''", order_by=["start_time DESC"])
    newest = next(run for run in stages if run.data.tags["stage"] == "rewards")
    nested = [run for run in stages if run.data.tags["mlflow.parentRunId"] == newest.data.tags["mlflow.parentRunId"]]
    assert {run.data.tags["stage"]: run.info.status for run in nested} == dict.fromkeys(("organise", "rewards"), "FINISHED")
    assert not client.search_runs([experiment], "attributes.status = 'RUNNING'")


def test_a_log_still_too_short_for_the_split_is_backfilled_all_the_same(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    lake, runner = Lake(config.lake), Runner(config, Lake(config.lake), Engines(config.resources), Progress(quiet=True))
    ingest_day(lake, LOG[0])
    made = backfilled(lake, config, LOG[0])
    assert {table: days for table, days in made.items() if days != [LOG[0]]} == {}
    assert set(made) == {table for spec in SPARK if spec.name != "lifelong" for table in spec.outputs}
    assert stages_to_run(runner) == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--from", "yesterday"], EXIT_USAGE, "--from is 'yesterday'; write a date as YYYY-MM-DD"),
        (["--from", str(LATE), "--to", "2026-03-32"], EXIT_USAGE, "--to is '2026-03-32'"),
        (["--from", str(DAYS[2]), "--to", str(LATE)], EXIT_USAGE, f"--to {LATE} is before --from {DAYS[2]}"),
        ([], EXIT_USAGE, "--from"),
        (["--from", str(DAYS[4])], EXIT_RETRY, f"The log holds no day from {DAYS[4]} on: it holds {DAYS[0]} to {DAYS[3]}"),
        (["--from", "2026-01-01", "--to", "2026-01-31"], EXIT_RETRY, "no day from 2026-01-01 to 2026-01-31"),
    ],
)
def test_a_wrong_range_is_one_sentence_and_a_code(
    late: dict[str, Any], arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    backfill(late["deployment"], *arguments, code=code)
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lazyrec: ")]
    assert words in sentence


def organised_by_user() -> Config:
    return dataclasses.replace(Config(), organise=OrganiseConfig(organiser="user_centric"))


def built_with_nights(lake: Lake, config: Config, nights: list[datetime.date]) -> None:
    """A whole run over the invented days, and then `nights`."""
    invented.ingest(lake)
    for spec in FEATURES:
        invented.build(lake, spec, config)
        if spec.name == "tokenize":
            lake.write_manifest("tokenize", lake.identities("semantic_ids")[invented.CALENDAR.fit_day], {})
    for night in nights:
        ingest_day(lake, night)
        for planned in night_plans(lake, config, night):
            commit(lake, planned)


def ingest_day(lake: Lake, day: datetime.date, content: str = "") -> None:
    for table in ("impressions", "items", "users"):
        invented.commit(lake, table, {day: f"{table}{day}{content}"})


def night_plans(lake: Lake, config: Config, night: datetime.date) -> Iterator[StagePlan]:
    """The feature stages of a night, each planned after those before it were committed."""
    calendar = before_training(lake.identities("impressions"), night, invented.CALENDAR.fit_day, invented.DAYS[-1])
    for spec in FEATURES:
        yield plan(spec, config, lake, calendar, only=(night,))


def commit(lake: Lake, planned: StagePlan) -> None:
    for table, days in planned.todo.items():
        if days:
            invented.commit(lake, table, {day: planned.expected[table][day] for day in days})


def backfilled(lake: Lake, config: Config, first: datetime.date) -> dict[str, list[datetime.date]]:
    """What a backfill makes, by table; what it leaves is not among it."""
    made = {}
    for step in steps.backfill(config, lake, first):
        planned = plan(step.spec, config, lake, step.calendar, only=step.only)
        if not planned.missing:
            made.update({table: list(days) for table, days in planned.todo.items()})
            commit(lake, planned)
    return made


def day_after(days: int) -> datetime.date:
    return invented.DAYS[-1] + datetime.timedelta(days=days)


def test_days_keep_the_roles_that_the_runs_gave_them(lake: Lake) -> None:
    config, nights = organised_by_user(), [day_after(1), day_after(2)]
    built_with_nights(lake, config, nights)
    assert not any(backfilled(lake, config, invented.DAYS[0]).values())
    by_the_log = {step.spec.name: step for step in whole_run(log_calendar(config, lake))}["organise"]
    assert not plan(by_the_log.spec, config, lake, by_the_log.calendar).done  # which would have moved the fit day

    invented.ingest(lake, changed={invented.DAYS[2]: "corrected", invented.DAYS[4]: "corrected"})
    later = [*invented.DAYS[4:], *nights]
    before = {table: lake.identities(table) for table in lake.tables()}
    made = backfilled(lake, config, invented.DAYS[4])
    assert made["user_sequences"] == [invented.DAYS[4]]
    assert made["user_features"] == made["training_examples"] == made["rewards"] == later
    earlier = [d for d in invented.DAYS if d < invented.DAYS[4]]
    for table, identities in before.items():  # stale since the other correction, and left so
        assert [lake.identities(table).get(d) for d in earlier] == [identities.get(d) for d in earlier], table
    assert not any(backfilled(lake, config, invented.DAYS[4]).values())
    assert backfilled(lake, config, invented.DAYS[2])["user_features"] == [*invented.DAYS[2:], *nights]
    ingest_day(lake, day_after(3))
    for planned in night_plans(lake, config, day_after(3)):
        assert not planned.missing
        commit(lake, planned)


def test_a_night_goes_on_without_the_codes_of_a_day_that_came_too_late_for_them(lake: Lake) -> None:
    config = Config()
    built_with_nights(lake, config, [day_after(2)])
    ingest_day(lake, day_after(1))
    ingest_day(lake, day_after(3))
    backfilled(lake, config, day_after(1))
    assert day_after(1) in lake.identities("rewards")
    for planned in night_plans(lake, config, day_after(3)):
        assert not planned.missing, planned.missing
        commit(lake, planned)
    assert day_after(1) not in lake.identities("semantic_ids")


def test_a_night_that_was_left_out_is_waited_for(lake: Lake) -> None:
    config = Config()
    built_with_nights(lake, config, [])
    ingest_day(lake, day_after(1))
    ingest_day(lake, day_after(2))
    backfilled(lake, config, day_after(1))
    missing = {planned.spec.name: planned.missing for planned in night_plans(lake, config, day_after(2))}
    assert missing["tokenize"] == [f"item_embeddings has no partition {day_after(1)}"]


@pytest.mark.long
def test_between_nights_the_next_night_and_the_plan_accept_what_it_leaves(
    tmp_path: Path, migrated_database: Path, engines: Any
) -> None:
    """A night passes over a day that comes late, and a day before the fit is corrected."""
    skipped, nights = DAYS[4], (DAYS[5], DAYS[6])
    made, right = (deployment_of(tmp_path / name, migrated_database) for name in ("late", "right"))
    write_day(made, CORRECTED, day_rows(CORRECTED)[::2])
    run = ["run", "--quiet", *made.arguments]
    with shared_engines(engines, made.folder):
        assert answer_of(run, made.folder)["status"] == "done"
        made.add_day(nights[0])
        assert answer_of([*run, "--date", str(nights[0])], made.folder)["status"] == "done"
        earlier, fitted = files_of(made.lake, DAYS[:2]), fitted_of(made.lake)
        write_day(made, CORRECTED, rows_of(CORRECTED))
        strange = [row | {"item_id": 9001} for row in day_rows(skipped)[:20]]
        write_day(made, skipped, [*day_rows(skipped), *strange])
        answer = backfill(made, "--from", str(CORRECTED), "--to", str(skipped))
        assert answer["days"]["impressions"] == [str(CORRECTED), str(skipped)]
        assert {"embed", "tokenize", "train"} <= set(answer["would_run"]) and not set(BUILT) & set(answer["would_run"])
        assert (files_of(made.lake, DAYS[:2]), fitted_of(made.lake)) == (earlier, fitted)
        for day in (skipped, nights[0]):
            write_day(right, day, [*day_rows(day), *(strange if day == skipped else [])])
    with shared_engines(engines, right.folder):
        build(right)
    assert_same(made.lake, right.lake)
    with shared_engines(engines, made.folder):
        made.add_day(nights[1])
        night = [*run, "--date", str(nights[1])]
        assert [answer_of(night, made.folder)["status"] for _ in range(2)] == ["done", "skipped"]
        assert backfill(made, "--from", str(LATE))["status"] == "skipped"


def fitted_of(lake: Lake) -> dict[str, Any]:
    """What a backfill leaves alone."""
    return {"artifacts": artifacts(lake), "tables": [lake.version(t) for t in ("item_embeddings", "semantic_ids")]}
