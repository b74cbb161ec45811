"""The items table as the model's fields: authors and tags of a catalogue's items as of a day."""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
import torch

from model.item_table import MAX_TAGS, ItemTable, build_item_table
from pipelines.catalogue import Catalogue
from pipelines.collate import text_hashes
from pipelines.ray_tables import newest_rows, read_arrow
from schemas.lake import Lake


def item_table(
    lake: Lake,
    items_version: int,
    catalogue: Catalogue,
    hash_buckets: int,
    until: datetime.date | None = None,
) -> ItemTable:
    """Fields of the catalogue's items by their newest rows, at or before `until` where it is given.

    An item without a row has neither author nor tags; of more than MAX_TAGS tags the first count.
    """
    rows = read_arrow(lake, "items", items_version, ["item_id", "date", "author_id", "tags"])
    rows = newest_rows(rows, "item_id", until).combine_chunks()
    place = catalogue.dense(rows.column("item_id").to_numpy())
    known = place >= 0
    authors = np.full(len(catalogue), -1, dtype=np.int64)
    authors[place[known]] = rows.column("author_id").fill_null(-1).to_numpy()[known]
    hashes, absent = _tags(rows)
    tags, no_tag = np.zeros((len(catalogue), MAX_TAGS), np.int64), np.ones((len(catalogue), MAX_TAGS), bool)
    tags[place[known]], no_tag[place[known]] = hashes[known], absent[known]
    return build_item_table(
        torch.from_numpy(np.array(catalogue.item_ids)),
        torch.from_numpy(np.array(catalogue.codes)),
        torch.from_numpy(authors),
        torch.from_numpy(tags),
        torch.from_numpy(no_tag),
        catalogue.sizes,
        hash_buckets,
    )


def _tags(rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the first MAX_TAGS tags, int64 [n, MAX_TAGS], and where there is none, bool."""
    if rows.num_rows == 0:
        return np.zeros((0, MAX_TAGS), np.int64), np.ones((0, MAX_TAGS), bool)
    column = rows.column("tags").combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    offsets = column.offsets.to_numpy().astype(np.int64)
    hashes = text_hashes(column.flatten())
    index = (offsets[:-1] - offsets[0])[:, None] + np.arange(MAX_TAGS)
    absent = np.arange(MAX_TAGS) >= np.diff(offsets)[:, None]
    taken = hashes[index.clip(max=max(len(hashes) - 1, 0))] if len(hashes) else np.zeros(index.shape, np.int64)
    return np.where(absent, 0, taken), absent
