"""The outputs in DuckDB's SQL: Parquet in, Parquet (zstd, a folder a day) out.

Every event gets its place in the user's history once, by window functions. The tails of many moments are then slices of
lists: a history is cut into blocks of 256 events, each with the tail before it, so that a slice copies at most about
twice the tails whatever the length of the history. The rank of a play among earlier ones is a window function with an
order of its own, which DuckDB answers from a merge sort tree.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import duckdb

from benchmarks.features.inputs import EVENTS, Clock, Inputs, Rules
from schemas.feedback import BITS, FLAGS, RATED_HIGH

MEMORY = "10GB"
THREADS = 2
EVENTS_A_PASS = 2_000_000

EVENT_LINE = """
CREATE TABLE events AS
WITH named AS (
    SELECT l.user_id, l.date, epoch_us(l.ts) AS ts_us, l.impression_id, l.request_id, l.item_id AS item_ids,
           coalesce(i.author_id, -1) AS author_ids, coalesce(l.play_ms, -1) AS play_ms,
           coalesce(l.duration_ms, -1) AS duration_ms, ({feedback})::INT AS feedback
    FROM {impressions} l ASOF LEFT JOIN {items} i ON l.item_id = i.item_id AND l.date >= i.date
), placed AS (
    SELECT *, feedback & {engaged_mask} != 0 AS engaged,
           row_number() OVER in_order - 1 AS place,            -- of the event among the user's
           rank() OVER (PARTITION BY user_id ORDER BY ts_us) - 1 AS before  -- events strictly earlier
    FROM named WINDOW in_order AS (PARTITION BY user_id ORDER BY ts_us, impression_id)
)
SELECT *, count(*) FILTER (engaged) OVER earlier AS engaged_place, count(*) FILTER (engaged) OVER recent AS recent_engaged
FROM placed
WINDOW earlier AS (PARTITION BY user_id ORDER BY place ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING),
       recent AS (PARTITION BY user_id ORDER BY place ROWS BETWEEN {recent} PRECEDING AND 1 PRECEDING)
"""

SEQUENCES = """
SELECT user_id, date, list(impression_id ORDER BY place) AS impression_ids, list(request_id ORDER BY place) AS request_ids,
       {lists}
FROM events WHERE date IN $days GROUP BY user_id, date ORDER BY date, user_id
"""

# Lists of structs: one sort and one copy serve the six arrays.
BLOCKS = """
CREATE TABLE {line}_blocks AS
SELECT user_id, block, list({event} ORDER BY {place}) AS {line}
FROM (
    SELECT *, unnest(CASE WHEN {place} % {block} >= {block} - {reach}
                     THEN [{place} // {block}, {place} // {block} + 1] ELSE [{place} // {block}] END) AS block
    FROM events WHERE {condition}
)
GROUP BY user_id, block
"""

DAY_ENDS = """
CREATE TABLE day_ends AS
SELECT user_id, date, max(place) + 1 AS recent_stop, max(engaged_place + engaged::INT) AS engaged_stop
FROM events GROUP BY user_id, date
"""

REQUESTS = """
CREATE TABLE slices AS
WITH requests AS (
    SELECT user_id, date, request_id, min(ts_us) AS slice_us, min(before) AS recent_stop,
           list({target} ORDER BY place) AS targets
    FROM events GROUP BY user_id, date, request_id
), gathered AS (
    SELECT user_id, date, slice_us, any_value(recent_stop) AS recent_stop,
           list(request_id ORDER BY request_id) AS request_ids,
           list(len(targets) ORDER BY request_id) AS sizes, flatten(list(targets ORDER BY request_id)) AS targets
    FROM requests GROUP BY user_id, date, slice_us
)
SELECT g.*, e.engaged_place AS engaged_stop, e.recent_engaged
FROM gathered g JOIN events e ON g.user_id = e.user_id AND g.recent_stop = e.place
"""

# Rows of `moments` of some days with `recent` and `engaged`: the events of the half-open ranges that end at their stops.
CUT = """
SELECT m.*, {attributes} AS attributes,
       coalesce(list_slice(r.recent,
                           greatest(m.recent_stop - {recent}, 0) - greatest(m.recent_block * {block} - {recent}, 0) + 1,
                           m.recent_stop - greatest(m.recent_block * {block} - {recent}, 0)), []) AS recent,
       coalesce(list_slice(e.engaged,
                           greatest(m.engaged_stop - {engaged}, 0) - greatest(m.engaged_block * {block} - {engaged}, 0) + 1,
                           greatest(m.engaged_end - greatest(m.engaged_block * {block} - {engaged}, 0), 0)), []) AS engaged
FROM (SELECT *, recent_stop // {block} AS recent_block, engaged_stop // {block} AS engaged_block,
             {engaged_end} AS engaged_end FROM {moments} WHERE date IN $days) m
ASOF LEFT JOIN {users} u ON m.user_id = u.user_id AND m.date >= u.{known_from}
LEFT JOIN recent_blocks r ON r.user_id = m.user_id AND r.block = m.recent_block
LEFT JOIN engaged_blocks e ON e.user_id = m.user_id AND e.block = m.engaged_block
"""

FEATURES = "SELECT user_id, date, attributes, {short}, {positive} FROM ({cut}) ORDER BY date, user_id"

EXAMPLES = """
SELECT user_id, date, slice_us, attributes, {context}, request_ids,
       list_transform(request_ids, lambda r: slice_us) AS request_ts_us,
       list_transform(request_ids, lambda r: len(context)::INT) AS history_end,
       list_transform(range(0, len(sizes) + 1), lambda r: coalesce(list_sum(sizes[1:r]), 0)::INT) AS target_start, {targets}
FROM (SELECT *, list_concat(engaged, recent) AS context FROM ({cut})) ORDER BY date, slice_us, user_id
"""

REWARDS = """
CREATE TABLE quantiles AS
WITH plays AS (
    SELECT impression_id, user_id, date, ts_us, play_ms, feedback & {negative_mask} != 0 AS negative,
           CASE WHEN duration_ms > 0
                THEN floor(ln(duration_ms / 1000.0::DOUBLE + {epsilon}) / ln({bucket_base}::DOUBLE)) END::INT AS bucket,
           duration_ms > 0 AND play_ms >= 0 AS known
    FROM events
), ranked AS (
    SELECT *, count(*) OVER earlier AS plays, rank(ORDER BY play_ms DESC) OVER earlier - 1 AS longer
    FROM plays WINDOW earlier AS (PARTITION BY user_id, bucket, known ORDER BY ts_us
                                  RANGE BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
)
SELECT impression_id, user_id, date, bucket,
       CASE WHEN known AND plays >= {min_bucket} THEN (plays - longer) / plays END AS quantile,
       CASE WHEN known AND plays >= {min_bucket} THEN 'own' END AS pool, negative
FROM ranked
"""


def build(inputs: Inputs, rules: Rules, out: Path) -> dict[str, float]:
    """Writes the four outputs below `out`; seconds by output."""
    clock = Clock()
    settings: dict[str, str | bool | int | float | list[str]] = {
        "threads": THREADS,
        "memory_limit": MEMORY,
        "temp_directory": str(out / "spill"),
    }
    with duckdb.connect(":memory:", config=settings) as base:
        sql = statements(inputs, rules)
        with clock("events"):
            base.execute(sql["events"])
            days = passes(base, inputs.days)
        with clock("user_sequences"):
            write(base, days, sql["user_sequences"], out, "user_sequences")
        with clock("blocks"):
            base.execute(sql["recent_blocks"])
            base.execute(sql["engaged_blocks"])
        with clock("user_features"):
            base.execute(DAY_ENDS)
            write(base, days, sql["user_features"], out, "user_features")
        with clock("training_examples"):
            base.execute(sql["slices"])
            write(base, days, sql["training_examples"], out, "training_examples")
        with clock("rewards"):
            base.execute(sql["quantiles"])
            rewards = "SELECT * FROM quantiles WHERE date IN $days"
            write(base, days, rewards, out, "rewards")
    return clock.seconds


def passes(base: duckdb.DuckDBPyConnection, days: list[datetime.date]) -> list[list[datetime.date]]:
    """The days by what is written at once: all of a small log, so that the tables are read once; few of a large one, whose
    examples would not be sorted in memory."""
    counted = base.execute("SELECT count(*) FROM events").fetchone()
    size = max(1, EVENTS_A_PASS * len(days) // max(1, counted[0] if counted else 0))
    return [days[start : start + size] for start in range(0, len(days), size)]


def write(base: duckdb.DuckDBPyConnection, days: list[list[datetime.date]], query: str, out: Path, table: str) -> None:
    options = "FORMAT parquet, COMPRESSION zstd, PARTITION_BY (date), APPEND"
    for some in days:
        listed = ", ".join(f"DATE '{day.isoformat()}'" for day in some)
        base.execute(f"COPY ({query.replace('$days', f'({listed})')}) TO '{out / table}' ({options})")


def statements(inputs: Inputs, rules: Rules) -> dict[str, str]:
    block = max(rules.block, rules.recent, rules.engaged)
    source = {name: f"read_parquet({files!r}, hive_partitioning = true)" for name, files in inputs.files.items()}
    # Known before the day, except that a user's first row counts on its own day too.
    known = f"""(SELECT *, date + CASE WHEN row_number() OVER (PARTITION BY user_id ORDER BY date) = 1 THEN 0 ELSE 1 END
                 AS known_from FROM {source["users"]})"""
    event = f"struct_pack({', '.join(f'{name} := {name}' for name in EVENTS)})"
    target = event.replace("author_ids := author_ids", "impression_ids := impression_id")
    common = {"block": block, "recent": rules.recent, "engaged": rules.engaged, "attributes": "coalesce(u.attributes, [])"}
    feature_cut = CUT.format(
        **common, moments="day_ends", users=source["users"], known_from="date", engaged_end="engaged_stop"
    )
    # Of a context, engaged events among the recent ones come with those.
    example_cut = CUT.format(
        **common, moments="slices", users=known, known_from="known_from", engaged_end="engaged_stop - recent_engaged"
    )
    line = {"event": event, "block": block}
    return {
        "events": EVENT_LINE.format(
            feedback=feedback(rules.rated_high), impressions=source["impressions"], items=source["items"],
            engaged_mask=rules.engaged_mask, recent=rules.recent,
        ),
        "user_sequences": SEQUENCES.format(lists=", ".join(f"list({n} ORDER BY place) AS {n}" for n in EVENTS)),
        "recent_blocks": BLOCKS.format(**line, line="recent", place="place", reach=rules.recent, condition="true"),
        "engaged_blocks": BLOCKS.format(
            **line, line="engaged", place="engaged_place", reach=rules.engaged, condition="engaged"
        ),
        "user_features": FEATURES.format(
            short=fields("recent", "short_", EVENTS), positive=fields("engaged", "positive_", EVENTS), cut=feature_cut
        ),
        "slices": REQUESTS.format(target=target),
        "training_examples": EXAMPLES.format(
            context=fields("context", "context_", EVENTS), targets=fields("targets", "target_", TARGETS), cut=example_cut
        ),
        "quantiles": REWARDS.format(
            negative_mask=rules.negative_mask, epsilon=rules.epsilon, bucket_base=rules.bucket_base,
            min_bucket=rules.min_bucket,
        ),
    }  # fmt: skip


TARGETS = ("impression_ids", "item_ids", "play_ms", "duration_ms", "feedback")


def feedback(rated_high: float) -> str:
    conditions = {f'l."{name}"': BITS[name] for name in FLAGS} | {f"l.rating >= {rated_high}": BITS[RATED_HIGH]}
    return " + ".join(f"CASE WHEN {condition} THEN {bit} ELSE 0 END" for condition, bit in conditions.items())


def fields(structs: str, prefix: str, names: tuple[str, ...]) -> str:
    """The arrays of a list of structs."""
    return ", ".join(f"list_transform({structs}, lambda x: x.{name}) AS {prefix}{name}" for name in names)
