"""The outputs by this project: the stages sequences, organise and rewards as a deployment runs them, Delta in and out.

The time of a table holds its plan, its Spark jobs and its commit. Spark's event log tells the stages of work apart.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession

from jobs import organise, rewards, sequences
from jobs.main import Run, run_job
from jobs.session import end_session, spark_session
from schemas.calendar import Calendar
from schemas.config import Config, ResourceConfig
from schemas.lake import Identities, Lake
from schemas.lineage import ORGANISE, REWARDS, SEQUENCES

ROWS_A_PARTITION = 500_000
MIB = 2**20


def only(table: str, run: Run) -> Run:
    """`run` for one of the tables that its stage writes."""

    def part(
        spark: SparkSession,
        lake: Lake,
        config: Config,
        calendar: Calendar,
        todo: Mapping[str, Identities],
        pins: Mapping[str, int],
    ) -> dict[str, int]:
        spark.sparkContext.setJobDescription(table)
        return run(spark, lake, config, calendar, {table: todo[table]}, pins)

    return part


STEPS = (
    ("user_sequences", SEQUENCES, sequences.run),
    ("user_features", SEQUENCES, sequences.run),
    ("training_examples", ORGANISE, organise.run),
    ("rewards", REWARDS, rewards.run),
)


def build(config: Config, impressions: int, events: Path) -> dict[str, Any]:
    """Writes the four tables into the lake of `config`; seconds by output, and the stages of Spark's event log."""
    resources = local(config.resources, impressions, events)
    config = replace(config, resources=resources)
    seconds = {}
    started = time.monotonic()
    spark = spark_session(resources, "lazyrec-bench-features")
    seconds["session"] = time.monotonic() - started
    for table, spec, run in STEPS:
        started = time.monotonic()
        run_job(spec, only(table, run), config)
        seconds[table] = time.monotonic() - started
    started = time.monotonic()
    end_session(spark)
    seconds["session"] += time.monotonic() - started
    (log,) = events.iterdir()
    return {"seconds": seconds, "stages": stages(log)}


def local(resources: ResourceConfig, impressions: int, events: Path) -> ResourceConfig:
    """Two cores, the default heap, and partitions of a shuffle that grow with the log, as a deployment sets them."""
    events.mkdir(parents=True)
    partitions = max(resources.spark_partitions, impressions // ROWS_A_PARTITION)
    conf = {
        "spark.eventLog.enabled": "true",
        "spark.eventLog.dir": events.as_uri(),
        "spark.eventLog.compress": "false",
        "spark.eventLog.rolling.enabled": "false",
        "spark.local.dir": str(events.parent / "spill"),  # beside the tables, not on a small /tmp
    }
    settings = tuple(f"{key}={value}" for key, value in conf.items())
    return replace(resources, spark_master="local[2]", spark_partitions=partitions, spark_conf=settings)


def stages(log: Path) -> list[dict[str, Any]]:
    """Every stage of work that took half a second or more: its output, wall and task seconds, shuffle and spill."""
    of_stage: dict[int, str] = {}
    found = []
    for line in log.read_text().splitlines():
        event = json.loads(line)
        if event["Event"] == "SparkListenerJobStart":
            description = (event.get("Properties") or {}).get("spark.job.description", "")
            of_stage |= dict.fromkeys(event["Stage IDs"], description)
        elif event["Event"] == "SparkListenerStageCompleted":
            found.append(stage(event["Stage Info"], of_stage))
    return [row for row in found if row["seconds"] >= 0.5]


def stage(info: Mapping[str, Any], of_stage: Mapping[int, str]) -> dict[str, Any]:
    values = {v["Name"].removeprefix("internal.metrics."): v.get("Value") for v in info["Accumulables"]}

    def number(name: str) -> float:
        return float(values.get(name) or 0)

    return {
        "output": of_stage.get(info["Stage ID"], ""),
        "stage": info["Stage ID"],
        "tasks": info["Number of Tasks"],
        "seconds": (info["Completion Time"] - info["Submission Time"]) / 1000,
        "cpu_seconds": number("executorCpuTime") / 1e9,
        "gc_seconds": number("jvmGCTime") / 1e3,
        "shuffle_read_mib": number("shuffle.read.localBytesRead") / MIB,
        "shuffle_write_mib": number("shuffle.write.bytesWritten") / MIB,
        "spill_mib": number("diskBytesSpilled") / MIB,
        "written_mib": number("output.bytesWritten") / MIB,
    }
