"""How many examples, context tokens and bytes each organisation of a log has, from offsets alone: no context is cut."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.organisation_measures import ONCE, SLICED
from jobs.organisers import bounded_reach
from jobs.slices import piece_of
from schemas.config import Config
from schemas.tables import TRAINING_EXAMPLES

OFFSET_BYTES = 4  # of a list in a row


def example_sizes(rows: DataFrame, config: Config) -> DataFrame:
    """One row an organisation from rows of `measured`: organisation, examples, requests, targets, context_tokens, as
    `jobs.organisers` would write them, and impressions."""
    requests = rows.groupBy("user_id", "date", "request_id").agg(
        F.count("*").alias("impressions"),
        *(F.min(name).alias(name) for name in ("recent_stop", "engaged_stop", "engaged_early", *ONCE)),
    )
    keys = {name: (F.col("date"), F.col(name)) for name in SLICED}
    piece = piece_of(F.col("recent_stop"), config.organise.user_events)
    keys |= {"user_centric": (F.lit(None).cast("date"), piece), "naive": (F.col("date"), F.col("request_id"))}
    each = [
        F.struct(F.lit(name).alias("organisation"), day.alias("day"), key.cast("long").alias("key"))
        for name, (day, key) in keys.items()
    ]
    stacked = requests.select("*", F.explode(F.array(*each)).alias("each"))
    found = stacked.groupBy("each.organisation", "user_id", "each.day", "each.key").agg(
        F.count("*").alias("requests"),
        F.sum("impressions").alias("impressions"),
        F.max("recent_stop").alias("stop"),
        *(F.min(name).alias(name) for name in ("recent_stop", "engaged_stop", "engaged_early")),
    )
    return _summed(found, config)


def _summed(contexts: DataFrame, config: Config) -> DataFrame:
    """Of naive a row stands for as many examples as its request has impressions, each with that context."""
    reach, start, engaged = bounded_reach(config), F.col("recent_stop"), F.col("engaged_stop")
    older = F.greatest(F.least(engaged, F.lit(reach.engaged)) - engaged + F.col("engaged_early"), F.lit(0))
    whole = F.col("organisation") == "user_centric"
    back = F.when(whole, F.lit(config.organise.user_events)).otherwise(F.lit(reach.recent))
    tokens = F.col("stop") - F.greatest(start - back, F.lit(0)) + F.when(whole, F.lit(0)).otherwise(older)
    naive = F.col("organisation") == "naive"
    examples = F.when(naive, F.col("impressions")).otherwise(1)
    targets = F.col("impressions") + F.when(naive, tokens * examples).otherwise(0)
    return contexts.groupBy("organisation").agg(
        F.sum(examples).alias("examples"),
        F.sum(F.when(naive, targets).otherwise(F.col("requests"))).alias("requests"),
        F.sum(targets).alias("targets"),
        F.sum(tokens * examples).alias("context_tokens"),
        F.sum("impressions").alias("impressions"),
    )


def table_bytes(sizes: Mapping[str, int]) -> int:
    """Bytes of the rows that `sizes` counts (examples, requests, targets, context_tokens) as arrays of the contract's
    types, list offsets included; without attributes, which are a few strings a row."""
    total = 0
    for field in TRAINING_EXAMPLES.schema:
        if field.name == "attributes":
            continue
        is_list = pa.types.is_list(field.type)
        width = (field.type.value_type if is_list else field.type).bit_width // 8
        values = _values(field.name, sizes) if is_list else sizes["examples"]
        total += width * values + (OFFSET_BYTES * sizes["examples"] if is_list else 0)
    return total


def _values(name: str, sizes: Mapping[str, int]) -> int:
    """Elements of a list column of training_examples in all rows."""
    if name == "target_start":  # one more than requests
        return sizes["requests"] + sizes["examples"]
    kinds = {"context_": "context_tokens", "target_": "targets"}
    return sizes[next((size for start, size in kinds.items() if name.startswith(start)), "requests")]
