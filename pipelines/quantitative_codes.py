"""Stage `codes`: the quantitative codes of every item (QARM), features of a ranker that learns an embedding of each.

VQ is the ids of the nearest items of the fit day; its codebook is those items, so an item of a later day is coded by items
of the fit day. An item is not among its own nearest: its id is a feature already, and so the code of an old item is of the
same kind as that of a new one. RQ is residual K-means on the same vectors, exact as in `tokenize`. Both codebooks lie in
the artifact folder of the fit day's partition and are frozen: a later day is coded by them alone, and moves no row.

This process holds the vectors of the fit day (4 x width bytes an item) and of one later day, as `embed` does. Exact search
compares every item with every item of the fit day; `codes.search: lists` compares with those of a few lists, which are the
items of one first RQ code each, and logs what share of the true nearest it finds.
"""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.near_items import listed_items, nearest_items, places_in
from model.rq_kmeans import Codebook, encode
from model.seeding import hash64
from pipelines.codebook import read_codebook, save_codebook
from pipelines.codebook_report import codebook_metrics
from pipelines.embed import refuse_stale_fit
from pipelines.item_vectors import matrix_of
from pipelines.ray_tables import lists_of, read_arrow, replace_days
from pipelines.stage import StageContext, StageResult
from schemas.config import CodesConfig
from schemas.errors import ContractViolation
from schemas.lake import Lake
from schemas.tables import ITEM_CODES

TABLE = "item_codes"
VECTORS = "item_embeddings"
ITEMS_FILE = "items.safetensors"
SAMPLE = 1_000  # items on which the search by lists is compared with the exact one


@dataclass(frozen=True)
class CodeBooks:
    """What codes are made from: the items of the fit day, in ascending order of id, and the centroids."""

    item_ids: Tensor  # int64 [M]
    vectors: Tensor  # float32 [M, D]
    centroids: Codebook

    @classmethod
    def load(cls, folder: Path) -> CodeBooks:
        items = load_file(folder / ITEMS_FILE)
        return cls(items["item_ids"], items["vectors"], read_codebook(folder))


def run(context: StageContext) -> StageResult:
    """Writes the stale days of item_codes. Raises MissingUpstream where only later days are asked for and the fit day's
    partition is stale, ContractViolation where vectors do not fit the codebook."""
    todo, fit_day, lake = context.todo(TABLE), context.calendar.fit_day, context.lake
    refuse_stale_fit(context, TABLE)
    version = context.plan.expected[TABLE][fit_day]
    series = {}
    if fit_day in todo or lake.manifest("codes", version) is None:
        series = fit(context, version)
    books = CodeBooks.load(lake.artifact("codes", version))
    settings, metrics, parts = context.config.codes, dict[str, float](), []
    for day in sorted(todo):
        ids, vectors = vectors_of(lake, context.pins[VECTORS], day)
        near, rq = coded(books, ids, vectors, settings)
        parts.append(table_of(ids, day, books.item_ids, near, rq, version))
        if day == fit_day:
            metrics |= codebook_metrics(rq.numpy(), books.centroids.sizes)
            metrics |= {} if settings.search == "exact" else {"vq_recall": sampled_recall(books, near, settings)}
    rows = pa.concat_tables(parts)
    table_version = replace_days(lake, TABLE, rows, todo)
    found = f", {metrics['vq_recall']:.2%} of the true nearest found" if "vq_recall" in metrics else ""
    context.say(f"{len(rows):,} items, {settings.nearest} nearest{found}, {settings.rq.levels} levels, codebook {version}")
    return StageResult({TABLE: table_version}, {TABLE: len(rows)}, metrics, series)


def fit(context: StageContext, version: str) -> dict[str, list[tuple[int, float]]]:
    """Makes the codebooks of the fit day and completes their artifact; the inertia curves."""
    from pipelines.codebook_fit import fit_stage_codebook  # Ray Train takes seconds to import

    settings, lake, pin = context.config.codes, context.lake, context.pins[VECTORS]
    fitted = fit_stage_codebook(context, version, settings.rq)
    ids, vectors = vectors_of(lake, pin, context.calendar.fit_day)
    folder = lake.artifact("codes", version)
    save_codebook(folder, fitted.codebook, version)
    save_file({"item_ids": ids, "vectors": vectors}, folder / ITEMS_FILE)
    content: dict[str, Any] = {"levels": settings.rq.levels, "codes": settings.rq.codes, "width": vectors.shape[1]}
    content |= {"items": len(ids), "inertia": fitted.inertia, "inputs": {VECTORS: pin}, "settings": asdict(settings)}
    lake.write_manifest("codes", version, content)
    return {f"inertia_level_{level + 1}": list(enumerate(curve)) for level, curve in enumerate(fitted.inertia)}


def vectors_of(lake: Lake, version: int, day: datetime.date) -> tuple[Tensor, Tensor]:
    """int64 [N] the items of a day, ascending, and float32 [N, D] their vectors. Raises ContractViolation where an item
    has two."""
    table = read_arrow(lake, VECTORS, version, ["item_id", "vector"], [day]).sort_by("item_id")
    ids = torch.tensor(table.column("item_id").to_numpy())
    if (ids[1:] == ids[:-1]).any():
        raise ContractViolation(f"Table {VECTORS} holds an item twice on {day}; rerun stage embed.")
    vectors = matrix_of(table.column("vector")) if len(ids) else np.zeros((0, 0), np.float32)
    return ids, torch.tensor(vectors)


def coded(books: CodeBooks, ids_N: Tensor, x_ND: Tensor, settings: CodesConfig) -> tuple[Tensor, Tensor]:
    """int64 [N, K] places of the nearest items among those of the codebook, -1 where there are no more; int32 [N, L] RQ."""
    if len(ids_N) == 0:  # a day without new items has no vectors to tell their width
        return torch.zeros(0, settings.nearest, dtype=torch.int64), torch.zeros(0, settings.rq.levels, dtype=torch.int32)
    rq_NL, own_N = encode(books.centroids, x_ND, settings.rq.chunk), places_in(ids_N, books.item_ids)
    if settings.search == "exact":
        return nearest_items(x_ND, books.vectors, settings.nearest, own_N), rq_NL
    first_KD = books.centroids.centroids[0]
    return listed_items(x_ND, books.vectors, settings.nearest, own_N, first_KD, settings.probes), rq_NL


def sampled_recall(books: CodeBooks, near_NK: Tensor, settings: CodesConfig) -> float:
    """Share of the true nearest items that `near_NK` holds, over a sample of the items of the fit day."""
    order = np.argsort(hash64(books.item_ids.numpy(), settings.rq.seed), kind="stable")
    rows = torch.from_numpy(order[:SAMPLE])
    exact = nearest_items(books.vectors[rows], books.vectors, settings.nearest, rows)
    found = (near_NK[rows][:, :, None] == exact[:, None]).any(1)
    return float(found[exact >= 0].float().mean())


def table_of(
    ids_N: Tensor, day: datetime.date, book_ids_M: Tensor, near_NK: Tensor, rq_NL: Tensor, version: str
) -> pa.Table:
    known = near_NK >= 0
    offsets = np.concatenate([[0], known.sum(1).cumsum(0).numpy()]).astype(np.int32)
    columns = {
        "item_id": ids_N.numpy(),
        "date": pa.array([day] * len(ids_N), pa.date32()),
        "vq": pa.ListArray.from_arrays(pa.array(offsets), pa.array(book_ids_M[near_NK[known]].numpy())),
        "rq": lists_of(rq_NL.numpy()),
        "codebook_version": pa.array([version] * len(ids_N), pa.string()),
    }
    return pa.table(columns, schema=ITEM_CODES.schema)
