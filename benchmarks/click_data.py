"""What the ranker of `benchmarks.code_ranker` reads of a lake that ran up to `codes`.

Roles are those of the days. The history of an impression is the user's positives strictly before the first impression of
its request, on whatever day; attributes of an item are those of its first row. Vectors and codes were fitted on the train
days, or come from them: an item that is new on a later day has the codes that the frozen codebooks gave it on that day.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from model.code_ranker import Impressions, ItemFeatures
from model.recent_positives import recent_positives
from model.seeding import hash64
from pipelines.example_roles import list_column
from pipelines.item_vectors import matrix_of
from pipelines.ray_tables import read_arrow
from schemas.calendar import Calendar
from schemas.feedback import BITS, mask_of
from schemas.lake import Lake

Role = str  # train, validation or test
DURATIONS = 64  # logarithmic buckets, two an octave


@dataclass(frozen=True)
class Reading:
    """What of the log the ranker sees."""

    labels: tuple[str, ...]
    positive: tuple[str, ...]  # bits of the positives that make a history
    history: int  # newest positives
    train: int  # newest impressions of the train days
    buckets: int  # of hashes


@dataclass(frozen=True)
class ClickData:
    """`users` holds the place of each test impression's user, `unseen` whether training shows none of its item."""

    items: ItemFeatures
    parts: dict[Role, Impressions]
    users: np.ndarray  # int64 [I]
    num_users: int
    unseen: np.ndarray  # bool [I]


@dataclass(frozen=True)
class Log:
    """Impressions of the whole log as parallel arrays [I]."""

    users: np.ndarray
    items: np.ndarray
    ts_us: np.ndarray
    before_us: np.ndarray  # the first time of the request
    feedback: np.ndarray
    days: np.ndarray  # datetime64[D]


def read_click_data(lake: Lake, calendar: Calendar, reading: Reading) -> ClickData:
    item_ids, items = read_items(lake, calendar, reading.buckets)
    log = read_log(lake, calendar.days)
    dense = dense_of(item_ids, log.items)
    liked = ((log.feedback & mask_of(reading.positive)) != 0) & (dense >= 0)
    past = recent_positives(log.users, log.before_us, log.users[liked], log.ts_us[liked], dense[liked], reading.history)
    labels_IY = np.stack([(log.feedback & BITS[label]) != 0 for label in reading.labels], 1).astype(np.float32)
    users = 1 + hash64(log.users, 1) % reading.buckets
    columns = [torch.from_numpy(column) for column in (users, dense, past, labels_IY)]
    days = {"train": calendar.train, "validation": calendar.validation, "test": calendar.test}
    rows = {
        role: np.flatnonzero(np.isin(log.days, np.array(own, "datetime64[D]")) & (dense >= 0)) for role, own in days.items()
    }
    newest = np.argsort(log.ts_us[rows["train"]], kind="stable")[-reading.train :]
    rows["train"] = rows["train"][newest]
    parts = {role: Impressions(*(column[torch.from_numpy(own)] for column in columns)) for role, own in rows.items()}
    names, test_users = np.unique(log.users[rows["test"]], return_inverse=True)
    unseen = ~np.isin(dense[rows["test"]], dense[rows["train"]])
    return ClickData(items, parts, test_users, len(names), unseen)


def read_log(lake: Lake, days: tuple[datetime.date, ...]) -> Log:
    columns = ["user_id", "date", "item_ids", "ts_us", "request_ids", "feedback"]
    version = lake.version("user_sequences") or 0
    table = pa.concat_tables(read_arrow(lake, "user_sequences", version, columns, [day]) for day in days)
    lengths = np.diff(list_column(table, "item_ids").offsets.to_numpy())
    user, day = (np.repeat(table.column(name).to_numpy(), lengths) for name in ("user_id", "date"))
    item, ts_us, request, feedback = (list_column(table, name).flatten().to_numpy() for name in columns[2:])
    _, group = np.unique(np.stack([user, request]), axis=1, return_inverse=True)
    first = np.full(group.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, group.ravel(), ts_us)
    return Log(user, item, ts_us, first[group.ravel()], feedback, day.astype("datetime64[D]"))


def read_items(lake: Lake, calendar: Calendar, buckets: int) -> tuple[np.ndarray, ItemFeatures]:
    """int64 [N] the items of the log's days, ascending, and their features in that order."""
    columns = ["item_id", "date", "author_id", "tags", "duration_ms"]
    rows = read_arrow(lake, "items", lake.version("items") or 0, columns).sort_by(
        [("item_id", "ascending"), ("date", "ascending")]
    )
    ids = rows.column("item_id").to_numpy()
    first = np.append(True, ids[1:] != ids[:-1]) & (rows.column("date").to_numpy() <= np.datetime64(calendar.days[-1]))
    rows, ids = rows.filter(pa.array(first)), ids[first]
    author = rows.column("author_id").combine_chunks()
    known = author.is_valid().to_numpy(zero_copy_only=False)
    authors = np.where(known, 1 + hash64(author.fill_null(0).to_numpy(), 2) % buckets, 0)
    milliseconds = rows.column("duration_ms").fill_null(0).to_numpy()
    durations = np.minimum((2 * np.log2(milliseconds / 1000 + 1)).astype(np.int64) + 1, DURATIONS) * (milliseconds > 0)
    vectors, vq, rq = read_codes(lake, calendar, ids)
    plain = (1 + hash64(ids, 3) % buckets, authors, tags_of(rows), durations, vectors, vq, rq)
    return ids, ItemFeatures(*(torch.from_numpy(np.ascontiguousarray(values)) for values in plain))


def tags_of(rows: pa.Table) -> np.ndarray:
    """int64 [N, T]: a number for each tag of each item, 0 behind them."""
    tags = list_column(rows, "tags")
    numbers = 1 + tags.flatten().dictionary_encode().indices.to_numpy().astype(np.int64)
    return padded(numbers, np.diff(tags.offsets.to_numpy()), max(1, int(np.diff(tags.offsets.to_numpy()).max())))


def padded(values: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """int64 [N, width]: jagged values, 0 behind them."""
    found = np.zeros((len(lengths), width), np.int64)
    found[np.arange(width) < lengths[:, None]] = values
    return found


def read_codes(lake: Lake, calendar: Calendar, item_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 [N, V], int64 [N, K] and [N, L] as in `ItemFeatures`; zero where an item has none."""
    days = [calendar.fit_day, *calendar.appended]
    vectors = read_arrow(lake, "item_embeddings", lake.version("item_embeddings") or 0, days=days)
    codes = read_arrow(lake, "item_codes", lake.version("item_codes") or 0, days=days)
    matrix = matrix_of(vectors.column("vector"))
    near, levels = list_column(codes, "vq"), list_column(codes, "rq")
    lengths = np.diff(near.offsets.to_numpy())
    vq = padded(1 + dense_of(item_ids, near.flatten().to_numpy()), lengths, int(lengths.max()))
    rq = levels.flatten().to_numpy().astype(np.int64).reshape(len(codes), -1)
    rq += 1 + np.arange(rq.shape[1]) * (rq.max() + 1)
    place = dense_of(item_ids, codes.column("item_id").to_numpy())
    own = dense_of(item_ids, vectors.column("item_id").to_numpy())
    return placed(matrix, own, len(item_ids)), placed(vq, place, len(item_ids)), placed(rq, place, len(item_ids))


def placed(values: np.ndarray, place: np.ndarray, rows: int) -> np.ndarray:
    found = np.zeros((rows, values.shape[1]), values.dtype)
    found[place[place >= 0]] = values[place >= 0]
    return found


def dense_of(item_ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int64: the place of each item among sorted ids, -1 where it is not there."""
    place = np.searchsorted(item_ids, wanted).clip(max=len(item_ids) - 1)
    return np.where(item_ids[place] == wanted, place, -1)
