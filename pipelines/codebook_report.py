"""What the codebook is worth, for MLflow and for the HTML report.

Stage `tokenize` knows ids, codes and what the fit lost, and logs those. The report reads more tables than an identity
should depend on: tags of `items` for the purity of prefixes, and vectors for the share of their variance that the codes
leave. It holds ids, codes and tags of the catalogue, and vectors of at most about `SAMPLED_ITEMS` items.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from matplotlib.figure import Figure

from model.codebook_metrics import (
    Collisions,
    Hourglass,
    LevelUse,
    PrefixUse,
    Purity,
    Reconstruction,
    collisions,
    hourglass,
    level_uses,
    prefix_labels,
    prefix_use,
    purity,
    rebuilt,
    reconstruction,
)
from model.rq_kmeans import Codebook
from pipelines import report_plots as plots
from pipelines.catalogue import codes_matrix
from pipelines.codebook import load_codebook
from pipelines.item_vectors import matrix_of
from pipelines.ray_tables import newest_rows, read_arrow
from schemas.lake import Lake

SAMPLED_ITEMS = 200_000


@dataclass(frozen=True)
class Level:
    """One level's row in the report."""

    use: LevelUse
    prefix: PrefixUse  # of the codes up to this level
    purity: Purity | None  # of those prefixes; None without tags
    left: Reconstruction | None  # after this level, of the items of the fit day; None without their vectors


@dataclass(frozen=True)
class Quality:
    """The codebook that the newest items have."""

    version: str
    items: int
    codes: int  # of the largest level
    ceiling: float  # of an entropy
    levels: list[Level]
    shared: Collisions
    hourglass: Hourglass | None
    later: Reconstruction | None  # by all levels, of the items that came after the fit


@dataclass(frozen=True)
class Coded:
    """The items that have codes of one codebook, by ascending id."""

    item_ids: np.ndarray  # int64 [N]
    days: np.ndarray  # datetime64[D] [N], on which an item got its codes
    codes_NL: torch.Tensor  # int32, the codebook's levels
    shared: Collisions  # by all codes of an id, which may have a level more
    version: str

    @property
    def fit_day(self) -> datetime.date:
        return self.days.min().item()


def codebook_metrics(codes: np.ndarray, sizes: Sequence[int]) -> dict[str, float]:
    """Use of every level (from 1 on), items a prefix, collisions and the hourglass; `codes` int32 [N, L], of
    `sizes` codes a level."""
    codes_NL = torch.from_numpy(codes)
    uses = level_uses(codes_NL, sizes)
    waist = hourglass(uses)
    metrics = {f"{name}_level_{level}": value for level, use in enumerate(uses, 1) for name, value in asdict(use).items()}
    for level, prefix in enumerate(prefix_use(codes_NL, sizes), 1):
        metrics |= {f"{PREFIX_NAMES[name]}_level_{level}": float(value) for name, value in asdict(prefix).items()}
    metrics |= sharing(codes)
    return metrics | ({"hourglass": float(waist.found), "hourglass_waist": waist.waist} if waist else {})


def sharing(codes: np.ndarray) -> dict[str, float]:
    """How many items share all their codes (int32 [N, L])."""
    shared = collisions(torch.from_numpy(codes))
    return {"collision_rate": shared.rate, "distinct_codes": shared.distinct, "largest_bucket": shared.largest}


PREFIX_NAMES = {
    "prefixes": "prefixes",
    "items_mean": "items_a_prefix_mean",
    "items_p50": "items_a_prefix_p50",
    "items_p99": "items_a_prefix_p99",
    "items_max": "items_a_prefix_max",
    "conditional_entropy": "conditional_entropy",
    "conditional_ceiling": "conditional_ceiling",
}


def fit_metrics(lake: Lake, version: str) -> dict[str, float]:
    """The mean squared distance of the fit's items from what their codes stand for, after each level, as it was fitted."""
    manifest = lake.manifest("tokenize", version) or {}
    losses = [curve[-1] / manifest["items"] for curve in manifest.get("inertia", [])]
    return {f"reconstruction_loss_level_{level}": loss for level, loss in enumerate(losses, 1)}


def codebook_figures(codes: np.ndarray, sizes: Sequence[int]) -> dict[str, Figure]:
    """What stage `tokenize` draws of its codes."""
    codes_NL = torch.from_numpy(codes)
    entropies = [use.entropy for use in level_uses(codes_NL, sizes)]
    conditional = [(use.conditional_entropy, use.conditional_ceiling) for use in prefix_use(codes_NL, sizes)]
    items = [torch.bincount(labels_N).numpy() for labels_N in prefix_labels(codes_NL)]
    return {
        "codebook_use": plots.codebook_use(codes, sizes),
        "codebook_entropy": plots.entropy_by_level(entropies, conditional),
        "codebook_prefixes": plots.items_a_prefix(items),
    }


def quality(lake: Lake) -> tuple[Quality, dict[str, Figure]] | None:
    """Of the codebook in use, with its figures; None where there are no codes or their codebook is gone."""
    coded = newest_codes(lake)
    if coded is None or lake.manifest("tokenize", coded.version) is None:
        return None
    codebook = load_codebook(lake, coded.version)
    pure = purity_by_level(lake, coded)
    fitted, later = reconstructions(lake, coded, codebook)
    uses, prefixes = level_uses(coded.codes_NL, codebook.sizes), prefix_use(coded.codes_NL, codebook.sizes)
    levels = [Level(*row) for row in zip(uses, prefixes, pure, fitted, strict=True)]
    waist, ceiling = hourglass(uses), float(np.log(codebook.codes))
    figures = codebook_figures(coded.codes_NL.numpy(), codebook.sizes)
    if (tagged := [one for one in pure if one]) and len(tagged) == len(pure):
        figures["codebook_purity"] = plots.purity_by_level([(one.share, one.chance) for one in tagged])
    found = Quality(coded.version, len(coded.item_ids), codebook.codes, ceiling, levels, coded.shared, waist, later)
    return found, figures


def newest_codes(lake: Lake) -> Coded | None:
    """All items with codes of the codebook that the newest items have: older partitions may belong to older ones."""
    version = lake.version("semantic_ids")
    rows = None if version is None else read_arrow(lake, "semantic_ids", version)
    if rows is None or len(rows) == 0:
        return None
    newest = rows.filter(pc.equal(rows.column("date"), pc.max(rows.column("date"))))
    codebook = newest.column("codebook_version")[0].as_py()
    rows = rows.filter(pc.equal(rows.column("codebook_version"), codebook)).sort_by("item_id")
    codes_NL = torch.from_numpy(codes_matrix(rows.column("codes")).copy())
    days = rows.column("date").to_numpy().astype("datetime64[D]")
    levels = len((lake.manifest("tokenize", codebook) or {}).get("inertia", codes_NL[0]))
    return Coded(rows.column("item_id").to_numpy(), days, codes_NL[:, :levels], collisions(codes_NL), codebook)


def purity_by_level(lake: Lake, coded: Coded) -> list[Purity | None]:
    """Of the prefixes of each length, by the tags that items have now."""
    owners_P, tags_P = tags_of(lake, coded.item_ids)
    return [purity(labels_N, owners_P, tags_P) for labels_N in prefix_labels(coded.codes_NL)]


def tags_of(lake: Lake, item_ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [P] places in `item_ids` (sorted) and numbers of tags, each pair once, by the newest row of each item."""
    version = lake.version("items")
    none = torch.zeros(0, dtype=torch.int64)
    if version is None or len(item_ids) == 0:
        return none, none
    rows = newest_rows(read_arrow(lake, "items", version, ["item_id", "date", "tags"]), "item_id")
    tags = rows.column("tags").combine_chunks()
    owners = rows.column("item_id").to_numpy()[pc.list_parent_indices(tags).to_numpy()]
    places = np.searchsorted(item_ids, owners).clip(max=len(item_ids) - 1)
    numbers = pc.dictionary_encode(tags.flatten()).indices.to_numpy()
    pairs = np.stack([places, numbers], 1)[item_ids[places] == owners].astype(np.int64)
    owners_P, tags_P = torch.from_numpy(np.unique(pairs, axis=0)).unbind(1)
    return owners_P, tags_P


def reconstructions(
    lake: Lake, coded: Coded, codebook: Codebook
) -> tuple[list[Reconstruction | None], Reconstruction | None]:
    """After each level, of the items of the fit day, and by all levels, of later items; None where there are none."""
    nothing: list[Reconstruction | None] = [None] * codebook.levels
    if not vectors_are_those_of(lake, coded.fit_day):
        return nothing, None
    rows = sampled_vectors(lake, coded)
    if len(rows) == 0:
        return nothing, None
    places = np.searchsorted(coded.item_ids, rows.column("item_id").to_numpy()).clip(max=len(coded.item_ids) - 1)
    known = coded.item_ids[places] == rows.column("item_id").to_numpy()
    x_ND = torch.tensor(matrix_of(rows.column("vector")))[torch.from_numpy(known)]
    codes_NL, days = coded.codes_NL[places[known]], coded.days[places[known]]
    of_fit = torch.from_numpy(days == np.datetime64(coded.fit_day))
    if not bool(of_fit.any()):
        return nothing, None
    fitted: list[Reconstruction | None] = [
        reconstruction(x_ND[of_fit], rebuilt(codebook.centroids[:level], codes_NL[of_fit]))
        for level in range(1, codebook.levels + 1)
    ]
    later = ~of_fit
    new = reconstruction(x_ND[later], rebuilt(codebook.centroids, codes_NL[later])) if bool(later.any()) else None
    return fitted, new


def vectors_are_those_of(lake: Lake, fit_day: datetime.date) -> bool:
    """Whether the vectors of the fit day are older than its codes; others are of a fit that was not tokenized yet."""
    made = {}
    for table in ("item_embeddings", "semantic_ids"):
        made[table] = next((moment for day, _, moment in lake.stamps(table) if day == fit_day), None)
    vectors, codes = made["item_embeddings"], made["semantic_ids"]
    return vectors is not None and codes is not None and vectors <= codes


def sampled_vectors(lake: Lake, coded: Coded) -> pa.Table:
    """Vectors since the fit day, of all items or of those whose ids end with so many zero bits that about `SAMPLED_ITEMS`
    are left."""
    mask = (1 << ((len(coded.item_ids) - 1) // SAMPLED_ITEMS).bit_length()) - 1
    chosen = pc.field("date") >= pa.scalar(coded.fit_day)
    if mask:
        chosen &= pc.bit_wise_and(pc.field("item_id"), pa.scalar(mask, pa.int64())) == pa.scalar(0, pa.int64())
    return lake.open("item_embeddings").to_pyarrow_dataset().to_table(columns=["item_id", "vector"], filter=chosen)
