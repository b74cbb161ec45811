"""Checkpoints in MLflow on SQLite: as they come, the newest alone, and in one run whatever stopped it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mlflow
import pytest
import torch
from safetensors.torch import load_file

from pipelines.checkpoints import load_model, states
from pipelines.engines import Engines
from pipelines.run_artifacts import RunArtifacts
from pipelines.stage import StageContext
from pipelines.tracking import Tracker
from pipelines.train import run, run_artifacts, train
from pipelines.train_loop import train_loop
from schemas.lake import Lake
from schemas.lineage import TRAIN, StagePlan
from tests.pipelines.examples import DAYS, calendar, example_rows, with_train, write_lake


class Killed(Exception):
    pass


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_states_remain(tmp_path: Path, keep: int) -> None:
    there = RunArtifacts((tmp_path / "store").as_uri(), "", keep)
    for step in (8, 12, 16, 20, 100):
        state = tmp_path / f"step_{step:09d}"
        state.mkdir()
        (state / "state.json").write_text(str(step))
        there.log_state(state)
    wanted = (8, 12, 16, 20, 100)[-keep:]
    assert there.states() == [f"step_{step:09d}" for step in wanted]
    assert [(tmp_path / f"store/checkpoints/{name}/state.json").read_text() for name in there.states()] == [
        *map(str, wanted)
    ]


def test_a_killed_and_resumed_stage_has_one_run_with_its_checkpoints(
    tmp_path: Path, tracking_uri: str, engines: Engines
) -> None:
    config = dataclasses.replace(with_train(keep_checkpoints=3, patience=5), tracking_uri=tracking_uri)
    lake = Lake(str(tmp_path / "lake"))
    pins = write_lake(lake, example_rows(20))
    plan = StagePlan(TRAIN, expected={"train": {DAYS[2]: "abc"}}, todo={"train": (DAYS[2],)})
    context = StageContext(config, lake, calendar(), plan, engines, pins, lambda line: None)
    seen: list[list[str]] = []

    def kill(step: int) -> None:
        seen.append([file.path for file in mlflow.artifacts.list_artifacts(run_id=context.run_id)])
        if step == 9:
            raise Killed

    tracker = Tracker(config, lake)
    with pytest.raises(Killed), tracker.stage("train", "abc", resumable=True) as context.run_id:
        settings = {"config": config, "lake": lake, "calendar": calendar(), "pins": pins, "folder": str(context.folder)}
        engines.ray()
        train(settings | {"identity": "abc", "artifacts": run_artifacts(context), "failpoint": kill}, train_loop)
    first, before = context.run_id, states(context.folder / "checkpoints")
    assert seen[0] == [] and "checkpoints" in seen[-1]  # as they come
    tracker.finish({}, None)

    tracker = Tracker(config, lake)
    with tracker.stage("train", "abc", resumable=True) as context.run_id:
        assert context.run_id == first and tracker.client.get_run(first).info.status == "RUNNING"
        run(context)
    found = tracker.client.get_run(first)
    assert found.info.status == "FINISHED" and tracker.parent is not None
    assert found.data.tags["mlflow.parentRunId"] == tracker.parent.info.run_id
    with tracker.stage("train", "abc", resumable=True) as other:
        assert other != first  # what ended well is not written to again

    got = Path(mlflow.artifacts.download_artifacts(run_id=first, dst_path=str(tmp_path / "got")))
    kept = [state.name for state in states(got / "checkpoints")]
    assert len(kept) == 3 and kept > [state.name for state in before]
    for mine in states(context.folder / "checkpoints"):  # the stage keeps two
        theirs = load_file(got / "checkpoints" / mine.name / "state.safetensors")
        assert all(torch.equal(value, theirs[name]) for name, value in load_file(mine / "state.safetensors").items())
    for logged, local in (("best", "best"), ("model", ".")):
        wanted, _ = load_model(context.folder / local)
        decoder, _ = load_model(got / logged)
        assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), wanted.parameters(), strict=True))
