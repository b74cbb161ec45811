"""The alias `champion` by hand: promotion of a version whose gates passed, and rollback to the version before.

A tag of the registered model keeps the versions that held the alias, oldest first, so that a second rollback goes one
further back. The alias itself is the truth: where a kill or a hand left it elsewhere than the tag says, its version
counts as the newest one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipelines.registry import CHAMPION, NOT_THERE, champion_of, champion_pin
from pipelines.tracking import SQLITE, tracking_uri
from schemas.config import Config
from schemas.errors import ConfigError, LazyRecError

HISTORY = "champions"  # tag of the registered model: versions that held the alias, as JSON
GATES = "gates"  # tag of a version: [{"passed", "text"}] as JSON
LONGEST = 100  # versions remembered


def registry(config: Config) -> MlflowClient:
    """A client of the deployment's registry. Raises LazyRecError where there is none yet; creates nothing."""
    uri = tracking_uri(config)
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
        raise LazyRecError(f"There is no registry at {uri} yet; run `lazyrec run` first.")
    return MlflowClient(uri, uri)


def champion_version(config: Config) -> str | None:
    """NAME/VERSION of the champion, as stages pin it, or None where nothing was promoted."""
    try:
        return champion_pin(registry(config), config.register.name)
    except LazyRecError:
        return None


def describe_version(
    client: MlflowClient, name: str, version: str, gates: list[dict[str, Any]], facts: Mapping[str, str]
) -> None:
    """Keeps with a version, as tags, how its gates came out (dictionaries of `passed` and `text`) and further facts."""
    for key, value in {GATES: json.dumps(gates), **facts}.items():
        client.set_model_version_tag(name, version, key, value)


def failed_gates(client: MlflowClient, name: str, version: str) -> list[str] | None:
    """The sentences of the gates that a version failed; None where none were recorded."""
    recorded = client.get_model_version(name, version).tags.get(GATES)
    return None if recorded is None else [gate["text"] for gate in json.loads(recorded) if not gate["passed"]]


def move_champion(client: MlflowClient, name: str, version: str) -> None:
    """Moves the alias forward and remembers who held it."""
    held = history(client, name)
    client.set_registered_model_alias(name, CHAMPION, version)
    if held[-1:] != [version]:
        _remember(client, name, [*held, version])


def history(client: MlflowClient, name: str) -> list[str]:
    """The versions that held the alias, oldest first; the last one holds it now."""
    champion = champion_of(client, name)
    if champion is None:
        return []
    held: list[str] = json.loads(client.get_registered_model(name).tags.get(HISTORY, "[]"))
    now = str(champion["version"])
    return held if held[-1:] == [now] else [*held, now]


def champion_before(client: MlflowClient, name: str) -> dict[str, Any] | None:
    """The version that held the alias before the one that holds it now, as `champion_of` gives it, or None."""
    held = history(client, name)[:-1]
    return {"name": name, "version": held[-1], "uri": f"models:/{name}/{held[-1]}"} if held else None


def promote(config: Config, version: str, force: bool = False) -> dict[str, Any]:
    """Makes `version` the champion. Raises ConfigError for an unknown version, LazyRecError where a gate failed."""
    client, name = registry(config), config.register.name
    try:
        failed = failed_gates(client, name, version)
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        raise ConfigError(f"There is no models:/{name}/{version}; `lazyrec status` lists the versions.") from error
    if failed != [] and not force:
        why = "has no record of its gates" if failed is None else f"failed its gates: {'; '.join(failed)}"
        raise LazyRecError(f"models:/{name}/{version} {why}; --force promotes it all the same.")
    before = history(client, name)
    move_champion(client, name, version)
    status = "skipped" if before[-1:] == [version] else "done"
    return _answer("promote", status, name, version, before[-1] if before else None)


def rollback(config: Config) -> dict[str, Any]:
    """Gives the alias back to the version that held it before. Raises LazyRecError where there is none."""
    client, name = registry(config), config.register.name
    held = history(client, name)
    if len(held) < 2:
        champion = f"models:/{name}/{held[0]} is the first champion" if held else f"models:/{name} has no champion"
        raise LazyRecError(f"{champion}, so there is none to go back to; `lazyrec promote --version N` names one.")
    # The tag first: a kill in between leaves the alias where it was, and the next rollback does the same again.
    _remember(client, name, held[:-1])
    client.set_registered_model_alias(name, CHAMPION, held[-2])
    return _answer("rollback", "done", name, held[-2], held[-1])


def _remember(client: MlflowClient, name: str, held: list[str]) -> None:
    client.set_registered_model_tag(name, HISTORY, json.dumps(held[-LONGEST:]))


def _answer(stage: str, status: str, name: str, version: str, before: str | None) -> dict[str, Any]:
    model = {"name": name, "version": version, "alias": CHAMPION}
    return {"stage": stage, "status": status, "model": model, "champion_before": before}
