"""Deletion of users: their rows in every table, the raw texts that name them, and the memory of who was deleted.

`deleted_users` is written first, so that a kill in between leaves a deletion that the same command completes, and no
ingest brings the rows back. Deletion is no partition's rewriting: it stamps no identity, so that nothing becomes stale, and
a rebuild from the source gives the same rows. A row that ingest leaves out stays counted, as refused and without its text.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs import tables
from jobs.bounds import INTEGER, MAX_ID
from jobs.ingest_plan import DELETED, REFUSED
from jobs.mapping import mapping_of
from schemas.errors import ConfigError
from schemas.lake import Lake
from schemas.source import SourceConfig
from schemas.tables import DELETED_USERS, PARTITION, REJECTED_ROWS, TABLES, USER

KEY = USER.name
PLACE = (*REJECTED_ROWS.key, PARTITION)
# A raw text is a line of CSV or the JSON of a row. An original id may hold any sign, so whole fields are looked at too.
FIELDS, WORDS = r"[\x00-\x1f,;|\"{}\[\]]+", r"(?U)\W+"


def tables_of_users() -> tuple[str, ...]:
    """Every table that says something of single users, by the contracts."""
    return tuple(t.name for t in TABLES.values() if KEY in t.columns and t.name != DELETED_USERS.name)


def user_ids(spark: SparkSession, source: SourceConfig, originals: Collection[str]) -> list[int]:
    """The user ids that ingest gives to the source's own. Raises ConfigError where this source cannot hold one."""
    ids = "integer" if source.kind == "sequences" else mapping_of(source).ids
    texts = spark.createDataFrame([(text.strip(),) for text in originals], "text string")
    number = F.when(F.col("text").rlike(INTEGER), F.col("text").try_cast("bigint"))
    hashed = F.xxhash64("text").bitwiseAND(F.lit(MAX_ID))
    value = {"integer": number, "text": hashed, "auto": F.when(F.col("text").rlike(INTEGER), number).otherwise(hashed)}
    found = texts.select("text", value[ids].alias(KEY)).collect()
    for row in found:
        if row[KEY] is None or row[KEY] < 0:
            raise ConfigError(f"--source-id {row['text']!r} can be no user: the source's ids are integers from 0 on.")
    return [row[KEY] for row in found]


def forget(spark: SparkSession, lake: Lake, users: Collection[int], today: datetime.date) -> dict[str, dict[int, int]]:
    """Deletes the rows of `users`; rows by table and user. `rejected_rows` counts, as one, the texts that named any."""
    ids = spark.createDataFrame([(user,) for user in sorted(set(users))], f"{KEY} bigint")
    known = deleted_users(spark, lake)
    new = ids if known is None else ids.join(known, KEY, "left_anti")
    remembered = [row[KEY] for row in new.collect()]
    if remembered:
        rows = ids.where(F.col(KEY).isin(remembered)).withColumn(PARTITION, F.lit(today))
        tables.append(lake, DELETED_USERS.name, rows)
    chosen, found = F.col(KEY).isin(sorted(set(users))), {}
    for name in (name for name in tables_of_users() if lake.exists(name)):
        counted = tables.read(spark, lake, name).where(chosen).groupBy(KEY).count().collect()
        found[name] = {row[KEY]: row["count"] for row in counted}
        if counted:  # a deletion that finds nothing would still be a new version
            tables.delete_rows(spark, lake, name, chosen)
    return found


def clear_texts(spark: SparkSession, lake: Lake) -> int:
    """Removes from `rejected_rows` the raw texts that name a deleted user; the rows stay. How many there were."""
    ids = deleted_users(spark, lake)
    if ids is None or not lake.exists(REJECTED_ROWS.name):
        return 0
    chosen = naming(tables.read(spark, lake, REJECTED_ROWS.name), ids).persist()
    try:
        count = chosen.count()
        if count:
            tables.update_rows(spark, lake, REJECTED_ROWS.name, chosen, {"raw": "CAST(NULL AS STRING)"})
    finally:
        chosen.unpersist()
    return count


def deleted_users(spark: SparkSession, lake: Lake) -> DataFrame | None:
    """The ids of deleted users, each once, or None where nobody was deleted yet."""
    if not lake.exists(DELETED_USERS.name):
        return None
    return tables.read(spark, lake, DELETED_USERS.name).select(KEY).distinct()


def with_deleted(fated: DataFrame, deleted: DataFrame | None) -> DataFrame:
    """Usable rows of the log: those of deleted users have the fate `deleted` and no text."""
    if deleted is None:
        return fated
    gone = fated.join(F.broadcast(deleted.withColumn("gone", F.lit(True))), KEY, "left")
    fate = F.when(F.col("gone"), DELETED).otherwise(F.col("fate"))
    return gone.withColumn("fate", fate).withColumn("raw", F.when(F.col("gone").isNull(), F.col("raw"))).drop("gone")


def without_users(judged: DataFrame, deleted: DataFrame | None) -> DataFrame:
    """Judged rows of a snapshot of users: those of deleted users are refused and have no text."""
    if deleted is None:
        return judged
    gone = judged.join(F.broadcast(deleted.withColumn("gone", F.lit(True))), KEY, "left")
    reason = F.when(F.col("gone"), REFUSED[DELETED]).otherwise(F.col("reason"))
    return gone.withColumn("reason", reason).withColumn("raw", F.when(F.col("gone").isNull(), F.col("raw"))).drop("gone")


def unnamed(rows: DataFrame, deleted: DataFrame | None) -> DataFrame:
    """Rows of rejected_rows without the raw texts that name a deleted user."""
    if deleted is None:
        return rows
    named = naming(rows, deleted).withColumn("named", F.lit(True))
    return (
        rows.join(named, list(PLACE), "left").withColumn("raw", F.when(F.col("named").isNull(), F.col("raw"))).drop("named")
    )


def naming(rows: DataFrame, deleted: DataFrame) -> DataFrame:
    """The places of the rows whose raw text holds the id of a deleted user, or the original that hashes to it, as a whole
    word or field. A short id is also a count or a flag of others: better a text too many than one too few."""
    words = F.array_union(F.split("raw", FIELDS), F.split("raw", WORDS))
    word = F.trim("word")
    ids = F.array(F.when(word.rlike(INTEGER), word.try_cast("bigint")), F.xxhash64(word).bitwiseAND(F.lit(MAX_ID)))
    found = rows.select(*PLACE, F.explode(words).alias("word")).select(*PLACE, F.explode(ids).alias(KEY))
    return found.join(F.broadcast(deleted), KEY, "left_semi").select(*PLACE).distinct()
