"""What a lake holds, so that two lakes can be compared.

Rows in a canonical order, identities, constraints, weights bit for bit, metrics, and the registry's versions. Versions
and files of tables, times, and the ids of MLflow's runs depend on how often a run was broken off, and stay out.
"""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from safetensors import safe_open

from schemas.lake import Lake
from schemas.tables import TABLES

Fingerprint = dict[str, Any]
WEIGHED = ("train", "align", "tokenize")  # stages whose artifacts hold tensors
DRAFTS = ("*.draft", ".draft*", "_draft", "*.draft-*")


def fingerprint(lake: Lake) -> Fingerprint:
    """By kind and name; two lakes hold the same if and only if these are equal."""
    tables = lake.tables()
    return {
        "rows": {name: rows_digest(lake, name) for name in tables},
        "identities": {name: {str(d): i for d, i in sorted(lake.identities(name).items())} for name in tables},
        "constraints": {name: constraints(lake, name) for name in tables},
        "artifacts": {stage: sorted(made) for stage, made in artifacts(lake).items()},
        "weights": {f"{s}/{i}": weights(lake.artifact(s, i)) for s in WEIGHED for i in sorted(artifacts(lake).get(s, []))},
        "metrics": {i: (lake.manifest("evaluate", i) or {}).get("metrics") for i in artifacts(lake).get("evaluate", [])},
        "registry": registry(lake.home / "mlflow.db"),
    }


def rows_digest(lake: Lake, table: str) -> tuple[int, str]:
    """How many rows, and a hash of them whatever their order."""
    rows = sorted(
        map(repr, lake.open(table).to_pyarrow_dataset().to_table(columns=list(TABLES[table].columns)).to_pylist())
    )
    return len(rows), digest("\n".join(rows).encode())


def constraints(lake: Lake, table: str) -> dict[str, str]:
    properties = lake.open(table).metadata().configuration
    return {key: text for key, text in sorted(properties.items()) if key.startswith("delta.constraints.")}


def artifacts(lake: Lake) -> dict[str, list[str]]:
    """The complete artifacts of each stage."""
    found: dict[str, list[str]] = {}
    for path in sorted(lake.artifact("any", "any").parents[1].glob("*/*/manifest.json")):
        found.setdefault(path.parents[1].name, []).append(path.parent.name)
    found.pop("ingest", None)  # its manifest is a memory of files, with their times
    return found


def weights(folder: Path) -> dict[str, str]:
    """A hash of each tensor in the files of an artifact; the states of training on the way stay out."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as part:
            for name in sorted(part.keys()):
                found[f"{path.name}/{name}"] = digest(part.get_tensor(name).tobytes())
    return found


def registry(database: Path) -> dict[str, Any]:
    """Versions, aliases and runs that do not end, read past MLflow, which keeps connections to databases that are gone."""
    if not database.is_file():
        return {}
    with closing(sqlite3.connect(database)) as connection:
        versions = connection.execute("SELECT name, version FROM model_versions ORDER BY name, version").fetchall()
        aliases = connection.execute("SELECT name, alias, version FROM registered_model_aliases ORDER BY name").fetchall()
        (unended,) = connection.execute("SELECT count(*) FROM runs WHERE status = 'RUNNING'").fetchone()
    return {"versions": versions, "aliases": aliases, "runs without an end": unended}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def differences(found: Fingerprint, wanted: Fingerprint) -> list[str]:
    """What differs, as KIND of NAME; empty where the two lakes hold the same."""
    return [
        f"{kind} of {name}"
        for kind in sorted(wanted)
        for name in sorted({*found[kind], *wanted[kind]})
        if found[kind].get(name) != wanted[kind].get(name)
    ]


def drafts(lake: Lake) -> list[str]:
    """Unfinished files below the lake."""
    return sorted({str(path.relative_to(lake.home)) for pattern in DRAFTS for path in lake.home.rglob(pattern)})
