"""Titles as vectors: a sentence encoder in a Ray Data actor pool, then principal components.

The encoder is a package that carries a model, a folder, or a name on a hub; it loads only in the actors, offline unless
it is a hub's name. Titles are sorted by length and batched within their day, because a transformer's last bits depend on
the batch: the same day then gives the same vectors whether it is made alone or with others.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.config import EmbedConfig

BLOCK_BATCHES = 8  # batches that one call of an actor encodes


@dataclass(frozen=True)
class Components:
    """Principal components of the encoder's vectors."""

    mean: np.ndarray  # float64 [W]
    axes: np.ndarray  # float64 [W, text_width]

    def project(self, vectors: np.ndarray) -> np.ndarray:
        """float32 [N, text_width]."""
        return ((vectors - self.mean) @ self.axes).astype(np.float32)


def encoder_source(encoder: str) -> str | None:
    """What the encoder loads from, or None where the `text` extra or the encoder's package is not installed."""
    if find_spec("sentence_transformers") is None:
        return None
    if Path(encoder).is_dir():
        return str(Path(encoder).absolute())
    if "/" in encoder:
        return encoder
    package = find_spec(encoder)
    return str(Path(package.origin).parent / "model") if package and package.origin else None


def text_of(title: str | None, tags: Sequence[str]) -> str | None:
    """What the encoder reads of an item; None for an item without a title, whose tags are among its attributes."""
    return (f"{title}. {', '.join(tags)}" if tags else title) if title else None


class TitleEncoder:
    """An actor that holds the model. A row of its input is a batch of texts."""

    def __init__(self, source: str, length: int, batch: int) -> None:
        if Path(source).is_dir():
            os.environ["HF_HUB_OFFLINE"] = "1"
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(source)
        self.model.max_seq_length = length
        self.batch = batch

    def __call__(self, rows: pa.Table) -> pa.Table:
        texts, places = rows.column("texts").to_pylist(), rows.column("places").combine_chunks().flatten()
        vectors = [self.model.encode(t, batch_size=self.batch, show_progress_bar=False) for t in texts]
        width = vectors[0].shape[1]
        flat = pa.array(np.concatenate(vectors).astype(np.float32).ravel(), pa.float32())
        lists = pa.FixedSizeListArray.from_arrays(flat, width).cast(pa.list_(pa.float32()))
        return pa.table({"place": places, "vector": lists})


def batches(texts: Sequence[str], size: int, first: int = 0) -> pa.Table:
    """`places` (from `first` on) and `texts` of each batch of at most `size`, shortest texts first."""
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    return pa.table(
        {
            "places": pa.array([[first + i for i in group] for group in groups], pa.list_(pa.int64())),
            "texts": pa.array([[texts[i] for i in group] for group in groups], pa.list_(pa.string())),
        }
    )


def encode_days(ray: Any, days: Sequence[Sequence[str]], source: str, settings: EmbedConfig) -> list[np.ndarray]:
    """float32 [texts of the day, W] for each day's texts."""
    starts = np.cumsum([0, *map(len, days)])
    parts = [batches(texts, settings.text_batch, int(start)) for texts, start in zip(days, starts, strict=False)]
    plan = pa.concat_tables(parts)
    blocks = [plan.slice(at, BLOCK_BATCHES).combine_chunks() for at in range(0, len(plan), BLOCK_BATCHES)]
    if not blocks:
        return [np.zeros((0, 0), np.float32) for _ in days]
    available = ray.cluster_resources()
    gpus = int(available.get("GPU", 0))
    encoded = ray.data.from_arrow(blocks).map_batches(
        TitleEncoder,
        fn_constructor_args=(source, settings.text_length, settings.text_batch),
        batch_format="pyarrow",
        batch_size=None,
        concurrency=max(1, min(len(blocks) // 4, gpus or int(available.get("CPU", 1)))),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )
    table = pa.concat_tables(encoded.iter_batches(batch_format="pyarrow", batch_size=None)).sort_by("place")
    flat = table.column("vector").combine_chunks().flatten().to_numpy()
    vectors = flat.reshape(len(table), -1)
    return [vectors[start : start + len(texts)] for texts, start in zip(days, starts, strict=False)]


def principal_components(vectors: np.ndarray, width: int) -> Components:
    """Of float32 [N, W], N > 0: the `width` axes of largest variance, each with its largest entry positive."""
    mean = vectors.mean(0, dtype=np.float64)
    centred = vectors.astype(np.float64) - mean
    _, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, ::-1][:, :width]
    extreme = axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])]
    return Components(mean, axes * np.where(extreme < 0, -1.0, 1.0))
