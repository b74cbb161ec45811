"""What a peer reads: the Parquet files of the tables, and the rules of the configuration as plain numbers."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from schemas.config import Config
from schemas.feedback import mask_of
from schemas.lake import Lake

OUTPUTS = ("user_sequences", "user_features", "training_examples", "rewards")
EVENTS = ("item_ids", "author_ids", "ts_us", "play_ms", "duration_ms", "feedback")


@dataclass(frozen=True)
class Inputs:
    """`files` maps a table to its Parquet files below folders date=YYYY-MM-DD; `days` are those of the log."""

    files: dict[str, list[str]]
    days: list[datetime.date]


@dataclass(frozen=True)
class Rules:
    recent: int
    engaged: int
    engaged_mask: int
    negative_mask: int
    rated_high: float
    bucket_base: float
    epsilon: float
    min_bucket: int
    block: int = 256  # events of a list from which tails are cut


@dataclass
class Clock:
    """Seconds by what was done in them."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + monotonic() - started


def inputs_of(lake: Lake) -> Inputs:
    files = {name: lake.open(name).file_uris() for name in ("impressions", "items", "users")}
    return Inputs(files, sorted(lake.identities("impressions")))


def rules_of(config: Config) -> Rules:
    """Raises ValueError where the configuration asks for more than the peers write."""
    if config.rewards.backoff or config.organise.slice != "request" or config.organise.organiser != "newest_only":
        raise ValueError("The peers know newest_only by request and rewards without back-off: set both in the config.")
    return Rules(
        recent=config.sequences.short_length,
        engaged=config.sequences.positive_length,
        engaged_mask=mask_of(config.sequences.engaged),
        negative_mask=mask_of(config.rewards.negative),
        rated_high=config.source.rating_threshold,
        bucket_base=config.rewards.bucket_base,
        epsilon=config.rewards.epsilon,
        min_bucket=max(1, config.rewards.min_bucket),
    )


def part(out: Path, table: str, day: datetime.date) -> Path:
    """The file of a table's day, its folder made."""
    path = out / table / f"date={day.isoformat()}" / "part-0.parquet"
    path.parent.mkdir(parents=True)
    return path
