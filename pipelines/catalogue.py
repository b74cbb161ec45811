"""The catalogue as a model sees it: dense indices, codes, ranks. Dense indices exist only here and in a bundle."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.codebook import codebook_manifest, sizes_of
from pipelines.ray_tables import read_arrow
from schemas.errors import ContractViolation
from schemas.lake import Lake


@dataclass(frozen=True)
class Catalogue:
    """N items in ascending order of item id; the dense index is the place in that order."""

    item_ids: np.ndarray  # int64 [N], sorted
    codes: np.ndarray  # int32 [N, L]
    ranks: np.ndarray  # int32 [N], place among the items that share the codes
    known_on: np.ndarray  # datetime64[D] [N], the day on which the item got its codes
    codebook_version: str
    sizes: tuple[int, ...]  # codes of each level that an item has

    @property
    def levels(self) -> int:
        return self.codes.shape[1]

    def __len__(self) -> int:
        return len(self.item_ids)

    def dense(self, item_ids: np.ndarray) -> np.ndarray:
        """int64 [...]: the dense index of each item id, -1 where the catalogue does not know it."""
        place = np.searchsorted(self.item_ids, item_ids).clip(max=max(len(self) - 1, 0))
        return np.where(self.item_ids[place] == item_ids, place, -1).astype(np.int64)


def load_catalogue(lake: Lake, version: int, fit_day: datetime.date, until: datetime.date) -> Catalogue:
    """The codes of the codebook of `fit_day` at a pinned table version, of the items known by the end of `until`.

    Partitions before the fit day belong to older codebooks. Raises ContractViolation where the others mix codebooks or do
    not fit theirs, MissingUpstream where the lake has lost it.
    """
    days = [day for day in lake.identities("semantic_ids") if fit_day <= day <= until]
    table = read_arrow(lake, "semantic_ids", version, days=days)
    versions = set(table.column("codebook_version").to_pylist())
    if len(versions) != 1:
        raise ContractViolation(
            f"Table semantic_ids version {version} holds codes of {len(versions)} codebooks ({sorted(versions)}) from "
            f"{fit_day} to {until}; run stage tokenize with --force, so that all items have codes of one."
        )
    (codebook,) = versions
    manifest = codebook_manifest(lake, codebook)
    sizes = sizes_of(manifest["codes"], manifest["levels"])
    table = table.sort_by("item_id")
    codes = table.column("codes").combine_chunks()
    lengths, flat = np.unique(np.diff(codes.offsets.to_numpy())), codes.flatten().to_numpy()
    if lengths.tolist() != [len(sizes)] or flat.min() < 0 or (flat.reshape(-1, len(sizes)) >= sizes).any():
        raise ContractViolation(
            f"Table semantic_ids version {version} holds ids that do not fit codebook {codebook}, whose levels have "
            f"{', '.join(map(str, sizes))} codes; run stage tokenize with --force."
        )
    return Catalogue(
        item_ids=table.column("item_id").to_numpy().copy(),  # copies, which PyTorch may hold: Arrow's memory is read-only
        codes=flat.copy().reshape(-1, len(sizes)),
        ranks=table.column("rank").to_numpy().copy(),
        known_on=table.column("date").to_numpy().astype("datetime64[D]"),
        codebook_version=codebook,
        sizes=sizes,
    )


def codes_matrix(codes: pa.ChunkedArray) -> np.ndarray:
    """int32 [N, L], read-only: the ids of at least one item, all of one codebook."""
    lists = codes.combine_chunks()
    return lists.flatten().to_numpy().reshape(len(lists), -1)
