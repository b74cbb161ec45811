"""Contracts of every table: Arrow schema, key, CHECK constraints and what one row means.

Spark DDL, Ray reads, tests and the docs page of tables come from these declarations. Every table is partitioned by
`date`, the day whose run writes the row, so that one rule serves all: a run of day D replaces partition D and no other.
Times are UTC microseconds. Within arrays they are int64 (`*_us`), which every reader maps to the same integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from schemas.checks import (
    Check,
    at_least,
    elements_at_least,
    one_longer,
    parallel,
    positive,
    unknown_or_at_least,
    unknown_or_positive,
    unknown_or_share,
)

PARTITION = "date"
TIMESTAMP = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class Table:
    """One table of the lake. `checks` maps a constraint's name to what every row satisfies."""

    name: str
    meaning: str
    schema: pa.Schema
    key: tuple[str, ...]
    written_by: str
    checks: Mapping[str, Check] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.schema.names)


def column(name: str, dtype: pa.DataType, comment: str, nullable: bool = True) -> pa.Field:
    return pa.field(name, dtype, nullable=nullable, metadata={"comment": comment})


def required(name: str, dtype: pa.DataType, comment: str) -> pa.Field:
    return column(name, dtype, comment, nullable=False)


def int64s(name: str, comment: str) -> pa.Field:
    return required(name, pa.list_(pa.int64()), comment)


DATE = required("date", pa.date32(), "partition: the day of ts in the source's time zone, or the day the row holds from")
USER = required("user_id", pa.int64(), "user")
ITEM = required("item_id", pa.int64(), "item")

IMPRESSIONS = Table(
    "impressions",
    "one exposure of an item to a user, with what the user did; whatever the source does not have is null",
    pa.schema(
        [
            required("impression_id", pa.int64(), "xxhash64 of (user_id, item_id, ts, request_id)"),
            required("request_id", pa.int64(), "impressions shown together share it"),
            USER,
            ITEM,
            required("ts", TIMESTAMP, "time of the exposure, UTC"),
            DATE,
            column("scene", pa.string(), "where it was shown: tab, page, surface"),
            column("duration_ms", pa.int64(), "length of the item in milliseconds"),
            column("play_ms", pa.int64(), "time played in milliseconds; exceeds the duration when re-watched"),
            column("rating", pa.float32(), "explicit rating on the source's scale"),
            column("click", pa.bool_(), "clicked or played"),
            column("long_view", pa.bool_(), "watched for long, by the source's rule"),
            column("like", pa.bool_(), "liked"),
            column("follow", pa.bool_(), "followed the author"),
            column("comment", pa.bool_(), "commented"),
            column("forward", pa.bool_(), "shared"),
            column("profile_enter", pa.bool_(), "opened the author's profile"),
            column("hate", pa.bool_(), "explicit dislike"),
            column("behaviour_log_probs", pa.list_(pa.float32()), "log-probability a code at exposure; null: not ours"),
            column("behaviour_codebook", pa.string(), "codebook version those codes belong to"),
            column("behaviour_policy", pa.string(), "name and version of the model that made the exposure"),
        ]
    ),
    key=("impression_id",),
    written_by="ingest",
    checks={
        "duration_positive": unknown_or_positive("duration_ms"),
        "play_not_negative": unknown_or_at_least(0, "play_ms"),
        "ids_not_negative": at_least(0, "user_id", "item_id"),
    },
)

NAMED_VECTOR = pa.struct([("name", pa.string()), ("values", pa.list_(pa.float32()))])

ITEMS = Table(
    "items",
    "an item's attributes from `date` on, until a newer row of the item; read the newest row at or before a day",
    pa.schema(
        [
            ITEM,
            DATE,
            column("source_id", pa.string(), "the source's own id where it is no int64"),
            column("author_id", pa.int64(), "author"),
            required("tags", pa.list_(pa.string()), "topics, possibly none"),
            column("title", pa.string(), "text"),
            column("duration_ms", pa.int64(), "length in milliseconds"),
            column("upload_date", pa.date32(), "the day on which the item appeared"),
            required("attributes", pa.list_(pa.string()), "further categorical attributes as 'name=value'"),
            column(
                "vectors", pa.list_(NAMED_VECTOR), "ready-made content vectors by the name of their column in the source"
            ),
            column("withdrawn", pa.date32(), "the day from which the item must not be recommended"),
        ]
    ),
    key=("item_id", "date"),
    written_by="ingest",
    checks={"item_not_negative": at_least(0, "item_id"), "duration_positive": unknown_or_positive("duration_ms")},
)

USERS = Table(
    "users",
    "a user's static attributes from `date` on, until a newer row of the user",
    pa.schema(
        [
            USER,
            DATE,
            column("source_id", pa.string(), "the source's own id where it is no int64"),
            required("attributes", pa.list_(pa.string()), "categorical or bucketed attributes as 'name=value'"),
        ]
    ),
    key=("user_id", "date"),
    written_by="ingest",
    checks={"user_not_negative": at_least(0, "user_id")},
)

REJECTED_ROWS = Table(
    "rejected_rows",
    "one refused input row; `date` is its day where it can be read, else the first day of its file, or of the log",
    pa.schema(
        [
            required("source_file", pa.string(), "file name below the source's folder"),
            required("row_number", pa.int64(), "1 is the first row after the header"),
            required("reason", pa.string(), "why it was refused"),
            column("raw", pa.string(), "the text of the row as read"),
            DATE,
        ]
    ),
    key=("source_file", "row_number"),
    written_by="ingest",
)

EVENT_ARRAYS = (
    int64s("item_ids", "items in time order"),
    int64s("author_ids", "their authors; -1 where unknown"),
    int64s("ts_us", "times, UTC microseconds, ascending"),
    int64s("play_ms", "play times; -1 where unknown"),
    int64s("duration_ms", "durations; -1 where unknown"),
    required("feedback", pa.list_(pa.int32()), "feedback bits, see schemas.feedback"),
)

USER_SEQUENCES = Table(
    "user_sequences",
    "one user and day: that day's events only, in (ts, impression_id) order, as parallel arrays",
    pa.schema(
        [
            USER,
            DATE,
            int64s("impression_ids", "impressions in time order"),
            int64s("request_ids", "their requests"),
            *EVENT_ARRAYS,
        ]
    ),
    key=("user_id", "date"),
    written_by="sequences",
    checks={"arrays_parallel": parallel("item_ids", "ts_us", "feedback")},
)

USER_FEATURES = Table(
    "user_features",
    "one user and day on which the user was active, as of the end of that day: static fields, the last 20 events "
    "(short_*) and the last 256 high-engagement events (positive_*)",
    pa.schema(
        [
            USER,
            DATE,
            required("attributes", pa.list_(pa.string()), "static attributes that hold on that day"),
            *(f.with_name(f"short_{f.name}") for f in EVENT_ARRAYS),
            *(f.with_name(f"positive_{f.name}") for f in EVENT_ARRAYS),
        ]
    ),
    key=("user_id", "date"),
    written_by="sequences",
    checks={
        "short_parallel": parallel("short_item_ids", "short_ts_us"),
        "positive_parallel": parallel("positive_item_ids", "positive_ts_us"),
    },
)

ITEM_PAIRS = Table(
    "item_pairs",
    "two items that belong together by the events of one day; sum over days for a longer span",
    pa.schema(
        [
            required("item_a", pa.int64(), "the smaller item id; the trigger for user_to_item"),
            required("item_b", pa.int64(), "the other item; the target for user_to_item"),
            required("kind", pa.string(), "cooccurrence, swing or user_to_item"),
            required("weight", pa.float64(), "strength, additive over days; of user_to_item the number of targets"),
            DATE,
        ]
    ),
    key=("item_a", "item_b", "kind", "date"),
    written_by="item_pairs",
    checks={"weight_positive": positive("weight")},
)

ITEM_EMBEDDINGS = Table(
    "item_embeddings",
    "an item's vector, from the day whose run made it",
    pa.schema(
        [
            ITEM,
            DATE,
            required("vector", pa.list_(pa.float32()), "the vector; one width a partition"),
            required("sources", pa.list_(pa.string()), "what it was made from: text, pairs, attributes, vector, aligned"),
        ]
    ),
    key=("item_id", "date"),
    written_by="embed",
)

SEMANTIC_IDS = Table(
    "semantic_ids",
    "an item's codes in a codebook; `date` is the day on which it got them, and they never move",
    pa.schema(
        [
            ITEM,
            DATE,
            required(
                "codes",
                pa.list_(pa.int32()),
                "one code a level, coarse to fine; last the place where `tokenize.collisions` is level",
            ),
            required("codebook_version", pa.string(), "identity of the codebook"),
            required("rank", pa.int32(), "place among the items that share the codes, 0 first; breaks ties after decoding"),
        ]
    ),
    key=("item_id", "codebook_version"),
    written_by="tokenize",
    checks={"rank_not_negative": at_least(0, "rank")},
)

ITEM_CODES = Table(
    "item_codes",
    "an item's quantitative codes, features of a ranker; `date` is the day on which it got them, and they never move",
    pa.schema(
        [
            ITEM,
            DATE,
            int64s("vq", "ids of the nearest items of the codebook, nearest first, itself left out; equal ones by id"),
            required("rq", pa.list_(pa.int32()), "one code a level of residual K-means, coarse to fine"),
            required("codebook_version", pa.string(), "identity of the codebook: the fit day's items and the centroids"),
        ]
    ),
    key=("item_id", "codebook_version"),
    written_by="codes",
)

LIFELONG_SEQUENCES = Table(
    "lifelong_sequences",
    "one user and a day on which the user was active, at most one in `lifelong.every_days` days: the history up to the end "
    "of that day as at most `lifelong.tokens` representatives, each the newest event nearest the centre of its cluster; "
    "readers take the newest row at or before a day",
    pa.schema(
        [
            USER,
            DATE,
            int64s("item_ids", "items of the representatives, in order of ts_us"),
            int64s("author_ids", "their authors; -1 where unknown"),
            int64s("ts_us", "mean time of the events of each cluster, UTC microseconds, ascending"),
            int64s("play_ms", "mean of the known play times of each cluster; -1 where none is known"),
            int64s("duration_ms", "mean of the known durations of each cluster; -1 where none is known"),
            required("feedback", pa.list_(pa.int32()), "feedback bits of the representatives, see schemas.feedback"),
            required("weights", pa.list_(pa.int32()), "events of each cluster; they sum to the length of the history"),
        ]
    ),
    key=("user_id", "date"),
    written_by="lifelong",
    checks={
        "arrays_parallel": parallel("item_ids", "ts_us", "weights"),
        "weights_positive": elements_at_least(1, "weights"),
    },
)

TRAINING_EXAMPLES = Table(
    "training_examples",
    "one user and time slice: the context once, and the slice's requests in time order; request r may see context "
    "[0, history_end[r]) and its targets are [target_start[r], target_start[r+1])",
    pa.schema(
        [
            USER,
            DATE,
            required("slice_us", pa.int64(), "time of the slice's first new request, UTC microseconds"),
            required("attributes", pa.list_(pa.string()), "static attributes known before the slice's day"),
            *(f.with_name(f"context_{f.name}") for f in EVENT_ARRAYS),
            int64s("request_ids", "requests in time order; -1: an event of the context that is a target again"),
            int64s("request_ts_us", "time of each request's first impression"),
            required("history_end", pa.list_(pa.int32()), "events of the context strictly before each request"),
            required("target_start", pa.list_(pa.int32()), "offsets of each request's targets, one more than requests"),
            int64s("target_impression_ids", "impressions of the requests, in order; -1: a target again"),
            int64s("target_item_ids", "their items"),
            int64s("target_play_ms", "play times; -1 where unknown"),
            int64s("target_duration_ms", "durations; -1 where unknown"),
            required("target_feedback", pa.list_(pa.int32()), "feedback bits, see schemas.feedback"),
        ]
    ),
    key=("user_id", "slice_us"),
    written_by="organise",
    checks={
        "requests_parallel": parallel("request_ids", "history_end"),
        "targets_parallel": one_longer("target_start", "request_ids"),
        "context_parallel": parallel("context_item_ids", "context_ts_us"),
    },
)

SESSIONS = Table(
    "sessions",
    "the impressions of one request of a user and day, and whether the session is of high quality; its context is that of "
    "the request in training_examples",
    pa.schema(
        [
            USER,
            DATE,
            required("request_id", pa.int64(), "request"),
            required("start_us", pa.int64(), "time of its first impression, UTC microseconds"),
            int64s("impression_ids", "impressions in time order"),
            int64s("item_ids", "their items"),
            int64s("ts_us", "times, UTC microseconds, ascending"),
            int64s("play_ms", "play times; -1 where unknown"),
            int64s("duration_ms", "durations; -1 where unknown"),
            required("feedback", pa.list_(pa.int32()), "feedback bits, see schemas.feedback"),
            required("watched", pa.int32(), "items that were watched"),
            required("watch_ms", pa.int64(), "sum of the known play times"),
            required("interacted", pa.bool_(), "whether any item has a bit of `sessions.interactions`"),
            required("high_quality", pa.bool_(), "whether `sessions.marks_needed` marks hold"),
        ]
    ),
    key=("user_id", "date", "request_id"),
    written_by="sessions",
    checks={
        "arrays_parallel": parallel("item_ids", "impression_ids", "ts_us", "feedback"),
        "watched_not_negative": at_least(0, "watched", "watch_ms"),
    },
)

REWARDS = Table(
    "rewards",
    "one impression: the quantile of its play time among earlier ones of like duration",
    pa.schema(
        [
            required("impression_id", pa.int64(), "impression"),
            USER,
            DATE,
            column("bucket", pa.int32(), "logarithmic duration bucket; null without a duration"),
            column("quantile", pa.float64(), "share of earlier plays in the pool that are no longer; null if too few"),
            column("pool", pa.string(), "own, neighbours or population: whose plays; null without a quantile"),
            required("negative", pa.bool_(), "explicit negative feedback"),
        ]
    ),
    key=("impression_id",),
    written_by="rewards",
    checks={"quantile_range": unknown_or_share("quantile")},
)

RECOMMENDATIONS = Table(
    "recommendations",
    "one recommended item of a user, by what was known at the end of the day; with its log-probabilities and versions it "
    "can come back as the behaviour of an impression",
    pa.schema(
        [
            USER,
            DATE,
            required("rank", pa.int32(), "0 is the best"),
            ITEM,
            required("log_probs", pa.list_(pa.float32()), "log-probability a code"),
            required("codebook_version", pa.string(), "codebook that those codes belong to"),
            required("model_version", pa.string(), "registered model and version"),
        ]
    ),
    key=("user_id", "date", "rank"),
    written_by="recommend",
)

DELETED_USERS = Table(
    "deleted_users",
    "a user whose rows were deleted on request; ingest leaves out whatever the source still says of them",
    pa.schema([USER, required("date", pa.date32(), "partition: the day of the deletion, UTC")]),
    key=("user_id",),
    written_by="forget",
    checks={"user_not_negative": at_least(0, "user_id")},
)

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        IMPRESSIONS,
        ITEMS,
        USERS,
        REJECTED_ROWS,
        USER_SEQUENCES,
        USER_FEATURES,
        ITEM_PAIRS,
        ITEM_EMBEDDINGS,
        SEMANTIC_IDS,
        ITEM_CODES,
        LIFELONG_SEQUENCES,
        TRAINING_EXAMPLES,
        SESSIONS,
        REWARDS,
        RECOMMENDATIONS,
        DELETED_USERS,
    )
}
