"""The simulated catalogue: authors, topics, quality, popularity, durations, and titles that say what an item is about.

Items are numbered in upload order, so that the items of a day are a range of numbers. An author's items in that order are
the episodes of one series. Popularity is a rank within (day, topic): a fixed score plus a bonus that fades with age. The
tables here grow with the catalogue and are small enough to broadcast.
"""

from __future__ import annotations

import random

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from jobs.latent import World, logistic, whole

OLDEST_DAYS = 60  # items of the first day's catalogue were uploaded at most this long before
FRESH_BONUS, FRESH_DAYS = 2.0, 2.0
HOME_SHARE = 0.8  # of an author's items in the home topic; the rest is in the second one

# Ordinary words, so that a text encoder finds the topics too; more topics than rows reuse a row with new invented words.
WORDS = (
    "recipe noodles kitchen baking spicy dinner dessert chef",
    "football goal match striker league penalty stadium coach",
    "guitar song concert melody band drums singer chorus",
    "puppy kitten rescue paws vet leash fur kennel",
    "makeup lipstick skincare blush mascara serum glow palette",
    "engine turbo racing garage drift tyres sedan motorcycle",
    "travel beach island passport hotel sunset temple backpack",
    "workout squat yoga muscle treadmill stretch cardio gym",
    "dance choreography ballet rhythm tango stage spin costume",
    "laptop phone battery camera gadget chip software screen",
    "garden tomato seeds soil roses harvest compost greenhouse",
    "boss quest console multiplayer pixel speedrun dungeon controller",
    "comedy prank joke sketch laugh parody improv standup",
    "history empire ancient castle war dynasty museum relic",
    "fashion dress sneakers jacket runway denim boutique vintage",
    "fishing river trout boat lure lake tackle tide",
    "anime manga cosplay hero villain studio fandom cartoon",
    "parenting toddler baby nursery bedtime lullaby stroller family",
    "finance stocks savings budget market invest dividend mortgage",
    "carpentry wood chisel workshop oak furniture varnish drill",
    "physics planet telescope galaxy experiment atom laser rocket",
    "exam lecture vocabulary grammar homework essay campus tutor",
    "basketball dunk hoop rebound playoffs dribble court jersey",
    "painting canvas brush watercolor sketchbook portrait gallery ink",
)
NOISE = "today best new watch amazing how why first last secret real simple never always daily tips moments story part"
INVENTED = 5  # words a topic beside the ordinary ones
SYLLABLES = ("ba", "ko", "mi", "ru", "ta", "ne", "so", "vi", "la", "du", "pe", "zo", "fa", "gi", "ho", "ju")
TITLE_WORDS = 3


def items(spark: SparkSession, world: World) -> DataFrame:
    """One row an item of the whole period: item_id, author_id, topic, upload_day (negative: before the first day),
    quality (logistic, sd 1), popularity, duration_ms, episode (0 is the author's first), title, tags (comma-separated)."""
    s = world.settings
    item, author, topic = F.col("item_id"), F.col("author_id"), F.col("topic")
    rows = spark.range(s.items + s.new_items_a_day * s.days).withColumnRenamed("id", "item_id")
    rows = rows.withColumn("author_id", world.integer(s.authors, "author", item, skew=1.3))
    home = F.pmod(author, F.lit(s.topics))
    second = F.pmod(home + 1 + world.integer(max(1, s.topics - 1), "second_topic", author), F.lit(s.topics))
    rows = rows.withColumn("topic", F.when(world.draw("home", item) < HOME_SHARE, home).otherwise(second))
    later = whole((item - s.items) / max(1, s.new_items_a_day))
    earlier = -1 - world.integer(OLDEST_DAYS, "age", item)
    quality = logistic(world.draw("quality", item)) * 0.55
    rows = rows.withColumns(
        {
            "upload_day": F.when(item < s.items, earlier).otherwise(later),
            "quality": quality,
            "popularity": quality + logistic(world.draw("popularity", item)),
            "duration_ms": duration(world, item, topic),
            "episode": (F.row_number().over(Window.partitionBy("author_id").orderBy("item_id")) - 1).cast("bigint"),
        }
    )
    rows = rows.join(F.broadcast(vocabulary(spark, s.topics)), "topic").withColumns(
        {"title": title(world, item, author), "tags": tags(world, item, topic)}
    )
    return rows.drop("words")


def duration(world: World, item: Column, topic: Column) -> Column:
    """Log-normal up to the tails, with a median of 8 to 60 seconds by topic; 3 seconds to 10 minutes."""
    median = F.pow(F.lit(7.5), world.draw("median", topic)) * 8_000
    return whole(
        F.least(F.greatest(median * F.exp(logistic(world.draw("duration", item)) * 0.4), F.lit(3000)), F.lit(600_000))
    )


def title(world: World, item: Column, author: Column) -> Column:
    """Words of the topic, the author's pet word, a noise word and the number of the episode."""
    words = [
        F.get("words", world.integer(F.size("words"), f"word{i}", item, skew=1.5).cast("int")) for i in range(TITLE_WORDS)
    ]
    syllables = F.array(*map(F.lit, SYLLABLES))
    pet = F.concat(*(F.get(syllables, world.integer(len(SYLLABLES), f"pet{i}", author).cast("int")) for i in range(3)))
    fillers = NOISE.split()
    noise = F.get(F.array(*map(F.lit, fillers)), world.integer(len(fillers), "noise", item).cast("int"))
    return F.concat_ws(" ", words[0], words[1], noise, pet, words[2], (F.col("episode") + 1).cast("string"))


def tags(world: World, item: Column, topic: Column) -> Column:
    """The topic's tag, sometimes a finer one beside it, sometimes none at all (null)."""
    fine = topic * 3 + world.integer(3, "fine", item) + 1 + world.settings.topics
    u = world.draw("tags", item)
    main = (topic + 1).cast("string")
    return F.when(u < 0.08, F.lit(None)).when(u < 0.6, main).otherwise(F.concat_ws(",", main, fine.cast("string")))


def vocabulary(spark: SparkSession, topics: int) -> DataFrame:
    """One row a topic: its words, ordinary and invented ones mixed."""
    return spark.createDataFrame([(z, topic_words(z)) for z in range(topics)], "topic bigint, words array<string>")


def topic_words(topic: int) -> list[str]:
    generator = random.Random(topic)
    invented = ["".join(generator.choices(SYLLABLES, k=4)) for _ in range(INVENTED)]
    words = WORDS[topic % len(WORDS)].split() + invented
    generator.shuffle(words)
    return words


def series(catalogue: DataFrame) -> DataFrame:
    """One row an author: author_id and `episodes`, the item ids in upload order."""
    return catalogue.groupBy("author_id").agg(F.array_sort(F.collect_list("item_id")).alias("episodes"))


def exposure(spark: SparkSession, world: World, catalogue: DataFrame) -> DataFrame:
    """One row a day and available item: day, topic, item_id, place (0 is the most popular of the topic that day)."""
    days = spark.range(world.settings.days).withColumnRenamed("id", "day")
    age = F.col("day") - F.col("upload_day")
    new = F.col("item_id") >= world.settings.items
    score = F.col("popularity") + F.when(new, F.exp(-age / FRESH_DAYS) * FRESH_BONUS).otherwise(0.0)
    order = Window.partitionBy("day", "topic").orderBy(score.desc(), "item_id")
    rows = catalogue.crossJoin(F.broadcast(days)).where(F.col("item_id") < world.available(F.col("day")))
    return rows.select("day", "topic", "item_id", (F.row_number().over(order) - 1).cast("bigint").alias("place"))


def ranking(exposures: DataFrame) -> DataFrame:
    """One row a day and topic: `ranked`, the item ids in order of place."""
    pairs = F.array_sort(F.collect_list(F.struct("place", "item_id")))
    return exposures.groupBy("day", "topic").agg(F.transform(pairs, lambda p: p["item_id"]).alias("ranked"))


def video_features(world: World, catalogue: DataFrame) -> DataFrame:
    """The official columns of KuaiRand's basic video features, and `title` as a last one."""
    item, author = F.col("item_id"), F.col("author_id")
    wide = world.draw("wide", item) < 0.2
    kinds = F.array(*map(F.lit, ("ShortImport", "LongImport", "Web", "Kmovie", "ShortCamera")))
    first = F.lit(world.settings.first_day)
    return catalogue.orderBy("item_id").select(
        item.alias("video_id"),
        author,
        F.when(world.draw("ad", item) < 0.01, "AD").otherwise("NORMAL").alias("video_type"),
        F.date_add(first, F.col("upload_day").cast("int")).cast("string").alias("upload_dt"),
        F.get(kinds, world.integer(5, "upload_type", item).cast("int")).alias("upload_type"),
        F.lit(0.0).alias("visible_status"),
        F.col("duration_ms").cast("double").alias("video_duration"),
        F.when(wide, 1280.0).otherwise(720.0).alias("server_width"),
        F.when(wide, 720.0).otherwise(1280.0).alias("server_height"),
        (world.integer(5000, "music", item, skew=2.0) + 1_000_000).alias("music_id"),
        F.when(world.draw("music_type", item) < 0.6, 9.0).otherwise(4.0).alias("music_type"),
        F.col("tags").alias("tag"),
        "title",
    )
