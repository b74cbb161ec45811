"""The table of item ids before training: which items have rows of their own, and where their embeddings start.

They may start at their items' vectors, turned to their principal axes and cut or filled to the model's width, as long as
random ones on average. What `embed` knows of items that were liked together need not be learned again, and an item with few
events starts beside its neighbours."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model.decoder import Decoder
from model.item_table import ItemTable
from model.pathways import INIT_STD
from pipelines.catalogue import Catalogue
from pipelines.item_vectors import matrix_of
from pipelines.ray_tables import read_arrow
from pipelines.training_data import TrainingData
from schemas.calendar import Calendar
from schemas.lake import Lake

VECTORS = "item_embeddings"


def items_with_rows(data: TrainingData, rows: int) -> Tensor:
    """int64 [M], ids: all items of the catalogue, or of more than `rows` those of the most train positives."""
    ids = data.catalogue.item_ids
    if len(ids) > rows:
        ids = ids[np.argsort(-data.train_positives().counts, kind="stable")[:rows]]
    return torch.from_numpy(np.array(ids))


def vectors_of(lake: Lake, version: int, catalogue: Catalogue, calendar: Calendar) -> tuple[Tensor, Tensor]:
    """Dense items (int64 [M]) of the catalogue and their vectors (float32 [M, W]) at a pinned version."""
    days = [day for day in lake.rows_by_day(VECTORS, version) if calendar.fit_day <= day <= calendar.trained_until]
    rows = read_arrow(lake, VECTORS, version, ["item_id", "vector"], days=days).combine_chunks()
    items = catalogue.dense(rows.column("item_id").to_numpy())
    known = items >= 0
    return torch.from_numpy(items[known]), torch.from_numpy(matrix_of(rows.column("vector"))[known])


@torch.no_grad()
def start_at_vectors(decoder: Decoder, items: ItemTable, known_M: Tensor, vectors_MW: Tensor) -> None:
    """`known_M` are dense items; those that share a row start at their mean, and a row of none stays as it is."""
    table = decoder.context.fields.items
    assert table is not None
    if not len(known_M):
        return
    width = table.embedding_dim
    start_ME = torch.zeros(len(known_M), width)
    turned_MA = vectors_MW @ _axes(vectors_MW)[:, :width]
    start_ME[:, : turned_MA.shape[1]] = turned_MA
    start_ME *= INIT_STD * width**0.5 / start_ME.square().sum(1).mean().sqrt().clamp(min=1e-12)
    rows_M = table.places(items.ids)[known_M.to(items.ids.device)].cpu()
    counts = torch.bincount(rows_M, minlength=table.num_embeddings)[:, None]
    means = torch.zeros(table.num_embeddings, width).index_add_(0, rows_M, start_ME) / counts.clamp(min=1)
    table.weight.copy_(torch.where(counts > 0, means, table.weight.cpu()))


def _axes(vectors_MW: Tensor) -> Tensor:
    """float32 [W, W]: of the second moments, the strongest first, each with its largest part positive."""
    x = vectors_MW.double()
    axes = torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)
    largest = axes.abs().argmax(0)
    return (axes * axes[largest, torch.arange(len(axes))].sign()).float()
