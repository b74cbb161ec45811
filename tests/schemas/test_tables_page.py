"""The docs page of tables is what the contracts say."""

from __future__ import annotations

from schemas.tables import TABLES
from schemas.tables_page import page
from tests.conftest import REPOSITORY


def test_the_page_in_docs_is_current() -> None:
    assert (REPOSITORY / "docs" / "tables.md").read_text() == page()


def test_every_column_says_what_it_means() -> None:
    silent = [(t.name, f.name) for t in TABLES.values() for f in t.schema if not (f.metadata or {}).get(b"comment")]
    assert silent == []
