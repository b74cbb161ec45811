"""The reader of each kind of source.

A reader gives rows with PLACE, raw, reason and values; `jobs.ingest` does the rest, the same for all of them. What a
reader of the log leaves out is null.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pyspark.sql import DataFrame, SparkSession

from jobs import kuairand, mapped, movielens, sequence_file
from jobs.source_files import SourceFile
from schemas.source import SourceConfig

ReadLog = Callable[[SparkSession, Iterable[SourceFile], SourceConfig], DataFrame]
ReadCatalogues = Callable[[SparkSession, Iterable[SourceFile], SourceConfig], dict[str, DataFrame]]

LOGS: dict[str, ReadLog] = {
    "kuairand": kuairand.read_log,
    "sequences": sequence_file.read_log,
    "movielens": movielens.read_log,
    "mapped": mapped.read_log,
}
# By table, or by role where a file's rows go into no table of their own.
CATALOGUES: dict[str, ReadCatalogues] = {
    "kuairand": kuairand.read_catalogues,
    "movielens": movielens.read_catalogues,
    "mapped": mapped.read_catalogues,
}
