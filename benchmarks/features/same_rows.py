"""Whether two systems wrote the same rows. DuckDB reads the Parquet files of both; types are those of the contract."""

from __future__ import annotations

from pathlib import Path

import duckdb

from schemas.lake import Lake
from schemas.tables import TABLES

MEMORY = "10GB"
TYPES = {
    "int64": "BIGINT",
    "int32": "INTEGER",
    "double": "DOUBLE",
    "bool": "BOOLEAN",
    "string": "VARCHAR",
    "date32[day]": "DATE",
    "list<item: int64>": "BIGINT[]",
    "list<item: int32>": "INTEGER[]",
    "list<item: string>": "VARCHAR[]",
}


class DifferentRows(AssertionError):
    """Two systems did different work, so that their times mean nothing."""


def files_of_lake(lake: Lake, table: str) -> list[str]:
    return list(lake.open(table).file_uris())


def files_below(out: Path, table: str) -> list[str]:
    return [str(path) for path in sorted((out / table).rglob("*.parquet"))]


def rows(table: str, files: list[str]) -> str:
    """A query for the rows as the contract has them."""
    columns = ", ".join(f'"{f.name}"::{TYPES[str(f.type)]} AS "{f.name}"' for f in TABLES[table].schema)
    return f"SELECT {columns} FROM read_parquet({files!r}, hive_partitioning = true)"


def digest(table: str, files: list[str], spill: Path) -> str:
    """Rows, and the sum and the exclusive or of a 64-bit hash of each, whatever their order."""
    columns = ", ".join(f'"{name}"' for name in TABLES[table].columns)
    hashes = f"SELECT hash({columns}) AS h FROM rows"
    query = f"SELECT count(*), coalesce(sum(h::HUGEINT), 0), coalesce(bit_xor(h), 0) FROM ({hashes})"
    with connected(spill) as base:
        found = base.execute(f"WITH rows AS ({rows(table, files)}) {query}").fetchone()
    assert found is not None
    return ":".join(map(str, found))


def compare(table: str, ours: list[str], others: list[str], system: str, spill: Path) -> None:
    """Row by row, every column, repeats counted. Raises DifferentRows with the first row that one side lacks."""
    sides = {"lazyrec": rows(table, ours), system: rows(table, others)}
    with connected(spill) as base:
        for one, other in (("lazyrec", system), (system, "lazyrec")):
            found = base.execute(f"{sides[one]} EXCEPT ALL {sides[other]} LIMIT 1").fetchone()
            if found is not None:
                row = dict(zip(TABLES[table].columns, found, strict=True))
                raise DifferentRows(f"Table {table}: {one} has a row that {other} has not: {str(row)[:2000]}")


def connected(spill: Path) -> duckdb.DuckDBPyConnection:
    return duckdb.connect(":memory:", config={"threads": 2, "memory_limit": MEMORY, "temp_directory": str(spill)})
