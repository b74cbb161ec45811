"""Identities: what makes a partition stale, and what does not. Real Delta commits, no engine."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.ray_tables import replace_days
from schemas.calendar import Calendar, calendar_of
from schemas.config import Config, LifelongConfig, SplitConfig
from schemas.errors import ContractViolation
from schemas.lake import Identities, Lake
from schemas.lineage import (
    EMBED,
    ITEM_PAIRS,
    LIFELONG,
    ORGANISE,
    REWARDS,
    SEQUENCES,
    TOKENIZE,
    TRAIN,
    Fold,
    StageSpec,
    digest,
    plan,
    span_days,
)
from schemas.tables import TABLES

DAYS = [datetime.date(2026, 1, 1) + datetime.timedelta(days=n) for n in range(6)]
CALENDAR = calendar_of(DAYS, SplitConfig(validation_days=1, test_days=1))
CONFIG = Config()


def commit(lake: Lake, table: str, identities: Identities) -> None:
    replace_days(lake, table, TABLES[table].schema.empty_table(), identities)


def ingest(lake: Lake, changed: dict[datetime.date, str] | None = None) -> None:
    """Stamps every day of the three inputs, as ingest does; `changed` gives some days of the log another content."""
    for table in ("impressions", "items", "users"):
        commit(lake, table, {day: f"{table}{day}" for day in DAYS})
    if changed:
        commit(lake, "impressions", dict(changed))


def build(lake: Lake, spec: StageSpec, config: Config = CONFIG) -> dict[str, tuple[datetime.date, ...]]:
    """Commits what the plan asks for and returns what was stale, by table."""
    todo = {}
    for table in spec.outputs:
        made = plan(spec, config, lake, CALENDAR)
        todo[table] = made.todo[table]
        commit(lake, table, {day: made.expected[table][day] for day in made.todo[table]} or {DAYS[0]: "none"})
    return todo


def stale(lake: Lake, spec: StageSpec, config: Config = CONFIG) -> dict[str, list[datetime.date]]:
    return {table: list(days) for table, days in plan(spec, config, lake, CALENDAR).todo.items()}


def test_everything_is_stale_at_first_and_nothing_after_it_was_built(lake: Lake) -> None:
    ingest(lake)
    assert stale(lake, SEQUENCES) == {"user_sequences": DAYS, "user_features": DAYS}
    build(lake, SEQUENCES)
    assert plan(SEQUENCES, CONFIG, lake, CALENDAR).done


def test_a_corrected_day_makes_stale_what_depends_on_it_and_nothing_else(lake: Lake) -> None:
    ingest(lake)
    for spec in (SEQUENCES, ITEM_PAIRS, ORGANISE, REWARDS):
        build(lake, spec)
    ingest(lake, changed={DAYS[2]: "corrected"})
    assert stale(lake, SEQUENCES) == {"user_sequences": [DAYS[2]], "user_features": DAYS[2:]}
    build(lake, SEQUENCES)
    assert stale(lake, ITEM_PAIRS) == {"item_pairs": DAYS[2:6]}  # the window of 72 hours reaches three days ahead
    assert stale(lake, ORGANISE) == {"training_examples": DAYS[2:]}
    assert stale(lake, REWARDS) == {"rewards": DAYS[2:]}


def test_settings_change_an_identity_and_resources_do_not(lake: Lake) -> None:
    ingest(lake)
    build(lake, SEQUENCES)
    wider = dataclasses.replace(
        CONFIG, resources=dataclasses.replace(CONFIG.resources, spark_partitions=64), lake="elsewhere"
    )
    assert plan(SEQUENCES, wider, lake, CALENDAR).done
    shorter = dataclasses.replace(CONFIG, sequences=dataclasses.replace(CONFIG.sequences, short_length=5))
    assert stale(lake, SEQUENCES, shorter)["user_features"] == DAYS


def test_a_commit_without_identities_changes_none(lake: Lake) -> None:
    ingest(lake)
    before = lake.identities("impressions")
    lake.open("impressions").alter.set_table_properties({"delta.checkpointInterval": "20"})
    assert lake.identities("impressions") == before


def test_missing_inputs_are_named(lake: Lake) -> None:
    assert "impressions has no partition 2026-01-01" in plan(SEQUENCES, CONFIG, lake, CALENDAR).missing


def test_fitted_stages_read_train_days_only(lake: Lake) -> None:
    ingest(lake)
    build(lake, SEQUENCES)
    build(lake, ITEM_PAIRS)
    build(lake, EMBED)
    ingest(lake, changed={CALENDAR.test[0]: "poison", CALENDAR.validation[0]: "poison"})
    build(lake, SEQUENCES)
    build(lake, ITEM_PAIRS)
    assert plan(EMBED, CONFIG, lake, CALENDAR).done


def test_what_is_fitted_is_not_awaited_before_the_fit_day(lake: Lake) -> None:
    """Stages after embed read item_embeddings and semantic_ids, which begin on the fit day."""
    ingest(lake)
    for spec in (SEQUENCES, ITEM_PAIRS, EMBED, TOKENIZE, ORGANISE):
        build(lake, spec)
    assert min(plan(TOKENIZE, CONFIG, lake, CALENDAR).expected["semantic_ids"]) == CALENDAR.fit_day
    assert plan(TOKENIZE, CONFIG, lake, CALENDAR).done
    assert not plan(TRAIN, CONFIG, lake, CALENDAR).missing


def test_long_histories_are_read_where_the_model_has_the_pathway(lake: Lake) -> None:
    ingest(lake)
    for spec in (SEQUENCES, ITEM_PAIRS, EMBED, TOKENIZE, ORGANISE):
        build(lake, spec)
    enabled = dataclasses.replace(CONFIG, lifelong=LifelongConfig(enabled=True))
    reading = dataclasses.replace(enabled, model=dataclasses.replace(CONFIG.model, lifelong_length=8))
    before = plan(TRAIN, CONFIG, lake, CALENDAR)
    assert "lifelong_sequences has no partition 2026-01-01" in plan(TRAIN, reading, lake, CALENDAR).missing
    build(lake, LIFELONG, enabled)
    assert plan(TRAIN, enabled, lake, CALENDAR).expected == before.expected
    known = plan(TRAIN, reading, lake, CALENDAR)
    assert not known.missing and known.identity != before.identity
    commit(lake, "lifelong_sequences", {CALENDAR.test[0]: "another"})
    assert plan(TRAIN, reading, lake, CALENDAR).identity == known.identity
    commit(lake, "lifelong_sequences", {CALENDAR.train[1]: "another"})
    assert plan(TRAIN, reading, lake, CALENDAR).identity != known.identity
    assert plan(TRAIN, enabled, lake, CALENDAR).expected == before.expected


def test_a_relative_root_counts_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Lake("lake/demo").path("items") == f"{tmp_path}/lake/demo/items"
    assert Lake("s3://bucket/lake").path("items") == "s3://bucket/lake/items"


def test_spans(lake: Lake) -> None:
    day = DAYS[3]
    assert span_days("same", day, CALENDAR, CONFIG) == [day]
    assert span_days("before", day, CALENDAR, CONFIG) == DAYS[:3]
    assert span_days("until", day, CALENDAR, CONFIG) == DAYS[:4]
    assert span_days("fit", day, CALENDAR, CONFIG) == list(CALENDAR.train)


def test_a_log_too_short_for_its_split_says_so() -> None:
    with pytest.raises(ContractViolation, match="holds out 2"):
        calendar_of(DAYS[:2], SplitConfig(validation_days=1, test_days=1))
    by_user: Calendar = calendar_of(DAYS[:1], SplitConfig(by="user"))
    assert by_user.fit_day == DAYS[0]


def test_a_write_replaces_its_days_and_no_other(lake: Lake) -> None:
    def rows(item: int, day: datetime.date) -> pa.Table:
        values = {"item_id": [item], "date": [day], "codes": [[1, 2, 3]], "codebook_version": ["c"], "rank": [0]}
        return pa.table(values, schema=TABLES["semantic_ids"].schema)

    replace_days(lake, "semantic_ids", rows(1, DAYS[0]), {DAYS[0]: "a"})
    replace_days(lake, "semantic_ids", rows(2, DAYS[1]), {DAYS[1]: "b"})
    replace_days(lake, "semantic_ids", rows(3, DAYS[1]), {DAYS[1]: "c"})
    assert sorted(lake.open("semantic_ids").to_pyarrow_table().column("item_id").to_pylist()) == [1, 3]
    assert lake.identities("semantic_ids") == {DAYS[0]: "a", DAYS[1]: "c"}
    with pytest.raises(ContractViolation, match="not among the days"):
        replace_days(lake, "semantic_ids", rows(4, DAYS[2]), {DAYS[1]: "d"})


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=8))
def test_a_fold_of_days_is_the_digest_of_their_identities(runs: list[tuple[int, int]]) -> None:
    """Runs of days in any order: continued, cut short, empty, or elsewhere."""
    days = [datetime.date(2026, 1, 1) + datetime.timedelta(days=place) for place in range(12)]
    identities = {day: f"identity {day.day}" for day in days[:9]}  # the last ones are not there
    fold = Fold()
    for start, stop in runs:
        expected = digest([(day.isoformat(), identities.get(day, "")) for day in days[start:stop]])
        assert fold.of(identities, days[start:stop]) == expected
