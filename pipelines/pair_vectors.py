"""Collaborative vectors: truncated SVD of the positive pointwise mutual information of item pairs.

PPMI with the discount of Pantel and Lin (2002), which keeps pairs seen once from ruling, factored as U sqrt(S) (Levy and
Goldberg, NeurIPS 2014: word2vec factors a shifted PMI). Start vector and signs are fixed, so a rerun gives the same.

`ppmi_svd_task` runs in one Ray task, so that the driver holds only the result. It reads a million pairs at a time; its
memory is about 100 bytes a distinct pair and 8 (2 width + 1) bytes an item: 10^7 pairs of 10^6 items at width 64 take 2 GB.
A larger catalogue needs pairs that are pruned upstream, or a randomised SVD over shards.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array, csr_array
from scipy.sparse.linalg import svds

from pipelines.ray_tables import arrow_parts
from schemas.lake import Lake

KIND = "cooccurrence"
ROWS_AT_ONCE = 1_000_000
SUMS = pa.schema([("item_a", pa.int64()), ("item_b", pa.int64()), ("weight", pa.float64())])


def summed_pairs(lake: Lake, version: int, days: Sequence[datetime.date], kind: str = KIND) -> pa.Table:
    """item_a, item_b, weight: the pairs of `days` of one kind, one row a pair, sorted."""
    total = SUMS.empty_table()
    for rows in arrow_parts(lake, "item_pairs", version, ["item_a", "item_b", "weight", "kind"], days, ROWS_AT_ONCE):
        rows = rows.filter(pc.equal(rows.column("kind"), kind)).drop_columns(["kind"]).cast(SUMS)
        grouped = pa.concat_tables([total, rows]).group_by(["item_a", "item_b"], use_threads=False)
        total = grouped.aggregate([("weight", "sum")]).rename_columns(SUMS.names)
    return total.sort_by([("item_a", "ascending"), ("item_b", "ascending")])


def ppmi(pairs: pa.Table) -> tuple[np.ndarray, csr_array]:
    """The items that have pairs (int64 [N], sorted) and their symmetric, discounted PPMI (float64 [N, N])."""
    first, second = pairs.column("item_a").to_numpy(), pairs.column("item_b").to_numpy()
    weight = pairs.column("weight").to_numpy()
    items, places = np.unique(np.concatenate([first, second]), return_inverse=True)
    row, column = places[: len(first)], places[len(first) :]
    sides = (np.concatenate([row, column]), np.concatenate([column, row]))
    both = coo_array((np.concatenate([weight, weight]), sides), shape=(len(items), len(items))).tocsr().tocoo()
    value, mass = both.data, np.bincount(both.row, both.data, len(items))
    masses = mass[both.row], mass[both.col]
    smaller = np.minimum(*masses)
    information = np.log(value * mass.sum() / (masses[0] * masses[1]))
    discounted = information * value / (value + 1) * smaller / (smaller + 1)
    kept = information > 0
    return items, csr_array((discounted[kept], (both.row[kept], both.col[kept])), shape=both.shape)


def factors(matrix: csr_array, width: int) -> np.ndarray:
    """float32 [N, width]: U sqrt(S), largest first, each column's largest entry positive; zeros beyond the rank."""
    rows = matrix.shape[0]
    if rows == 0:
        return np.zeros((0, width), np.float32)
    if rows <= 2 * width:
        left, values, _ = np.linalg.svd(matrix.toarray(), full_matrices=False)
    else:
        left, values, _ = svds(matrix, k=width, v0=np.full(rows, rows**-0.5), solver="arpack")
    order = np.argsort(-values, kind="stable")[:width]
    left, values = left[:, order], values[order]
    extreme = left[np.abs(left).argmax(0), np.arange(left.shape[1])]
    vectors = np.zeros((rows, width), np.float32)
    vectors[:, : len(order)] = left * np.where(extreme < 0, -1.0, 1.0) * np.sqrt(np.maximum(values, 0))
    return vectors


def ppmi_svd_task(lake: Lake, version: int, days: Sequence[datetime.date], width: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [N] items with pairs, sorted, and float32 [N, width] their vectors."""
    items, matrix = ppmi(summed_pairs(lake, version, days))
    return items, factors(matrix, width)
