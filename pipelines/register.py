"""Stage `register`: one bundle as an MLflow model; the alias `champion` moves if the gates hold.

A failed gate is no failure: the version is registered, the alias stays, and the manifest says why.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.models import ModelSignature
from mlflow.utils.logging_utils import disable_logging, enable_logging

from pipelines.bundle import load_bundle, write_bundle
from pipelines.candidates import model_folder
from pipelines.catalogue import load_catalogue
from pipelines.codebook_registry import TAG
from pipelines.gates import Gate, better_than_popularity, not_worse_than_champion
from pipelines.item_fields import item_table
from pipelines.measurement import MODEL
from pipelines.promotion import champion_before, describe_version, move_champion
from pipelines.registry import CHAMPION, champion_of
from pipelines.serving import INPUTS, OUTPUTS, PARAMS
from pipelines.stage import StageContext, StageResult
from schemas.loader import to_mapping

# What `predict` needs at run time; the pins are those of this environment.
REQUIREMENTS = ("mlflow", "numpy", "pandas", "pyarrow", "pyyaml", "safetensors", "torch", "deltalake", "ray")
CODE = ("schemas", "model", "pipelines")
NEWEST = 10  # versions among which one that was broken off is looked for
ROOT = Path(__file__).resolve().parent.parent  # of the packages


def run(context: StageContext) -> StageResult:
    """Builds the bundle, registers it, judges it, and moves the alias if every gate holds."""
    bundle_folder = build_bundle(context)
    load_bundle(bundle_folder)  # what cannot be loaded is not registered
    name = context.config.register.name
    client = MlflowClient()
    champion = champion_of(client, name)
    broken_off = context.lake.manifest("register", context.identity) is None  # and not forced
    number = version_of(client, name, context) if broken_off else None
    if number is not None and champion is not None and str(champion["version"]) == number:
        champion = champion_before(client, name)  # a version is not judged against itself
    gates = judge(context, champion)
    if number is None:
        number = log_model(context, bundle_folder, name)
    passed = all(gate.passed for gate in gates)
    verdicts = [{"passed": gate.passed, "text": gate.text} for gate in gates]
    describe_version(client, name, number, verdicts, facts_of(context))
    if passed:
        move_champion(client, name, number)
    reason = "; ".join(gate.text for gate in gates if not gate.passed) or None
    model = {"name": name, "version": number, "alias": CHAMPION if passed else None, "promoted": passed, "reason": reason}
    context.say(f"models:/{name}/{number} {'is the champion' if passed else 'was not promoted: ' + str(reason)}")
    return StageResult(
        metrics={"promoted": float(passed)},
        manifest={"model": model, "gates": verdicts},
    )


def facts_of(context: StageContext) -> dict[str, str]:
    """What `lazyrec status` shows of a version: the days it has seen, and how it measured."""
    trained = context.lake.manifest("align", context.plan.artifact("align")) or {}
    evaluated = context.lake.manifest("evaluate", context.plan.artifact("evaluate")) or {}
    cells = evaluated.get("metrics", {}).get(MODEL, {})
    shown = {name: cell["value"] for name, cell in cells.items() if name.endswith("@10")}
    return {
        "fit_day": context.calendar.fit_day.isoformat(),
        "trained_until": str(trained.get("trained_until", "")),
        TAG: str(trained.get("codebook_version", "")),
        "metrics": json.dumps(shown),
    }


def build_bundle(context: StageContext) -> Path:
    """Collects the parts behind the trained model into this stage's folder."""
    lake, config, calendar = context.lake, context.config, context.calendar
    model = context.plan.artifact("align")
    manifest = lake.manifest("align", model) or {}
    catalogue = load_catalogue(lake, context.pins["semantic_ids"], calendar.fit_day, calendar.days[-1])
    lineage = {
        "identity": context.identity,
        "model": model,
        "trained_until": manifest["trained_until"],
        "inputs": manifest["inputs"],
        "tables": {table: lake.version(table) for table in lake.tables()},
        "mlflow_run": manifest["mlflow_run"],
    }
    fields = item_table(lake, context.pins["items"], catalogue, config.model.hash_buckets, calendar.days[-1])
    folder = context.folder / "bundle"
    write_bundle(
        folder,
        model_folder=model_folder(lake, model),
        codebook_file=lake.artifact("tokenize", catalogue.codebook_version) / "codebook.safetensors",
        catalogue=catalogue,
        items=fields,
        config=to_mapping(config),
        lineage=lineage,
    )
    return folder


def judge(context: StageContext, champion: dict[str, Any] | None) -> list[Gate]:
    """Every gate of promotion, each with the sentence that the report shows."""
    evaluated = context.lake.manifest("evaluate", context.plan.artifact("evaluate")) or {}
    gates = [better_than_popularity(evaluated, context.config.register.gate_metric)]
    if champion is not None:
        gates.append(not_worse_than_champion(context, champion))
    return gates


def version_of(client: MlflowClient, name: str, context: StageContext) -> str | None:
    """The version that a run of this stage on this lake registered before it was broken off, or None: it is completed,
    so that a kill leaves no second version of one model. The run's status tells nothing: MLflow ends it with the model."""
    found = client.search_model_versions(f"name = '{name}'", order_by=["version_number DESC"], max_results=NEWEST)
    for registered in found:
        run = client.get_run(registered.run_id) if registered.run_id and registered.status == "READY" else None
        if run and run.data.tags.get("identity") == context.identity:
            parent = client.get_run(run.data.tags["mlflow.parentRunId"])
            if parent.data.tags.get("lake") == context.lake.root:
                return str(registered.version)
    return None


def log_model(context: StageContext, bundle_folder: Path, name: str) -> str:
    """Logs and registers the bundle with the code that serves it; the new version's number."""
    with mlflow.start_run(run_id=context.run_id), _quiet():
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(ROOT / "pipelines" / "serving_model.py"),
            artifacts={"bundle": str(bundle_folder)},
            code_paths=[str(ROOT / package) for package in CODE],
            signature=ModelSignature(inputs=INPUTS, outputs=OUTPUTS, params=PARAMS),
            pip_requirements=[f"{package}=={version(package)}" for package in REQUIREMENTS],
            registered_model_name=name,
        )
    return str(info.registered_model_version)


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow tells what the stage tells anyway, and advises an example although the signature is given."""
    disable_logging()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*An input example was not provided")
            yield
    finally:
        enable_logging()
