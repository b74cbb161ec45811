"""What each organiser would make of a log, as sums over events: no example is built, and no row comes to the driver.

A transition A->B is an event B of a user after A, the user's latest event strictly before it (of equal times, the one with
the highest impression id). It is trained whenever B bears a loss: once by newest_only and user_centric, and by naive once
more in every later example whose context holds A and B. Its time is that of B's request.

A trained transition was visible if the same A->B of another user's later event had been trained before it. Examples
come in the order of slice_us (newest_only), user by user in the order of a hash (user_centric) or by time (naive);
what comes at the same place is not before. Within a user no organiser trains a later event first.

How often an event is in a context follows from counts of its user's examples: those after the event that begin at most
`short_length` events (or, if it is engaged, `positive_length` engaged ones) after it. So the work is a fixed number of
sorts of some ten rows an event, by user and by transition, whatever the length of a context.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from jobs.organisers import bounded_reach
from jobs.slices import SLICES
from jobs.timelines import has_any
from schemas.config import Config

SLICED = tuple(f"newest_only/{name}" for name in SLICES)
ONCE = (*SLICED, "user_centric")  # train a transition once; each has a column with an event's place in the order
ORGANISATIONS = (*ONCE, "naive")
TRANSITION = ("item_before", "item_id")
UP_TO_HERE = (Window.unboundedPreceding, Window.currentRow)
BEFORE = (Window.unboundedPreceding, -1)


def measured(sequences: DataFrame, config: Config) -> DataFrame:
    """One row an event of `sequences`, which holds whole days from the start of the log: what `numbered` says of its
    request, the column of each of ONCE, and

    transition (bool)       whether it has an event before it
    repeats (bigint)        trainings of the transition by naive beside the first
    visible/ORGANISATION    trainings of the transition that came too late by that organisation
    engaged_early (bigint)  engaged events before the last `short_length` of its request's context
    """
    events = with_visibility(with_next_of_others(numbered(sequences, config)))
    return with_repeats(events, config)


def numbered(sequences: DataFrame, config: Config) -> DataFrame:
    """user_id, date, impression_id, request_id, item_id, event and event_before (place, engaged_place, engaged; the
    latter null for a user's first), item_before, request_us, and recent_stop and engaged_stop of the request (see
    `jobs.slices`), and the column of each of ONCE."""
    columns = ("impression_ids", "request_ids", "item_ids", "ts_us", "feedback")
    events = sequences.select("user_id", "date", F.inline(F.arrays_zip(*columns)))
    events = events.withColumnsRenamed({f"{name}_ids": f"{name}_id" for name in ("impression", "request", "item")})
    engaged = has_any(F.col("feedback"), bounded_reach(config).mask).cast("int")
    in_time, in_order = (Window.partitionBy("user_id").orderBy(*by) for by in (["ts_us"], ["ts_us", "impression_id"]))
    engaged_place = F.sum(engaged).over(in_order.rowsBetween(*UP_TO_HERE)) - engaged
    place = F.row_number().over(in_order) - 1
    events = events.withColumn(
        "event", F.struct(place.alias("place"), engaged_place.alias("engaged_place"), engaged.alias("engaged"))
    )
    strictly_before = in_time.rangeBetween(*BEFORE)
    latest = F.max(F.struct("ts_us", "impression_id", "item_id", "event")).over(strictly_before)
    events = events.withColumns(
        {
            "latest": latest,
            "before": F.rank().over(in_time) - 1,
            "engaged_before": F.coalesce(F.sum(F.col("event")["engaged"]).over(strictly_before), F.lit(0)),
        }
    )
    request = Window.partitionBy("user_id", "date", "request_id")
    events = events.withColumns(
        {
            "item_before": F.col("latest")["item_id"],
            "event_before": F.col("latest")["event"],
            "request_us": F.min("ts_us").over(request),
            "recent_stop": F.min("before").over(request),
            "engaged_stop": F.min("engaged_before").over(request),
        }
    )
    return with_orders(events).drop("ts_us", "feedback", "latest", "before", "engaged_before")


def with_orders(events: DataFrame) -> DataFrame:
    """The place of each event's example in the order of each of ONCE: slice_us, or a hash of the user."""
    orders = {
        name: F.min("request_us").over(Window.partitionBy("user_id", "date", key(F.col("request_us"))))
        for name, key in zip(SLICED, SLICES.values(), strict=True)
    }
    return events.withColumns(orders | {"user_centric": F.shiftright(F.xxhash64("user_id"), 1)})  # half: frames end at -1


def with_visibility(events: DataFrame) -> DataFrame:
    """visible/NAME (0 or 1) for each of ONCE. What is trained before an event and later than it is another user's, since
    the examples of one user come in the order of time."""
    found = {}
    for name in ONCE:
        trained = Window.partitionBy(*TRANSITION).orderBy(name).rangeBetween(*BEFORE)
        later = F.max("request_us").over(trained) > F.col("request_us")
        found[f"visible/{name}"] = (F.col("item_before").isNotNull() & F.coalesce(later, F.lit(False))).cast("int")
    return events.withColumns(found)


def with_next_of_others(events: DataFrame) -> DataFrame:
    """next_us: the first later time at which another user makes the same transition; null for never.

    Times of a transition that only one user makes, one after the other, are a run; what follows on a run is another's.
    Frames end before a row, in order or against it, so that each is one pass.
    """
    alike, at_once = Window.partitionBy(*TRANSITION), Window.partitionBy(*TRANSITION, "request_us")
    in_time, back_in_time = alike.orderBy("request_us"), alike.orderBy(F.desc("request_us"))
    user = F.min("user_id").over(at_once)
    rows = events.withColumn("single", F.when(user == F.max("user_id").over(at_once), user))  # null: several users
    previous = F.max(F.struct("request_us", "single")).over(in_time.rangeBetween(*BEFORE))["single"]
    goes_on = F.coalesce(previous == F.col("single"), F.lit(False))
    rows = rows.withColumn("begins", F.when(~goes_on, F.col("request_us")))
    rows = rows.withColumn("run", F.max("begins").over(in_time.rangeBetween(*UP_TO_HERE)))
    later_runs = alike.orderBy(F.desc("run")).rangeBetween(*BEFORE)
    rows = rows.withColumn("after_run", F.min("request_us").over(later_runs))
    following = F.min(F.struct("request_us", "single", "after_run")).over(back_in_time.rangeBetween(*BEFORE))
    rows = rows.withColumn("following", following)
    own = F.coalesce(F.col("following.single") == F.col("user_id"), F.lit(False))
    next_us = F.when(own, F.col("following.after_run")).otherwise(F.col("following.request_us"))
    return rows.withColumn("next_us", next_us).drop("single", "begins", "run", "after_run", "following")


def with_repeats(events: DataFrame, config: Config) -> DataFrame:
    """repeats, visible/naive and engaged_early, from counts of a user's examples and engaged events up to some point."""
    counts = counted(events, config)
    first, second = (F.greatest(f"{name}_recent", f"{name}_engaged") for name in ("event", "before"))  # skips null
    last = F.least(first, second)  # of the examples in time order, the last whose context holds both
    visible_from = F.greatest("seen", "next_example")
    repeats = {
        "repeats": F.greatest(last - F.col("seen"), F.lit(0)),
        "visible/naive": F.when(F.col("next_example").isNotNull(), F.greatest(last - visible_from, F.lit(0))).otherwise(0),
    }
    transition = F.col("item_before").isNotNull()
    rows = counts.withColumns({name: F.when(transition, value).otherwise(0) for name, value in repeats.items()})
    return rows.withColumn("transition", transition)


def counted(events: DataFrame, config: Config) -> DataFrame:
    """`events` with six counts: the examples (impressions) whose context ends at or before the event (`seen`), begins at
    or before it or the one before it (`*_recent`, `*_engaged`), or whose request is at or before next_us
    (`next_example`); and engaged_early. Null where there is nothing to ask."""
    reach = bounded_reach(config)
    event, before = F.col("event"), F.col("event_before")
    points = [
        *(
            _point(line, at, 1)
            for line, at in (("recent", "recent_stop"), ("engaged", "engaged_stop"), ("time", "request_us"))
        ),
        _point("events", event["place"] + 1, event["engaged"]),
    ]
    questions = {
        "seen": ("recent", event["place"]),
        "event_recent": ("recent", event["place"] + reach.recent),
        "event_engaged": ("engaged", F.when(event["engaged"] == 1, event["engaged_place"] + reach.engaged)),
        "before_recent": ("recent", before["place"] + reach.recent),
        "before_engaged": ("engaged", F.when(before["engaged"] == 1, before["engaged_place"] + reach.engaged)),
        "next_example": ("time", F.col("next_us")),
        "engaged_early": ("events", F.col("recent_stop") - reach.recent),
    }
    asked = [_point(line, at, 0, name) for name, (line, at) in questions.items()]
    carried = F.struct(*events.columns).alias("carried")
    rows = events.select("user_id", "impression_id", carried, F.explode(F.array(*points, *asked)).alias("point"))
    rows = rows.select(
        "user_id", "impression_id", F.when(F.col("point.question") == "seen", F.col("carried")).alias("carried"), "point.*"
    )
    up_to = Window.partitionBy("user_id", "line").orderBy("at").rangeBetween(*UP_TO_HERE)
    rows = rows.where("at IS NOT NULL").withColumn("count", F.sum("weight").over(up_to)).where("question IS NOT NULL")
    answers = [F.max(F.when(F.col("question") == name, F.col("count"))).alias(name) for name in questions]
    return (
        rows.groupBy("user_id", "impression_id")
        .agg(F.first("carried", True).alias("carried"), *answers)
        .select("carried.*", *questions)
    )


def _point(line: str, at: Column | str, weight: Column | int, question: str | None = None) -> Column:
    where = F.col(at) if isinstance(at, str) else at
    counts = weight if isinstance(weight, Column) else F.lit(weight)
    name = F.lit(question).cast("string")
    return F.struct(
        F.lit(line).alias("line"),
        where.cast("long").alias("at"),
        counts.cast("long").alias("weight"),
        name.alias("question"),
    )


def losses(rows: DataFrame) -> DataFrame:
    """One row an organisation from rows of `measured`: organisation, transitions, trained (how often, in sum), and the
    mean and 99th percentile (interpolated) of it, visible (sum)."""
    each = [
        F.struct(
            F.lit(n).alias("organisation"),
            _trainings(n).alias("times"),
            F.col(f"visible/{n}").cast("long").alias("visible"),
        )
        for n in ORGANISATIONS
    ]
    stacked = rows.where("transition").select(F.explode(F.array(*each)).alias("each")).select("each.*")
    return stacked.groupBy("organisation").agg(
        F.count("*").alias("transitions"),
        F.sum("times").alias("trained"),
        F.mean("times").alias("trained_mean"),
        F.percentile("times", 0.99).alias("trained_p99"),
        F.sum("visible").alias("visible"),
    )


def _trainings(organisation: str) -> Column:
    return (F.lit(1) + F.col("repeats") if organisation == "naive" else F.lit(1)).cast("long")
