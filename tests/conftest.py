"""One Spark session, one Ray and one migrated MLflow database for the whole run; a fresh lake for each test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: its kernels then run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
    collect_ignore = ["model/test_on_gpu.py"]

from pipelines.engines import Engines
from schemas.config import ResourceConfig
from schemas.lake import Lake

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

REPOSITORY = Path(__file__).resolve().parent.parent
# The workers of Spark and Ray read the tests' own functions too, from wherever pytest was started.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
DATA = Path(os.environ.get("LAZYREC_DATA", REPOSITORY.parent / "shared" / "data"))

# Small and quiet: one core's worth of partitions, so that a test's time is its work and not its scheduling.
# Compiling code for each of thousands of tiny queries would take a fifth of the time. What spark-submit starts, and the
# demo, compile as a deployment does.
INTERPRETED = ("spark.sql.codegen.wholeStage=false", "spark.sql.codegen.factoryMode=NO_CODEGEN")
RESOURCES = ResourceConfig(
    spark_master="local[2]", spark_heap="2g", spark_partitions=2, spark_conf=INTERPRETED, ray_cpus=2, object_store_mb=300
)


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    started = Engines(RESOURCES)
    yield started
    started.stop()


@pytest.fixture(scope="session")
def spark(engines: Engines):
    return engines.spark


@pytest.fixture(scope="session")
def ray_module(engines: Engines):
    return engines.ray()


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "lake"))


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creating an MLflow database takes seconds and copying one takes none."""
    import mlflow

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracking_uri(migrated_database: Path, tmp_path: Path) -> str:
    copy = tmp_path / "mlflow.db"
    shutil.copy(migrated_database, copy)
    return f"sqlite:///{copy}"


@pytest.fixture(scope="session")
def data_folder() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"development data is not at {DATA}; set LAZYREC_DATA to its folder")
    return DATA
