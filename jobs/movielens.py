"""Reader of MovieLens's files: ratings.csv, movies.csv and, where it is there, tags.csv, as mapped columns.

A rating is an exposure with a rating: whether the user clicked or watched is not told, so every flag and play time is
null. Genres become the item's tags. What users wrote about a film joins its attributes as 'user_tag=...', lower-cased
and distinct: that text is open and noisy where genres are a closed list, and item vectors weigh either by its rarity. The
source has no users file. Films and tags come as one snapshot: a tag holds from the first day on, whenever it was written.
"""

from __future__ import annotations

from collections.abc import Iterable

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs import mapped
from jobs.mapped_values import identifier
from jobs.mapping import mapping_of
from jobs.source_files import SourceFile
from schemas.source import SourceConfig

NO_GENRES = "(no genres listed)"
TAGS = {"item_id": "movieId", "title": "tag"}  # a tag is text, as a title is


def read_log(spark: SparkSession, files: Iterable[SourceFile], source: SourceConfig) -> DataFrame:
    """As `jobs.mapped.read_log`, of ratings.csv."""
    return mapped.read_log(spark, files, mapping_of(source))


def read_catalogues(spark: SparkSession, files: Iterable[SourceFile], source: SourceConfig) -> dict[str, DataFrame]:
    """ "items": movies.csv with what users wrote in tags.csv; "tags": the lines of tags.csv, for those that are refused."""
    files, source = list(files), mapping_of(source)
    movies = mapped.read_catalogues(spark, files, source)["items"]
    movies = movies.withColumn("tags", F.filter("tags", lambda tag: tag != NO_GENRES))
    written = [file for file in files if file.role == "tags"]
    if not written:
        return {"items": movies}
    tags = mapped.read_role(spark, written, "tags", TAGS, source, _tags)
    return {"items": _with_tags(movies, tags), "tags": tags}


def _tags(rows: DataFrame, given: mapped.Inputs, source: SourceConfig) -> DataFrame:
    values = {"item_id": identifier(given["item_id"], source.ids), "tag": mapped.text(given["title"])}
    return rows.select(*mapped.judged_row(values))


def _with_tags(movies: DataFrame, tags: DataFrame) -> DataFrame:
    usable = tags.where(F.col("reason").isNull() & F.col("tag").isNotNull())
    attribute = F.concat(F.lit("user_tag="), F.lower("tag"))
    by_movie = usable.groupBy("item_id").agg(F.sort_array(F.collect_set(attribute)).alias("written"))
    joined = movies.join(F.broadcast(by_movie), "item_id", "left")
    empty = F.array().cast("array<string>")
    return joined.withColumn("attributes", F.coalesce("written", empty)).select(*movies.columns)
