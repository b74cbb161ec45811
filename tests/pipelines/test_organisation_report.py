"""The organisation report against brute force and against the rows that the organisers really write."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pytest

from jobs.organisation_measures import ORGANISATIONS
from jobs.organisers import organised
from jobs.slices import SLICES
from jobs.tables import conform, replace_days
from pipelines import organisation_report
from schemas.config import Config, OrganiseConfig, SequencesConfig
from schemas.errors import EXIT_RETRY
from schemas.lake import Lake
from schemas.tables import TABLES, TRAINING_EXAMPLES
from tests.jobs import logs
from tests.pipelines.command_line import answer_of, shared_engines

DAYS = logs.days_from(3)
SETTINGS = OrganiseConfig(user_events=9)
CONFIG = Config(sequences=SequencesConfig(2, 3), organise=SETTINGS)
WAYS = {f"newest_only/{name}": ("newest_only", replace(SETTINGS, slice=name)) for name in SLICES}
WAYS |= {"user_centric": ("user_centric", SETTINGS), "naive": ("naive", SETTINGS)}


@dataclass
class Transition:
    """B after A, and when each organiser trains it: by naive first by its own impression, then by others."""

    event: logs.Event
    items: tuple[int, int]
    request_us: int
    trained: list[int]  # by naive


def a_log() -> list[logs.Event]:
    """Many users on few items within three hours a day, so that transitions are shared, tie and follow each other soon."""
    events = logs.random_log(51, users=12, days=3, items=4, requests=4)
    starts = [logs.midnight_us(e.date) for e in events]
    return [replace(e, ts_us=start + (e.ts_us - start) // 8) for e, start in zip(events, starts, strict=True)]


@pytest.fixture(scope="module")
def lake(spark, tmp_path_factory) -> Lake:
    found = Lake(str(tmp_path_factory.mktemp("report") / "lake"))
    rows = logs.reference_sequences(a_log(), [], Config())
    stamps = {day: f"sequences of {day}" for day in DAYS}
    replace_days(found, "user_sequences", logs.table_frame(spark, "user_sequences", rows), stamps)
    return found


@pytest.fixture(scope="module")
def report(engines, lake):
    """What is measured by CONFIG."""
    return organisation_report.measures(engines, lake, CONFIG, DAYS)


def transitions(events: list[logs.Event], config: Config) -> list[Transition]:
    """Every event with one before it, by looking at all events and all later contexts of its user."""
    found = []
    request_us = {
        e.impression_id: own[0].ts_us for own in logs.grouped(events, "user_id", "date", "request_id").values() for e in own
    }
    for own in logs.grouped(events, "user_id").values():
        contexts = []  # (time of the example, ids in its context) an impression
        for event in own:
            at = request_us[event.impression_id]
            short, positive = logs.tails([e for e in own if e.ts_us < at], config)
            contexts.append((at, {e.impression_id for e in (*short, *positive)}))
        for event in own:
            earlier = [e for e in own if e.ts_us < event.ts_us]
            if earlier:
                pair = {event.impression_id, earlier[-1].impression_id}
                at = request_us[event.impression_id]
                again = [time for time, context in contexts if pair <= context]
                found.append(Transition(event, (earlier[-1].item_id, event.item_id), at, [at, *again]))
    return found


def visible(found: list[Transition], place, training) -> int:
    """Trainings of a transition after one of the same by another user's later event. `place` is where the order of
    examples first trains a transition, `training` all places where it is trained."""
    alike = defaultdict(list)
    for one in found:
        alike[one.items].append(one)
    return sum(
        any(
            other.event.user_id != one.event.user_id and other.request_us > one.request_us and place(other) < at
            for other in alike[one.items]
        )
        for one in found
        for at in training(one)
    )


def slice_places(events: list[logs.Event], config: Config) -> dict[int, int]:
    """slice_us of each impression's example."""
    rows = logs.reference_examples(events, [], [], config)
    return {i: row["slice_us"] for row in rows for i in row["target_impression_ids"]}


def test_transitions_are_counted_as_by_brute_force(report):
    each = transitions(a_log(), CONFIG)
    times = [len(one.trained) for one in each]
    assert report["naive"]["trained"] == sum(times) > len(each)
    assert report["naive"]["trained_mean"] == pytest.approx(np.mean(times))
    assert report["naive"]["trained_p99"] == pytest.approx(np.percentile(times, 99))
    for name in ORGANISATIONS:
        assert report[name]["transitions"] == len(each)
        if name != "naive":
            assert (report[name]["trained_mean"], report[name]["trained_p99"]) == (1, 1)


def test_what_was_visible_too_early_is_counted_as_by_brute_force(spark, report):
    events = a_log()
    each = transitions(events, CONFIG)
    for name in SLICES:
        places = slice_places(events, replace(CONFIG, organise=replace(SETTINGS, slice=name)))
        expected = visible(each, lambda t: places[t.event.impression_id], lambda t: [places[t.event.impression_id]])  # noqa: B023
        assert report[f"newest_only/{name}"]["visible"] == expected
        assert (expected == 0) == (name == "request")
    users = spark.createDataFrame([(e.user_id,) for e in events], "user_id bigint").distinct()
    order = {row.user_id: row.hash for row in users.selectExpr("user_id", "xxhash64(user_id) hash").collect()}
    by_user = visible(each, lambda t: order[t.event.user_id], lambda t: [order[t.event.user_id]])
    assert report["user_centric"]["visible"] == by_user > 0
    assert report["naive"]["visible"] == visible(each, lambda t: t.request_us, lambda t: t.trained) > 0
    assert report["naive"]["visible_share"] == pytest.approx(report["naive"]["visible"] / report["naive"]["trained"])


@pytest.mark.parametrize("name", ORGANISATIONS)
def test_sizes_are_those_of_the_rows_that_the_organiser_makes(spark, report, name):
    organiser, settings = WAYS[name]
    sequences = logs.table_frame(spark, "user_sequences", logs.reference_sequences(a_log(), [], CONFIG))
    users = logs.table_frame(spark, "users", [])
    made = organised(organiser, sequences, None, users, replace(CONFIG, organise=settings))
    rows = conform(made.frame(), TRAINING_EXAMPLES).toArrow()
    rows = rows.combine_chunks().cast(TABLES["training_examples"].schema)
    assert report[name]["examples"] == len(rows)
    for key, column in (("requests", "request_ids"), ("targets", "target_item_ids"), ("context_tokens", "context_ts_us")):
        assert report[name][key] == sum(map(len, rows.column(column).to_pylist()))
    assert report[name]["bytes"] == rows.drop(["attributes"]).nbytes
    assert report[name]["impressions_a_context"] == len(a_log()) / len(rows)


def test_the_command_prints_a_table_and_ends_with_one_json_object(engines, lake, tmp_path):
    (tmp_path / "conf.yaml").write_text(f"lake: {lake.root}\nsequences: {{short_length: 2, positive_length: 3}}\n")
    command = ["organisation-report", "--config", "conf.yaml"]
    before = lake.version("user_sequences"), sorted(p.name for p in lake.home.iterdir())
    with shared_engines(engines, tmp_path), pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.organisation_report.Engines", lambda resources: engines)
        answer = answer_of([*command, "--date", DAYS[1].isoformat()], tmp_path)
        printed = (tmp_path / "out.txt").read_text()
        assert answer_of([*command, "--date", "2031-01-01"], tmp_path, EXIT_RETRY) == {}
        assert answer_of([*command, "--set", "lake=elsewhere"], tmp_path, EXIT_RETRY) == {}
    assert (answer["stage"], answer["status"]) == ("organisation-report", "done")
    assert list(answer["organisations"]) == list(ORGANISATIONS)
    assert all(name in printed for name in ORGANISATIONS)
    early = sum(e.date <= DAYS[1] for e in a_log())
    assert answer["organisations"]["naive"]["impressions"] == early < len(a_log())
    assert before == (lake.version("user_sequences"), sorted(p.name for p in lake.home.iterdir()))
