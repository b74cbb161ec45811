"""Rows that tasks write as files: the same from any number of tasks, all of them or none, as the table's log says."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.arrow_files import ArrowRows
from jobs.organisers import organised
from jobs.rewards import quantiles
from jobs.sequences import features_of, sequences_of
from jobs.tables import read, replace_days
from schemas.config import Config, RewardsConfig, SequencesConfig
from schemas.errors import ContractViolation
from tests.jobs import logs

SEED = 71
DAYS = logs.days_from(5)
STAMPS = {day: f"of {day}" for day in DAYS}
CONFIG = Config(sequences=SequencesConfig(3, 6), rewards=RewardsConfig(min_bucket=4, min_population=60))
ORDER = {"user_sequences": "user_id", "user_features": "user_id", "training_examples": "slice_us", "rewards": "user_id"}


@pytest.fixture(scope="module")
def expected() -> dict[str, list[logs.Row]]:
    events, items, users = logs.random_log(SEED), logs.random_catalogue(SEED), logs.random_users(SEED)
    return {
        "user_sequences": logs.reference_sequences(events, items, CONFIG),
        "user_features": logs.reference_features(events, items, users, CONFIG),
        "training_examples": logs.reference_examples(events, items, users, CONFIG),
        "rewards": logs.reference_rewards(events, CONFIG),
    }


def rows_by(spark, expected, table: str, tasks: int) -> ArrowRows:
    """The rows of a job, in `tasks` tasks or more."""
    sequences = logs.table_frame(spark, "user_sequences", expected["user_sequences"])
    users = logs.table_frame(spark, "users", logs.random_users(SEED))
    if table == "user_sequences":
        impressions = logs.impressions_frame(spark, logs.random_log(SEED))
        items = logs.table_frame(spark, "items", logs.random_catalogue(SEED))
        return sequences_of(impressions, items, CONFIG.source.rating_threshold, DAYS, tasks)
    if table == "user_features":
        return features_of(sequences, None, users, CONFIG.sequences, tasks)
    if table == "training_examples":
        return organised("newest_only", sequences, None, users, CONFIG, tasks)
    return quantiles(sequences, None, None, CONFIG.rewards, tasks)


@pytest.mark.parametrize("table", ORDER)
def test_any_number_of_tasks_writes_the_same_rows_and_the_log_tells_of_their_files(spark, lake, expected, table):
    versions = [replace_days(lake, table, [rows_by(spark, expected, table, n)], STAMPS) for n in (1, 3)]
    for version in versions:
        assert logs.collected(read(spark, lake, table, version), table) == expected[table]
    assert lake.identities(table) == STAMPS
    assert len(lake.open(table, versions[1]).file_uris()) > len(lake.open(table, versions[0]).file_uris()) >= len(DAYS)
    for action in pa.table(lake.open(table).get_add_actions(flatten=True)).to_pylist():
        path = Path(lake.path(table)) / action["path"]
        assert (action["size_bytes"], action["num_records"]) == (path.stat().st_size, pq.read_metadata(path).num_rows)
        values = pq.read_table(path, columns=[ORDER[table]], partitioning=None).column(0).to_pylist()
        assert values == sorted(values)
        assert (action[f"min.{ORDER[table]}"], action[f"max.{ORDER[table]}"]) == (values[0], values[-1])


def test_a_day_is_replaced_alone_and_a_day_without_rows_becomes_empty(spark, lake, expected):
    table = "user_sequences"
    replace_days(lake, table, [rows_by(spark, expected, table, 1)], STAMPS)
    before = {path for path in lake.open(table).file_uris() if f"date={DAYS[1]}" not in path}
    none = spark.createDataFrame([], "x int")
    replace_days(lake, table, [ArrowRows(table, none, lambda batches: iter(()))], {DAYS[1]: "empty"})
    assert set(lake.open(table).file_uris()) == before
    assert lake.identities(table) == STAMPS | {DAYS[1]: "empty"}


def test_one_row_against_a_constraint_and_nothing_is_committed(spark, lake, expected):
    table = "user_sequences"
    version = replace_days(lake, table, [rows_by(spark, expected, table, 1)], STAMPS)
    frame = logs.table_frame(spark, table, expected[table])
    parts = frame.repartition(2, "user_id").sortWithinPartitions("date")

    def too_short(batches):  # a function of this module would not be found by a worker of Spark
        """The rows as they come, but for one user, whose arrays differ in length."""
        for batch in batches:
            rows = batch.to_pylist()
            shorter = [row | {"feedback": row["feedback"][1:]} if row["user_id"] == 7 else row for row in rows]
            yield pa.RecordBatch.from_pylist(shorter, batch.schema)

    with pytest.raises(ContractViolation, match=r"^Table user_sequences refused \d+ row\(s\), .* break arrays_parallel"):
        replace_days(lake, table, [ArrowRows(table, parts, too_short)], STAMPS)
    with pytest.raises(ContractViolation, match=r"^Table user_sequences refused a row of 2026-03-0\d"):
        replace_days(lake, table, [rows_by(spark, expected, table, 1)], {DAYS[4]: "one day alone"})
    with pytest.raises(ContractViolation, match=r"do not fit its contract: \['feedback'\]"):
        replace_days(lake, table, [ArrowRows(table, parts.drop("feedback"), lambda batches: iter(batches))], STAMPS)
    assert lake.version(table) == version
    assert logs.collected(read(spark, lake, table), table) == expected[table]
