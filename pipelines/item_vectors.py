"""An item's vector: the weighted, L2-normalised blocks of its sources side by side, from parts fitted on the fit day.

Blocks: `text` (principal components of a sentence encoder), `pairs` (PPMI-SVD of co-occurrences), `attributes` (hashed
signs), `vector` (the source's own, each of length 1 where it has several), `aligned` (what the aligner makes of the
content, for new items too). What the fit keeps is small and lies in one .npz and the aligner's file beside it, so that
later days are appended without a refit and land in the same space.

An item without pairs, a new one above all, gets as its pairs block the mean of the pairs vectors of the
`NEIGHBOURS` items with pairs that are nearest by content (all other blocks), so that its codes lie among
those of its kind; without content it stays zero. `sources` names what an item itself has, so such a block is not among
them. Cost: new items x items with pairs (a sample of at most `NEIGHBOUR_POOL`), by matrix products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from model.item_aligner import Aligner, aligned_vectors
from model.seeding import hash64
from pipelines.attribute_vectors import TokenWeights, attribute_vectors, fit_weights
from pipelines.checkpoints import load_aligner, save_aligner
from pipelines.text_encoder import Components
from schemas.config import EmbedConfig
from schemas.errors import ContractViolation

NEIGHBOURS = 10
NEIGHBOUR_POOL = 1_000_000
ALIGNER = "aligner.safetensors"


@dataclass(frozen=True)
class Fitted:
    """What the fit keeps. `content` holds the content blocks of those items of `pair_items` that the catalogue knows."""

    sources: tuple[str, ...]  # those in use, in the order of the configuration
    components: Components
    tokens: TokenWeights
    pair_items: np.ndarray  # int64 [P], sorted
    pair_vectors: np.ndarray  # float32 [P, pairs_width]
    content_items: np.ndarray  # int64 [C], sorted, among pair_items
    content: np.ndarray  # float32 [C, W]
    vector_widths: dict[str, int]  # of the source's own, by name
    aligner: Aligner | None = None
    aligner_content: tuple[str, ...] = ()  # the blocks that it reads, in this order

    @property
    def reads_text(self) -> bool:
        return "text" in (*self.sources, *self.aligner_content)

    def save(self, path: Path, settings: EmbedConfig) -> None:
        if self.aligner is not None:
            save_aligner(path.with_name(ALIGNER), self.aligner, settings.aligned)
        np.savez(
            path,
            sources=np.array(self.sources, dtype="U"),
            text_mean=self.components.mean,
            text_axes=self.components.axes,
            token_hashes=self.tokens.hashes,
            token_weights=self.tokens.weights,
            token_unknown=self.tokens.unknown,
            pair_items=self.pair_items,
            pair_vectors=self.pair_vectors,
            content_items=self.content_items,
            content=self.content,
            vector_names=np.array(list(self.vector_widths), dtype="U"),
            vector_widths=np.array(list(self.vector_widths.values()), dtype=np.int64),
            aligner_content=np.array(self.aligner_content, dtype="U"),
        )

    @staticmethod
    def load(path: Path) -> Fitted:
        with np.load(path, allow_pickle=False) as saved:
            sources = tuple(saved["sources"].tolist())
            return Fitted(
                sources,
                Components(saved["text_mean"], saved["text_axes"]),
                TokenWeights(saved["token_hashes"], saved["token_weights"], float(saved["token_unknown"])),
                saved["pair_items"],
                saved["pair_vectors"],
                saved["content_items"],
                saved["content"],
                dict(zip(saved["vector_names"].tolist(), saved["vector_widths"].tolist(), strict=True)),
                load_aligner(path.with_name(ALIGNER)) if "aligned" in sources else None,
                tuple(saved["aligner_content"].tolist()) if "aligned" in sources else (),
            )


@dataclass(frozen=True)
class DayItems:
    """The items of one partition, sorted by id, with what the encoder made of their titles."""

    items: pa.Table
    has_title: np.ndarray  # bool [N]
    text: np.ndarray  # float32 [titles, encoder's width]

    @property
    def ids(self) -> np.ndarray:
        return self.items.column("item_id").to_numpy()


def fit_parts(
    day: DayItems,
    sources: tuple[str, ...],
    aligner_content: tuple[str, ...],
    components: Components,
    pairs: tuple[np.ndarray, np.ndarray],
    settings: EmbedConfig,
) -> Fitted:
    """Fits what depends on the catalogue alone. `pairs` are items (int64 [P], sorted) and vectors (float32 [P, W])."""
    reads = {*sources, *aligner_content}
    return Fitted(
        sources,
        components,
        fit_weights(day.items, settings.seed),
        *pairs,
        content_items=np.zeros(0, np.int64),
        content=np.zeros((0, 0), np.float32),
        vector_widths=widths_of(day.items) if "vector" in reads else {},
        aligner_content=aligner_content,
    )


def with_neighbours(day: DayItems, fitted: Fitted, settings: EmbedConfig) -> Fitted:
    """Keeps the content of the items with pairs, among which those without find their neighbours."""
    content = _side_by_side(content_blocks(day, fitted, settings), len(day.items))
    kept = np.flatnonzero(np.isin(day.ids, fitted.pair_items) & content.any(axis=1))
    if len(kept) > NEIGHBOUR_POOL:
        kept = np.sort(kept[np.argsort(hash64(day.ids[kept], settings.seed), kind="stable")[:NEIGHBOUR_POOL]])
    return replace(fitted, content_items=day.ids[kept], content=content[kept])


def item_vectors(day: DayItems, fitted: Fitted, settings: EmbedConfig) -> tuple[np.ndarray, list[list[str]]]:
    """float32 [N, W] the vectors, and the sources of each item."""
    blocks = content_blocks(day, fitted, settings)
    own: dict[str, np.ndarray] = {source: np.any(block, axis=1) for source, block in blocks.items()}
    if "pairs" in fitted.sources:
        known, vectors = own_pairs(day.ids, fitted)
        vectors[~known] = neighbours_mean(_side_by_side(blocks, len(day.items))[~known], fitted)
        blocks["pairs"], own["pairs"] = _weighted(vectors, "pairs", settings), known
    ordered = {source: blocks[source] for source in fitted.sources}
    names = [[source for source in ordered if own[source][row]] for row in range(len(day.items))]
    return _side_by_side(ordered, len(day.items)), names


def content_blocks(day: DayItems, fitted: Fitted, settings: EmbedConfig) -> dict[str, np.ndarray]:
    """The weighted blocks that an item has from its first day on: all but pairs, in the order of the sources."""
    blocks: dict[str, np.ndarray] = {}
    for source in fitted.sources:
        if source == "aligned":
            blocks[source] = _weighted(aligned_block(day, fitted, settings), source, settings)
        elif source != "pairs":
            width = settings.attributes_width
            parts = source_blocks(source, day, fitted, width, settings.seed)
            blocks[source] = _weighted(np.concatenate(parts, axis=1), source, settings)
    return blocks


def aligned_block(day: DayItems, fitted: Fitted, settings: EmbedConfig) -> np.ndarray:
    """float32 [N, W] of length 1; zero for an item without content."""
    if fitted.aligner is None:
        raise ContractViolation("The vectors of the fit day hold no aligner; run stage embed with --force.")
    content = np.concatenate(aligner_blocks(day, fitted, settings), axis=1)
    return aligned_vectors(fitted.aligner, torch.from_numpy(content)).numpy()


def aligner_blocks(day: DayItems, fitted: Fitted, settings: EmbedConfig) -> list[np.ndarray]:
    """What the aligner reads: float32 [N, W] a block, rows of length 1, zero where the item has nothing of it."""
    width = settings.aligned.attributes_width
    read = (source_blocks(source, day, fitted, width, settings.seed) for source in fitted.aligner_content)
    return [normalised(block) for blocks in read for block in blocks]


def source_blocks(source: str, day: DayItems, fitted: Fitted, attributes_width: int, seed: int) -> list[np.ndarray]:
    """float32 [N, W] of `text` or `attributes`, as it comes, or of each name of `vector`."""
    if source == "attributes":
        return [attribute_vectors(day.items, fitted.tokens, attributes_width, seed)]
    if source == "vector":
        return own_vectors(day.items, fitted.vector_widths)
    values = np.zeros((len(day.items), fitted.components.axes.shape[1]), np.float32)
    if len(day.text):
        values[day.has_title] = fitted.components.project(day.text)
    return [values]


def own_pairs(ids: np.ndarray, fitted: Fitted) -> tuple[np.ndarray, np.ndarray]:
    """bool [N] items with a pairs vector, and float32 [N, W] that vector, zero for the others."""
    vectors = np.zeros((len(ids), fitted.pair_vectors.shape[1]), np.float32)
    if len(fitted.pair_items) == 0:
        return np.zeros(len(ids), bool), vectors
    place = np.searchsorted(fitted.pair_items, ids).clip(max=len(fitted.pair_items) - 1)
    known = (fitted.pair_items[place] == ids) & fitted.pair_vectors[place].any(1)
    vectors[known] = fitted.pair_vectors[place[known]]
    return known, vectors


def neighbours_mean(content: np.ndarray, fitted: Fitted) -> np.ndarray:
    """float32 [N, W]: mean of the normalised pairs vectors of the nearest items by content; zero without content."""
    means = np.zeros((len(content), fitted.pair_vectors.shape[1]), np.float32)
    has_content = np.flatnonzero(content.any(1)) if content.size else np.zeros(0, np.int64)
    if len(has_content) == 0 or len(fitted.content) == 0:
        return means
    index = faiss.IndexFlatL2(fitted.content.shape[1])
    index.add(np.ascontiguousarray(fitted.content))
    _, near = index.search(np.ascontiguousarray(content[has_content]), min(NEIGHBOURS, len(fitted.content)))
    rows = np.searchsorted(fitted.pair_items, fitted.content_items)
    means[has_content] = normalised(fitted.pair_vectors[rows])[near].mean(1)
    return means


def normalised(vectors: np.ndarray) -> np.ndarray:
    """float32 [N, W]: rows of length 1; zero rows stay zero."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)


def matrix_of(vectors: pa.ChunkedArray) -> np.ndarray:
    """float32 [N, D] of lists of one length. Raises ContractViolation for others."""
    lists = vectors.combine_chunks()
    lengths = np.unique(np.diff(lists.offsets.to_numpy()))
    if len(lengths) != 1:
        raise ContractViolation("Table item_embeddings mixes vectors of different dimensions; rerun stage embed.")
    return lists.flatten().to_numpy().reshape(len(lists), int(lengths[0]))


def _weighted(vectors: np.ndarray, source: str, settings: EmbedConfig) -> np.ndarray:
    weights: Mapping[str, float] = dict(zip(settings.sources, settings.weights, strict=True))
    return normalised(vectors) * np.float32(weights[source])


def vectors_by_name(items: pa.Table) -> dict[str, tuple[np.ndarray, pa.ListArray]]:
    """The source's own vectors: by name, the rows that have one (int64 [R]) and their values."""
    lists = items.column("vectors").combine_chunks()
    named, rows = lists.flatten(), pc.list_parent_indices(lists)
    found = {}
    for name in sorted(pc.unique(named.field("name")).to_pylist()):
        mine = pc.equal(named.field("name"), name)
        found[name] = rows.filter(mine).to_numpy(), named.field("values").filter(mine)
    return found


def widths_of(items: pa.Table) -> dict[str, int]:
    """Dimensions of each of the source's own vectors, by name. Raises ContractViolation where one has several."""
    found: dict[str, int] = {}
    for name, (_, values) in vectors_by_name(items).items():
        widths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(widths) > 1:
            raise ContractViolation(f"Table items holds {name!r} of {sorted(widths)} dimensions; give all the same width.")
        (found[name],) = widths
    return found


def own_vectors(items: pa.Table, widths: Mapping[str, int]) -> list[np.ndarray]:
    """float32 [N, W] for each name that the fit knows, rows of length 1, zero where the item lacks it."""
    blocks = {name: np.zeros((len(items), width), np.float32) for name, width in widths.items()}
    for name, (rows, values) in vectors_by_name(items).items():
        if name not in blocks:
            continue
        wrong = np.flatnonzero(pc.list_value_length(values).to_numpy() != widths[name])
        if len(wrong):
            item, found = items.column("item_id")[rows[wrong[0]]], len(values[wrong[0]])
            raise ContractViolation(f"Item {item} has a vector {name!r} of {found} dimensions, others have {widths[name]}.")
        blocks[name][rows] = normalised(values.flatten().to_numpy().reshape(-1, widths[name]))
    return list(blocks.values())


def _side_by_side(blocks: Mapping[str, np.ndarray], rows: int) -> np.ndarray:
    return np.concatenate([np.zeros((rows, 0), np.float32), *blocks.values()], axis=1)
