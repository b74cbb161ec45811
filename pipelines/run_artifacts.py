"""Training states and weights among the artifacts of the stage's run in MLflow (`train.keep_checkpoints`).

Files go straight to the run's artifact store, which takes them from the worker that wrote them; MLflow's database is the
driver's alone. A state is resumed from the stage's folder, never from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

CHECKPOINTS = "checkpoints"
WEIGHTS = ("model.json", "weights.safetensors")  # what load_model reads


@dataclass(frozen=True)
class RunArtifacts:
    """Of one run; travels to workers."""

    uri: str  # of the run's artifacts
    tracking_uri: str
    keep: int  # newest states

    @cached_property
    def store(self) -> ArtifactRepository:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        return get_artifact_repository(self.uri, tracking_uri=self.tracking_uri)

    def log_state(self, state: Path) -> None:
        """Adds a state's folder, and removes all but the newest ones."""
        self.store.log_artifacts(str(state), f"{CHECKPOINTS}/{state.name}")
        for old in self.states()[: -self.keep]:
            self.store.delete_artifacts(f"{CHECKPOINTS}/{old}")

    def states(self) -> list[str]:
        """Names, oldest first."""
        return sorted(PurePosixPath(file.path).name for file in self.store.list_artifacts(CHECKPOINTS))

    def log_weights(self, folder: Path, name: str) -> None:
        """The model of `folder`, in place of an earlier one of that name."""
        for part in WEIGHTS:
            self.store.log_artifact(str(folder / part), name)
