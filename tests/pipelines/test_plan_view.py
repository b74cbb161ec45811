"""What a plan says: the stages that would run are those that are stale, and each stale day has its true reason.

The lakes are real Delta commits with invented identities; no engine is started.
"""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import pytest

from pipelines.differences import Historian, changed_days, in_words
from pipelines.plan_view import RUN, SKIP, WAIT, View, _served, plan_views
from pipelines.steps import whole_run
from schemas.config import Config
from schemas.lake import Lake
from schemas.lineage import FEATURES, STAGES, TRAIN, plan
from schemas.loader import to_mapping
from tests.schemas.test_lineage import CALENDAR, DAYS, build, ingest


def config_of(tmp_path: Path, **sections: Any) -> Config:
    logs = tmp_path / "logs.txt"
    logs.write_text("1 2 3\n")
    config = Config(lake=str(tmp_path / "lake"))
    source = dataclasses.replace(config.source, kind="sequences", path=str(logs))
    return dataclasses.replace(config, source=source, **sections)


@pytest.fixture
def built(lake: Lake, tmp_path: Path) -> Lake:
    """Every table made by the default configuration, and a model whose manifest remembers it."""
    config = config_of(tmp_path)
    ingest(lake)
    for spec in FEATURES:
        build(lake, spec, config)
    finish(lake, config)
    return lake


def finish(lake: Lake, config: Config) -> None:
    """The manifest of a trained model, as the runner writes it."""
    planned = plan(TRAIN, config, lake, CALENDAR)
    inputs = {table: {"identities": {str(d): i for d, i in ids.items()}} for table, ids in planned.inputs.items()}
    lake.write_manifest("train", planned.identity, {"config": to_mapping(config), "inputs": inputs})


def views_of(config: Config) -> dict[str, View]:
    return {view.stage: view for view in plan_views(config)}


def test_nothing_is_there_and_everything_waits_for_ingest(tmp_path: Path) -> None:
    views = views_of(config_of(tmp_path))
    assert views["ingest"].would == RUN
    assert "logs.txt" in views["ingest"].note
    assert {view.would for name, view in views.items() if name != "ingest"} == {WAIT}
    assert not (tmp_path / "lake").exists()  # a plan leaves no trace


def test_what_is_done_is_skipped_and_the_rest_was_never_made(built: Lake, tmp_path: Path) -> None:
    views = views_of(config_of(tmp_path))
    skipped = {spec.name for spec in FEATURES} | {"train"}
    assert {name for name, view in views.items() if view.would == SKIP} == skipped
    made_anew = {spec.name for spec in STAGES} - skipped
    assert all(set(texts) == {"never made"} for name in made_anew for texts in views[name].reasons.values())


def test_a_corrected_day_shows_in_all_that_depends_on_it_before_anything_runs(built: Lake, tmp_path: Path) -> None:
    ingest(built, changed={DAYS[2]: "corrected"})
    views = views_of(config_of(tmp_path))
    assert views["sequences"].tables == {"user_sequences": [DAYS[2]], "user_features": DAYS[2:]}
    assert views["sequences"].reasons["user_sequences"] == {"reads impressions of that day, which changed": [DAYS[2]]}
    # Its own identity does not know yet that sequences will run; the plan does.
    assert views["rewards"].tables == {"rewards": DAYS[2:]}
    why = views["rewards"].reasons["rewards"]
    assert why["reads user_sequences of that day, which changed"] == [DAYS[2]]
    assert why[f"reads user_sequences of {DAYS[2]}, which changed"] == DAYS[3:]
    assert views["train"].reasons["train"].keys() == {
        f"reads training_examples of {DAYS[2]} and {DAYS[3]}, which changed",
        f"reads semantic_ids of {CALENDAR.fit_day}, which changed",
    }


def test_a_changed_setting_is_named_with_both_values(built: Lake, tmp_path: Path) -> None:
    default = Config()
    other = config_of(
        tmp_path,
        rewards=dataclasses.replace(default.rewards, min_bucket=7),
        train=dataclasses.replace(default.train, learning_rate=0.5),
    )
    views = views_of(other)
    rewards, train = (f"settings {key}" for key in ("rewards.min_bucket", "train.learning_rate"))
    assert views["rewards"].reasons["rewards"] == {f"{rewards} changed from 3 to 7": DAYS}
    assert set(views["train"].reasons["train"]) == {f"{train} changed from {default.train.learning_rate} to 0.5"}
    assert views["organise"].would == SKIP


def test_without_a_champion_there_is_nothing_to_recommend(built: Lake, tmp_path: Path) -> None:
    views = [View("register", SKIP), View("recommend", RUN, {"recommendations": DAYS[-1:]})]
    assert [view.would for view in _served(list(views), has_champion=True)] == [SKIP, RUN]
    assert [view.would for view in _served(list(views), has_champion=False)] == [SKIP, SKIP]
    assert views_of(config_of(tmp_path))["recommend"].would == RUN  # registration may bring one


def test_settings_that_no_manifest_remembers_are_not_invented(lake: Lake, tmp_path: Path) -> None:
    default = Config()
    ingest(lake)
    for spec in FEATURES:
        build(lake, spec, config_of(tmp_path))
    other = config_of(tmp_path, rewards=dataclasses.replace(default.rewards, min_bucket=7))
    (why,) = views_of(other)["rewards"].reasons["rewards"]
    assert "does not remember" in why


def test_a_forced_plan_says_so(built: Lake, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    step = next(step for step in whole_run(CALENDAR) if step.spec.name == "rewards")
    forced = plan(step.spec, config, built, CALENDAR, force=True)
    assert Historian(built).reasons(step, forced, config) == {"rewards": {"forced": DAYS}}


def test_new_days_and_changed_days_are_told_apart() -> None:
    one, two, three = DAYS[:3]
    then, now = {one: "a", two: "b"}, {one: "a", two: "B", three: "c"}
    assert changed_days("t", three, then, {one, two}, now, [one, two, three]) == [
        f"reads t of {two}, which changed",
        "reads t of that day, which is new",
    ]
    assert in_words([one + datetime.timedelta(days=n) for n in range(4)]) == f"{one} to {DAYS[3]} (4 days)"
