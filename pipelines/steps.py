"""What a run does, as steps in order: which stage, with the roles of which days, on which earlier models.

A whole run fits everything anew on its train days. A night does one new day D on a lake that holds those before it:
the codebook stays, new items are appended to it, the newest model is scored on D before it has seen it, and only then
continues its training on D. So every candidate is judged on a day that it did not train on, and a model never meets
codes of another codebook: a new codebook comes with a whole run alone. A backfill brings the tables of late or corrected
days up to date, and what depends on them; it fits and trains nothing.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module

from pipelines.candidates import newest_candidate
from pipelines.stage import StageFunction
from schemas.calendar import Calendar, DayRange, before_training, log_calendar, training
from schemas.config import Config
from schemas.errors import ConfigError, ContractViolation, MissingUpstream
from schemas.lake import Lake
from schemas.lineage import ALIGN, EVALUATE, FEATURES, RECOMMEND, REGISTER, STAGES, TRAIN, StageSpec, newest_codebook, plan

FUNCTIONS = {
    "sequences": "pipelines.features:sequences",
    "item_pairs": "pipelines.features:item_pairs",
    "embed": "pipelines.embed:run",
    "tokenize": "pipelines.tokenize_items:run",
    "codes": "pipelines.quantitative_codes:run",
    "lifelong": "pipelines.features:lifelong",
    "organise": "pipelines.features:organise",
    "sessions": "pipelines.features:sessions",
    "rewards": "pipelines.features:rewards",
    "train": "pipelines.train:run",
    "align": "pipelines.align:run",
    "evaluate": "pipelines.evaluate:run",
    "register": "pipelines.register:run",
    "recommend": "pipelines.recommend:run",
}


@dataclass(frozen=True)
class Step:
    """One stage; `pinned` and `only` as in `schemas.lineage.plan`."""

    spec: StageSpec
    calendar: Calendar
    pinned: Mapping[str, str] = field(default_factory=dict)
    only: Collection[datetime.date] | None = None

    @property
    def function(self) -> StageFunction:
        """Imported when it is needed, so that a skip loads neither PyTorch nor Ray."""
        module, name = FUNCTIONS[self.spec.name].split(":")
        return getattr(import_module(module), name)


def spec_of(name: str) -> StageSpec:
    for spec in STAGES:
        if spec.name == name:
            return spec
    raise ConfigError(f"No stage {name!r}; stages: ingest, {', '.join(spec.name for spec in STAGES)}.")


def whole_run(calendar: Calendar) -> list[Step]:
    """Every stage over all days."""
    return [Step(spec, calendar) for spec in STAGES]


def night(config: Config, lake: Lake, date: datetime.date) -> list[Step]:
    """The stages of one night. Raises ConfigError where the split is by user, MissingUpstream where the day is not
    ingested or no model waits for it."""
    if config.split.by == "user":
        raise ConfigError("A night needs a split by days; set split.by to days, or run without --date.")
    days = lake.identities("impressions")
    if date not in days:
        raise MissingUpstream(f"The log in {lake.root} has no day {date}; ingest its file first.")
    codebook_day = codebook_day_of(lake, date)
    version = lake.identities("semantic_ids")[codebook_day]
    candidate = newest_candidate(lake, config, version, date)
    if candidate is None:
        raise MissingUpstream(
            f"No model of these sizes on codebook {version} waits for {date}; run `lazyrec run` without --date over the "
            "days before it first."
        )
    scored = before_training(days, date, codebook_day, candidate.trained_until)
    learned, goes_on = training(scored), {"candidate": candidate.identity}
    return [
        *(Step(spec, scored, only=(date,)) for spec in FEATURES),
        *(Step(spec, scored, {"align": candidate.identity}, (date,)) for spec in (EVALUATE, REGISTER)),
        *(Step(spec, learned, goes_on, (date,)) for spec in (TRAIN, ALIGN)),
        Step(RECOMMEND, scored, only=(date,)),
    ]


def append(name: str, config: Config, lake: Lake, date: datetime.date) -> Step:
    """A stage that fits, on the new items of `date` alone. Raises MissingUpstream where the day is not ingested, or no fit
    lies before it or a stale one, ConfigError where the newest fit knows the day."""
    days = lake.identities("impressions")
    if date not in days:
        raise MissingUpstream(f"The log in {lake.root} has no day {date}; ingest its file first.")
    fit_day = codebook_day_of(lake, date)
    newest, _ = newest_codebook(lake, datetime.date.max)
    if newest != fit_day:
        raise ConfigError(
            f"The codebook of {newest} was fitted on {date} or later; --append needs a day after the newest fit."
        )
    step = Step(spec_of(name), before_training(days, date, fit_day, fit_day), only=(date,))
    for table, expected in plan(step.spec, config, lake, step.calendar).expected.items():
        fitted = lake.manifest(name, expected[fit_day]) is not None
        if lake.identities(table).get(fit_day) != expected[fit_day] or not fitted:
            raise MissingUpstream(
                f"Table {table} of {fit_day}, the fit day, is stale: settings or data differ from those of its fit, or it "
                "is lost, and --append fits nothing; run `lazyrec run` without --date, or take back the change."
            )
    return step


def backfill(config: Config, lake: Lake, first: datetime.date) -> list[Step]:
    """The Spark stages over `first` and all days after it; earlier days count as they are."""
    calendar = roles_so_far(config, lake)
    return [Step(spec, calendar, only=DayRange(first)) for spec in FEATURES if spec.engine == "spark"]


def roles_so_far(config: Config, lake: Lake) -> Calendar:
    """The roles that the runs so far gave the days: those of the newest codebook, whatever days came after it.

    By the log alone, as a whole run sees it, each night would move the fit day, and with it how days are organised. All
    days of a log that is still too short for the split train.
    """
    try:
        calendar = log_calendar(config, lake)
    except ContractViolation:
        days = tuple(sorted(lake.identities("impressions")))
        calendar = Calendar(days, days, (), ())
    fitted, _ = newest_codebook(lake, datetime.date.max)
    return calendar if config.split.by == "user" or fitted is None else replace(calendar, codebook_day=fitted)


def codebook_day_of(lake: Lake, before: datetime.date) -> datetime.date:
    """The fit day of the newest codebook that does not know the day `before`."""
    day, _ = newest_codebook(lake, before)
    if day is None:
        raise MissingUpstream(f"{lake.root} has no codebook from before {before}; run `lazyrec run` without --date first.")
    return day
