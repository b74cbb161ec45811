"""What something still needs: artifacts, and the versions of tables behind them.

Roots are the versions in the registry, the newest artifact of each stage, the candidates that a night could continue, and
what this configuration's whole run would find done. Each needs the artifacts that its manifest names, but not the
candidate that its training began from: the weights that it ended with are its own.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipelines.candidates import newest_candidate
from pipelines.checkpoints import described, states
from pipelines.example_stream import TABLE as STREAM
from pipelines.promotion import registry
from pipelines.run_artifacts import CHECKPOINTS
from schemas.calendar import log_calendar
from schemas.config import Config
from schemas.errors import ContractViolation, LazyRecError, MissingUpstream
from schemas.lake import Lake
from schemas.lineage import REGISTER, STAGES, plan
from schemas.tables import TABLES

ARTIFACT_STAGES = {spec.name: spec for spec in STAGES if spec.artifact}
Artifact = tuple[str, str]  # stage, identity


@dataclass
class Pins:
    """Who needs what. `versions`: table, version, names; `models` are the names that are registered models."""

    artifacts: set[Artifact] = field(default_factory=set)
    versions: dict[str, dict[int, set[str]]] = field(default_factory=dict)
    models: set[str] = field(default_factory=set)

    def add(self, table: str, version: Any, who: str) -> None:
        if table in TABLES and version is not None:
            self.versions.setdefault(table, {}).setdefault(int(version), set()).add(who)

    def add_lineage(self, lineage: dict[str, Any], who: str) -> None:
        """What a bundle says of the tables behind it."""
        for table, version in lineage.get("tables", {}).items():
            self.add(table, version, who)
        for table, read in lineage.get("inputs", {}).items():
            self.add(table, read.get("version"), who)

    def of_models(self, table: str) -> dict[int, list[str]]:
        """The versions of a table that registered models pin, and which models."""
        pinned = {version: sorted(who & self.models) for version, who in self.versions.get(table, {}).items()}
        return {version: who for version, who in pinned.items() if who}


def pins_of(config: Config, lake: Lake) -> Pins:
    """Raises LazyRecError where a registered model of this lake does not tell which tables it pins."""
    pins = Pins()
    for name, identity, lineage in registered(config, lake):
        pins.models.add(name)
        pins.add_lineage(lineage, name)
        _need(lake, pins, REGISTER.name, identity, name)
    for stage in ARTIFACT_STAGES:
        if newest := lake.newest_artifact(stage):
            _need(lake, pins, stage, newest, f"the newest of {stage}")
    for codebook in set(lake.identities("semantic_ids").values()):
        if candidate := newest_candidate(lake, config, codebook, datetime.date.max):
            _need(lake, pins, "align", candidate.identity, "the candidate of a night")
    for stage, identity in _planned(config, lake):
        _need(lake, pins, stage, identity, "this configuration")
    return pins


def _need(lake: Lake, pins: Pins, stage: str, identity: str, who: str) -> None:
    """Adds a complete artifact, what it was made from, and the versions that it read."""
    manifest = lake.manifest(stage, identity)
    if manifest is None:
        return
    pins.artifacts.add((stage, identity))
    bundle = lake.artifact(stage, identity) / "bundle" / "lineage.json"
    if bundle.is_file():
        pins.add_lineage(json.loads(bundle.read_text()), who)
    pins.add_lineage(manifest, who)
    for source, read in manifest.get("inputs", {}).items():
        if source in ARTIFACT_STAGES:
            for made in read["identities"].values():
                _need(lake, pins, source, made, who)


def _planned(config: Config, lake: Lake) -> Iterator[Artifact]:
    try:
        calendar = log_calendar(config, lake)
    except (MissingUpstream, ContractViolation):  # a log that is not there, or too short for the split
        return
    for name, spec in ARTIFACT_STAGES.items():
        yield name, plan(spec, config, lake, calendar).identity


def registered(config: Config, lake: Lake) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The registered versions that this lake made: name, identity of stage `register`, lineage of the bundle."""
    try:
        client = registry(config)
    except LazyRecError:  # nothing has run yet
        return
    name = config.register.name
    for version in client.search_model_versions(f"name='{name}'"):
        identity = _identity_of(client, version, lake)
        if identity is not None:
            yield f"models:/{name}/{version.version}", identity, _lineage_of(client, version, lake, identity)


def _identity_of(client: MlflowClient, version: ModelVersion, lake: Lake) -> str | None:
    """Of the stage that registered the version, or None where that was no run on this lake."""
    if not version.run_id:
        return None
    tags = client.get_run(version.run_id).data.tags
    identity = tags.get("identity")
    if identity is None or lake.manifest(REGISTER.name, identity) is not None:
        return identity
    parent = tags.get("mlflow.parentRunId")
    return identity if parent and client.get_run(parent).data.tags.get("lake") == lake.root else None


def _lineage_of(client: MlflowClient, version: ModelVersion, lake: Lake, identity: str) -> dict[str, Any]:
    path = lake.artifact(REGISTER.name, identity) / "bundle" / "lineage.json"
    if not path.is_file():  # the registry has its own copy
        uri = f"{client.get_model_version_download_uri(version.name, version.version)}/artifacts/bundle/lineage.json"
        try:
            path = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, tracking_uri=client.tracking_uri))
        except (MlflowException, OSError) as error:
            raise LazyRecError(
                f"models:/{version.name}/{version.version} does not tell which tables it pins ({uri} cannot be read); "
                "delete that version from the registry, or give it its files back."
            ) from error
    lineage: dict[str, Any] = json.loads(path.read_text())
    return lineage


def unfinished(lake: Lake) -> list[tuple[Path, int | None]]:
    """Artifacts of trainings that were broken off: the folder, and the version of training_examples in which its newest
    checkpoint stands."""
    found = []
    for stage in ARTIFACT_STAGES:
        for folder in sorted(lake.artifact(stage, "any").parent.glob("*/")):
            if not (folder / "manifest.json").is_file():
                kept = states(folder / CHECKPOINTS)
                position = described(kept[-1])["position"] if kept else {}
                found.append((folder, position.get("table_version")))
    return found


def resumable(lake: Lake) -> list[Path]:
    """Trainings that the next run continues, as long as training_examples stays at its version."""
    newest = lake.version(STREAM)
    return [folder for folder, version in unfinished(lake) if version is not None and version == newest]
