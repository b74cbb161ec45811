"""The simulated world: who likes what, what is shown, and the probability that it is liked.

Every draw is a hash of (seed, name of the draw, ids of the entities), so a row is the same whatever the partitions, the
cluster or the order of work, and no state is carried from row to row. Sequences come from counters instead: request k of
a user belongs to session k div length, which has one intent topic, and to series run k div RUN, in which consecutive
requests show consecutive items of one favourite author for a geometric number of steps. A run goes on exactly where the
episode was likely liked, so that a like announces the next episode without recursion.

The trade-off: probabilities are closed forms that NumPy repeats exactly (`benchmarks/simulated_oracle.py`), at the cost of
a policy that does not learn from the feedback.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from jobs.bounds import DAY_MS
from schemas.config import SimulateConfig

REQUEST_SIZES = (0.07776, 0.33696, 0.68256, 0.91296, 0.98976)  # cumulative: 3 + Binomial(5, 0.4), mean 5
MEAN_REQUEST = 5.0
ACTIVITY = 0.6  # exponent of the heavy tail: the busiest user has (2 / users)^0.6 of all requests
SESSION_GAP_MS = 90_000  # between two requests of a session
TOPIC_SKEW = 1.4  # topic = floor(T * u^skew): topic 0 is the most popular one
ZIPF = 0.85  # exponent of popularity within a topic
DRIFT = 0.9  # amplitude, in log weight, of the drift of a user's topics
CORE = (0.5, 0.3, 0.2)  # base weights of a user's three topics
FAVOURITES = (0, 0, 0, 1, 2)  # the core topic of each favourite author
AUTHOR_SKEW = 1.5

# Where a slot's item comes from: the session's topic, the user's topics, what is popular anywhere, chance.
INTENT_SHARE, MIXTURE_SHARE, TREND_SHARE = 0.60, 0.20, 0.10
INTENT_CORE = 0.9  # an intent is one of the user's topics; else any topic

RUN = 6  # requests of a series run at most
RUN_SHARE = 0.7  # of the stretches of RUN requests that hold a run
RUN_GOES_ON = 0.75
SERIES_LIKED, SERIES_LAST = 0.9, 0.15  # probability of a positive on an episode that is continued, and on the last one

BIAS, BY_TOPIC, BY_QUALITY, BY_FAVOURITE = -1.75, 2.2, 0.8, 1.0  # log-odds of a positive


@dataclass(frozen=True)
class World:
    """The latent state as Spark columns. Column arguments are int64; draws are in (0, 1)."""

    settings: SimulateConfig

    def draw(self, name: str, *ids: Column) -> Column:
        """A uniform number in (0, 1) that depends on the seed, `name` and `ids` alone."""
        key = F.xxhash64(F.lit(self.settings.seed).cast("bigint"), F.lit(name), *(i.cast("bigint") for i in ids))
        return (F.shiftrightunsigned(key, 11).cast("double") + F.lit(0.5)) * F.lit(2.0**-53)

    def integer(self, below: int | Column, name: str, *ids: Column, skew: float = 1.0) -> Column:
        """floor(below * u^skew): uniform over 0..below-1 for skew 1, heavier on small numbers above it."""
        u = self.draw(name, *ids)
        return whole(F.pow(u, F.lit(skew)) * below if skew != 1 else u * below)

    # Users

    def requests_of(self, user: Column) -> Column:
        """Requests of a user in the whole log; they sum to impressions / MEAN_REQUEST up to rounding."""
        n = self.settings.users
        rank = F.pmod(user * coprime(n) + self.settings.seed, F.lit(n)).cast("double")
        share = left_of(rank / n) - left_of((rank + 1) / n)
        return whole(share * (self.settings.impressions / MEAN_REQUEST) + self.draw("requests", user))

    def with_taste(self, rows: DataFrame) -> DataFrame:
        """Adds topic0..2, the core topics of `user_id`, and weight0..2, their weights on `day`, which sum to 1.

        The second and third topic tend to be near the one before. Weights drift with a period of 8 to 20 days. They are
        columns and not expressions, so that Spark computes each once and not wherever it is used.
        """
        user, count = F.col("user_id"), self.settings.topics
        rows = rows.withColumn("topic0", self.integer(count, "topic", user, skew=TOPIC_SKEW))
        for i in (1, 2):
            step = self.integer(max(1, count - 1), f"topic{i}", user, skew=2.0) + 1
            rows = rows.withColumn(f"topic{i}", F.pmod(F.col(f"topic{i - 1}") + step, F.lit(count)))
        rows = rows.withColumn("turn", F.col("day").cast("double") / (self.draw("period", user) * 12 + 8))
        for i, base in enumerate(CORE):
            angle = (F.col("turn") + self.draw(f"phase{i}", user)) * (2 * math.pi)
            rows = rows.withColumn(f"raw{i}", F.exp(F.sin(angle) * DRIFT) * base)
        total = F.col("raw0") + F.col("raw1") + F.col("raw2")
        return rows.withColumns({f"weight{i}": F.col(f"raw{i}") / total for i in range(3)}).drop(
            "turn", "raw0", "raw1", "raw2"
        )

    def favourites(self) -> list[Column]:
        """The favourite authors of `user_id`, all at home in one of topic0..2."""
        draws = [self.draw(f"favourite{i}", F.col("user_id")) for i in range(len(FAVOURITES))]
        return [self.author_in(F.col(f"topic{core}"), u) for core, u in zip(FAVOURITES, draws, strict=True)]

    def author_in(self, topic: Column, u: Column) -> Column:
        """An author at home in a topic: author a's home is a mod topics, and low numbers are prolific."""
        s = self.settings
        count = F.greatest(F.ceil((F.lit(s.authors) - topic) / s.topics), F.lit(1))
        return F.pmod(topic + whole(F.pow(u, F.lit(AUTHOR_SKEW)) * count) * s.topics, F.lit(s.authors))

    # Requests

    def requests(self, users: DataFrame) -> DataFrame:
        """One row a request: user_id, k, time_ms since the first day, day, session; times of a user ascend strictly."""
        user, k = F.col("user_id"), F.col("k")
        counted = users.withColumn("n", self.requests_of(user)).where("n > 0")
        rows = counted.withColumn("length", self.integer(4, "session_length", user) + 3)
        rows = rows.withColumn("k", F.explode(F.sequence(F.lit(0).cast("bigint"), F.col("n") - 1)))
        before = whole(self.draw("first_session", user) * F.col("length"))  # the log begins within a session
        rows = rows.withColumn("place", k + before)
        rows = rows.withColumn("session", whole(F.col("place") / F.col("length")))
        sessions = F.ceil((before + F.col("n")) / F.col("length"))
        period = float(self.settings.days * DAY_MS)
        gap = F.least(F.lit(SESSION_GAP_MS / period), F.lit(0.35) / (sessions * F.col("length")))
        free = F.lit(1.0) - gap * F.col("length") * sessions
        start = (F.col("session") + self.draw("start", user, F.col("session")) * free) / sessions
        step = (F.pmod("place", "length") + self.draw("step", user, k) * 0.5) * gap
        time = daylight((start + step) * self.settings.days)
        rows = rows.withColumn("time_ms", whole(time * DAY_MS))
        return rows.select("user_id", "k", "session", "time_ms", whole(F.col("time_ms") / DAY_MS).alias("day"))

    def with_state(self, requests: DataFrame, series: DataFrame) -> DataFrame:
        """Adds what drives a request: its intent topic, and the episode that a series run shows, with its probability.

        `series` has one row an author: author_id and `episodes`, the author's items in upload order. Later work asks
        this state what would have been shown: it is written as truth/requests.
        """
        user, session, day = F.col("user_id"), F.col("session"), F.col("day")
        requests = self.with_taste(requests)
        own = own_topic(self.draw("intent", user, session))
        anywhere = self.integer(self.settings.topics, "intent_any", user, session, skew=TOPIC_SKEW)
        intent = F.when(self.draw("intent_core", user, session) < INTENT_CORE, own).otherwise(anywhere)
        shifted = F.col("k") + self.integer(RUN, "run_offset", user)
        rows = requests.withColumn("intent", intent).withColumn("run", whole(shifted / RUN))
        rows = rows.withColumn("step", F.pmod(shifted, F.lit(RUN)))
        run = F.col("run")
        length = whole(F.log(self.draw("run_length", user, run)) / math.log(RUN_GOES_ON)) + 1
        favourites = F.array(*self.favourites())
        author = F.get(favourites, self.integer(len(FAVOURITES), "run_author", user, run).cast("int"))
        active = (self.draw("run", user, run) < RUN_SHARE) & (F.col("step") < length)
        rows = rows.withColumn("author_id", F.when(active, author)).withColumn(
            "series_liked", F.when(F.col("step") < length - 1, SERIES_LIKED).otherwise(SERIES_LAST)
        )
        rows = rows.join(F.broadcast(series), "author_id", "left")
        position = self.integer(4, "run_start", user, run, skew=2.0) + F.col("step")
        episode = F.get("episodes", position.cast("int"))
        rows = rows.withColumn("series_item", F.when(episode < self.available(day), episode))
        return rows.drop("author_id", "episodes", "run", "step")

    def slots(self, requests: DataFrame) -> DataFrame:
        """One row an impression to be: adds `slot` and `topic`, null where the item is drawn from the whole catalogue."""
        user, k = F.col("user_id"), F.col("k")
        u = self.draw("size", user, k)
        size = sum((F.when(u > bound, 1).otherwise(0) for bound in REQUEST_SIZES), F.lit(3))
        rows = requests.withColumn("slot", F.explode(F.sequence(F.lit(0).cast("bigint"), (size - 1).cast("bigint"))))
        slot = F.col("slot")
        source = self.draw("source", user, k, slot)
        mixture = own_topic(self.draw("mixture", user, k, slot))
        trend = self.integer(self.settings.topics, "trend", user, k, slot, skew=TOPIC_SKEW)
        topic = (
            F.when(source < INTENT_SHARE, F.col("intent"))
            .when(source < INTENT_SHARE + MIXTURE_SHARE, mixture)
            .when(source < INTENT_SHARE + MIXTURE_SHARE + TREND_SHARE, trend)
        )
        return rows.withColumn("topic", topic)

    def shown(self, slots: DataFrame, ranking: DataFrame) -> DataFrame:
        """Fills the slots: user_id, k, time_ms, day, slot, item_id, series_liked (null outside a series run).

        `ranking` has one row a day and topic: `ranked`, the available items from the most popular on. An item that the
        user has met is replaced by one drawn evenly from the same topic, and none appears twice in a request.
        """
        keys = [F.col(c) for c in ("user_id", "k", "slot")]
        slot, day, ranked = F.col("slot"), F.col("day"), F.col("ranked")
        rows = slots.join(F.broadcast(ranking), ["day", "topic"], "left")
        total, count = self.available(day), F.size("ranked")
        first, second = self.draw("item", *keys), self.draw("replacement", *keys)
        by_rank = F.get(ranked, zipf_rank(first, count).cast("int"))
        drawn = F.coalesce(by_rank, whole(first * total))
        spare = F.coalesce(F.get(ranked, whole(second * count).cast("int")), whole(second * total))
        in_series = (slot == 0) & F.col("series_item").isNotNull()
        rows = rows.select(
            "user_id",
            "k",
            "slot",
            "time_ms",
            "day",
            F.when(in_series, F.col("series_item")).otherwise(drawn).alias("item_id"),
            spare.alias("spare"),
            F.when(in_series, F.col("series_liked")).alias("series_liked"),
        )
        return without_repeats(rows)

    def available(self, day: Column) -> Column:
        """Items that exist on a day: ids ascend by upload, so exactly those below this number."""
        return (day + 1) * self.settings.new_items_a_day + self.settings.items

    def liked(self, topic: Column, author: Column, quality: Column) -> Column:
        """The true probability that a user of rows `with_taste` gives an item a click, long view or like."""
        weight = sum(
            (F.when(F.col(f"topic{i}") == topic, F.col(f"weight{i}")).otherwise(0.0) for i in range(3)), F.lit(0.0)
        )
        favourite = F.when(author.isin(self.favourites()), BY_FAVOURITE).otherwise(0.0)
        return sigmoid(weight * BY_TOPIC + quality * BY_QUALITY + favourite + BIAS)


def without_repeats(rows: DataFrame) -> DataFrame:
    """Replaces what a user has met before by the row's spare, and drops what a request would then show twice."""
    met = Window.partitionBy("user_id", "item_id").orderBy("k", "slot")
    again = (F.row_number().over(met) > 1) & F.col("series_liked").isNull()
    replaced = rows.repartition("user_id").withColumn("item_id", F.when(again, F.col("spare")).otherwise(F.col("item_id")))
    twice = Window.partitionBy("user_id", "k", "item_id").orderBy("slot")
    return replaced.drop("spare").withColumn("copy", F.row_number().over(twice)).where("copy = 1").drop("copy")


def whole(value: Column) -> Column:
    return F.floor(value).cast("bigint")


def sigmoid(value: Column) -> Column:
    return F.lit(1.0) / (F.exp(-value) + 1.0)


def logistic(u: Column) -> Column:
    """A standard logistic number from a uniform one; its standard deviation is 1.81."""
    return F.log(u / (F.lit(1.0) - u))


def own_topic(u: Column) -> Column:
    """One of topic0..2 by weight0..2."""
    first, second = F.col("weight0"), F.col("weight0") + F.col("weight1")
    return F.when(u < first, F.col("topic0")).when(u < second, F.col("topic1")).otherwise(F.col("topic2"))


def left_of(q: Column) -> Column:
    """The share of activity of the users above quantile q: differences of it sum to exactly 1."""
    return F.pow(F.greatest(F.lit(1.0) - q * q, F.lit(0.0)), F.lit(ACTIVITY))


def zipf_rank(u: Column, count: Column) -> Column:
    """Rank 0..count-1 with P(r) = ((r+2)^b - (r+1)^b) / ((count+1)^b - 1), b = 1 - ZIPF."""
    b = 1.0 - ZIPF
    rank = whole(F.pow(u * (F.pow(count + 1, F.lit(b)) - 1.0) + 1.0, F.lit(1.0 / b))) - 1
    return F.least(F.greatest(rank, F.lit(0)), count - 1)


def daylight(days: Column) -> Column:
    """Warps time within each day, strictly ascending, so that noon is busy and midnight is quiet."""
    fraction = days - F.floor(days)
    return days + F.sin(fraction * (2 * math.pi)) * (0.5 / (2 * math.pi))


def coprime(n: int) -> int:
    """A multiplier near the golden section of n that permutes 0..n-1."""
    candidate = max(1, round(n * 0.6180339887))
    while math.gcd(candidate, n) != 1:
        candidate += 1
    return candidate
