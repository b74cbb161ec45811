"""Codebooks in the model registry: `NAME-codebook`, NAME that of the models, one version a codebook.

A version's tag `codebook` is the identity that tables, models, bundles and exposures name, so `tags.codebook = 'IDENTITY'`
finds the centroids, the manifest and the statistics of the fit behind any of them. They are copies of the lake's files
(safetensors and JSON), kept with the run that registered them; stages read the lake's.
"""

from __future__ import annotations

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipelines.stage import StageContext

TAG = "codebook"  # of a version of a codebook, and of a model


def register_codebook(context: StageContext, identity: str) -> str:
    """Registers the codebook of `identity` from this stage's run, unless it is registered; the number of its version."""
    client, name = MlflowClient(), registered_name(context.config.register.name)
    if (number := version_of(client, name, identity)) is not None:
        return number
    folder, manifest = context.lake.artifact("tokenize", identity), context.lake.manifest("tokenize", identity) or {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        client.log_artifact(context.run_id, str(path), TAG)
    facts = {key: str(manifest[key]) for key in ("levels", "codes", "items")}
    facts |= {TAG: identity, "fit_day": str(context.calendar.fit_day), "lake": context.lake.root}
    if earlier := manifest.get("earlier"):
        facts["earlier"] = earlier["codebook"]
    create(client, name)
    source = f"{client.get_run(context.run_id).info.artifact_uri}/{TAG}"
    return str(client.create_model_version(name, source, context.run_id, facts).version)


def registered_name(model: str) -> str:
    return f"{model}-codebook"


def version_of(client: MlflowClient, name: str, identity: str) -> str | None:
    """The number of the version of a codebook, or None where it is not registered."""
    found = client.search_model_versions(f"name = '{name}' and tags.{TAG} = '{identity}'")
    return str(found[0].version) if found else None


def create(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name, description="RQ-Kmeans codebooks; the tag `codebook` is what tables name.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
