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
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from schemas.calendar import Calendar, organised_otherwise
from schemas.config import Config
from schemas.lake import Identities, Lake
from schemas.loader import to_mapping

# Which days of an input the partition of day D reads: D itself; all up to D; all before D; the days of the co-occurrence
# window up to D; D and, where the configuration compares plays, days before it; those whose plays rewards of D recall; all
# up to the fit day; all up to D and the fit day besides (what is fitted, as D sees it); the days that train; all up to the
# last of those; every day of the log.
# "artifact" is what a stage made for this configuration; "pinned" an identity that the run names: a model to start from
# or to serve, empty where there is none; "earlier" the codebook of the newest fit day before this one, empty likewise.
Span = Literal[
    "same",
    "until",
    "before",
    "window",
    "watched",
    "recalled",
    "fit",
    "fitted",
    "train",
    "trained",
    "all",
    "artifact",
    "pinned",
    "earlier",
]


@dataclass(frozen=True)
class Read:
    """An input: a table, or an artifact where the span says so."""

    source: str
    span: Span
    when: Callable[[Config], bool] | None = None  # which configurations read it; None: all


@dataclass(frozen=True)
class StageSpec:
    """A stage's contract. `outputs` maps each table (or, for an artifact, the stage's own name) to what it may read."""

    name: str
    logic: int  # raise it when the same inputs and settings would give other rows
    settings: tuple[str, ...]  # sections of the configuration that its result depends on
    outputs: Mapping[str, tuple[Read, ...]]
    days: Literal["each", "fit_and_later", "fit", "last"] = "each"
    artifact: bool = False  # writes a folder with a manifest
    engine: Literal["spark", "ray", "none"] = "spark"
    switch: str = ""  # the section of the configuration whose `enabled: false` turns the stage off
    summary: str = ""
    # How the partition of one day is made, where that depends on the roles of days; a part of its identity unless empty.
    by_day: Callable[[Config, Calendar, datetime.date], str] | None = None

    def reads(self, output: str, config: Config) -> tuple[Read, ...]:
        """What `output` is made from under a configuration."""
        return tuple(read for read in self.outputs[output] if read.when is None or read.when(config))

    def off(self, config: Config) -> str:
        """Why the stage does nothing by configuration; empty where it is on."""
        on = not self.switch or getattr(config, self.switch).enabled
        return "" if on else f"{self.switch}.enabled is false"


def has_lifelong(config: Config) -> bool:
    """Whether the model has the pathway that reads lifelong_sequences."""
    return config.model.lifelong_length > 0


def starts_at_vectors(config: Config) -> bool:
    """Whether training starts from item_embeddings."""
    return config.train.item_start == "vectors"


SEQUENCES = StageSpec(
    "sequences",
    logic=1,
    settings=("sequences",),
    outputs={
        "user_sequences": (Read("impressions", "watched"), Read("items", "until")),
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
    summary="item vectors from text, pairs and attributes, or aligned with the pairs",
)
TOKENIZE = StageSpec(
    "tokenize",
    logic=1,
    settings=("tokenize", "targets", "split"),
    outputs={
        "semantic_ids": (
            Read("item_embeddings", "until"),
            Read("user_sequences", "fit"),
            Read("codebook", "earlier"),  # whose codes a new one keeps where it can
        )
    },
    days="fit_and_later",
    engine="ray",
    summary="RQ-Kmeans codebook and the codes of every item",
)
CODES = StageSpec(
    "codes",
    logic=1,
    settings=("codes",),
    outputs={"item_codes": (Read("item_embeddings", "fit"), Read("item_embeddings", "same"))},
    days="fit_and_later",
    engine="ray",
    switch="codes",
    summary="nearest items and residual codes of every item, as features of a ranker",
)
LIFELONG = StageSpec(
    "lifelong",
    logic=1,
    settings=("lifelong",),
    outputs={"lifelong_sequences": (Read("user_sequences", "until"), Read("item_embeddings", "fitted"))},
    switch="lifelong",
    summary="long histories as at most 2,000 cluster representatives",
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
    by_day=organised_otherwise,
)
SESSIONS = StageSpec(
    "sessions",
    logic=1,
    settings=("sessions",),
    outputs={"sessions": (Read("user_sequences", "same"),)},
    switch="sessions",
    summary="the impressions of a request as a session, and whether it is of high quality",
)
REWARDS = StageSpec(
    "rewards",
    logic=3,
    settings=("rewards",),
    outputs={"rewards": (Read("user_sequences", "recalled"),)},
    summary="duration-aware quantile of each play among earlier ones",
)
TRAIN = StageSpec(
    "train",
    logic=3,
    settings=("model", "train", "targets", "split"),
    outputs={
        "train": (
            Read("training_examples", "train"),
            Read("semantic_ids", "trained"),
            Read("items", "trained"),
            Read("lifelong_sequences", "train", has_lifelong),
            Read("item_embeddings", "trained", starts_at_vectors),
            Read("candidate", "pinned"),  # whose weights the night's training continues
        )
    },
    days="fit",
    artifact=True,
    engine="ray",
    summary="the lazy decoder on the organised stream",
)
ALIGN = StageSpec(
    "align",
    logic=2,
    settings=("align", "targets", "split"),
    outputs={
        "align": (
            Read("training_examples", "train"),
            Read("rewards", "train"),
            Read("impressions", "train"),  # what this system showed carries its probabilities
            Read("semantic_ids", "trained"),
            Read("items", "trained"),
            Read("lifelong_sequences", "train", has_lifelong),
            Read("train", "artifact"),
        )
    },
    days="fit",
    artifact=True,
    engine="ray",
    summary="GBPO on logged exposures, in one step with the next-token loss",
)
EVALUATE = StageSpec(
    "evaluate",
    logic=2,
    settings=("evaluate", "targets", "split"),
    outputs={
        "evaluate": (
            Read("training_examples", "all"),
            Read("semantic_ids", "all"),
            Read("items", "all"),
            Read("lifelong_sequences", "all", has_lifelong),
            Read("align", "artifact"),
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
            Read("lifelong_sequences", "all", has_lifelong),
            Read("align", "artifact"),
            Read("evaluate", "artifact"),
        )
    },
    days="fit",
    artifact=True,
    engine="none",
    summary="one bundle in the model registry; champion moves if the gates hold",
)
RECOMMEND = StageSpec(
    "recommend",
    logic=1,
    settings=("recommend",),
    outputs={
        "recommendations": (
            Read("user_features", "until"),
            Read("items", "until"),
            Read("lifelong_sequences", "until", has_lifelong),
            Read("champion", "pinned"),
        )
    },
    days="last",
    engine="ray",
    summary="the champion's best items for every active user",
)
# In the order in which they run. `ingest` comes first and takes its identities from the checksums of the files.
FEATURES: tuple[StageSpec, ...] = (SEQUENCES, ITEM_PAIRS, EMBED, TOKENIZE, CODES, LIFELONG, ORGANISE, SESSIONS, REWARDS)
STAGES: tuple[StageSpec, ...] = (*FEATURES, TRAIN, ALIGN, EVALUATE, REGISTER, RECOMMEND)


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

    def artifact(self, name: str) -> str:
        """The identity of an artifact that the stage reads; empty where the run names none."""
        return next(iter(self.inputs.get(name, {}).values()), "")

    @property
    def identity(self) -> str:
        """One identity for the stage as a whole: of its artifact, or over all its partitions."""
        if self.spec.artifact:
            return next(iter(self.expected[self.spec.name].values()))
        return digest({table: {str(d): i for d, i in ids.items()} for table, ids in self.expected.items()})


def plan(
    spec: StageSpec,
    config: Config,
    lake: Lake,
    calendar: Calendar,
    force: bool = False,
    pinned: Mapping[str, str] | None = None,
    only: Collection[datetime.date] | None = None,
) -> StagePlan:
    """Compares what the stage should have written with what the lake's log says is there.

    `pinned` names artifacts by identity: those read by the span "pinned", and those that stand for what this
    configuration would make. With `only`, the plan of a night or of a backfill, every other day that is there counts as
    it is, so that a late correction of an old day does not stop the night; the next plan without it finds that day
    stale. What is fitted goes on without an overtaken day.
    """
    result = StagePlan(spec)
    pinned = pinned or {}
    settings = {name: to_mapping(getattr(config, name), identity=True) for name in spec.settings}
    known: dict[str, Identities] = {}
    for output in spec.outputs:
        reads = spec.reads(output, config)
        folds: dict[Read, Fold] = {}
        for read in reads:
            if read.source not in known:
                fresh = result.expected.get(read.source)  # an earlier output of the same stage
                known[read.source] = fresh if fresh is not None else _present(read, config, lake, calendar, pinned)
        frozen = (
            {} if only is None or spec.artifact else {d: i for d, i in lake.identities(output).items() if d not in only}
        )
        expected: Identities = {}
        for day in output_days(spec, calendar):
            parts = []
            if spec.by_day and (way := spec.by_day(config, calendar, day)):
                parts.append(("by_day", way))
            for read in reads:
                days = input_days(read, day, calendar, config)
                lacking = [d for d in days if d not in known[read.source]]
                if lacking and only is not None and read.source in _fitted_tables():
                    lacking = sorted(set(lacking) - overtaken(lacking, known[read.source], only))
                if lacking and (only is None or day in only or spec.artifact):
                    result.missing.append(f"{read.source} has no partition {lacking[0]}")
                parts.append((read.source, folds.setdefault(read, Fold()).of(known[read.source], days)))
            expected[day] = frozen.get(day) or digest(spec.name, output, spec.logic, settings, parts)
        present = _artifact_present(spec, lake, expected) if spec.artifact else lake.identities(output)
        result.expected[output] = expected
        stale = tuple(d for d, identity in expected.items() if force or present.get(d) != identity)
        result.todo[output] = stale if only is None or spec.artifact else tuple(d for d in stale if d in only)
    result.inputs = {source: ids for source, ids in known.items() if source not in spec.outputs}
    return result


def overtaken(
    days: Iterable[datetime.date], present: Collection[datetime.date], making: Collection[datetime.date]
) -> set[datetime.date]:
    """Those of `days` that are not there although a later one is that this run does not make: they were ingested late.

    A codebook takes new items in the order of the days, so such a day waits for the next one.
    """
    newest = max((d for d in present if d not in making), default=datetime.date.min)
    return {d for d in days if d not in present and d not in making and d < newest}


def _fitted_tables() -> set[str]:
    return {table for spec in STAGES if spec.days == "fit_and_later" for table in spec.outputs}


def input_days(read: Read, day: datetime.date, calendar: Calendar, config: Config) -> list[datetime.date]:
    """The days of an input that the partition of `day` reads and that its stage writes, in order."""
    days = span_days(read.span, day, calendar, config)
    if read.span in ("pinned", "earlier"):  # no stage of this run writes it
        return days
    written = frozenset(_written_days(read.source, calendar))
    return [d for d in days if d in written]


def span_days(span: Span, day: datetime.date, calendar: Calendar, config: Config) -> list[datetime.date]:
    """The days of an input that the partition of `day` reads, in order."""
    if span == "same":
        return [day]
    if span in ("artifact", "pinned", "earlier"):
        return [calendar.fit_day]
    if span == "fitted":
        return sorted({calendar.fit_day, *(d for d in calendar.days if d <= day)})
    if span == "train":
        return list(calendar.train)
    if span == "all" or (span == "window" and config.split.by == "user"):  # a user's role depends on all of their days
        return list(calendar.days)
    ends = {"until": day, "fit": calendar.fit_day, "trained": calendar.trained_until}
    back = {"window": window_days(config), "watched": watch_days(config), "recalled": config.rewards.history_days}
    last = day if span in back else ends.get(span, day - datetime.timedelta(days=1))
    first = day - datetime.timedelta(days=back[span]) if span in back else datetime.date.min
    return [d for d in calendar.days if first <= d <= last]


def window_days(config: Config) -> int:
    """Days before D that the co-occurrence window of D can reach."""
    return math.ceil(config.item_pairs.max_gap_hours / 24)


def watch_days(config: Config) -> int:
    """Days before D with whose plays those of D are compared for the bit `watched_high`."""
    return config.sequences.watch_days if config.sequences.watch_quantile is not None else 0


def newest_codebook(lake: Lake, before: datetime.date) -> tuple[datetime.date | None, str]:
    """Fit day and identity of the newest codebook that does not know the day `before`; (None, "") where there is none."""
    for day, identity in sorted(lake.identities("semantic_ids").items(), reverse=True):
        if day < before and lake.manifest(TOKENIZE.name, identity) is not None:
            return day, identity
    return None, ""


def output_days(spec: StageSpec, calendar: Calendar) -> tuple[datetime.date, ...]:
    """The days on which the stage has partitions, or the one day that stands for its artifact."""
    if spec.days == "each":
        return calendar.days
    if spec.days == "last":
        return calendar.days[-1:]
    return (calendar.fit_day, *(calendar.appended if spec.days == "fit_and_later" else ()))


def _written_days(source: str, calendar: Calendar) -> tuple[datetime.date, ...]:
    """The days on which `source` has partitions: what is fitted has none before the fit day."""
    writer = next((spec for spec in STAGES if source in spec.outputs), None)
    return output_days(writer, calendar) if writer else calendar.days


def _present(read: Read, config: Config, lake: Lake, calendar: Calendar, pinned: Mapping[str, str]) -> Identities:
    if read.span == "pinned" or read.source in pinned:
        return {calendar.fit_day: pinned.get(read.source, "")}
    if read.span == "earlier":
        return {calendar.fit_day: newest_codebook(lake, calendar.fit_day)[1]}
    if read.span != "artifact":
        return lake.identities(read.source)
    spec = next(s for s in STAGES if s.name == read.source)
    identity = plan(spec, config, lake, calendar, pinned=pinned).identity
    return {calendar.fit_day: identity} if lake.manifest(read.source, identity) else {}


def _artifact_present(spec: StageSpec, lake: Lake, expected: Identities) -> Identities:
    return {day: identity for day, identity in expected.items() if lake.manifest(spec.name, identity)}


class Fold:
    """One identity for the days of an input. Days that continue those asked before cost what they add, so that a plan
    over thousands of days grows with the days and not with their square."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._days: list[datetime.date] = []
        self._hash = hashlib.sha256(b"[[")

    def of(self, identities: Identities, days: list[datetime.date]) -> str:
        """The `digest` of the pairs (day, identity). `identities` are the same at every call."""
        if days[: len(self._days)] != self._days:
            self._restart()
        known = len(self._days)
        for place, day in enumerate(days[known:], known):
            pair = json.dumps([day.isoformat(), identities.get(day, "")], separators=(",", ":"))
            self._hash.update((b"," if place else b"") + pair.encode())
        self._days = days
        whole = self._hash.copy()
        whole.update(b"]]")
        return whole.hexdigest()[:16]
