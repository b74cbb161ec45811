"""Which partitions a stage reads and writes, and the identity of each.

A partition's identity is a hash of (stage, the stage's logic version, the settings it uses without resources, the
identities of the partitions it reads). It follows that a stage is done for a day exactly when the newest stamped commit
of its output carries the expected identity, that a corrected day makes stale what depends on it and nothing else, and
that worker counts, paths and compaction change nothing.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from schemas.calendar import Calendar
from schemas.config import Config
from schemas.lake import Identities, Lake
from schemas.loader import to_mapping

# Which days of an input the partition of day D reads: D itself; all up to D; all before D; the days of the co-occurrence
# window up to D; all up to the fit day; every day of the log; or, of an artifact, the one made at the fit day.
Span = Literal["same", "until", "before", "window", "fit", "all", "artifact"]


@dataclass(frozen=True)
class Read:
    """An input: a table, or the artifact of a stage where the span is "artifact"."""

    source: str
    span: Span


@dataclass(frozen=True)
class StageSpec:
    """A stage's contract. `outputs` maps each table (or, for an artifact, the stage's own name) to what it reads."""

    name: str
    logic: int  # raise it when the same inputs and settings would give other rows
    settings: tuple[str, ...]  # sections of the configuration that its result depends on
    outputs: Mapping[str, tuple[Read, ...]]
    days: Literal["each", "fit_and_later", "fit"] = "each"
    artifact: bool = False  # writes a folder with a manifest
    engine: Literal["spark", "ray", "none"] = "spark"
    summary: str = ""


SEQUENCES = StageSpec(
    "sequences",
    logic=1,
    settings=("sequences",),
    outputs={
        "user_sequences": (Read("impressions", "same"), Read("items", "until")),
        "user_features": (Read("user_sequences", "until"), Read("users", "until")),
    },
    summary="events of each user and day; short-term and positive features as of its end",
)
ITEM_PAIRS = StageSpec(
    "item_pairs",
    logic=1,
    settings=("item_pairs", "targets", "split"),
    outputs={"item_pairs": (Read("user_sequences", "window"),)},
    summary="items that the same users liked closely after each other",
)
EMBED = StageSpec(
    "embed",
    logic=1,
    settings=("embed",),
    outputs={"item_embeddings": (Read("items", "until"), Read("item_pairs", "fit"))},
    days="fit_and_later",
    engine="ray",
    summary="item vectors from text, pairs and attributes",
)
TOKENIZE = StageSpec(
    "tokenize",
    logic=1,
    settings=("tokenize", "targets", "split"),
    outputs={"semantic_ids": (Read("item_embeddings", "until"), Read("user_sequences", "fit"))},
    days="fit_and_later",
    engine="ray",
    summary="RQ-Kmeans codebook and the codes of every item",
)
ORGANISE = StageSpec(
    "organise",
    logic=1,
    settings=("organise", "sequences"),
    outputs={
        "training_examples": (
            Read("user_sequences", "same"),
            Read("user_features", "before"),
            Read("users", "until"),  # the first day's examples take the snapshot of that day
        )
    },
    summary="impressions organised into examples, each target with the context strictly before its request",
)
REWARDS = StageSpec(
    "rewards",
    logic=1,
    settings=("rewards",),
    outputs={"rewards": (Read("user_sequences", "until"),)},
    summary="duration-aware quantile of each play among the user's earlier ones",
)
TRAIN = StageSpec(
    "train",
    logic=1,
    settings=("model", "train", "targets", "split"),
    outputs={"train": (Read("training_examples", "fit"), Read("semantic_ids", "fit"), Read("items", "fit"))},
    days="fit",
    artifact=True,
    engine="ray",
    summary="the lazy decoder on the organised stream",
)
EVALUATE = StageSpec(
    "evaluate",
    logic=1,
    settings=("evaluate", "targets", "split"),
    outputs={
        "evaluate": (
            Read("training_examples", "all"),
            Read("semantic_ids", "all"),
            Read("items", "all"),
            Read("train", "artifact"),
        )
    },
    days="fit",
    artifact=True,
    engine="ray",
    summary="whole-catalogue ranking of every test positive, beside the baselines",
)
REGISTER = StageSpec(
    "register",
    logic=1,
    settings=("register",),
    outputs={
        "register": (
            Read("semantic_ids", "all"),
            Read("items", "all"),
            Read("training_examples", "all"),  # a champion is measured on them beside the candidate
            Read("train", "artifact"),
            Read("evaluate", "artifact"),
        )
    },
    days="fit",
    artifact=True,
    engine="none",
    summary="one bundle in the model registry; champion moves if the gates hold",
)
# In the order in which they run. `ingest` comes first and takes its identities from the checksums of the files.
STAGES: tuple[StageSpec, ...] = (SEQUENCES, ITEM_PAIRS, EMBED, TOKENIZE, ORGANISE, REWARDS, TRAIN, EVALUATE, REGISTER)


def digest(*parts: Any) -> str:
    """16 hexadecimal digits over the canonical JSON of `parts`."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class StagePlan:
    """What a stage would write: `expected` identities, the dates `todo`, and the inputs behind them, by table."""

    spec: StageSpec
    expected: dict[str, Identities] = field(default_factory=dict)
    todo: dict[str, tuple[datetime.date, ...]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # inputs that are not there, as sentences
    inputs: dict[str, Identities] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return not self.missing and not any(self.todo.values())

    @property
    def dates(self) -> tuple[datetime.date, ...]:
        """Every day on which some output is stale, in order."""
        return tuple(sorted({day for days in self.todo.values() for day in days}))

    @property
    def identity(self) -> str:
        """One identity for the stage as a whole: of its artifact, or over all its partitions."""
        if self.spec.artifact:
            return next(iter(self.expected[self.spec.name].values()))
        return digest({table: {str(d): i for d, i in ids.items()} for table, ids in self.expected.items()})


def plan(spec: StageSpec, config: Config, lake: Lake, calendar: Calendar, force: bool = False) -> StagePlan:
    """Compares what the stage should have written with what the lake's log says is there."""
    result = StagePlan(spec)
    settings = {name: to_mapping(getattr(config, name), identity=True) for name in spec.settings}
    known: dict[str, Identities] = {}
    for output, reads in spec.outputs.items():
        for read in reads:
            if read.source not in known:
                fresh = result.expected.get(read.source)  # an earlier output of the same stage
                known[read.source] = fresh if fresh is not None else _present(read, config, lake, calendar)
        expected: Identities = {}
        for day in _output_days(spec, calendar):
            parts = []
            for read in reads:
                written = _written_days(read.source, calendar)
                days = [d for d in span_days(read.span, day, calendar, config) if d in written]
                lacking = [d for d in days if d not in known[read.source]]
                if lacking:
                    result.missing.append(f"{read.source} has no partition {lacking[0]}")
                parts.append((read.source, _fold(known[read.source], days)))
            expected[day] = digest(spec.name, output, spec.logic, settings, parts)
        present = _artifact_present(spec, lake, expected) if spec.artifact else lake.identities(output)
        result.expected[output] = expected
        result.todo[output] = tuple(d for d, identity in expected.items() if force or present.get(d) != identity)
    result.inputs = {source: ids for source, ids in known.items() if source not in spec.outputs}
    return result


def span_days(span: Span, day: datetime.date, calendar: Calendar, config: Config) -> list[datetime.date]:
    """The days of an input that the partition of `day` reads, in order."""
    if span == "same":
        return [day]
    if span == "artifact":
        return [calendar.fit_day]
    if span == "all" or (span == "window" and config.split.by == "user"):  # a user's role depends on all of their days
        return list(calendar.days)
    last = {"until": day, "window": day, "fit": calendar.fit_day}.get(span, day - datetime.timedelta(days=1))
    first = day - datetime.timedelta(days=window_days(config)) if span == "window" else datetime.date.min
    return [d for d in calendar.days if first <= d <= last]


def window_days(config: Config) -> int:
    """Days before D that the co-occurrence window of D can reach."""
    return math.ceil(config.item_pairs.max_gap_hours / 24)


def artifact_identity(stage: str, config: Config, lake: Lake, calendar: Calendar) -> str:
    """The identity that the artifact of `stage` has, or would have, for this configuration and lake."""
    spec = next(s for s in STAGES if s.name == stage)
    return plan(spec, config, lake, calendar).identity


def _output_days(spec: StageSpec, calendar: Calendar) -> Iterable[datetime.date]:
    if spec.days == "each":
        return calendar.days
    return (calendar.fit_day, *(calendar.appended if spec.days == "fit_and_later" else ()))


def _written_days(source: str, calendar: Calendar) -> Iterable[datetime.date]:
    """The days on which `source` has partitions: what is fitted has none before the fit day."""
    writer = next((spec for spec in STAGES if source in spec.outputs), None)
    return tuple(_output_days(writer, calendar)) if writer else calendar.days


def _present(read: Read, config: Config, lake: Lake, calendar: Calendar) -> Identities:
    if read.span != "artifact":
        return lake.identities(read.source)
    identity = artifact_identity(read.source, config, lake, calendar)
    return {calendar.fit_day: identity} if lake.manifest(read.source, identity) else {}


def _artifact_present(spec: StageSpec, lake: Lake, expected: Identities) -> Identities:
    return {day: identity for day, identity in expected.items() if lake.manifest(spec.name, identity)}


def _fold(identities: Identities, days: list[datetime.date]) -> str:
    return digest([(day.isoformat(), identities.get(day, "")) for day in days])
