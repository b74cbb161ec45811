"""Items in words, so that a person can judge a recommendation: the title, else what else is known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from schemas.lake import Lake

COLUMNS = ["item_id", "date", "author_id", "tags", "title", "duration_ms"]


def item_names(lake: Lake, item_ids: Iterable[int]) -> dict[int, str]:
    """A name for each item by its newest row; of an unknown one only its id."""
    wanted = sorted(set(item_ids))
    dataset = lake.open("items").to_pyarrow_dataset()
    rows = dataset.to_table(columns=COLUMNS, filter=pc.field("item_id").isin(pa.array(wanted, pa.int64())))
    names = {item: f"item {item}" for item in wanted}
    for row in rows.sort_by("date").to_pylist():  # newer rows overwrite
        names[row["item_id"]] = name_of(row)
    return names


def name_of(row: dict[str, Any]) -> str:
    if row["title"]:
        return f"{row['title']} (item {row['item_id']})"
    facts = [f"tag {', '.join(row['tags'])}"] if row["tags"] else []
    if row["author_id"] is not None:
        facts.append(f"author {row['author_id']}")
    if row["duration_ms"]:
        facts.append(f"{row['duration_ms'] / 1000:.0f} s")
    return f"item {row['item_id']}" + (f" ({', '.join(facts)})" if facts else "")


def readable(lake: Lake, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sample recommendations with items in words instead of ids."""
    if not samples:
        return []
    names = item_names(lake, [item for s in samples for item in (*s["history"], *s["items"])])

    def words(items: list[int]) -> list[str]:
        return [names[item] for item in items]

    return [sample | {"history": words(sample["history"]), "items": words(sample["items"])} for sample in samples]
