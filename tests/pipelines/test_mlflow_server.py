"""A real MLflow server on PostgreSQL: lineage, registration, promotion and rollback go through it as they do on SQLite,
where `test_operator` asks for the same."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import mlflow
import pytest

from pipelines.promotion import promote, rollback
from pipelines.status import status_of
from pipelines.tracking import Tracker
from schemas.config import Config
from schemas.lake import lake_of
from tests.pipelines.tracked import PASSED, assert_complete, bare_version, register_version, tracked_run
from tests.processes import free_ports, listens, server

pytestmark = pytest.mark.long

USER = "lazyrec"


def postgres_bin() -> Path:
    """The folder of PostgreSQL's programs; skips the test where there is none."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed; the extra `postgres` brings it")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    program = found[-1] if found else shutil.which("initdb")
    if program is None:
        pytest.skip("PostgreSQL is not installed; apt-get install postgresql")
    return Path(program).parent


@contextmanager
def postgresql(port: int, log: Path) -> Iterator[str]:
    """A fresh PostgreSQL; its URI. It refuses to run as root, who lends it to another user of the machine."""
    programs = postgres_bin()
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = ("postgres" if "postgres" in names else "nobody") if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="lazyrec-postgres-") as name:
        folder = Path(name)
        if user:
            shutil.chown(folder, user)
        data = folder / "data"
        create = [programs / "initdb", "-D", data, "-U", USER, "--auth=trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(create, check=True, capture_output=True, user=user, cwd=folder)
        command = [str(programs / "postgres"), "-D", str(data), "-h", "127.0.0.1", "-p", str(port), "-k", name, "-F"]
        with server(command, lambda: listens(port), log, user=user, cwd=folder):
            yield f"postgresql://{USER}@127.0.0.1:{port}/postgres"


@contextmanager
def mlflow_server(backend: str, folder: Path, port: int) -> Iterator[str]:
    """`mlflow server` over a database, with artifacts below `folder`; its URI."""
    uri = f"http://127.0.0.1:{port}"
    places = ["--backend-store-uri", backend, "--artifacts-destination", str(folder / "artifacts")]
    command = [sys.executable, "-m", "mlflow", "server", *places, "--host", "127.0.0.1", "--port", str(port)]
    with server([*command, "--workers", "1"], lambda: healthy(uri), folder / "server.log", seconds=120, cwd=folder):
        yield uri


def healthy(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.slow
def test_lineage_and_registry_through_a_server(tmp_path: Path) -> None:
    ports = free_ports(2)
    with ExitStack() as running:
        database = running.enter_context(postgresql(ports[0], tmp_path / "postgres.log"))
        uri = running.enter_context(mlflow_server(database, tmp_path, ports[1]))
        config = Config(name="served", lake=str(tmp_path / "lake"), tracking_uri=uri)
        lake = lake_of(config)
        assert_complete(config, tracked_run(config, lake))
        assert Tracker(config, lake).is_mirrored("identity of first")
        first = register_version(config, lake, tmp_path, PASSED)
        second = bare_version(config, PASSED)
        assert [promote(config, number)["champion_before"] for number in (first, second)] == [None, first]
        assert rollback(config)["model"]["version"] == first
        files = mlflow.artifacts.list_artifacts(f"models:/{config.register.name}@champion")
        assert {"MLmodel", "artifacts", "code"} <= {Path(file.path).name for file in files}
        aliases = {version["version"]: version["alias"] for version in status_of(config)["versions"]}
        assert aliases == {first: "champion", second: None}
    assert any((tmp_path / "artifacts").rglob("loss.png"))
