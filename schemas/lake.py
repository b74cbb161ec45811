"""The lake as its logs tell it: where tables and artifacts lie, their versions, identities and protocol.

Reads and makes only metadata, so that a plan, a status, a skip or a new table costs milliseconds and starts no engine.
Rows are read and written by Spark (`jobs.tables`) and read by Ray (`pipelines.ray_tables`).

A commit that replaces partitions carries `{"stage", "identities": {date: identity}}` as Delta userMetadata;
commits without it (compaction, constraints) change no identity. Artifacts (checkpoints, codebooks, bundles) are
folders `_artifacts/STAGE/IDENTITY` that are complete once their `manifest.json` is there. They lie below the lake's
home: its root, or a mount where the root is an object store.
"""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake import Schema as DeltaSchema
from deltalake.exceptions import DeltaError

from schemas.config import Config
from schemas.errors import ContractViolation
from schemas.tables import PARTITION, TABLES

Identities = dict[datetime.date, str]

FORMAT = 1  # of manifests
WRITER = "lazyrec"  # of Delta's transactions
PROPERTIES: dict[str, str | None] = {
    "delta.enableDeletionVectors": "false",
    "delta.logRetentionDuration": "interval 3650 days",  # identities live in the log
    "delta.deletedFileRetentionDuration": "interval 90 days",  # longer than the life of a model that pins a version
}

# Reader features that Ray's path over Arrow data sets honours. Column mapping is the dangerous one:
# it would read as all-null columns without an error.
READABLE_FEATURES = {"timestampNtz"}


def commit_metadata(stage: str, identities: Mapping[datetime.date, str]) -> str:
    """The userMetadata of a commit that replaces the partitions in `identities`."""
    stamped = {day.isoformat(): value for day, value in sorted(identities.items())}
    return json.dumps({"stage": stage, "identities": stamped})


@dataclass(frozen=True)
class Write:
    """A write that has begun: the number of its transaction, and the stamp of the days that it replaces.

    The number is that of the version which would come next. A commit that is tried again, and that of a run which was
    taken for dead and wakes behind another's, bear one that the log has reached: neither changes the table.
    """

    table: str
    number: int
    stamp: str | None = None

    def options(self) -> dict[str, str]:
        """Of a commit by Spark, which leaves out one whose number is not above the last."""
        stamp = {"userMetadata": self.stamp} if self.stamp else {}
        return {"txnAppId": WRITER, "txnVersion": str(self.number), **stamp}


@dataclass(frozen=True)
class Lake:
    """A lake with tables below `root`, a local path or an object-store URI, and files that are no tables below `mount`
    (default: the root). A relative path counts from the working directory."""

    root: str
    mount: str = ""

    def __post_init__(self) -> None:
        for name in ("root", "mount"):  # engines resolve a relative path each in a way of its own
            value = getattr(self, name)
            if value and "://" not in value:
                object.__setattr__(self, name, str(Path(value).resolve()))

    @property
    def home(self) -> Path:
        """Where artifacts, reports, simulated logs and the lock lie: a path that every machine of a run shares."""
        return Path(self.mount or self.root)

    def path(self, table: str) -> str:
        return f"{self.root}/{TABLES[table].name}"

    def open(self, table: str, version: int | None = None) -> DeltaTable:
        """The table at `version` (default: the newest). Raises ContractViolation for one that a newer release wrote."""
        try:
            return DeltaTable(self.path(table), version=version)
        except DeltaError as error:
            if "Unsupported" not in str(error):
                raise
            raise ContractViolation(
                f"Table {table} in {self.root} was written by a newer release ({error}); use that release, or another lake."
            ) from error

    def exists(self, table: str) -> bool:
        path = self.path(table)
        if "://" not in path:  # a kill before the first commit leaves the log's folder, which delta-rs takes for a table
            log = Path(path) / "_delta_log"
            return any(log.glob("[0-9]*.json")) or any(log.glob("[0-9]*.checkpoint*.parquet"))
        return DeltaTable.is_deltatable(path)

    def create(self, table: str) -> None:
        """Creates the table from its contract where it is missing, without deletion vectors or column mapping, so that Ray
        reads what Spark wrote. One that an earlier release wrote gets the columns that the contract has gained, null in
        older rows. Constraints are a commit of their own, before any row: a kill between the two leaves none out."""
        contract = TABLES[table]
        if not self.exists(table):
            self._clear_unborn(table)
            DeltaTable.create(
                self.path(table),
                contract.schema,
                partition_by=[PARTITION],
                description=contract.meaning,
                configuration=PROPERTIES,
            )
        delta = self.open(table)
        there = {field.name for field in delta.schema().fields}
        added = [field.with_nullable(True) for field in contract.schema if field.name not in there]
        if added:
            delta.alter.add_columns(DeltaSchema.from_arrow(pa.schema(added)).fields)
        kept = delta.metadata().configuration
        lacking = {name: check.sql for name, check in contract.checks.items() if f"delta.constraints.{name}" not in kept}
        if lacking:
            delta.alter.add_constraint(lacking)

    def begin(self, table: str, identities: Mapping[datetime.date, str] | None = None) -> Write:
        """Begins a write to the table, which is created where it is missing."""
        self.create(table)
        stamp = commit_metadata(TABLES[table].written_by, identities) if identities else None
        return Write(table, self.open(table).version() + 1, stamp)

    @contextmanager
    def writing(self, table: str, identities: Mapping[datetime.date, str] | None = None) -> Iterator[Write]:
        """Begins a write that the block commits. Whatever an engine raises where another write was committed since, it is a
        ContractViolation that says so."""
        write = self.begin(table, identities)
        try:
            yield write
        except Exception as error:
            if isinstance(error, ContractViolation) or not self._is_overtaken(write):
                raise
            raise _another_wrote(write) from error

    def _is_overtaken(self, write: Write) -> bool:
        last = self.open(write.table).transaction_version(WRITER)
        return last is not None and last >= write.number

    def properties(self, write: Write) -> CommitProperties:
        """Of a commit by delta-rs, which notes the number and does not compare it. Raises ContractViolation where another
        write was committed since this one began."""
        if self._is_overtaken(write):
            raise _another_wrote(write)
        metadata = {"userMetadata": write.stamp} if write.stamp else None
        return CommitProperties(custom_metadata=metadata, app_transactions=[Transaction(WRITER, write.number)])

    def committed(self, write: Write) -> int:
        """The table's version after the write. Raises ContractViolation where the log has not taken it, and where Ray would
        misread the table."""
        assert_ray_readable(self, write.table)
        table = self.open(write.table)
        newest = next((commit for commit in table.history() if stamped_identities(commit)), {})
        if write.stamp and newest.get("userMetadata") != write.stamp:
            raise _another_wrote(write)
        return table.version()

    def _clear_unborn(self, table: str) -> None:
        """Removes the log's folder of a table whose creation a kill broke off: no engine creates one beside other files."""
        if "://" not in self.root:
            shutil.rmtree(Path(self.path(table)) / "_delta_log", ignore_errors=True)

    def tables(self) -> list[str]:
        """The tables that exist."""
        return [table for table in TABLES if self.exists(table)]

    def version(self, table: str) -> int | None:
        """The newest committed version, or None where there is no table yet."""
        return self.open(table).version() if self.exists(table) else None

    def identities(self, table: str) -> Identities:
        """The identity of each partition as its newest stamped commit gives it, a day without rows included."""
        found: Identities = {}
        for day, identity, _ in self.stamps(table):
            found.setdefault(day, identity)
        return found

    def stamps(self, table: str) -> Iterator[tuple[datetime.date, str, int]]:
        """Every identity that a partition ever got, newest first: day, identity, milliseconds of the commit."""
        for commit in self.open(table).history() if self.exists(table) else ():
            for day, identity in stamped_identities(commit).items():
                yield day, identity, int(commit["timestamp"])

    def row_count(self, table: str, version: int | None = None) -> int:
        """Rows by the log's own statistics; reads no data."""
        return sum(self.rows_by_day(table, version).values())

    def rows_by_day(self, table: str, version: int | None = None) -> dict[datetime.date, int]:
        """Rows of each partition by the log's own statistics; reads no data."""
        return self._by_day(table, version, "num_records")

    def bytes_by_day(self, table: str, version: int | None = None) -> dict[datetime.date, int]:
        """Bytes of each partition's files by the log; reads no data."""
        return self._by_day(table, version, "size_bytes")

    def _by_day(self, table: str, version: int | None, column: str) -> dict[datetime.date, int]:
        actions = self.open(table, version).get_add_actions(flatten=True)
        found: dict[datetime.date, int] = {}
        days, sizes = (actions.column(name).to_pylist() for name in (f"partition.{PARTITION}", column))
        for day, size in zip(days, sizes, strict=True):
            found[day] = found.get(day, 0) + (size or 0)
        return found

    def artifact(self, stage: str, identity: str) -> Path:
        """The folder of an artifact; a path on a disk or a mount, since engines write into it."""
        return self.home / "_artifacts" / stage / identity

    def manifest(self, stage: str, identity: str) -> dict[str, Any] | None:
        """The manifest of a complete artifact, or None."""
        path = self.artifact(stage, identity) / "manifest.json"
        return _manifest_of(path) if path.is_file() else None

    def newest_artifact(self, stage: str) -> str | None:
        """The identity of the artifact that was completed last, or None."""
        made = {path: path.stat().st_mtime for path in self.artifact(stage, "any").parent.glob("*/manifest.json")}
        return max(made, key=lambda path: made[path]).parent.name if made else None

    def write_manifest(self, stage: str, identity: str, content: Mapping[str, Any]) -> None:
        """Completes an artifact: the manifest appears whole or not at all."""
        folder = self.artifact(stage, identity)
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / "manifest.json.draft"
        whole = {"format": FORMAT, "stage": stage, "identity": identity, **content}
        draft.write_text(json.dumps(whole, indent=2, default=str))
        draft.replace(folder / "manifest.json")


def _manifest_of(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ContractViolation(f"{path} is no JSON; remove the folder {path.parent} and run again.") from error
    if content.get("format", FORMAT) > FORMAT:
        raise ContractViolation(
            f"{path} has format {content['format']}, written by a newer release; this one reads up to {FORMAT}: "
            "use that release, or another lake."
        )
    return content


def _another_wrote(write: Write) -> ContractViolation:
    return ContractViolation(
        f"Another run wrote table {write.table} while this one did; the rows of this one were left out. "
        "Run again: what is up to date is kept."
    )


def lake_of(config: Config) -> Lake:
    """The lake of a deployment."""
    return Lake(config.lake, config.artifacts)


def stamped_identities(commit: Mapping[str, Any]) -> Identities:
    """The identities that one entry of a table's history carries; empty for commits of other kinds."""
    raw = commit.get("userMetadata")
    if not raw:
        return {}
    try:
        stamped = json.loads(raw)["identities"]
    except (ValueError, KeyError, TypeError):
        return {}  # somebody else's metadata
    return {datetime.date.fromisoformat(day): identity for day, identity in stamped.items()}


def assert_ray_readable(lake: Lake, table: str) -> None:
    """Refuses a table whose protocol Ray would misread (deletion vectors, column mapping, newer features).

    Raises ContractViolation naming the table, the feature and the remedy.
    """
    delta = lake.open(table)
    protocol = delta.protocol()
    properties = delta.metadata().configuration
    mapping = properties.get("delta.columnMapping.mode", "none")
    features = set(protocol.reader_features or [])
    remedy = f"Rewrite {lake.path(table)} with that feature off; this release reads plain Delta tables only."
    if mapping != "none":
        raise ContractViolation(f"Table {table} uses column mapping ({mapping}), which Ray reads as nulls. {remedy}")
    if protocol.min_reader_version > 3 or not features <= READABLE_FEATURES:
        names = ", ".join(sorted(features - READABLE_FEATURES)) or f"reader version {protocol.min_reader_version}"
        raise ContractViolation(f"Table {table} needs {names}, which Ray cannot read. {remedy}")
    if protocol.min_reader_version == 2:
        raise ContractViolation(f"Table {table} has reader version 2 (column mapping). {remedy}")
