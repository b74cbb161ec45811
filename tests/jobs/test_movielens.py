"""MovieLens's files: ratings as exposures without flags, genres as tags, what users wrote as attributes."""

from __future__ import annotations

import datetime

from jobs import tables
from jobs.ingest import ingest
from schemas.config import Config
from schemas.feedback import FLAGS
from schemas.source import SourceConfig

RATINGS = [
    "1,10,4.5,1260759144",
    "1,11,0.5,1260759144",
    "2,10,3.0,851866703",
    "2,11,x,851866703",
    "2,99,3.0,1",
    "2,12,3.0,1575158400",
]
NOW = datetime.datetime(2019, 11, 29, 23, 59, tzinfo=datetime.UTC)
MOVIES = [
    '10,"""Great"" Cats, The (1998)",Comedy|Musical',
    "11,Nothing (2001),(no genres listed)",
    "12,Never Rated (1950),Drama",
]
TAGS = ["1,10,Dancing Cats,1", "2,10,dancing cats,2", "2,10,boring,3", "1,x,lost,4", "1,10,,5"]


def test_ratings_films_and_tags(spark, lake, tmp_path):
    for name, header, lines in (
        ("ratings.csv", "userId,movieId,rating,timestamp", RATINGS),
        ("movies.csv", "movieId,title,genres", MOVIES),
        ("tags.csv", "userId,movieId,tag,timestamp", TAGS),
    ):
        (tmp_path / name).write_text("\n".join([header, *lines]) + "\n")
    report = ingest(spark, lake, Config(source=SourceConfig(kind="movielens", path=str(tmp_path))), now=NOW)
    assert report.days == (datetime.date(1996, 12, 29), datetime.date(2009, 12, 14))
    assert report.rows == {"read": 6, "kept": 3, "duplicates": 0, "rejected": 3, "outside_range": 0}

    rows = tables.read(spark, lake, "impressions").collect()
    assert {(r.user_id, r.item_id, r.rating) for r in rows} == {(1, 10, 4.5), (1, 11, 0.5), (2, 10, 3.0)}
    unknown = (*FLAGS, "scene", "play_ms", "duration_ms", "behaviour_log_probs")
    assert all(row[name] is None for row in rows for name in unknown)
    assert len({r.request_id for r in rows if r.user_id == 1}) == 1  # rated in the same second

    items = {r.item_id: r for r in tables.read(spark, lake, "items").collect()}
    assert {key: r.title for key, r in items.items()} == {
        10: '"Great" Cats, The (1998)',
        11: "Nothing (2001)",
        12: "Never Rated (1950)",
    }
    assert [items[key].tags for key in (10, 11, 12)] == [["Comedy", "Musical"], [], ["Drama"]]
    assert items[10].attributes == ["user_tag=boring", "user_tag=dancing cats"] and items[11].attributes == []
    assert {r.user_id: r.attributes for r in tables.read(spark, lake, "users").collect()} == {1: [], 2: []}
    refused = {(r.source_file, r.row_number): r.reason for r in tables.read(spark, lake, "rejected_rows").collect()}
    assert refused == {
        ("ratings.csv", 4): "rating is not a number",
        ("ratings.csv", 5): "timestamp is out of range",
        ("ratings.csv", 6): "timestamp is in the future",
        ("tags.csv", 4): "movieId is not an integer",
    }
