"""Items that pairs of users share (Swing: Yang et al., 2020), with weights that add up over days.

Two users u, v who both engaged the items i and j are a swing; it weighs

    w_u w_v / (alpha + |I_u n I_v|),    w_u = 1 / sqrt(|I_u|)

so that a shared item says more between users who are choosy and have little else in common. All of it is as of a day D
and its window, the `days_back` days before D and D itself: I_u are the distinct items that u engaged there. A swing
belongs to D if the newest of its four engagements, each counted from its first day in the window, is new on D. The sum
over days thus counts a swing once, and again only when an engagement comes back that had left the window.

An item's list of users keeps the `swing_users` users with the smallest hash. It is ONE order of users for all items, a
bottom-k sketch: two popular items that share users keep the same ones, where a sample for each item would keep hardly a
common one. |I_u n I_v| counts the common items in whose lists both users are; |I_u| counts all items of u.

A day looks at items x swing_users^2 / 2 pairs of users within a list at most, and at pairs of items within what two users
share: at most swing_items / 2 for each of the former. Users beyond `swing_items` (crawlers, shared accounts) take part
nowhere. A pair of users of whom neither engaged anything new on D is left out at once.

Terms are summed as integers, in units of 2^-40: sums of floats would depend on their order, hence on the partitioning,
and an exact count for each value of a term would need a group for each pair of |I_u| |I_v| and |I_u n I_v|. The root,
the product and the quotient of small integers are rounded alike everywhere, so weights are bit-identical; a term is off
by 2^-41 at most. A sum of swing_users^2 / 2 terms of at most 1 / 4 stays below 2^63.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from schemas.config import PairsConfig

KIND = "swing"
SEED = 2020  # of the order of users
UNIT = 2.0**40


def swings(events: DataFrame, settings: PairsConfig, days_back: int, days: Collection[datetime.date]) -> DataFrame:
    """Rows of item_pairs of `days` from positives (user_id, item_id, date) of them and of the `days_back` before each."""
    users = capped(engagements(events, settings, days_back, days), settings.swing_users)
    return summed(common_items(users), settings.swing_alpha)


def engagements(events: DataFrame, settings: PairsConfig, days_back: int, days: Collection[datetime.date]) -> DataFrame:
    """day, user_id, item_id, new, items, active: each engagement of the window that ends with `day`; whether it is new on
    that day, the user's distinct items (int) and whether any of them is new."""
    window_end = F.explode(F.sequence("date", F.date_add("date", days_back)))
    seen = events.select("user_id", "item_id", "date", window_end.alias("day")).where(F.col("day").isin(sorted(days)))
    first = seen.groupBy("day", "user_id", "item_id").agg((F.min("date") == F.col("day")).alias("new"))
    own = Window.partitionBy("day", "user_id")
    counted = first.withColumns({"items": F.count("*").over(own), "active": F.max("new").over(own)})
    return counted.where(F.col("items") <= settings.swing_items)


def capped(engaged: DataFrame, cap: int) -> DataFrame:
    """day, item_id, users: the `cap` users of each item that come first in the order of all users, by user_id."""
    one_order = Window.partitionBy("day", "item_id").orderBy(F.xxhash64("user_id", F.lit(SEED)), "user_id")
    kept = engaged.withColumn("place", F.row_number().over(one_order)).where(F.col("place") <= cap)
    user = F.struct("user_id", "items", "new", "active")
    return kept.groupBy("day", "item_id").agg(F.sort_array(F.collect_list(user)).alias("users"))


def common_items(lists: DataFrame) -> DataFrame:
    """day, sizes, shared: for each two users with two or more items in common, |I_u| |I_v| and the sorted items (structs of
    item_id and new: whether either user's engagement is); pairs of users without anything new are left out."""
    pairs = each_two(lists, "users", "day", "item_id")
    u, v = F.col("one"), F.col("other")
    met = pairs.where(u["active"] | v["active"]).select(
        "day",
        u["user_id"].alias("u"),
        v["user_id"].alias("v"),
        (u["items"] * v["items"]).alias("sizes"),
        F.struct("item_id", (u["new"] | v["new"]).alias("new")).alias("item"),
    )
    shared = met.groupBy("day", "u", "v", "sizes").agg(F.sort_array(F.collect_list("item")).alias("shared"))
    return shared.where((F.size("shared") >= 2) & F.exists("shared", lambda item: item["new"]))


def summed(shared: DataFrame, alpha: float) -> DataFrame:
    """Rows of item_pairs: of each two shared items, at least one of them new, the sum of the terms."""
    term = UNIT / (F.sqrt("sizes") * (F.lit(float(alpha)) + F.size("shared")))
    pairs = each_two(shared.withColumn("units", F.rint(term).cast("long")), "shared", "day", "units")
    new = pairs.where(F.col("one")["new"] | F.col("other")["new"])
    items = [F.col("one")["item_id"].alias("item_a"), F.col("other")["item_id"].alias("item_b")]
    sums = new.select(*items, "day", "units").groupBy("item_a", "item_b", "day").agg(F.sum("units").alias("units"))
    weight = (F.col("units") / F.lit(UNIT)).alias("weight")
    return sums.select("item_a", "item_b", F.lit(KIND).alias("kind"), weight, F.col("day").alias("date"))


def each_two(rows: DataFrame, array: str, *kept: str) -> DataFrame:
    """`kept`, one, other: a row for every two elements of `array`, in its order."""
    first = rows.select(*kept, array, F.posexplode(array).alias("place", "one"))
    rest = F.slice(array, F.col("place") + 2, F.size(array))
    return first.select(*kept, "one", F.explode(rest).alias("other"))
