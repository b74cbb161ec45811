"""`lazyrec tables [NAME]`: the contracts of the tables, readable. Needs no configuration and no lake."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from schemas.errors import ConfigError
from schemas.tables import TABLES, Table
from schemas.tables_page import comment


def contracts(name: str | None) -> list[Table]:
    """The named contract, or all of them. Raises ConfigError for an unknown name."""
    if name is None:
        return list(TABLES.values())
    if name not in TABLES:
        raise ConfigError(f"There is no table {name!r}; tables: {', '.join(TABLES)}.")
    return [TABLES[name]]


def answer(tables: list[Table]) -> dict[str, Any]:
    """The JSON line."""
    columns = {table.name: {field.name: str(field.type) for field in table.schema} for table in tables}
    return {"stage": "tables", "status": "done", "tables": columns}


def print_contracts(tables: list[Table], console: Console) -> None:
    for table in tables:
        console.print(f"\n[bold]{table.name}[/bold]: one row is {table.meaning}. Written by {table.written_by}.")
        grid = Grid("column", "type", "null", "meaning")
        for field in table.schema:
            key = " (key)" if field.name in table.key else ""
            grid.add_row(f"{field.name}{key}", str(field.type), "yes" if field.nullable else "no", comment(field))
        console.print(grid)
        for check in table.checks.values():
            console.print(f"  check: {check.sql}", markup=False)
