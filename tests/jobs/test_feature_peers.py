"""The feature jobs, DuckDB's SQL and Polars make the same rows of random logs full of ties.

The three share no code, so each is a reference for the other two; the benchmark's times mean something only while this
holds. `tests.jobs.logs` holds the jobs to brute force on the same logs.
"""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from benchmarks.features import by_duckdb, by_polars
from benchmarks.features.inputs import OUTPUTS, Inputs, rules_of
from benchmarks.features.same_rows import DifferentRows, compare, digest, files_below
from jobs.organisers import organised
from jobs.rewards import quantiles
from jobs.sequences import features_of, sequences_of
from schemas.config import Config, RewardsConfig, SequencesConfig
from tests.jobs import logs

pytestmark = pytest.mark.long

# With 3 recent events of 6 engaged ones, and the other way round: all engaged ones may then be recent.
SETTINGS = (SequencesConfig(3, 6), SequencesConfig(6, 3))
SEEDS = range(2)
PARTITION = ds.partitioning(pa.schema([("date", pa.date32())]), flavor="hive")


@pytest.fixture(scope="module", params=SEEDS)
def made(spark, request, tmp_path_factory):
    """The folder with the files of the inputs and of the jobs' outputs of one seed, its configuration and inputs."""
    seed, folder = request.param, tmp_path_factory.mktemp("peers")
    config = Config(sequences=SETTINGS[seed], rewards=RewardsConfig(backoff=()))
    frames = {
        "impressions": logs.impressions_frame(spark, logs.random_log(seed)),
        "items": logs.table_frame(spark, "items", logs.random_catalogue(seed)),
        "users": logs.table_frame(spark, "users", logs.random_users(seed)),
    }
    for name, frame in frames.items():
        write(frame, folder, name)
    sequences = sequences_of(frames["impressions"], frames["items"], config.source.rating_threshold, logs.days_from(5))
    sequences = sequences.frame().cache()
    write(sequences, folder, "user_sequences")
    write(features_of(sequences, None, frames["users"], config.sequences).frame(), folder, "user_features")
    write(organised("newest_only", sequences, None, frames["users"], config).frame(), folder, "training_examples")
    write(quantiles(sequences, None, None, config.rewards).frame(), folder, "rewards")
    return folder, config, Inputs({name: files_below(folder, name) for name in frames}, logs.days_from(5))


def write(frame, folder, name):
    ds.write_dataset(frame.toArrow(), folder / name, format="parquet", partitioning=PARTITION)


@pytest.mark.parametrize("peer", [by_duckdb, by_polars])
def test_a_peer_writes_the_rows_of_the_jobs(made, tmp_path, peer):
    folder, config, inputs = made
    # Blocks as short as the tails, so that the short histories here are cut across blocks.
    peer.build(inputs, replace(rules_of(config), block=1), tmp_path)
    for table in OUTPUTS:
        ours, others = files_below(folder, table), files_below(tmp_path, table)
        compare(table, ours, others, peer.__name__, tmp_path)
        assert digest(table, ours, tmp_path) == digest(table, others, tmp_path)


def test_one_other_value_is_a_difference(made, tmp_path):
    folder, _, _ = made
    ours = files_below(folder, "rewards")
    rows = ds.dataset(folder / "rewards", partitioning=PARTITION).to_table().to_pylist()
    rows[7]["negative"] = not rows[7]["negative"]
    ds.write_dataset(pa.Table.from_pylist(rows), tmp_path / "rewards", format="parquet", partitioning=PARTITION)
    others = files_below(tmp_path, "rewards")
    with pytest.raises(DifferentRows, match=r"Table rewards: lazyrec has a row that peer has not"):
        compare("rewards", ours, others, "peer", tmp_path)
    assert digest("rewards", ours, tmp_path) != digest("rewards", others, tmp_path)
