"""Lineage in MLflow: one parent run a pipeline run, one nested run a stage.

The lake is the record of what is done and MLflow its mirror: a stage that is done but has no run (a kill came between
the two commits) is mirrored by the next run. The driver alone writes; workers send their metrics to it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# Standard output ends with one JSON object and holds nothing odd.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
from mlflow.data.delta_dataset_source import DeltaDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Metric, Run

from pipelines.stage import StageResult
from schemas.config import Config
from schemas.lake import Lake, lake_of
from schemas.lineage import StagePlan
from schemas.loader import to_mapping

METRICS_A_CALL = 1000  # of one log_batch
SQLITE = "sqlite:///"

for noisy in ("mlflow", "alembic"):
    logging.getLogger(noisy).setLevel(logging.WARNING)


def tracking_uri(config: Config) -> str:
    """The configured server, or SQLite beside the artifacts. Always absolute: a relative default depends on who asks."""
    if config.tracking_uri:
        return config.tracking_uri
    return f"sqlite:///{lake_of(config).home}/mlflow.db"


class Tracker:
    """The parent run of one pipeline run; opened by the first stage that has something to say."""

    def __init__(self, config: Config, lake: Lake) -> None:
        self.config = config
        self.lake = lake
        self.uri = tracking_uri(config)
        lake.home.mkdir(parents=True, exist_ok=True)
        create_database(self.uri)
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.uri)
        self.client = mlflow.MlflowClient(self.uri)
        self.experiment_id = self._experiment()
        self.parent: Run | None = None
        self._mirrored: set[str] | None = None
        self._end_broken_runs()

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.config.name)
        if found:
            return found.experiment_id
        local = self.uri.startswith("sqlite")
        location = (self.lake.home / "_mlflow").as_uri() if local else None
        return self.client.create_experiment(self.config.name, artifact_location=location)

    def is_mirrored(self, identity: str) -> bool:
        """Whether a finished run of this experiment carries the stage identity."""
        if self._mirrored is None:
            runs = self.client.search_runs(
                [self.experiment_id], "attributes.status = 'FINISHED' and tags.stage != ''", max_results=5000
            )
            self._mirrored = {run.data.tags.get("identity", "") for run in runs}
        return identity in self._mirrored

    @contextmanager
    def stage(self, name: str, identity: str, resumable: bool = False) -> Iterator[str]:
        """A nested run; it ends FINISHED, or FAILED where the body raises. Yields its run id. What is `resumable` goes on
        in the run of an earlier attempt that did not end well."""
        tags = {"stage": name, "identity": identity, "mlflow.parentRunId": self._parent_id()}
        run_id = self._attempt(name, identity) if resumable else None
        if run_id is None:
            run_id = self.client.create_run(self.experiment_id, run_name=name, tags=tags).info.run_id
        else:
            self.client.update_run(run_id, "RUNNING")
            self.client.set_tag(run_id, "mlflow.parentRunId", tags["mlflow.parentRunId"])
        try:
            yield run_id
        except BaseException:
            self.client.set_terminated(run_id, "FAILED")
            raise
        self.client.set_terminated(run_id, "FINISHED")
        if self._mirrored is not None:
            self._mirrored.add(identity)

    def _attempt(self, name: str, identity: str) -> str | None:
        """The newest run of a stage, where it was killed or failed."""
        wanted = f"tags.stage = '{name}' and tags.identity = '{identity}'"
        found = self.client.search_runs([self.experiment_id], wanted, max_results=1)  # the newest first
        return found[0].info.run_id if found and found[0].info.status in ("KILLED", "FAILED") else None

    def log(self, run_id: str, plan: StagePlan | None, pins: Mapping[str, int], result: StageResult) -> None:
        """Inputs and outputs with versions and identities, the configuration, metrics, curves and plots."""
        self._log_tables(run_id, pins, "input")
        self._log_tables(run_id, result.tables, "output")
        sections = plan.spec.settings if plan else ("source",)
        settings = {name: to_mapping(getattr(self.config, name)) for name in sections}
        self.client.log_dict(run_id, settings, "config.yaml")
        if plan:
            identities = {t: {str(d): i for d, i in ids.items()} for t, ids in plan.expected.items()}
            self.client.log_dict(run_id, identities, "identities.json")
        self._log_metrics(run_id, result)
        for name, figure in result.figures.items():
            self.client.log_figure(run_id, figure, f"plots/{name}.png")

    def _log_tables(self, run_id: str, versions: Mapping[str, int], role: str) -> None:
        with mlflow.start_run(run_id=run_id, log_system_metrics=False):
            for name, version in versions.items():
                # MLflow drops version 0 from the source's JSON, so the digest and a tag carry it as well.
                source = DeltaDatasetSource(path=self.lake.path(name), delta_table_version=version)
                dataset = MetaDataset(source, name=name, digest=f"v{version}")  # type: ignore[abstract]
                mlflow.log_input(dataset, context=role)
                mlflow.set_tag(f"{role}.{name}", str(version))

    def _log_metrics(self, run_id: str, result: StageResult) -> None:
        single = {f"rows.{table}": float(n) for table, n in result.rows.items()} | result.metrics
        metrics = [Metric(_metric_name(name), value, 0, 0) for name, value in single.items()]
        for name, points in result.series.items():
            metrics += [Metric(_metric_name(name), value, 0, step) for step, value in points]
        for start in range(0, len(metrics), METRICS_A_CALL):
            self.client.log_batch(run_id, metrics=metrics[start : start + METRICS_A_CALL])

    def _parent_id(self) -> str:
        if self.parent is None:
            tags = {"lake": self.lake.root}
            self.parent = self.client.create_run(self.experiment_id, run_name=f"run {self.config.name}", tags=tags)
            self.client.log_dict(self.parent.info.run_id, to_mapping(self.config), "config.yaml")
        return self.parent.info.run_id

    def _end_broken_runs(self) -> None:
        """What still runs on this lake, whose lock this process holds, was killed."""
        running = self.client.search_runs([self.experiment_id], "attributes.status = 'RUNNING'", max_results=5000)
        broken = {run.info.run_id for run in running if run.data.tags.get("lake") == self.lake.root}
        for run in running:
            if run.info.run_id in broken or run.data.tags.get("mlflow.parentRunId") in broken:
                self.client.set_terminated(run.info.run_id, "KILLED")

    def finish(self, metrics: Mapping[str, float], report: Path | None, failed: bool = False) -> None:
        """Ends the parent run, if there is one, with the run's metrics and report."""
        if self.parent is None:
            return
        run_id = self.parent.info.run_id
        self.client.log_batch(run_id, metrics=[Metric(_metric_name(k), v, 0, 0) for k, v in metrics.items()])
        if report is not None:
            self.client.log_artifact(run_id, str(report))
        self.client.set_terminated(run_id, "FAILED" if failed else "FINISHED")


def create_database(uri: str) -> None:
    """Makes an SQLite database that is missing beside its place and renames it: MLflow takes seconds to migrate a new
    one, and a kill within them would leave one that it can neither use nor mend."""
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or path.is_file():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    draft = path.with_name(f"{path.name}.draft")
    for name in (draft.name, *(f"{draft.name}-{end}" for end in ("wal", "shm", "journal"))):
        path.with_name(name).unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    store = SqlAlchemyStore(f"{SQLITE}{draft}", (path.parent / "_mlflow").as_uri())
    store.engine.dispose()
    draft.replace(path)


def _metric_name(name: str) -> str:
    return name.replace("@", "_at_")
