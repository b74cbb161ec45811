"""The outputs in Polars: Parquet in, Parquet (zstd, a folder a day) out.

The events are sorted once, by user and time, so that a user is a range of rows and a tail of a history is a range of
places. The lists of many tails are one gather of those places, cut by offsets, a day at a time: memory holds the events
and a day's output. The rank of a play among earlier ones is counted in dyadic blocks as this project counts it, a level
at a time; Polars has no window function for it, and a join of all pairs grows with the square of a heavy user.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("POLARS_MAX_THREADS", "2")  # before Polars looks

import numpy as np
import polars as pl
import pyarrow as pa

from benchmarks.features.inputs import EVENTS, Clock, Inputs, Rules, part
from schemas.feedback import BITS, FLAGS, RATED_HIGH

IDS = {"impression_ids": "impression_id", "request_ids": "request_id"}
TARGETS = {"impression_ids": "impression_id"} | {n: n for n in ("item_ids", "play_ms", "duration_ms", "feedback")}


@dataclass(frozen=True)
class Line:
    """All events by user and time: `row` is an event's place, `first` that of its user and `before` that of the first
    event of the same user and time. `engaged_above[r]` engaged events lie above row r, at the places `engaged_rows`."""

    events: pl.DataFrame
    engaged_above: np.ndarray
    engaged_rows: np.ndarray


def build(inputs: Inputs, rules: Rules, out: Path) -> dict[str, float]:
    """Writes the four outputs below `out`; seconds by output."""
    clock = Clock()
    with clock("events"):
        line = event_line(inputs, rules)
    users = pl.scan_parquet(inputs.files["users"], hive_partitioning=True).select("user_id", "date", "attributes").collect()
    for day in inputs.days:
        of_day = line.events.filter(pl.col("date") == day)
        with clock("user_sequences"):
            sequences_of(of_day).write_parquet(part(out, "user_sequences", day))
        with clock("user_features"):
            features_of(of_day, line, users, rules).write_parquet(part(out, "user_features", day))
        with clock("training_examples"):
            examples_of(of_day, line, users, rules).write_parquet(part(out, "training_examples", day))
    with clock("rewards"):
        rewards = quantiles(line.events, rules)
        for day in inputs.days:
            rewards.filter(pl.col("date") == day).drop("date").write_parquet(part(out, "rewards", day))
    return clock.seconds


def event_line(inputs: Inputs, rules: Rules) -> Line:
    items = pl.scan_parquet(inputs.files["items"], hive_partitioning=True)
    authors = items.select(pl.col("item_id").alias("item_ids"), "date", pl.col("author_id").alias("author_ids")).sort(
        "date"
    )
    log = pl.scan_parquet(inputs.files["impressions"], hive_partitioning=True).select(
        "user_id",
        "date",
        pl.col("ts").dt.epoch("us").alias("ts_us"),
        *IDS.values(),
        pl.col("item_id").alias("item_ids"),
        *(pl.col(name).fill_null(-1) for name in ("play_ms", "duration_ms")),
        feedback(rules.rated_high),
    )
    named = (
        log.sort("date")
        .join_asof(authors, on="date", by="item_ids", check_sortedness=False)
        .with_columns(pl.col("author_ids").fill_null(-1))
    )
    events = named.sort("user_id", "ts_us", "impression_id").collect(engine="streaming")
    row = pl.int_range(pl.len(), dtype=pl.Int64)
    new_user = changed("user_id")
    events = events.with_columns(
        row=row,
        first=pl.when(new_user).then(row).forward_fill(),
        before=pl.when(new_user | changed("ts_us")).then(row).forward_fill(),
    )
    engaged = (events["feedback"].to_numpy() & rules.engaged_mask) != 0
    return Line(events, np.concatenate([[0], np.cumsum(engaged)]), np.flatnonzero(engaged))


def changed(name: str) -> pl.Expr:
    return (pl.col(name) != pl.col(name).shift()).fill_null(True)


def feedback(rated_high: float) -> pl.Expr:
    conditions = [(pl.col(name), BITS[name]) for name in FLAGS] + [(pl.col("rating") >= rated_high, BITS[RATED_HIGH])]
    bits = [condition.fill_null(False).cast(pl.Int32) * bit for condition, bit in conditions]
    return pl.sum_horizontal(bits).cast(pl.Int32).alias("feedback")


def sequences_of(of_day: pl.DataFrame) -> pl.DataFrame:
    columns = {**IDS, **{name: name for name in EVENTS}}
    return of_day.group_by("user_id", maintain_order=True).agg(**{name: pl.col(c) for name, c in columns.items()})


def features_of(of_day: pl.DataFrame, line: Line, users: pl.DataFrame, rules: Rules) -> pl.DataFrame:
    ends = of_day.group_by("user_id", maintain_order=True).agg(
        pl.col("date").first(), pl.col("first").first(), stop=pl.col("row").last() + 1
    )
    first, stop = ends["first"].to_numpy(), ends["stop"].to_numpy()
    above = line.engaged_above
    recent = Places.of([(np.maximum(stop - rules.recent, first), stop, None)])
    since = np.maximum(above[stop] - rules.engaged, above[first])
    engaged = Places.of([(since, above[stop], line.engaged_rows)])
    made = as_of(ends, users).select("user_id", "attributes")
    return made.with_columns(*recent.lists(line.events, "short_"), *engaged.lists(line.events, "positive_"))


def examples_of(of_day: pl.DataFrame, line: Line, users: pl.DataFrame, rules: Rules) -> pl.DataFrame:
    first_of_request = {"slice_us": pl.col("ts_us").min(), "stop": pl.col("before").min()}
    requests = of_day.group_by("user_id", "request_id").agg(
        pl.col("date", "first").first(), targets=pl.col("row"), size=pl.len(), **first_of_request
    )
    slices = (
        requests.sort("slice_us", "user_id", "request_id")
        .group_by("slice_us", "user_id", maintain_order=True)
        .agg(
            pl.col("date", "first", "stop").first(),
            pl.col("targets").explode(),
            pl.col("request_id").alias("request_ids"),
            pl.col("size").cum_sum().alias("sizes"),
        )
    )
    first, stop = slices["first"].to_numpy(), slices["stop"].to_numpy()
    above, start = line.engaged_above, np.maximum(stop - rules.recent, first)
    since = np.maximum(above[stop] - rules.engaged, above[first])
    # Engaged events among the recent ones come with those.
    context = Places.of([(since, np.maximum(above[start], since), line.engaged_rows), (start, stop, None)])
    targets = Places(slices["targets"].explode().to_numpy(), offsets_of(slices["targets"].list.len().to_numpy()))
    count = pl.col("request_ids").list.len()
    rows = as_of(slices, known_before(users)).with_columns(events=pl.Series(np.diff(context.offsets).astype(np.int32)))
    return rows.select(
        "user_id",
        "slice_us",
        "attributes",
        "request_ids",
        pl.col("slice_us").repeat_by(count).alias("request_ts_us"),
        pl.col("events").repeat_by(count).alias("history_end"),
        pl.concat_list(pl.lit(0, pl.Int32), pl.col("sizes").cast(pl.List(pl.Int32))).alias("target_start"),
    ).with_columns(*context.lists(line.events, "context_"), *targets.lists(line.events, "target_", TARGETS))


@dataclass(frozen=True)
class Places:
    """Rows of the events, list after list: those of list i are `rows[offsets[i]:offsets[i + 1]]`."""

    rows: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]) -> Places:
        """List i joins the half-open range i of each piece (start, stop, the rows that its places stand for)."""
        sizes = np.stack([stop - start for start, stop, _ in pieces], axis=1)
        starts = np.stack([start for start, *_ in pieces], axis=1)
        offsets = offsets_of(sizes.ravel())
        rows = np.arange(offsets[-1]) + np.repeat(starts.ravel() - offsets[:-1], sizes.ravel())
        for number, (*_, stands_for) in enumerate(pieces):
            if stands_for is not None:
                of_piece = np.repeat(np.tile(np.arange(len(pieces)) == number, len(sizes)), sizes.ravel())
                rows[of_piece] = stands_for[rows[of_piece]]
        return cls(rows, offsets[:: len(pieces)])

    def lists(self, events: pl.DataFrame, prefix: str, names: dict[str, str] | None = None) -> Iterable[pl.Series]:
        for name, source in (names or {name: name for name in EVENTS}).items():
            values = events[source].gather(self.rows).to_arrow()
            arrays = pa.LargeListArray.from_arrays(pa.array(self.offsets, pa.int64()), values)
            yield pl.Series(f"{prefix}{name}", arrays)


def offsets_of(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def as_of(rows: pl.DataFrame, users: pl.DataFrame) -> pl.DataFrame:
    """`rows` of one day with the attributes that hold on it."""
    newest = (
        users.filter(pl.col("date") <= rows["date"].max()).sort("date").group_by("user_id").agg(pl.col("attributes").last())
    )
    joined = rows.join(newest, on="user_id", how="left", maintain_order="left")
    return joined.with_columns(pl.col("attributes").fill_null(pl.lit([], pl.List(pl.String))))


def known_before(users: pl.DataFrame) -> pl.DataFrame:
    """Each row counts from the day after its own, a user's first row from its own."""
    later = pl.col("date") > pl.col("date").min().over("user_id")
    return users.with_columns(pl.col("date") + later.cast(pl.Int64) * pl.duration(days=1))


def quantiles(events: pl.DataFrame, rules: Rules) -> pl.DataFrame:
    """Rows of rewards, with their date."""
    seconds = pl.when(pl.col("duration_ms") > 0).then(pl.col("duration_ms") / 1000.0)
    bucket = ((seconds + rules.epsilon).log() / pl.lit(float(np.log(rules.bucket_base)))).floor().cast(pl.Int32)
    rows = events.select("impression_id", "user_id", "date", "play_ms", "before", "row", bucket=bucket,
        negative=pl.col("feedback") & rules.negative_mask != 0)  # fmt: skip
    known = rows.filter(pl.col("bucket").is_not_null() & (pl.col("play_ms") >= 0)).sort("user_id", "bucket", "row")
    at = pl.int_range(pl.len(), dtype=pl.Int64)
    of_group = changed("user_id") | changed("bucket")
    known = known.select(
        "row",
        "play_ms",
        start=pl.when(of_group).then(at).forward_fill(),
        before=pl.when(of_group | changed("before")).then(at).forward_fill(),
    )
    start = known["start"].to_numpy()
    earlier = known["before"].to_numpy() - start
    no_longer = counts_no_longer(known["play_ms"].to_numpy(), start, earlier)
    enough = pl.col("earlier") >= rules.min_bucket
    counted = known.select("row", earlier=pl.Series(earlier), no_longer=pl.Series(no_longer)).select(
        "row",
        quantile=pl.when(enough).then(pl.col("no_longer") / pl.col("earlier")),
        pool=pl.when(enough).then(pl.lit("own")),
    )
    columns = ("impression_id", "user_id", "date", "bucket", "quantile", "pool", "negative")
    return rows.join(counted, on="row", how="left").select(columns)


def counts_no_longer(play: np.ndarray, start: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    """How many of the first `earlier` plays of each play's group, which begins at `start`, are no longer than it."""
    place = np.arange(len(play)) - start
    found = np.zeros(len(play), np.int64)
    for level in range(int(earlier.max(initial=0)).bit_length()):
        asks = np.flatnonzero((earlier >> level) & 1)
        left = np.flatnonzero(((place >> level) & 1) == 0)
        asked, inserted = ((start[i] + (n[i] >> level + 1 << level + 1)) for i, n in ((asks, earlier), (left, place)))
        entries = pl.DataFrame(
            {
                "block": np.concatenate([inserted, asked]),
                "play": play[np.concatenate([left, asks])],
                "asks": np.repeat([False, True], [len(left), len(asks)]),
                "at": np.concatenate([left, asks]),
            }
        )
        inserts = (~pl.col("asks")).cast(pl.Int64)
        in_order = entries.sort("block", "play", "asks").with_columns(so_far=inserts.cum_sum())
        above = pl.when(changed("block")).then(pl.col("so_far") - inserts).forward_fill()
        answers = in_order.with_columns(count=pl.col("so_far") - above).filter("asks")
        found[answers["at"].to_numpy()] += answers["count"].to_numpy()
    return found
