"""The docs page of all tables, made from their contracts: python -m schemas.tables_page > docs/tables.md"""

from __future__ import annotations

import sys

import pyarrow as pa

from schemas.tables import PARTITION, TABLES, Table


def page() -> str:
    head = (
        "# Tables\n\nMade from `schemas/tables.py` by `make docs`. Every table is a Delta table in a folder of its own "
        f"below the lake's root, partitioned by `{PARTITION}`; times are UTC microseconds.\n"
    )
    return "\n".join([head, *(section(table) for table in TABLES.values())])


def section(table: Table) -> str:
    lines = [f"## {table.name}\n", f"One row is {table.meaning}.\n"]
    lines.append(f"Written by `{table.written_by}`; key ({', '.join(table.key)}).\n")
    lines += ["| column | type | null | meaning |", "|---|---|---|---|"]
    lines += [f"| {f.name} | {f.type} | {'yes' if f.nullable else 'no'} | {comment(f)} |" for f in table.schema]
    if table.checks:
        lines += ["", "Constraints: " + "; ".join(f"`{check.sql}`" for check in table.checks.values()) + "."]
    return "\n".join(lines) + "\n"


def comment(field: pa.Field) -> str:
    return (field.metadata or {}).get(b"comment", b"").decode().replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(page())
