"""Simulated logs, users and videos in KuaiRand's CSV format, at any size, with the truth behind them.

Contract: `simulate` writes below a folder

    log_standard_<yyyymmdd>-<part>.csv.gz       all 19 official columns; impressions of one request share time_ms
    user_features_simulated.csv.gz              the official columns
    video_features_basic_simulated.csv.gz       the official columns and `title`
    truth/{items,users,requests,exposure}       Parquet: the latent state, for oracles and what-if questions
    _SIMULATED.json                             the settings, written last: without it the folder is unfinished

The content is a function of the settings alone, whatever the partitions or the cluster. Files appear by renaming, so an
object store copies them once more.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from pyarrow import fs
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.bounds import DAY_MS
from jobs.latent import World, logistic, whole
from jobs.main import command, job_parser
from jobs.session import spark_session
from jobs.simulated_items import exposure, items, ranking, series, video_features
from schemas.config import Config, SimulateConfig
from schemas.errors import ConfigError
from schemas.loader import to_mapping

MARKER = "_SIMULATED.json"
DRAFT = "_draft"
FORMAT = 1  # of what is written for given settings; a change makes old folders stale
ROWS_A_FILE = 1_000_000
OURS = re.compile(r"(log_standard_\d{8}-\d{5}|(user|video)_features(_basic)?_simulated)\.csv\.gz")


def simulate(spark: SparkSession, settings: SimulateConfig, folder: str) -> None:
    """Writes the logs of `settings` below `folder`, replacing what an earlier simulation left there.

    Raises ConfigError for settings that describe no log, and for a folder that holds logs of another origin.
    """
    check(settings)
    files, root, uri = target(folder)
    clear(files, root)
    world = World(settings)
    catalogue = items(spark, world).cache()
    exposures = exposure(spark, world, catalogue).cache()
    users = spark.range(settings.users).withColumnRenamed("id", "user_id")
    requests = world.with_state(world.requests(users), series(catalogue))
    impressions = world.shown(world.slots(requests), ranking(exposures))
    try:
        write_log(log(world, impressions, catalogue), settings, files, root, uri)
        write_one(video_features(world, catalogue), files, root, uri, "video_features_basic_simulated")
        write_one(user_features(world, users), files, root, uri, "user_features_simulated")
        write_truth(world, uri, catalogue, exposures, users, requests)
    finally:
        catalogue.unpersist()
        exposures.unpersist()
    files.delete_dir(f"{root}/{DRAFT}")
    with files.open_output_stream(f"{root}/{MARKER}") as stream:
        stream.write(marker(settings).encode())


def is_simulated(folder: str, settings: SimulateConfig) -> bool:
    """Whether `folder` holds a complete simulation of exactly these settings."""
    files, root, _ = target(folder)
    path = f"{root}/{MARKER}"
    if files.get_file_info(path).type != fs.FileType.File:
        return False
    with files.open_input_stream(path) as stream:
        return stream.read().decode() == marker(settings)


def check(settings: SimulateConfig) -> None:
    for key in ("impressions", "users", "items", "days", "topics", "authors"):
        if getattr(settings, key) < 1:
            raise ConfigError(f"simulate.{key} is {getattr(settings, key)}; it must be at least 1.")
    if settings.new_items_a_day < 0:
        raise ConfigError(f"simulate.new_items_a_day is {settings.new_items_a_day}; it must not be negative.")


def marker(settings: SimulateConfig) -> str:
    return json.dumps({"format": FORMAT, "settings": to_mapping(settings)}, indent=2)


def log(world: World, impressions: DataFrame, catalogue: DataFrame) -> DataFrame:
    """The official columns of the log, and `day`. Whether an impression is a positive is drawn with its true probability;
    click, long view and like then say so together, and the play time follows."""
    keys = [F.col(name) for name in ("user_id", "k", "slot")]
    user, play = F.col("user_id"), F.col("play_ms")
    attributes = catalogue.select("item_id", "author_id", "topic", "quality", "duration_ms")
    rows = impressions.join(F.broadcast(attributes), "item_id")
    by_taste = world.liked(F.col("topic"), F.col("author_id"), F.col("quality"))
    rows = world.with_taste(rows).withColumn("liked", F.coalesce("series_liked", by_taste))
    rows = rows.withColumn("positive", world.draw("positive", *keys) < F.col("liked"))
    rows = rows.withColumn("play_ms", play_time(world, keys))
    rows = rows.withColumn("long", F.col("positive") & (play >= F.least(F.col("duration_ms") * 0.8, F.lit(18_000))))
    when = F.col("time_ms") + F.unix_date(F.lit(world.settings.first_day)).cast("bigint") * DAY_MS

    def happens(name: str, probability: Column | float) -> Column:
        return F.col("positive") & (world.draw(name, *keys) < probability)

    entered = happens("profile", 0.04)
    commented = happens("comment", 0.008)
    return rows.select(
        "user_id",
        F.col("item_id").alias("video_id"),
        F.date_format(F.timestamp_millis(when), "yyyyMMdd").alias("date"),
        F.date_format(F.timestamp_millis(when), "Hmm").cast("int").alias("hourmin"),
        when.alias("time_ms"),
        # A positive without a long view is a click, so that the three flags together are the draw of `positive`.
        flag(F.col("positive") & (~F.col("long") | (world.draw("click", *keys) < 0.9))).alias("is_click"),
        flag(happens("like", F.col("liked") * 0.12)).alias("is_like"),
        flag(happens("follow", 0.01)).alias("is_follow"),
        flag(commented).alias("is_comment"),
        flag(happens("forward", 0.004)).alias("is_forward"),
        flag(~F.col("positive") & (world.draw("hate", *keys) < (F.lit(1.0) - F.col("liked")) * 0.035)).alias("is_hate"),
        flag(F.col("long")).alias("long_view"),
        play.alias("play_time_ms"),
        "duration_ms",
        F.when(entered, world.integer(30_000, "profile_time", *keys) + 500).otherwise(0).alias("profile_stay_time"),
        F.when(commented, world.integer(60_000, "comment_time", *keys) + 500).otherwise(0).alias("comment_stay_time"),
        flag(entered).alias("is_profile_enter"),
        F.lit(0).alias("is_rand"),
        F.when(world.draw("tab", user, F.col("k")) < 0.85, 1).otherwise(0).alias("tab"),
        "day",
    )


def play_time(world: World, keys: list[Column]) -> Column:
    """A positive plays a share of the duration that falls with length and rises with interest, again and again where it is
    short; anything else is left after a few seconds, or at once."""
    length = F.col("duration_ms")
    spread = F.exp(logistic(world.draw("play", *keys)) * 0.35)
    share = F.pow(length / 10_000, F.lit(-0.3)) * (F.col("liked") * 0.8 + 0.7) * spread
    watched = F.least(share, F.lit(4.0)) * length
    glance = F.least(spread * spread * 1500, length * 0.9)
    left = F.when(world.draw("skip", *keys) < 0.15, 0).otherwise(whole(glance))
    return F.when(F.col("positive"), whole(F.greatest(watched, F.lit(1000)))).otherwise(left)


def flag(condition: Column) -> Column:
    return condition.cast("int")


FOLLOWED = ((0, "0"), (10, "(0,10]"), (50, "(10,50]"), (100, "(50,100]"), (150, "(100,150]"), (250, "(150,250]"))
RANGES: dict[str, tuple[tuple[int, str], ...]] = {
    "follow_user_num": (*FOLLOWED, (500, "(250,500]")),
    "fans_user_num": ((0, "0"), (9, "[1,10)"), (99, "[10,100)"), (999, "[100,1k)"), (4999, "[1k,5k)")),
    "friend_user_num": ((0, "0"), (4, "[1,5)"), (29, "[5,30)"), (59, "[30,60)"), (119, "[60,120)"), (249, "[120,250)")),
    "register_days": ((30, "15-30"), (60, "31-60"), (90, "61-90"), (180, "91-180"), (365, "181-365"), (730, "366-730")),
}
LAST_RANGES = {"follow_user_num": "500+", "fans_user_num": "[5k,1w)", "friend_user_num": "250+", "register_days": "730+"}
SCALES = {"follow_user_num": 150.0, "fans_user_num": 60.0, "friend_user_num": 25.0, "register_days": 600.0}
ONE_HOT = (2, 7, 50, 1471, 15, 34, 3, 118, 454, 7, 5, 5)  # values of each anonymous feature; six more are 0.0 or 1.0


def user_features(world: World, users: DataFrame) -> DataFrame:
    """The official columns of KuaiRand's user features. onehot_feat1 and onehot_feat2 hint at the user's first topic."""
    user = F.col("user_id")
    requests = world.requests_of(user)
    degree = F.when(requests > 5 * world.settings.days, "full_active").when(requests > world.settings.days, "high_active")
    columns = [
        user,
        degree.when(requests > 0, "middle_active").otherwise("low_active").alias("user_active_degree"),
        flag(requests == 0).alias("is_lowactive_period"),
        flag(world.draw("streamer", user) < 0.03).alias("is_live_streamer"),
        flag(world.draw("uploader", user) < 0.3).alias("is_video_author"),
    ]
    for name, scale in SCALES.items():
        count = whole(F.least(F.exp(logistic(world.draw(name, user)) * 0.8) * scale, F.lit(4900.0)))
        count = count + 15 if name == "register_days" else count
        bounds = F.lit(LAST_RANGES[name])
        for upper, label in reversed(RANGES[name]):
            bounds = F.when(count <= upper, label).otherwise(bounds)
        columns += [count.alias(name), bounds.alias(f"{name}_range")]
    first = F.col("topic0")
    for number, values in enumerate(ONE_HOT):
        value = world.integer(values, f"onehot{number}", user)
        if number in (1, 2):
            value = F.when(world.draw(f"hint{number}", user) < 0.6, F.pmod(first, F.lit(values))).otherwise(value)
        columns.append(value.alias(f"onehot_feat{number}"))
    for number in range(len(ONE_HOT), 18):
        columns.append(flag(world.draw(f"onehot{number}", user) < 0.2).cast("double").alias(f"onehot_feat{number}"))
    return world.with_taste(users.withColumn("day", F.lit(0))).orderBy("user_id").select(*columns)


def write_log(rows: DataFrame, settings: SimulateConfig, files: fs.FileSystem, root: str, uri: str) -> None:
    """One shuffle puts each (day, part) into one task, and with it into one file, in order of time."""
    parts = max(1, math.ceil(settings.impressions / settings.days / ROWS_A_FILE))
    part = F.pmod(F.xxhash64("user_id"), F.lit(parts))
    placed = rows.withColumn("part", part).repartition(settings.days * parts, "day", "part")
    ordered = placed.sortWithinPartitions("day", "part", "time_ms", "user_id", "video_id")
    draft = f"{root}/{DRAFT}/log"
    ordered.write.partitionBy("day", "part").csv(f"{uri}/{DRAFT}/log", header=True, compression="gzip")
    for info in files.get_file_info(fs.FileSelector(draft, recursive=True)):
        if info.base_name.endswith(".csv.gz"):
            *_, day, number, _ = info.path.split("/")
            date = settings.first_day + datetime.timedelta(days=int(day.removeprefix("day=")))
            files.move(info.path, f"{root}/log_standard_{date:%Y%m%d}-{int(number.removeprefix('part=')):05d}.csv.gz")


def write_one(rows: DataFrame, files: fs.FileSystem, root: str, uri: str, name: str) -> None:
    draft = f"{root}/{DRAFT}/{name}"
    rows.coalesce(1).write.csv(f"{uri}/{DRAFT}/{name}", header=True, compression="gzip")
    (part,) = (info for info in files.get_file_info(fs.FileSelector(draft)) if info.base_name.endswith(".csv.gz"))
    files.move(part.path, f"{root}/{name}.csv.gz")


def write_truth(
    world: World, uri: str, catalogue: DataFrame, exposures: DataFrame, users: DataFrame, requests: DataFrame
) -> None:
    """What the draws were made from. With the constants of `jobs.latent` it gives the probability of an exposure and of a
    positive for any user, item and day."""
    tastes = users.crossJoin(F.broadcast(users.sparkSession.range(world.settings.days).withColumnRenamed("id", "day")))
    tastes = world.with_taste(tastes).select(
        "user_id",
        "day",
        F.array("topic0", "topic1", "topic2").alias("topics"),
        F.array("weight0", "weight1", "weight2").alias("weights"),
        F.array(*world.favourites()).alias("favourites"),
    )
    catalogue.drop("title", "tags").write.parquet(f"{uri}/truth/items")
    exposures.write.parquet(f"{uri}/truth/exposure")
    tastes.write.parquet(f"{uri}/truth/users")
    start = F.unix_date(F.lit(world.settings.first_day)).cast("bigint") * DAY_MS
    state = ("user_id", "k", "session", "day", "intent", "series_item", "series_liked")
    requests.select(*state, (F.col("time_ms") + start).alias("time_ms")).write.parquet(f"{uri}/truth/requests")


def target(folder: str) -> tuple[fs.FileSystem, str, str]:
    """The file system of a path or URI, the path within it, and the URI by which Spark knows it."""
    if "://" in folder:
        return (*fs.FileSystem.from_uri(folder), folder.rstrip("/"))
    path = Path(folder).absolute()
    return fs.LocalFileSystem(), str(path), path.as_uri()


def clear(files: fs.FileSystem, root: str) -> None:
    """Removes the marker first, then everything that a simulation writes; logs of another origin are refused."""
    files.create_dir(root, recursive=True)
    found = {info.base_name: info.path for info in files.get_file_info(fs.FileSelector(root))}
    ours = {name for name in found if OURS.fullmatch(name)}
    foreign = sorted(name for name in found.keys() - ours if ".csv" in name)
    if foreign:
        raise ConfigError(f"{root} holds {foreign[0]}, which is not simulated; simulate into an empty folder.")
    if MARKER in found:
        files.delete_file(found[MARKER])
    for name in ours:
        files.delete_file(found[name])
    for name in found.keys() & {"truth", DRAFT}:
        files.delete_dir(found[name])


def main(arguments: list[str] | None = None) -> int:
    """`python -m jobs.simulate --config F --out FOLDER`; prints one JSON object, returns the exit code."""
    parser = job_parser("simulate", "Write simulated logs in KuaiRand's format.")
    parser.add_argument("--out", required=True, help="folder for the files; what a simulation left there is replaced")
    return command("simulate", parser, _work, arguments)


def _work(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    if config.simulate is None:
        raise ConfigError(f"{options.config}: no section simulate; add one, or use the logs of source.path.")
    if is_simulated(options.out, config.simulate):
        return {"status": "skipped", "out": options.out}
    simulate(spark_session(config.resources, "lazyrec-simulate"), config.simulate, options.out)
    return {"status": "done", "out": options.out}


if __name__ == "__main__":
    sys.exit(main())
