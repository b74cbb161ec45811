"""The page of several seeds: a user brings the targets of all seeds to a resample."""

from __future__ import annotations

import json

import numpy as np

from benchmarks.compare_baselines import page
from benchmarks.comparison import Row
from schemas.config import EvaluateConfig

TARGETS = 300
CONFIG = EvaluateConfig(cutoffs=(10, 50), bootstrap=200)


def a_seed(seed: int) -> Row:
    rng = np.random.default_rng(seed)
    return {
        "user": np.arange(TARGETS) // 3,
        "item": np.arange(TARGETS) % 7,
        "history": np.zeros(TARGETS, np.int64),
        "deep": np.zeros(TARGETS, bool),
        "rank model": rng.integers(0, 30, TARGETS),
        "rank popularity": rng.integers(0, 60, TARGETS),
        "counts": np.arange(7),
        "chose": np.array(json.dumps({"model": {"item_share": 1.0}})),
    }


def row_of(seeds: list[Row], start: str, table: int = 0) -> list[str]:
    """The cells of a row, of the first table that has one or of a later one."""
    found = [line for line in page(seeds, CONFIG) if line.startswith(start)]
    return [cell.strip() for cell in found[table].split("|")[2:-1]]


def test_a_mean_is_over_the_seeds_and_each_seed_is_shown() -> None:
    seeds = [a_seed(seed) for seed in (1, 2, 3)]
    recall = [(seed["rank model"] < 10).mean() for seed in seeds]
    cells = row_of(seeds, "| model ")
    assert abs(float(cells[0].split()[0]) - np.mean(recall)) <= 0.00005
    assert [float(cell) for cell in cells[3].split(", ")] == [round(each, 4) for each in recall]


def test_the_same_seed_three_times_is_as_sure_as_once() -> None:
    once, thrice = ([a_seed(1)], [a_seed(1)] * 3)
    assert row_of(once, "| model ")[:3] == row_of(thrice, "| model ")[:3]
    assert row_of(once, "| popularity ", 1) == row_of(thrice, "| popularity ", 1)  # minus the model


def test_positives_of_a_kind_are_counted_once() -> None:
    kinds = np.array(["cold", "tail", "tail", "tail", "tail", "head", "head"])[a_seed(1)["item"]]
    for kind in ("head", "tail", "cold"):
        assert [row_of([a_seed(1)] * n, f"| {kind} items")[0] for n in (1, 3)] == [str((kinds == kind).sum())] * 2
