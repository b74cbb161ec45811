"""Lifelong compression: users a CPU second by the length of the history, beside the same hierarchy by others.

The histories are simulated: items of 40 interests, drawn by Zipf's law, 64 dimensions, each item with a vector of its own
around its interest's; three quarters of the events are of distinct items. One thread, so a CPU second is a second of one
core, whatever else the machine does. All systems split the same
sets in the same order, from the same first centres, with the same number of moves; they differ in the K-means of one set:
ours (`jobs.history_clusters.lloyd`), scikit-learn's `KMeans` (Lloyd) and faiss's `Kmeans`. `spread` is the mean squared
distance of an event from its cluster's centre as a share of that from the history's mean: lower is better.
Peak memory is of the whole process, which holds one user; each cell runs in a process of its own.

    python -m benchmarks.lifelong [--fresh]

FULL=1 measures more users a cell.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
for variable in THREADS:  # before NumPy, scikit-learn and faiss look
    os.environ[variable] = "1"

import numpy as np  # noqa: E402

from jobs.history_clusters import Arrays, KMeans, compress, hierarchy, lloyd, means, points_of  # noqa: E402
from schemas.config import LifelongConfig  # noqa: E402

OUT = Path(__file__).resolve().parent / "out" / "lifelong.jsonl"
LENGTHS = (100, 1_000, 10_000, 100_000)
SYSTEMS = ("lazyrec", "scikit-learn", "faiss")
DIMENSIONS = 64
INTERESTS = 40
SETTINGS = LifelongConfig()
SECONDS = 10.0  # of a cell, at least one user


def user(length: int, seed: int) -> tuple[Arrays, Arrays]:
    """Events of one simulated user, and the vectors of the items among them."""
    rng = np.random.default_rng([length, seed])
    catalogue = 2 * length
    interest = rng.zipf(1.5, catalogue) % INTERESTS
    centres = rng.normal(size=(INTERESTS, DIMENSIONS))
    vectors = (centres[interest] + 0.7 * rng.normal(size=(catalogue, DIMENSIONS))).astype(np.float32)
    items = np.minimum((catalogue * rng.random(length) ** 1.5).astype(np.int64), catalogue - 1)
    events = {
        "impression_ids": rng.permutation(length),
        "item_ids": items,
        "author_ids": items % 1_000,
        "ts_us": np.sort(rng.integers(0, 10**15, length)),
        "play_ms": rng.integers(-1, 60_000, length),
        "duration_ms": rng.integers(1, 60_000, length),
        "feedback": rng.integers(0, 256, length).astype(np.int32),
    }
    return events, {"item_ids": np.arange(catalogue), "vectors": vectors}


def by_sklearn(x_PD: np.ndarray, weights_P: np.ndarray, k: int, iterations: int) -> np.ndarray:
    from sklearn.cluster import KMeans as Peer

    peer = Peer(k, init=x_PD[:k], n_init=1, max_iter=iterations, tol=0, algorithm="lloyd", copy_x=False)
    return peer.fit(x_PD, sample_weight=weights_P).labels_.astype(np.int64)


def by_faiss(x_PD: np.ndarray, weights_P: np.ndarray, k: int, iterations: int) -> np.ndarray:
    import faiss

    x = x_PD.astype(np.float32)
    peer = faiss.Kmeans(x.shape[1], k, niter=iterations, min_points_per_centroid=1, max_points_per_centroid=10**9)
    peer.train(x, weights=weights_P.astype(np.float32), init_centroids=x[:k].copy())
    return peer.index.search(x, 1)[1][:, 0]


KMEANS: dict[str, KMeans] = {"lazyrec": lloyd, "scikit-learn": by_sklearn, "faiss": by_faiss}


def spread(events: Arrays, vectors: Arrays, kmeans: KMeans) -> float:
    points = points_of(events["item_ids"], vectors["item_ids"], vectors["vectors"])
    labels = hierarchy(points.x_PD, points.weights_P, SETTINGS, kmeans)
    none = np.zeros((labels.max() + 1, DIMENSIONS))
    centres = means(points.x_PD, points.weights_P, labels, none)[labels]
    mean = np.average(points.x_PD, axis=0, weights=points.weights_P)
    within, whole = (np.square(points.x_PD - c).sum(axis=1) @ points.weights_P for c in (centres, mean))
    return float(within / whole)


def measure(system: str, length: int, seconds: float) -> dict[str, Any]:
    """One cell: as many users as fit into the time."""
    taken: list[float] = []
    tokens = 0
    while sum(taken) < seconds and len(taken) < 1_000:
        events, vectors = user(length, len(taken))
        started = time.process_time()
        made = compress(events, vectors, SETTINGS, KMEANS[system])
        taken.append(time.process_time() - started)
        tokens = max(tokens, len(made["weights"]))
        assert made["weights"].sum() == length
    return {
        "work": "compress_one_history",
        "size": {"events": length, "dimensions": DIMENSIONS},
        "system": system,
        "users": len(taken),
        "users_per_cpu_second": len(taken) / sum(taken),
        "cpu_seconds_median": float(np.median(taken)),
        "cpu_seconds_most": max(taken),
        "tokens": tokens,
        "spread": spread(*user(length, 0), KMEANS[system]) if length > SETTINGS.tokens else 0.0,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def cells() -> Iterator[tuple[int, str]]:
    for length in LENGTHS:
        yield from ((length, system) for system in (SYSTEMS if length > SETTINGS.tokens else SYSTEMS[:1]))


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| events | system | users a CPU second | longest, s | tokens | spread | peak, MiB |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        speed, longest = f"{row['users_per_cpu_second']:,.2f}", f"{row['cpu_seconds_most']:.3f}"
        spent = f"{row['tokens']:,} | {row['spread']:.4f} | {row['peak_mib']:.0f}"
        print(f"| {row['size']['events']:,} | {row['system']} | {speed} | {longest} | {spent} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="run every cell again")
    parser.add_argument("--cell", nargs=2, metavar=("EVENTS", "SYSTEM"), help="one cell, as a JSON line")
    arguments = parser.parse_args()
    seconds = SECONDS * (3 if os.environ.get("FULL") == "1" else 1)
    if arguments.cell:
        print(json.dumps(measure(arguments.cell[1], int(arguments.cell[0]), seconds)))
        return
    OUT.parent.mkdir(parents=True, exist_ok=True)
    rows = [] if arguments.fresh or not OUT.is_file() else [json.loads(line) for line in OUT.read_text().splitlines()]
    done = {(row["size"]["events"], row["system"]) for row in rows}
    for length, system in cells():
        if (length, system) in done:
            continue
        command = [sys.executable, "-m", "benchmarks.lifelong", "--cell", str(length), system]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
        OUT.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print_table(rows)


if __name__ == "__main__":
    main()
