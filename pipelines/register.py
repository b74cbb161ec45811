"""Stage `register`: one bundle as an MLflow model; the alias `champion` moves if the gates hold.

A failed gate is no failure: the version is registered, the alias stays, and the manifest says why.
"""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.models import ModelSignature

from pipelines.bundle import load_bundle, write_bundle
from pipelines.catalogue import load_catalogue
from pipelines.gates import CHAMPION, Gate, better_than_popularity, not_worse_than_champion
from pipelines.item_fields import item_table
from pipelines.serving import INPUTS, OUTPUTS, PARAMS
from pipelines.stage import StageContext, StageResult
from schemas.lineage import artifact_identity
from schemas.loader import to_mapping

# What `predict` needs at run time; the pins are those of this environment.
REQUIREMENTS = ("mlflow", "numpy", "pandas", "pyarrow", "pyyaml", "safetensors", "torch", "deltalake", "ray")
CODE = ("schemas", "model", "pipelines")
ROOT = Path(__file__).resolve().parent.parent  # of the packages


def run(context: StageContext) -> StageResult:
    """Builds the bundle, registers it, judges it, and moves the alias if every gate holds."""
    bundle_folder = build_bundle(context)
    load_bundle(bundle_folder)  # what cannot be loaded is not registered
    name = context.config.register.name
    client = MlflowClient()
    champion = champion_of(client, name)
    gates = judge(context, champion)
    number = log_model(context, bundle_folder, name)
    passed = all(gate.passed for gate in gates)
    if passed:
        client.set_registered_model_alias(name, CHAMPION, number)
    reason = "; ".join(gate.text for gate in gates if not gate.passed) or None
    model = {"name": name, "version": number, "alias": CHAMPION if passed else None, "promoted": passed, "reason": reason}
    context.say(f"models:/{name}/{number} {'is the champion' if passed else 'was not promoted: ' + str(reason)}")
    return StageResult(
        metrics={"promoted": float(passed)},
        manifest={"model": model, "gates": [{"passed": gate.passed, "text": gate.text} for gate in gates]},
    )


def build_bundle(context: StageContext) -> Path:
    """Collects the parts behind the trained model into this stage's folder."""
    lake, config, calendar = context.lake, context.config, context.calendar
    train = artifact_identity("train", config, lake, calendar)
    manifest = lake.manifest("train", train) or {}
    catalogue = load_catalogue(lake, context.pins["semantic_ids"], until=calendar.days[-1])
    lineage = {
        "identity": context.identity,
        "train": train,
        "fit_day": calendar.fit_day.isoformat(),
        "inputs": manifest.get("inputs", {}),
        "tables": {table: lake.version(table) for table in lake.tables()},
        "mlflow_run": manifest.get("mlflow_run"),
    }
    fields = item_table(
        lake, context.pins["items"], catalogue, config.model.hash_buckets, config.tokenize.codes, calendar.days[-1]
    )
    folder = context.folder / "bundle"
    write_bundle(
        folder,
        model_folder=lake.artifact("train", train),
        codebook_file=lake.artifact("tokenize", catalogue.codebook_version) / "codebook.safetensors",
        catalogue=catalogue,
        items=fields,
        config=to_mapping(config),
        lineage=lineage,
    )
    return folder


def judge(context: StageContext, champion: dict[str, Any] | None) -> list[Gate]:
    """Every gate of promotion, each with the sentence that the report shows."""
    lake, config, calendar = context.lake, context.config, context.calendar
    evaluated = lake.manifest("evaluate", artifact_identity("evaluate", config, lake, calendar)) or {}
    gates = [better_than_popularity(evaluated, config.register.gate_metric)]
    if champion is not None:
        gates.append(not_worse_than_champion(context, champion))
    return gates


def champion_of(client: MlflowClient, name: str) -> dict[str, Any] | None:
    """The version that holds the alias, or None where there is no such model or alias."""
    try:
        found = client.get_model_version_by_alias(name, CHAMPION)
    except mlflow.exceptions.MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return {"name": name, "version": found.version, "uri": f"models:/{name}@{CHAMPION}"}


def log_model(context: StageContext, bundle_folder: Path, name: str) -> str:
    """Logs and registers the bundle with the code that serves it; the new version's number."""
    logging.getLogger("mlflow.models.model").setLevel(logging.ERROR)
    with mlflow.start_run(run_id=context.run_id):
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
