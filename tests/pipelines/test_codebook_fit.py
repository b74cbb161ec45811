"""A fit that was killed continues with the same bits, and codes of a saved codebook follow from it in plain NumPy."""

from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from model import rq_kmeans
from model.rq_kmeans import Codebook, Levels, encode
from pipelines import codebook_fit
from pipelines.codebook import read_codebook, save_codebook
from pipelines.codebook_fit import LEVELS, CodebookFit, fit_codebook, read_levels
from pipelines.engines import Engines
from schemas.config import TokenizeConfig
from tests.model.test_kmeans import rows_of, true_labels

SETTINGS = TokenizeConfig(levels=3, codes=(6, 4, 9), iterations=5)
ROWS = 120


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["normal", "grid", "duplicates", "far"]),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_a_replay_in_numpy_gives_the_codes_of_a_saved_codebook(kind: str, sizes: list[int], seed: int) -> None:
    """Centroids are rows and their repetitions, so that rows lie on them and ties abound."""
    x = rows_of(kind, 50, 6, seed)
    picks = torch.Generator().manual_seed(seed)
    codebook = Codebook(
        [x[torch.randint(0, 20, (size,), generator=picks)] / (level + 1) for level, size in enumerate(sizes)]
    )
    with tempfile.TemporaryDirectory() as folder:
        save_codebook(Path(folder), codebook)
        codes = encode(read_codebook(Path(folder)), x, chunk=17).numpy()
        levels = load_file(Path(folder) / "codebook.safetensors")
    residual = x.numpy().copy()
    for level in range(len(sizes)):
        labels = true_labels(residual, levels[f"level_{level}"])
        assert np.array_equal(labels, codes[:, level])
        residual -= levels[f"level_{level}"][labels]


def items(ray: Any, rows: int = ROWS) -> Any:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows_of("normal", rows, 8, 1).numpy().ravel()), 8)
    table = pa.table({"item_id": np.arange(rows) * 3, "vector": vectors.cast(pa.list_(pa.float32()))})
    return ray.data.from_arrow(table)


def same(a: CodebookFit, b: CodebookFit) -> bool:
    pairs = zip(a.codebook.centroids, b.codebook.centroids, strict=True)
    equal = all(x.numpy().tobytes() == y.numpy().tobytes() for x, y in pairs)
    return equal and a.inertia == b.inertia and np.array_equal(a.codes, b.codes) and np.array_equal(a.item_ids, b.item_ids)


def test_a_killed_fit_continues_after_its_last_level(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = engines.ray()
    unbroken = fit_codebook(ray, items(ray), ROWS, SETTINGS, tmp_path / "unbroken", "a 1")
    save, fitted = codebook_fit.save_levels, []

    def save_and_end(folder: Path, levels: Levels, identity: str) -> None:
        save(folder, levels, identity)
        if len(levels.centroids) == 2:
            raise KeyboardInterrupt("the end")

    def counted(*arguments: Any, **options: Any) -> Any:
        fitted.append(arguments[2])
        return lloyd(*arguments, **options)

    lloyd = rq_kmeans.lloyd
    monkeypatch.setattr(codebook_fit, "save_levels", save_and_end)
    with pytest.raises(BaseException, match="the end"):
        fit_codebook(ray, items(ray), ROWS, SETTINGS, tmp_path / "killed", "a 1")
    monkeypatch.setattr(codebook_fit, "save_levels", save)
    monkeypatch.setattr(rq_kmeans, "lloyd", counted)
    assert same(fit_codebook(ray, items(ray), ROWS, SETTINGS, tmp_path / "killed", "a 1"), unbroken)
    assert fitted == [9]
    fitted.clear()
    assert same(fit_codebook(ray, items(ray), ROWS, SETTINGS, tmp_path / "killed", "a 2"), unbroken)
    assert fitted == [6, 4, 9]


def test_levels_of_another_fit_are_none_of_ours(tmp_path: Path) -> None:
    levels = Levels([torch.ones(2, 3)], [[1.5, 0.1]], [torch.arange(5, dtype=torch.int32)])
    codebook_fit.save_levels(tmp_path, levels, "one")
    found = read_levels(tmp_path, "one")
    assert found.inertia == levels.inertia and torch.equal(found.centroids[0], levels.centroids[0])
    assert torch.equal(found.labels[0], levels.labels[0])
    assert read_levels(tmp_path, "two") == read_levels(tmp_path / "nowhere", "one") == Levels([], [])


def train_workers() -> list[int]:
    """The processes of the worker group that is alive."""
    from ray.util.state import list_actors

    found = list_actors(filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")])
    return [actor.pid for actor in found]


@pytest.mark.long
def test_a_worker_that_is_killed_is_started_again_and_the_fit_continues(engines: Engines, tmp_path: Path) -> None:
    ray, rows = engines.ray(), 40_000
    settings = TokenizeConfig(levels=3, codes=256, iterations=15, tolerance=0.0)
    alone = fit_codebook(ray, items(ray, rows), rows, settings, tmp_path / "alone")
    killed: list[int] = []

    def kill_after_a_level() -> None:
        until = time.monotonic() + 300
        while not (tmp_path / "two" / LEVELS).is_file() and time.monotonic() < until:
            time.sleep(0.02)
        pid = train_workers()[-1]
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    killer = threading.Thread(target=kill_after_a_level)
    killer.start()
    two = dataclasses.replace(settings, num_workers=2)
    result = fit_codebook(ray, items(ray, rows), rows, two, tmp_path / "two")
    killer.join()
    assert len(killed) == 1
    assert same(result, alone)
