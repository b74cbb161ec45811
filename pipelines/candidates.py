"""Trained models of a lake: where the weights lie, and which one the next night starts from.

Every model ends as an artifact of stage `align`, whose manifest says which folder holds its weights (its own, or that of
`train` where there was nothing to align), its codebook, its sizes and the last day that it has seen.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from schemas.config import Config
from schemas.errors import ContractViolation
from schemas.lake import Lake
from schemas.loader import to_mapping
from schemas.model_config import ModelConfig

STAGE = "align"


@dataclass(frozen=True)
class Candidate:
    identity: str  # of the artifact of `align`
    codebook_version: str
    trained_until: datetime.date
    made: float  # modification time of the manifest; of two equal ones the newer counts


def model_folder(lake: Lake, identity: str) -> Path:
    """The folder of weights.safetensors and model.json behind an artifact of `align`."""
    manifest = lake.manifest(STAGE, identity)
    if manifest is None:
        raise ContractViolation(f"{lake.root} holds no model {identity}; run stages train and align first.")
    return lake.artifact(manifest["model"]["stage"], manifest["model"]["identity"])


def newest_candidate(lake: Lake, config: Config, codebook_version: str, before: datetime.date) -> Candidate | None:
    """The model of this codebook and these sizes that has seen most and nothing of the day `before`. Sizes that its release
    did not know are at their defaults."""
    found = [
        candidate
        for candidate, sizes in _candidates(lake)
        if candidate.codebook_version == codebook_version
        and candidate.trained_until < before
        and to_mapping(ModelConfig()) | sizes == to_mapping(config.model)
    ]
    return max(found, key=lambda candidate: (candidate.trained_until, candidate.made), default=None)


def _candidates(lake: Lake) -> list[tuple[Candidate, dict]]:
    found = []
    for path in lake.artifact(STAGE, "any").parent.glob("*/manifest.json"):
        identity = path.parent.name
        manifest = lake.manifest(STAGE, identity) or {}
        until = datetime.date.fromisoformat(manifest["trained_until"])
        candidate = Candidate(identity, manifest["codebook_version"], until, path.stat().st_mtime)
        found.append((candidate, manifest["config"]["model"]))
    return found
