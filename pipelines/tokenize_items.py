"""Stage `tokenize`: semantic ids of every item, by exact RQ-Kmeans on the fit day and its frozen codebook afterwards.

The codebook's version is the identity of the fit day's partition of semantic_ids, and its files lie in the artifact
folder of that name. Codes depend on an item's vector and the codebook alone, ranks on what came before, so appending a
day moves neither a code nor a rank. This process holds ids and codes of all items (8 + 4 L bytes each), but vectors only
of one later day's new items: those of the fit day stay with the workers.
"""

from __future__ import annotations

import datetime
import shutil
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from model.codebook_metrics import code_counts, collisions, level_use
from model.rq_kmeans import Codebook, encode
from pipelines.codebook import load_codebook, save_codebook
from pipelines.embed import absolute, refuse_stale_fit
from pipelines.item_ranks import ranks, train_positives
from pipelines.item_vectors import matrix_of
from pipelines.ray_tables import read_arrow, read_dataset, replace_days
from pipelines.stage import StageContext, StageResult
from schemas.errors import ContractViolation, MissingUpstream
from schemas.lineage import overtaken
from schemas.tables import SEMANTIC_IDS

__all__ = ["load_codebook", "run"]
TABLE = "semantic_ids"
VECTORS = "item_embeddings"
Curves = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Coded:
    """Items with their codes, of one or more days."""

    item_ids: np.ndarray  # int64 [N]
    codes: np.ndarray  # int32 [N, L]
    days: np.ndarray  # datetime64[D] [N]
    counts: np.ndarray  # int64 [N], train positives; of items of later days 0


def run(context: StageContext) -> StageResult:
    """Writes the stale days of semantic_ids. Raises MissingUpstream where a day before them is stale,
    ContractViolation where K-means did not see every item exactly once."""
    todo = context.todo(TABLE)
    fit_day = context.calendar.fit_day
    refuse_stale_fit(context, TABLE)
    refuse_gaps(context)
    version = context.plan.expected[TABLE][fit_day]
    parts: list[Coded] = []
    series: Curves = {}
    if fit_day in todo or context.lake.manifest("tokenize", version) is None:
        fitted, series = fit_day_codes(context, version)
        parts += [fitted] if fit_day in todo else []
    codebook = load_codebook(context.lake, version)
    parts += [encoded(context, codebook, day) for day in sorted(todo) if day != fit_day]
    earlier = codes_before(context, version)
    items = joined([*earlier, *parts])
    fresh = len(items.item_ids) - sum(len(part.item_ids) for part in parts)
    rows = table_of(items, ranks(items.codes, items.days, items.counts, items.item_ids), version).slice(fresh)
    table_version = replace_days(context.lake, TABLE, rows, todo)
    metrics = codebook_metrics(items, codebook)
    context.say(f"{len(rows):,} items, {metrics['collision_rate']:.2%} share their codes, codebook {version}")
    figures = {"codebook_use": use_figure(items, codebook)}
    return StageResult({TABLE: table_version}, {TABLE: len(rows)}, metrics, series, figures)


def refuse_gaps(context: StageContext) -> None:
    """Ranks continue those of earlier days, which must be current or in this pass."""
    present, todo = context.lake.identities(TABLE), context.plan.todo[TABLE]
    late = overtaken(context.plan.expected[TABLE], present, todo)
    for day, identity in sorted(context.plan.expected[TABLE].items()):
        if day < max(todo) and day not in todo and day not in late and present.get(day) != identity:
            raise MissingUpstream(
                f"Table {TABLE} of {day} is stale or missing, and ranks of {max(todo)} continue it; run tokenize first."
            )


def fit_day_codes(context: StageContext, version: str) -> tuple[Coded, Curves]:
    """Fits the codebook on the fit day's items, completes its artifact; the items' codes and the inertia curves."""
    from pipelines.codebook_fit import fit_codebook  # Ray Train takes seconds to import

    fit_day, settings = context.calendar.fit_day, context.config.tokenize
    ray, lake = context.engines.ray(), absolute(context.lake)
    folder = lake.artifact("tokenize", version)
    items = read_dataset(lake, VECTORS, context.pins[VECTORS], ["item_id", "vector"], [fit_day])
    scratch = folder / "fit"  # of a killed run too, which it continues
    rows = lake.rows_by_day(VECTORS, context.pins[VECTORS]).get(fit_day, 0)
    result = fit_codebook(ray, items, rows, settings, scratch, f"{version} {context.pins[VECTORS]}")
    save_codebook(folder, result.codebook)
    shutil.rmtree(scratch)
    counts = train_positives(context, result.item_ids)
    days = np.full(len(counts), np.datetime64(fit_day), "datetime64[D]")
    fitted = Coded(result.item_ids, result.codes, days, counts)
    codebook = result.codebook
    content: dict[str, Any] = {"levels": codebook.levels, "codes": list(codebook.sizes), "width": codebook.width}
    content |= {"items": len(counts), "inertia": result.inertia, "metrics": codebook_metrics(fitted, codebook)}
    content |= {"inputs": {name: context.pins[name] for name in (VECTORS, "user_sequences")}, "settings": asdict(settings)}
    context.lake.write_manifest("tokenize", version, content)
    curves = {f"inertia_level_{level + 1}": list(enumerate(curve)) for level, curve in enumerate(result.inertia)}
    return fitted, curves


def encoded(context: StageContext, codebook: Codebook, day: datetime.date) -> Coded:
    """Codes of the items of a later day; the day's vectors are held here."""
    table = read_arrow(context.lake, VECTORS, context.pins[VECTORS], ["item_id", "vector"], [day]).sort_by("item_id")
    ids = table.column("item_id").to_numpy()
    codes = np.zeros((0, codebook.levels), np.int32)
    if len(ids):
        vectors = torch.tensor(matrix_of(table.column("vector")))
        codes = encode(codebook, vectors, context.config.tokenize.chunk).numpy()
    days = np.full(len(ids), np.datetime64(day), "datetime64[D]")
    return Coded(ids, codes, days, np.zeros(len(ids), np.int64))


def codes_before(context: StageContext, version: str) -> list[Coded]:
    """Items of the codebook that an earlier pass coded, on days before the last one to make."""
    todo, found = context.plan.todo[TABLE], context.lake.version(TABLE)
    days = [day for day in context.plan.expected[TABLE] if day not in todo and day < max(todo)]
    if found is None or not days:
        return []
    rows = read_arrow(context.lake, TABLE, found, days=days)
    rows = rows.filter(pc.equal(rows.column("codebook_version"), version))
    if len(rows) == 0:
        return []
    codes = np.array(rows.column("codes").to_pylist(), dtype=np.int32)
    # Within a day the stored rank is the order; as negative counts it puts the fit day's items back in their places.
    order = -rows.column("rank").to_numpy().astype(np.int64)
    return [Coded(rows.column("item_id").to_numpy(), codes, rows.column("date").to_numpy().astype("datetime64[D]"), order)]


def joined(parts: list[Coded]) -> Coded:
    """All items, one below the other. Raises ContractViolation where an item has codes already."""
    names = ("item_ids", "codes", "days", "counts")
    items = Coded(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
    if len(np.unique(items.item_ids)) != len(items.item_ids):
        raise ContractViolation(
            "An item of table item_embeddings is new on two days; run stages embed and tokenize with --force."
        )
    return items


def table_of(items: Coded, rank: np.ndarray, version: str) -> pa.Table:
    levels = items.codes.shape[1]
    codes = pa.FixedSizeListArray.from_arrays(pa.array(items.codes.ravel(), pa.int32()), levels)
    columns = {
        "item_id": items.item_ids,
        "date": pa.array(items.days, pa.date32()),
        "codes": codes.cast(pa.list_(pa.int32())),
        "codebook_version": pa.array([version] * len(rank), pa.string()),
        "rank": rank,
    }
    return pa.table(columns, schema=SEMANTIC_IDS.schema)


def codebook_metrics(items: Coded, codebook: Codebook) -> dict[str, float]:
    """Use of every level (from 1 on) and collisions over all items so far."""
    codes_NL = torch.from_numpy(items.codes)
    metrics: dict[str, float] = {}
    for level in range(codebook.levels):
        for name, value in asdict(level_use(codes_NL[:, level], codebook.sizes[level])).items():
            metrics[f"{name}_level_{level + 1}"] = value
    shared = collisions(codes_NL)
    return metrics | {"collision_rate": shared.rate, "distinct_codes": shared.distinct, "largest_bucket": shared.largest}


def use_figure(items: Coded, codebook: Codebook) -> Any:
    """Items a code, codes by falling use, one line a level."""
    from matplotlib.figure import Figure  # no pyplot: figures without a display or global state

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for level in range(codebook.levels):
        counts = code_counts(torch.from_numpy(items.codes[:, level]), codebook.sizes[level]).sort(descending=True).values
        axes.plot(counts.numpy(), label=f"level {level + 1}")
    axes.set(xlabel="codes by falling use", ylabel="items", title="Use of the codebook")
    axes.legend()
    return figure
