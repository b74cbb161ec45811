"""Stage `tokenize`: semantic ids of every item, by exact RQ-Kmeans on the fit day and its frozen codebook afterwards.

The codebook's version is the identity of the fit day's partition of semantic_ids, and its files lie in the artifact
folder of that name. The codebook's codes depend on an item's vector alone, and what becomes of items that share them on
what came before (`pipelines.collisions`), so appending a day moves neither a code nor a rank. This process holds ids and
codes of all items (8 + 4 L bytes each), but vectors only of one later day's new items, and of those that `nearest_free`
moves: the others of the fit day stay with the workers.
"""

from __future__ import annotations

import datetime
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import torch

from model.rq_kmeans import Codebook, encode
from pipelines.catalogue import codes_matrix
from pipelines.codebook import codebook_manifest, load_codebook, save_codebook, sizes_of
from pipelines.codebook_registry import register_codebook
from pipelines.codebook_report import codebook_figures, codebook_metrics, fit_metrics, sharing
from pipelines.collisions import Coded, before_settling, id_sizes, settled
from pipelines.drift import FILE as STATISTICS
from pipelines.drift import drift_of, save_statistics
from pipelines.embed import refuse_stale_fit
from pipelines.item_ranks import train_positives
from pipelines.item_vectors import matrix_of
from pipelines.ray_tables import days_filter, lists_of, read_arrow, replace_days
from pipelines.stage import StageContext, StageResult
from schemas.errors import MissingUpstream
from schemas.lineage import overtaken
from schemas.tables import SEMANTIC_IDS

__all__ = ["load_codebook", "run"]
TABLE = "semantic_ids"
VECTORS = "item_embeddings"


def run(context: StageContext) -> StageResult:
    """Writes the stale days of semantic_ids. Raises MissingUpstream where a day before them is stale,
    ContractViolation where K-means did not see every item exactly once."""
    todo = context.todo(TABLE)
    fit_day = context.calendar.fit_day
    refuse_stale_fit(context, TABLE)
    refuse_gaps(context)
    version = context.plan.expected[TABLE][fit_day]
    result = StageResult()
    parts: list[Coded] = []
    if fit_day in todo or context.lake.manifest("tokenize", version) is None:
        fitted = fit_day_codes(context, version, result)
        parts += [fitted] if fit_day in todo else []
    codebook = load_codebook(context.lake, version)
    parts += [encoded(context, codebook, day) for day in sorted(todo) if day != fit_day]
    manifest = codebook_manifest(context.lake, version)
    rule = manifest["settings"].get("collisions", "rank")  # of the fit, which a night continues whatever it is now
    earlier, vectors = codes_before(context, version, rule), partial(vectors_of, context)
    items, rank = settled(rule, codebook, sizes_of(manifest["codes"], manifest["levels"])[-1], earlier, parts, vectors)
    rows = table_of(items, rank, version).slice(len(items) - sum(map(len, parts)))
    if context.run_id:
        register_codebook(context, version)  # before a table names it
    table_version = replace_days(context.lake, TABLE, rows, todo)
    own_codes = items.codes[:, : codebook.levels]
    metrics = codebook_metrics(own_codes, codebook.sizes) | sharing(items.codes) | fit_metrics(context.lake, version)
    context.say(f"{len(rows):,} items, {metrics['collision_rate']:.2%} share their codes, codebook {version}")
    result.tables, result.rows = {TABLE: table_version}, {TABLE: len(rows)}
    result.metrics |= metrics
    result.figures |= codebook_figures(own_codes, codebook.sizes)
    report_drift(context, version, [day for day in sorted(todo) if day != fit_day], result)
    return result


def report_drift(context: StageContext, version: str, days: list[datetime.date], result: StageResult) -> None:
    """Tells how the items of the later days of this pass fit the codebook."""
    if not days:
        return
    if not (context.lake.artifact("tokenize", version) / STATISTICS).is_file():
        result.notes.append(f"Codebook {version} of an earlier release keeps no statistics of its fit: drift is unknown.")
        return
    drift = drift_of(context.lake, context.config.tokenize, context.calendar.fit_day, days)
    result.metrics |= drift.metrics()
    result.notes.append(drift.sentence())
    context.say(drift.sentence())


def refuse_gaps(context: StageContext) -> None:
    """Ranks continue those of earlier days, which must be current or in this pass."""
    present, todo = context.lake.identities(TABLE), context.plan.todo[TABLE]
    late = overtaken(context.plan.expected[TABLE], present, todo)
    for day, identity in sorted(context.plan.expected[TABLE].items()):
        if day < max(todo) and day not in todo and day not in late and present.get(day) != identity:
            raise MissingUpstream(
                f"Table {TABLE} of {day} is stale or missing, and ranks of {max(todo)} continue it; run tokenize first."
            )


def fit_day_codes(context: StageContext, version: str, result: StageResult) -> Coded:
    """Fits the codebook on the fit day's items, completes its artifact, tells `result` of it; the items' codes."""
    from pipelines.codebook_fit import fit_stage_codebook  # Ray Train takes seconds to import
    from pipelines.renumbering import renumbered

    fit_day, settings, lake = context.calendar.fit_day, context.config.tokenize, context.lake
    fit = fit_stage_codebook(context, version, settings)
    numbered = renumbered(context, fit)
    codebook, folder = numbered.codebook, lake.artifact("tokenize", version)
    save_codebook(folder, codebook, version)
    counts = train_positives(context, fit.item_ids)
    days = np.full(len(counts), np.datetime64(fit_day), "datetime64[D]")
    fitted = Coded(fit.item_ids, numbered.codes, days, counts)
    # Levels and codes are those of the items' ids, which may have a level more than the codebook.
    sizes = id_sizes(settings, fitted.codes)
    codes: int | list[int] = sizes[0] if len(set(sizes)) == 1 else list(sizes)
    content: dict[str, Any] = {"levels": len(sizes), "codes": codes, "width": codebook.width}
    content |= {"items": len(counts), "inertia": fit.inertia, "metrics": codebook_metrics(fitted.codes, codebook.sizes)}
    content |= {"inputs": {name: context.pins[name] for name in (VECTORS, "user_sequences")}, "settings": asdict(settings)}
    content |= {"earlier": numbered.earlier}
    save_statistics(folder, fitted.codes, codebook.codes, fit.inertia)
    context.lake.write_manifest("tokenize", version, content)
    result.series = {f"inertia_level_{level + 1}": list(enumerate(curve)) for level, curve in enumerate(fit.inertia)}
    result.metrics, result.notes = {**numbered.metrics}, [*numbered.notes]
    return fitted


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


def codes_before(context: StageContext, version: str, rule: str) -> list[Coded]:
    """Items of the codebook that an earlier pass coded, on days before the last one to make."""
    todo, found = context.plan.todo[TABLE], context.lake.version(TABLE)
    days = [day for day in context.plan.expected[TABLE] if day not in todo and day < max(todo)]
    if found is None or not days:
        return []
    rows = read_arrow(context.lake, TABLE, found, days=days)
    rows = rows.filter(pc.equal(rows.column("codebook_version"), version))
    if len(rows) == 0:
        return []
    codes, counts = before_settling(rule, codes_matrix(rows.column("codes")), rows.column("rank").to_numpy())
    return [Coded(rows.column("item_id").to_numpy(), codes, rows.column("date").to_numpy().astype("datetime64[D]"), counts)]


def vectors_of(context: StageContext, day: np.datetime64, item_ids: np.ndarray) -> torch.Tensor:
    """float32 [M, D] of `item_ids`, distinct items of a day, in their order; other rows only stream past."""
    vectors = context.lake.open(VECTORS, context.pins[VECTORS]).to_pyarrow_dataset()
    wanted = days_filter([day.astype(object)]) & pads.field("item_id").isin(pa.array(item_ids))
    rows = vectors.to_table(columns=["item_id", "vector"], filter=wanted)
    matrix = matrix_of(rows.sort_by("item_id").column("vector"))
    return torch.from_numpy(matrix[np.argsort(np.argsort(item_ids))])


def table_of(items: Coded, rank: np.ndarray, version: str) -> pa.Table:
    columns = {
        "item_id": items.item_ids,
        "date": pa.array(items.days, pa.date32()),
        "codes": lists_of(items.codes),
        "codebook_version": pa.array([version] * len(rank), pa.string()),
        "rank": rank,
    }
    return pa.table(columns, schema=SEMANTIC_IDS.schema)
