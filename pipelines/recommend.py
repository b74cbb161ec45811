"""Stage `recommend`: the champion's best items for every user active in the last days, into the table `recommendations`.

Users are cut into slices by id; an actor of Ray Data reads the newest `user_features` row of each user of a slice, ranks
the catalogue by beam search over the trie and gives rows, which stream through this process into one commit. Memory: a
slice an actor. The log-probability of each code is kept with its codebook, so that an exposure made from a row can
come back as `behaviour` and be learned from. Nothing is written where no version is champion.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import torch

from model.requests import Requests
from pipelines.bundle import Bundle
from pipelines.collate import EVENTS, requests_as_of
from pipelines.long_histories import long_histories
from pipelines.ray_tables import days_filter, lists_of, newest_rows, read_arrow, replace_days
from pipelines.registry import CHAMPION
from pipelines.split import day_start_us
from pipelines.stage import StageContext, StageResult
from pipelines.tracking import tracking_uri
from schemas.feedback import mask_of
from schemas.lake import Lake
from schemas.tables import PARTITION, RECOMMENDATIONS

TABLE, FEATURES = "recommendations", "user_features"
SLICE_ROWS = 20_000  # rows of user_features that a slice reads
LARGEST_READ = 10_000_000  # rows of a day whose ids are read to cut slices of equal size
COLUMNS = ("user_id", "date", "attributes", *(f"{line}_{name}" for line in ("short", "positive") for name in EVENTS))


def run(context: StageContext) -> StageResult:
    """Replaces the partition of the day."""
    champion = context.plan.artifact(CHAMPION)
    if not champion:
        return StageResult(skipped=f"no version of {context.config.register.name} is champion yet")
    (day,) = context.dates
    first = day - datetime.timedelta(days=context.config.recommend.active_days - 1)
    days = [d for d in context.calendar.days if first <= d <= day]
    slices = user_slices(context.lake, context.pins[FEATURES], days)
    settings = {
        "lake": context.lake,
        "pins": dict(context.pins),
        "config": context.config,
        "tracking_uri": tracking_uri(context.config),
        "model": champion,
        "days": days,
    }
    parts = recommended(context, slices, settings)
    reader = pa.RecordBatchReader.from_batches(RECOMMENDATIONS.schema, parts)
    version = replace_days(context.lake, TABLE, reader, context.todo(TABLE))
    rows = context.lake.rows_by_day(TABLE, version).get(day, 0)
    context.say(f"models:/{settings['model']} for the users of {days[0]} to {day}")
    return StageResult({TABLE: version}, {TABLE: rows}, notes=[f"Recommendations of {day} come from {settings['model']}."])


def recommended(context: StageContext, slices: list[tuple[int, int]], settings: dict[str, Any]) -> Iterator[pa.RecordBatch]:
    ray = context.engines.ray()
    workers = max(1, min(context.config.recommend.num_workers, len(slices)))
    answers = ray.data.from_items([{"low": low, "high": high} for low, high in slices]).map_batches(
        Recommender,
        fn_constructor_args=(settings,),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
    )
    for table in answers.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from table.select(RECOMMENDATIONS.columns).cast(RECOMMENDATIONS.schema).to_batches()


def user_slices(lake: Lake, version: int, days: list[datetime.date]) -> list[tuple[int, int]]:
    """Half-open ranges of user ids with about SLICE_ROWS rows of `days` each, over all ids."""
    actions = lake.open(FEATURES, version).get_add_actions(flatten=True)
    names = (f"partition.{PARTITION}", "num_records", "min.user_id")
    columns = (actions.column(name).to_pylist() for name in names)
    files = [(day, rows, low) for day, rows, low in zip(*columns, strict=True) if day in days and rows]
    count = -(-sum(rows for _, rows, _ in files) // SLICE_ROWS)
    by_day = {day: sum(rows for d, rows, _ in files if d == day) for day in {day for day, _, _ in files}}
    if by_day and max(by_day.values()) <= LARGEST_READ:
        largest = max(sorted(by_day), key=lambda day: by_day[day])
        ids = np.sort(read_arrow(lake, FEATURES, version, ["user_id"], [largest]).column("user_id").to_numpy())
    else:
        ids = np.sort(np.array([low for _, _, low in files], np.int64))
    inner = np.unique(ids[np.arange(1, count) * len(ids) // max(count, 1)]) if count > 1 else np.empty(0, np.int64)
    bounds = [0, *inner[inner > 0].tolist(), np.iinfo(np.int64).max]
    return list(itertools.pairwise(bounds))


class Recommender:
    """An actor that holds the champion's bundle."""

    def __init__(self, settings: dict[str, Any]) -> None:
        mlflow.set_tracking_uri(settings["tracking_uri"])
        mlflow.set_registry_uri(settings["tracking_uri"])  # a worker may have inherited another one's
        self.settings, self.config = settings, settings["config"]
        self.lake, self.day = settings["lake"], settings["days"][-1]
        model = mlflow.pyfunc.load_model(f"models:/{settings['model']}")
        self.bundle: Bundle = model.unwrap_python_model().bundle
        self.after_us = day_start_us(self.day + datetime.timedelta(days=1), self.config.source.time_zone)
        self.withheld = self._withheld() if self.config.recommend.mask_withdrawn else None

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        users = self._newest(int(batch["low"][0]), int(batch["high"][0]))
        step = self.config.recommend.batch_users
        slices = [users.slice(start, step) for start in range(0, len(users), step)]
        parts = [self._rows(part, asked) for part, asked in zip(slices, self._requests(slices), strict=True)]
        return pa.concat_tables([RECOMMENDATIONS.schema.empty_table(), *parts])

    def _newest(self, low: int, high: int) -> pa.Table:
        """The newest row of each user with low <= id < high, by user id."""
        users = (pads.field("user_id") >= low) & (pads.field("user_id") < high)
        days, version = self.settings["days"], self.settings["pins"][FEATURES]
        rows = self.lake.open(FEATURES, version).to_pyarrow_dataset()
        table = rows.to_table(columns=list(COLUMNS), filter=days_filter(days) & users)
        return newest_rows(table, "user_id").combine_chunks()

    def _requests(self, slices: list[pa.Table]) -> Iterator[Requests]:
        """What each slice of users asks at the end of the day. Raises ContractViolation where the champion reads long
        histories and the configuration makes none."""
        engaged, catalogue = mask_of(self.config.sequences.engaged), self.bundle.catalogue
        long = long_histories(self.config, self.lake, self.settings["pins"], catalogue, self.bundle.lifelong_length)
        asked = (requests_as_of(users, catalogue, engaged, self.after_us) for users in slices)
        return asked if long is None else long.given_to(asked)

    def _rows(self, users: pa.Table, requests: Requests) -> pa.Table:
        settings, catalogue = self.config.recommend, self.bundle.catalogue
        beam = max(settings.beam, settings.items)
        with torch.inference_mode():
            ranking = self.bundle.ranker.ranking(requests, settings.items, beam, settings.mask_seen, self.withheld)
        user, rank = np.nonzero(ranking.items.numpy() >= 0)
        log_probs = ranking.log_probs.numpy()[user, rank]
        columns = {
            "user_id": users.column("user_id").to_numpy()[user],
            "date": pa.array([self.day] * len(user), pa.date32()),
            "rank": rank.astype(np.int32),
            "item_id": catalogue.item_ids[ranking.items.numpy()[user, rank]],
            "log_probs": lists_of(log_probs),
            "codebook_version": [catalogue.codebook_version] * len(user),
            "model_version": [self.settings["model"]] * len(user),
        }
        return pa.table(columns, schema=RECOMMENDATIONS.schema)

    def _withheld(self) -> torch.Tensor:
        """bool [N]: items withdrawn by the day after `day`, on which the recommendations are shown."""
        items = self.lake.open("items", self.settings["pins"]["items"]).to_pyarrow_dataset()
        rows = newest_rows(items.to_table(columns=["item_id", "date", "withdrawn"]), "item_id", self.day)
        gone = pc.less_equal(rows.column("withdrawn"), pa.scalar(self.day + datetime.timedelta(days=1)))
        return torch.from_numpy(np.isin(self.bundle.catalogue.item_ids, rows.filter(gone).column("item_id").to_numpy()))
