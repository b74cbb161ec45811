"""The arrows between the packages: pipelines -> jobs, model -> schemas, and no other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ENGINES = {"pyspark", "delta", "ray", "torch", "mlflow", "faiss"}
FORBIDDEN = {
    "schemas": ENGINES | {"jobs", "model", "pipelines"},
    "jobs": {"torch", "ray", "mlflow", "model", "pipelines"},
    "model": {"pyspark", "delta", "ray", "mlflow", "deltalake", "jobs", "pipelines"},
    "pipelines": {"tests", "benchmarks"},
}
LONGEST_FILE = 500


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_arrows_point_one_way(package: str) -> None:
    files = sorted((REPOSITORY / package).rglob("*.py"))
    assert files
    wrong = {file.name: sorted(imported(file) & FORBIDDEN[package]) for file in files}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_no_file_outgrows_a_reader() -> None:
    files = [file for package in FORBIDDEN for file in (REPOSITORY / package).rglob("*.py")]
    lengths = {str(file.relative_to(REPOSITORY)): len(file.read_text().splitlines()) for file in files}
    assert {name: n for name, n in lengths.items() if n > LONGEST_FILE} == {}


def test_only_the_table_modules_touch_delta_from_engines() -> None:
    spark_writers = [f.name for f in (REPOSITORY / "jobs").glob("*.py") if 'format("delta")' in f.read_text()]
    assert spark_writers == ["tables.py"]
    ray_readers = [f.name for f in (REPOSITORY / "pipelines").glob("*.py") if "read_delta(" in f.read_text()]
    assert ray_readers == ["ray_tables.py"]
