"""A pipeline run as MLflow sees it, without engines: a parent, stages with tables and plots, and registered versions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlflow
from matplotlib.figure import Figure

from pipelines.promotion import describe_version
from pipelines.register import log_model
from pipelines.stage import StageContext, StageResult
from pipelines.tracking import Tracker
from schemas.config import Config
from schemas.lake import Lake
from tests.schemas.test_lineage import ingest

PASSED = [{"passed": True, "text": "recall@10 is above popularity"}]
FAILED = [{"passed": False, "text": "recall@10 is not above popularity"}]


def tracked_run(config: Config, lake: Lake) -> str:
    """One parent run with the stages `first` and `second`; the parent's id."""
    ingest(lake)
    tracker = Tracker(config, lake)
    figure = Figure()
    figure.subplots().plot([1, 2])
    curve = {"loss": [(1, 2.0), (2, 1.0)]}
    for name in ("first", "second"):
        result = StageResult(tables={"items": 0}, rows={"items": 3}, series=curve, figures={"loss": figure})
        with tracker.stage(name, f"identity of {name}") as run_id:
            tracker.log(run_id, None, {"impressions": 0}, result)
    tracker.finish({"seconds": 1.5}, None)
    assert tracker.parent is not None
    return tracker.parent.info.run_id


def register_version(config: Config, lake: Lake, folder: Path, gates: list[dict[str, Any]]) -> str:
    """A version with the files of a real registration around an empty bundle."""
    bundle = folder / "bundle"
    bundle.mkdir(exist_ok=True)
    (bundle / "manifest.json").write_text("{}")
    tracker = Tracker(config, lake)
    with tracker.stage("register", "identity of a version") as run_id:
        context = cast(StageContext, SimpleNamespace(run_id=run_id))
        number = log_model(context, bundle, config.register.name)
    tracker.finish({}, None)
    facts = {"fit_day": "2026-01-04", "trained_until": "2026-01-04", "metrics": '{"recall@10": 0.25}'}
    describe_version(tracker.client, config.register.name, number, gates, facts)
    return number


def bare_version(config: Config, gates: list[dict[str, Any]]) -> str:
    """A version without files, of a model that may be new."""
    client, name = mlflow.MlflowClient(config.tracking_uri, config.tracking_uri), config.register.name
    if not client.search_registered_models(f"name='{name}'"):
        client.create_registered_model(name)
    number = str(client.create_model_version(name, source="s3://nowhere/model").version)
    describe_version(client, name, number, gates, {})
    return number


def assert_complete(config: Config, parent: str) -> None:
    """Parent, nested stages, table versions, metrics and plots are where `mlflow ui` looks for them."""
    client = mlflow.MlflowClient()
    run = client.get_run(parent)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"seconds": 1.5})
    assert [file.path for file in client.list_artifacts(parent)] == ["config.yaml"]
    stages = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert {stage.data.tags["stage"] for stage in stages} == {"first", "second"}
    for stage in stages:
        datasets = {(i.tags[0].value, i.dataset.name, i.dataset.digest) for i in stage.inputs.dataset_inputs}
        assert datasets == {("input", "impressions", "v0"), ("output", "items", "v0")}
        assert stage.data.tags["input.impressions"] == stage.data.tags["output.items"] == "0"
        assert stage.data.metrics == {"rows.items": 3.0, "loss": 1.0}
        assert [m.step for m in client.get_metric_history(stage.info.run_id, "loss")] == [1, 2]
        assert [file.path for file in client.list_artifacts(stage.info.run_id, "plots")] == ["plots/loss.png"]
    assert client.get_experiment(run.info.experiment_id).name == config.name
