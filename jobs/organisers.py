"""The three ways to organise impressions into examples (OneRec-V2, section 2.1 and Figure 3), behind one interface.

`newest_only` gives one example a user and slice: the context that collate needs, once, and the slice's requests with
their targets. Every impression is a target exactly once, and its context ends strictly before its request's
first ts, ties excluded. The context is the union in time order of the last `positive_length` engaged events and the
last `short_length` events before the slice's first request, and whatever happened from there to its last one. Which
targets bear a loss is a choice of the collate step.

`naive` gives one example an impression, with the same context, and every event of the context is a target again: a
request of its own, at its own time, that sees the context's events strictly before it. Contexts carry no ids of
impressions, so impression and request of such a repeat are -1; what counts impressions counts each once.

`user_centric` gives one example a user: all requests and the whole history, without the limits of short and positive.
A history of more than `organise.user_events` events is cut into pieces of about that many, each with the
`organise.user_events` events before it as further context, so that no row grows without bound and every impression
still is a target exactly once. Attributes are those known before the day of the example's first request.

None of them lets a target see its user's own future. What they let another user's future do to the weights by the order
of examples is measured by `lazyrec organisation-report`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs.as_of import join_as_of
from jobs.slices import TARGETS, piece_key, requests_of, single_impressions, slice_keys, slices_of
from jobs.timelines import EVENTS, cut, has_any, timelines
from schemas.config import Config
from schemas.feedback import mask_of

REPEATED = -1  # the impression and the request of a context's event that is a target again

# Rows of training_examples from (sequences, base, users, config). `sequences` holds whole days without a gap. `base` has
# each user's newest row of user_features before the first of those days, or is None at the start of the log.
Organiser = Callable[[DataFrame, DataFrame | None, DataFrame, Config], DataFrame]


@dataclass(frozen=True)
class Reach:
    """How far a context goes back before its slice: the last `recent` events and the last `engaged` engaged ones."""

    recent: int
    engaged: int
    mask: int


def newest_only(sequences: DataFrame, base: DataFrame | None, users: DataFrame, config: Config) -> DataFrame:
    """Rows of training_examples, one a user and slice. Attributes are those known before the slice's day (see
    `jobs.as_of`), or empty."""
    reach = bounded_reach(config)
    slices = slices_of(requests_of(sequences, reach.mask), *slice_keys(config.organise.slice))
    return examples(slices, timelines(sequences, base, reach.mask), users, reach)


def naive(sequences: DataFrame, base: DataFrame | None, users: DataFrame, config: Config) -> DataFrame:
    """Rows of training_examples, one an impression, the context's events as targets before it."""
    reach = bounded_reach(config)
    slices = single_impressions(requests_of(sequences, reach.mask))
    return with_repeats(examples(slices, timelines(sequences, base, reach.mask), users, reach))


def user_centric(sequences: DataFrame, base: DataFrame | None, users: DataFrame, config: Config) -> DataFrame:
    """Rows of training_examples, one a user or piece of a long history; `date` is the day of its first request.

    `sequences` holds the whole log and `base` is None: a history that goes on from `user_features` would be no whole one.
    """
    reach = Reach(config.organise.user_events, 0, mask_of(config.sequences.engaged))
    slices = slices_of(requests_of(sequences, reach.mask), piece_key(config.organise.user_events))
    return examples(slices, timelines(sequences, base, reach.mask), users, reach)


ORGANISERS: dict[str, Organiser] = {"newest_only": newest_only, "naive": naive, "user_centric": user_centric}


def bounded_reach(config: Config) -> Reach:
    settings = config.sequences
    return Reach(settings.short_length, settings.positive_length, mask_of(settings.engaged))


def examples(slices: DataFrame, lines: DataFrame, users: DataFrame, reach: Reach) -> DataFrame:
    """Rows of training_examples from rows of `jobs.slices.slices_of` and `jobs.timelines.timelines`."""
    first, last = F.col("requests")[0], F.element_at("requests", -1)
    moments = join_as_of(slices, users, "user_id", ["attributes"], known_before=True).withColumns(
        {
            "recent_start": first["recent_stop"] - reach.recent,
            "recent_stop": last["recent_stop"],
            "engaged_start": first["engaged_stop"] - reach.engaged,
            "engaged_stop": last["engaged_stop"],
        }
    )
    contexts = cut(moments, lines)
    # Engaged events among the recent ones are the newest of the engaged line: cut there, the two parts are disjoint.
    shared = F.size(F.filter("recent_feedback", lambda bits: has_any(bits, reach.mask)))
    contexts = contexts.withColumn("older", F.greatest(F.size("engaged_ts_us") - shared, F.lit(0)))
    return contexts.select(
        "user_id",
        "date",
        "slice_us",
        F.coalesce("attributes", F.array().cast("array<string>")).alias("attributes"),
        *(_context(name).alias(f"context_{name}") for name in EVENTS),
        F.col("requests")["request_id"].alias("request_ids"),
        F.col("requests")["first_us"].alias("request_ts_us"),
        _history_ends().alias("history_end"),
        _target_starts().alias("target_start"),
        *(F.flatten("requests.targets")[name].alias(f"target_{name}") for name in TARGETS),
    )


def with_repeats(rows: DataFrame) -> DataFrame:
    """Rows with one request and target each, and before it one for every event of the context, in time order."""
    events = F.size("context_ts_us")
    repeated = F.array_repeat(F.lit(REPEATED).cast("long"), events)
    columns = {
        "request_ids": F.concat(repeated, "request_ids"),
        "request_ts_us": F.concat("context_ts_us", "request_ts_us"),
        "history_end": F.concat(_strictly_earlier("context_ts_us"), "history_end"),
        "target_start": F.sequence(F.lit(0), events + 1),
        "target_impression_ids": F.concat(repeated, "target_impression_ids"),
        **{f"target_{name}": F.concat(f"context_{name}", f"target_{name}") for name in TARGETS if name in EVENTS},
    }
    return rows.withColumns(columns)


def _strictly_earlier(ascending: str) -> Column:
    """For each value of an ascending array, how many are smaller. Only ties look for the first of their kind."""

    def smaller(value: Column, place: Column) -> Column:
        is_first = (place == 0) | (F.get(ascending, place - 1) < value)
        return F.when(is_first, place).otherwise((F.array_position(ascending, value) - 1).cast("int"))

    return F.transform(ascending, smaller)


def _context(name: str) -> Column:
    return F.concat(F.slice(f"engaged_{name}", F.lit(1), F.col("older")), f"recent_{name}")


def _history_ends() -> Column:
    """All events from the slice's first request on are in the context, so offsets count back from its end."""
    length = F.col("older") + F.size("recent_ts_us")
    last = F.element_at("requests", -1)["recent_stop"]
    return F.transform("requests", lambda request: length - (last - request["recent_stop"]))


def _target_starts() -> Column:
    return F.aggregate(
        "requests",
        F.array(F.lit(0)),
        lambda starts, request: F.concat(starts, F.array(F.element_at(starts, -1) + F.size(request["targets"]))),
    )
