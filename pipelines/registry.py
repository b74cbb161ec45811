"""The model registry as the stages see it: which version is champion."""

from __future__ import annotations

from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

CHAMPION = "champion"
NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # error codes of a name, version or alias


def champion_of(client: MlflowClient, name: str) -> dict[str, Any] | None:
    """The version that holds the alias, or None where there is no such model or alias."""
    try:
        found = client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in NOT_THERE:
            return None
        raise
    return {"name": name, "version": found.version, "uri": f"models:/{name}@{CHAMPION}"}


def champion_pin(client: MlflowClient, name: str) -> str | None:
    """NAME/VERSION of the champion, as stages pin it, or None."""
    found = champion_of(client, name)
    return f"{found['name']}/{found['version']}" if found else None
