"""Stage `train`: the lazy decoder on the organised stream, through Ray Train.

With train.num_workers = 0 the loop runs in this process. A killed run resumes from the newest checkpoint in the stage's
folder, which the stage's identity names, so a changed setting or input never continues another run's weights; where the
examples were written again since, it starts anew.
Requests of the split's train role bear the loss, on items whose codes were known by the last train day. A night continues
the candidate that it has scored, in one pass over the days that this one has not seen.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from mlflow import MlflowClient
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines.candidates import model_folder
from pipelines.checkpoints import described, load_model, states
from pipelines.devices import enough_gpus
from pipelines.example_stream import TABLE
from pipelines.report_plots import curves
from pipelines.run_artifacts import CHECKPOINTS, RunArtifacts
from pipelines.stage import StageContext, StageResult
from pipelines.tracking import tracking_uri
from pipelines.train_loop import HISTORY, train_loop
from schemas.config import Config

__all__ = ["load_model", "run", "train", "trained"]

WORKER_CPUS = 0.5  # leaves room for reading where there are as many workers as cores
RESTARTS = 2  # of lost workers
# Beside the losses.
CURVES = ("learning_rate", "gradient_norm", "mfu", "expert_load", "validation_ndcg", "item_share", "item_memory")


class _Lines(UserCallback):
    """Lines of progress from workers of other processes."""

    def __init__(self, say: Any) -> None:
        self.say = say

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self.say(metrics[0]["line"])


def run(context: StageContext) -> StageResult:
    """Weights and model.json in the stage's folder; the curves and figures of the run."""
    candidate = context.plan.artifact("candidate")
    config, initial = context.config, None
    if candidate:
        rate = config.train.night_learning_rate
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=1, learning_rate=rate))
        initial = str(model_folder(context.lake, candidate))
    return trained(context, config, train_loop, initial)


def trained(context: StageContext, config: Config, loop: Callable[..., None], initial: str | None) -> StageResult:
    """Runs `loop` into the stage's folder, from the weights in `initial` where they are given."""
    context.engines.ray()
    settings = {
        "config": config,
        "lake": context.lake,
        "calendar": context.calendar,
        "pins": dict(context.pins),
        "folder": str(context.folder),
        "identity": context.identity,
        "initial": initial,
        "artifacts": run_artifacts(context),
        "say": context.say,
    }
    train(settings, loop)
    history = json.loads((context.folder / HISTORY).read_text())
    description = json.loads((context.folder / "model.json").read_text())
    return _result(history, description)


def run_artifacts(context: StageContext) -> RunArtifacts | None:
    """Where the stage's run in MLflow takes checkpoints."""
    keep, uri = context.config.train.keep_checkpoints, tracking_uri(context.config)
    return RunArtifacts(MlflowClient(uri).get_run(context.run_id).info.artifact_uri, uri, keep) if keep else None


def train(settings: dict[str, Any], loop: Callable[..., None] = train_loop) -> None:
    """Trains by `loop` with the configured number of workers; see `train_loop` for the settings."""
    start_anew_where_rewritten(settings)
    workers = settings["config"].train.num_workers
    storage = Path(settings["folder"]).resolve() / "ray_train"
    run_config = RunConfig(name=settings["identity"], storage_path=str(storage))
    scaling, backend = ScalingConfig(num_workers=workers), "gloo"
    if workers:
        scaling.use_gpu = enough_gpus(ray.cluster_resources(), workers)
        backend = "nccl" if scaling.use_gpu else backend
        say, settings = settings.get("say"), {k: v for k, v in settings.items() if k not in ("say", "failpoint")}
        run_config.callbacks = [_Lines(say)] if say else []  # type: ignore[list-item]  # the type is that of Train V1
        run_config.failure_config = FailureConfig(max_failures=RESTARTS)
        scaling.resources_per_worker = {"CPU": WORKER_CPUS}
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    TorchTrainer(
        loop,
        train_loop_config=settings,
        torch_config=TorchConfig(backend=backend),
        scaling_config=scaling,
        run_config=run_config,
    ).fit()


def start_anew_where_rewritten(settings: dict[str, Any]) -> None:
    """Removes checkpoints from another version of the examples. It holds the same rows, since the identity is the same, but
    compaction or a second writing may have put them in another order, in which their positions mean nothing."""
    version = settings["pins"][TABLE]
    stale = [
        state
        for state in states(Path(settings["folder"]) / CHECKPOINTS)
        if described(state)["position"]["table_version"] != version
    ]
    for state in stale:
        shutil.rmtree(state)
    if stale and settings.get("say"):
        settings["say"](f"{TABLE} was written again since the last checkpoint, {stale[-1].name}: training starts anew")


def _result(history: list[dict[str, float]], description: dict[str, Any]) -> StageResult:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in history:
        for name, value in row.items():
            if "loss" in name or name in CURVES:
                series.setdefault(name, []).append((int(row["step"]), value))
    reports = [row for row in history if "seconds" in row]
    seconds = sum(row["seconds"] for row in reports)
    targets = sum(row["targets"] for row in reports)
    metrics = {name: points[-1][1] for name, points in series.items() if name != "mfu"}
    metrics |= {
        "steps": float(history[-1]["step"]),
        "parameters": float(description["parameters"]),
        "targets": float(targets),  # over all epochs
        "targets_per_second": targets / max(seconds, 1e-9),
        "tokens_per_second": targets * description["levels"] / max(seconds, 1e-9),
        "data_wait_share": sum(row["waited"] for row in reports) / max(seconds, 1e-9),
        "flops_per_second": sum(row["flops"] for row in reports) / max(seconds, 1e-9),
        "mfu": sum(row["mfu"] * row["seconds"] for row in reports) / max(seconds, 1e-9),
    }
    loss = metrics.get("validation_loss", metrics["loss"])
    note = (
        f"{description['parameters']:,} parameters, {metrics['steps']:.0f} steps at {metrics['targets_per_second']:.0f} "
        f"targets a second, {metrics['flops_per_second'] / 1e9:.3g} GFLOP/s ({metrics['mfu']:.0%} of the device's rate); "
        f"{metrics['data_wait_share']:.1%} of the time waited for data; final loss {loss:.4f}."
    )
    manifest = {name: description[name] for name in ("codebook_version", "parameters", "trained_until")}
    losses = {name: points for name, points in series.items() if "loss" in name}
    return StageResult(metrics=metrics, series=series, figures={"loss": curves(losses)}, notes=[note], manifest=manifest)
