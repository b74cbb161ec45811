"""`ray job submit --working-dir . -- lazyrec tokenize ...` on a cluster of two nodes equals the stage in this process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipelines import tokenize_items
from pipelines.engines import Engines
from pipelines.ray_tables import read_arrow
from schemas.config import Config, TokenizeConfig
from schemas.lake import Lake
from schemas.loader import to_mapping
from tests.conftest import REPOSITORY
from tests.pipelines.small_catalogue import DAYS, calendar, catalogue, context, small_lake, write
from tests.processes import free_ports, listens, server

PROGRAMS = Path(sys.executable).parent
CONFIG = Config(tokenize=TokenizeConfig(levels=2, codes=5, iterations=4, num_workers=2))
NODE = ["--num-cpus", "2", "--object-store-memory", str(100 * 2**20), "--disable-usage-stats", "--block"]


def environment() -> dict[str, str]:
    """Of every process of the cluster: its programs first, and no Ray that this test session may have started."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return kept | {"PATH": f"{PROGRAMS}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}


@contextmanager
def two_nodes(folder: Path) -> Iterator[str]:
    """The dashboard's address of a cluster with a head and one further node."""
    gcs, dashboard, *agents = free_ports(6)
    ray = [str(PROGRAMS / "ray"), "start"]
    flags = ("--dashboard-agent-listen-port", "--dashboard-agent-grpc-port")
    pairs = [[flags[0], str(agents[i]), flags[1], str(agents[i + 1])] for i in (0, 2)]
    place = ["--port", str(gcs), "--dashboard-port", str(dashboard)]
    head = [*ray, "--head", "--include-dashboard", "true", "--temp-dir", str(folder / "r"), *place, *pairs[0], *NODE]
    node = [*ray, "--address", f"127.0.0.1:{gcs}", *pairs[1], *NODE]
    address = f"http://127.0.0.1:{dashboard}"
    with ExitStack() as running:
        env = environment()
        running.enter_context(server(head, lambda: listens(dashboard), folder / "head.log", 120, env))
        running.enter_context(server(node, lambda: len(alive(address)) == 2, folder / "node.log", 120, env))
        yield address


def listed(address: str, what: str) -> list[dict[str, Any]]:
    """The cluster's state as its dashboard serves it."""
    try:
        with urllib.request.urlopen(f"{address}/api/v0/{what}?detail=1&limit=100", timeout=10) as response:
            return json.load(response)["data"]["result"]["result"]
    except OSError:
        return []


def alive(address: str) -> list[dict[str, Any]]:
    return [node for node in listed(address, "nodes") if node["state"] == "ALIVE"]


def prepared(lake: Lake, database: Path) -> Path:
    """A lake up to the vectors, and the configuration that names it by absolute paths."""
    small_lake(lake)
    write(lake, "impressions", [], DAYS)
    vectors = np.random.default_rng(0).normal(size=(len(catalogue()), 8)).astype(np.float32)
    rows = [{"item_id": r["item_id"], "date": r["date"], "vector": v} for r, v in zip(catalogue(), vectors, strict=True)]
    rows = [row | {"date": max(row["date"], calendar().fit_day), "sources": ["vector"]} for row in rows]
    write(lake, "item_embeddings", rows, DAYS[2:])
    path = Path(lake.root).parent / "conf.yaml"
    mapping = to_mapping(CONFIG) | {"lake": lake.root, "tracking_uri": f"sqlite:///{database}"}
    path.write_text(yaml.safe_dump(mapping))
    return path


def submit(address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(PROGRAMS / "ray"), "job", "submit", "--address", address, "--working-dir", ".", "--", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(), cwd=REPOSITORY, timeout=240, check=False
    )


@pytest.mark.long
def test_a_submitted_stage_equals_the_one_in_this_process(
    lake: Lake, tmp_path_factory: pytest.TempPathFactory, migrated_database: Path, engines: Engines
) -> None:
    folder = tmp_path_factory.mktemp("r")
    database = folder / "mlflow.db"
    shutil.copy(migrated_database, database)
    path = prepared(lake, database)
    here = Lake(f"{lake.root}-here")
    shutil.copytree(lake.root, here.root)
    with two_nodes(folder) as address:
        done = submit(address, "lazyrec", "tokenize", "--config", str(path), "--quiet")
        assert done.returncode == 0, done.stdout[-3000:] or done.stderr[-3000:]
        answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"stage"')]
        workers = [actor for actor in listed(address, "actors") if actor["class_name"] == "RayTrainWorker"]
    (answer,) = answers
    assert (answer["stage"], answer["status"], answer["rows"]) == ("tokenize", "done", {"semantic_ids": len(catalogue())})
    assert len({worker["node_id"] for worker in workers}) == 2
    alone = Config(tokenize=TokenizeConfig(levels=2, codes=5, iterations=4))
    tokenize_items.run(context("tokenize", here, engines, alone))
    assert lake.identities("semantic_ids") == here.identities("semantic_ids") != {}
    tables = [read_arrow(place, "semantic_ids", place.version("semantic_ids")).sort_by("item_id") for place in (lake, here)]
    assert tables[0].equals(tables[1])
