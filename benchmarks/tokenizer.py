"""RQ-Kmeans beside the same chain of K-means by others, codes of a table that is larger than the memory, encoded titles.

`fit`: three levels of K codes, 10 iterations each. All systems get the same float32 vectors, one thread a process, and at
each level first centroids by our rule on their own residuals, which are part of everyone's time. `lazyrec` runs in one
process and in two gloo processes that hold half the rows each, whose start (interpreters, imports, rendezvous) stands
apart. faiss is a chain of `faiss.Kmeans` on all rows, scikit-learn `KMeans` by Lloyd and Elkan (where its bounds, 4 bytes a
row and code, fit) and `MiniBatchKMeans` with 10 passes.

seconds  wall time of first centroids, fit, last assignment and residuals; `cpu` is that of all processes
peak     MiB of the whole processes, imports and vectors among them
losses   sum of squared distances that each level leaves, in float64, by the first of our rows for the same size
bits     the first letters of a hash of all centroids and codes: alike for any number of our workers

Vectors: 64 topics by Zipf's law (exponent 1.3) with normal centres, 1,024 themes of half their spread, evenly, and noise
of 0.3: topic + theme + noise. `assign a streamed table` writes such vectors as Parquet, then encodes them batch by batch
with 3 x 256 codes in a process whose private memory is limited to 2 GiB. `encode titles` gives made-up titles of 2 to 30
words to the encoder stage, whose actors start within its time (told apart, as that of one title), and to the same model
in this process, loaded before.

    python -m benchmarks.tokenizer [--fresh]

The cells of FULL=1 go to 10^6 vectors, 256 dimensions and 8,192 codes, and a table of 6 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # before NumPy and the others look
    os.environ[variable] = "1"

import faiss  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from model.nearest import label_distances  # noqa: E402
from model.reduction import Alone, reducer_of_process  # noqa: E402
from model.rq_kmeans import Codebook, encode, fit  # noqa: E402
from model.seeding import seed_centroids  # noqa: E402
from schemas.config import EmbedConfig, ResourceConfig, TokenizeConfig  # noqa: E402

OUT = Path(__file__).resolve().parent / "out" / "tokenizer.jsonl"
LEVELS, ITERATIONS = 3, 10
BLOCK = 50_000  # rows that are drawn together
ELKAN_CELLS = 3 * 10**8  # rows times codes
LIMIT = 2 * 2**30
STREAM, FIT, ENCODE = "assign a streamed table", "fit", "encode titles"
SMALL = [(10**5, 64, 256), (10**5, 64, 1_024), (10**5, 256, 256), (3 * 10**5, 64, 256), (3 * 10**5, 64, 1_024)]
WHOLE = [
    (n, d, k) for n in (10**5, 3 * 10**5, 10**6) for d in (64, 256) for k in (256, 1_024, 8_192) if k < 8_192 or n == 10**5
]
TITLES = {"0": 4_000, "1": 40_000}
STREAMED = {"0": 10**6, "1": 6 * 10**9 // 256}  # rows of 64 dimensions
Fitted = tuple[list[np.ndarray], np.ndarray]  # centroids of each level, codes [N, L]
KMeans = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]  # vectors, first centroids: centroids, labels


def vectors(start: int, stop: int, width: int) -> np.ndarray:
    """float32 [stop - start, width]: rows of an endless table."""
    shape = np.random.default_rng(width)
    topics, themes = shape.normal(size=(64, width)), 0.5 * shape.normal(size=(1_024, width))
    parts = [np.zeros((0, width), np.float32)]
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        rng = np.random.default_rng([width, block])
        topic, theme = np.minimum(rng.zipf(1.3, BLOCK) - 1, 63), rng.integers(0, 1_024, BLOCK)
        rows = (topics[topic] + themes[theme] + 0.3 * rng.normal(size=(BLOCK, width))).astype(np.float32)
        parts.append(rows[max(0, start - block * BLOCK) : stop - block * BLOCK])
    return np.concatenate(parts)


def by_faiss(x: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    peer = faiss.Kmeans(x.shape[1], len(first), niter=ITERATIONS, min_points_per_centroid=1, max_points_per_centroid=10**9)
    peer.train(x, init_centroids=first)
    return np.asarray(peer.centroids), peer.index.search(x, 1)[1][:, 0]


def by_sklearn(algorithm: str) -> KMeans:
    from sklearn.cluster import KMeans as Peer

    def run(x: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        peer = Peer(len(first), init=first, n_init=1, max_iter=ITERATIONS, tol=0, algorithm=algorithm)
        labels = peer.fit_predict(x)
        return peer.cluster_centers_, labels

    return run


def by_minibatches(x: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.cluster import MiniBatchKMeans

    options = {"n_init": 1, "max_iter": ITERATIONS, "batch_size": 4_096, "max_no_improvement": None, "random_state": 0}
    peer = MiniBatchKMeans(len(first), init=first, **options)
    labels = peer.fit_predict(x)
    return peer.cluster_centers_, labels


PEERS: dict[str, Callable[[], KMeans]] = {
    "faiss": lambda: by_faiss,
    "scikit-learn lloyd": lambda: by_sklearn("lloyd"),
    "scikit-learn elkan": lambda: by_sklearn("elkan"),
    "scikit-learn minibatch": lambda: by_minibatches,
}
ENCODER, ENCODER_PEER = "lazyrec, actors", "sentence-transformers, 1 thread"
OURS = {"lazyrec, 1 worker": 1, "lazyrec, 2 workers": 2}


def chain(x: np.ndarray, codes: int, kmeans: KMeans) -> tuple[Fitted, float, float]:
    """A peer on the residuals of each level; wall and CPU seconds."""
    centroids, labels = [], []
    residual, ids = x.copy(), torch.arange(len(x))
    started, used = time.perf_counter(), time.process_time()
    for level in range(LEVELS):
        first = seed_centroids(torch.from_numpy(residual), ids, codes, level, Alone()).numpy()
        found, label = kmeans(residual, first)
        residual -= found[label]
        centroids.append(np.asarray(found, np.float32))
        labels.append(label)
    return (centroids, np.stack(labels, 1)), time.perf_counter() - started, time.process_time() - used


def our_part(rank: int, workers: int, rows: int, width: int, codes: int, folder: str, begun: float) -> dict[str, Any]:
    """One worker's half, or the whole; what the ranks have in common is told by each."""
    if workers > 1:
        rendezvous = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", rendezvous, timeout=timedelta(hours=2), rank=rank, world_size=workers)
        dist.barrier()
    startup = time.time() - begun
    start, stop = rows * rank // workers, rows * (rank + 1) // workers
    x = torch.from_numpy(vectors(start, stop, width))
    settings = TokenizeConfig(levels=LEVELS, codes=codes, iterations=ITERATIONS, tolerance=0.0)
    if workers > 1:
        dist.barrier()
    started, used = time.perf_counter(), time.process_time()
    found = fit(x.clone(), torch.arange(start, stop), settings, reducer_of_process())
    taken = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
    np.save(f"{folder}/codes-{rank}.npy", found.codes_NL.numpy())
    if rank == 0:
        np.savez(f"{folder}/centroids.npz", *[c.numpy() for c in found.codebook.centroids])
    return taken | {"startup_seconds": startup, "peak_mib": peak_mib()}


def ours(workers: int, rows: int, width: int, codes: int) -> tuple[Fitted, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        begun = time.time()
        command = [sys.executable, "-m", "benchmarks.tokenizer", "--worker"]
        parts = [[workers, rows, width, codes, folder, begun]] * workers
        started = [
            subprocess.Popen([*command, json.dumps([rank, *part])], stdout=subprocess.PIPE, text=True)
            for rank, part in enumerate(parts)
        ]
        told = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
        arrays = np.load(f"{folder}/centroids.npz")
        labels = np.concatenate([np.load(f"{folder}/codes-{rank}.npy") for rank in range(workers)])
        sums = {name: sum(one[name] for one in told) for name in ("cpu_seconds", "peak_mib")}
        most = {name: max(one[name] for one in told) for name in ("seconds", "startup_seconds")}
        return ([arrays[name] for name in arrays.files], labels), most | sums


def fit_cell(system: str, rows: int, width: int, codes: int) -> dict[str, Any]:
    if system in OURS:
        found, taken = ours(OURS[system], rows, width, codes)
        x = vectors(0, rows, width)
    else:
        kmeans, x = PEERS[system](), vectors(0, rows, width)
        found, seconds, cpu = chain(x, codes, kmeans)
        taken = {"seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak_mib()}
    centroids, labels = found
    content = b"".join([*(c.tobytes() for c in centroids), labels.astype(np.int32).tobytes()])
    losses, residual = [], torch.from_numpy(x.copy())
    for c, label in zip(centroids, torch.from_numpy(labels.astype(np.int64)).unbind(1), strict=True):
        losses.append(float(label_distances(residual, torch.from_numpy(c), label).sum()))
        residual -= torch.from_numpy(c)[label]
    return taken | {"inertia": losses, "bits": hashlib.sha256(content).hexdigest()[:8]}


def stream_cell(rows: int) -> dict[str, Any]:
    """Writes the table in one process and encodes it in another."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.parquet"
        with pq.ParquetWriter(path, pa.schema([("vector", pa.list_(pa.float32(), 64))]), compression="none") as writer:
            for start in range(0, rows, BLOCK):
                flat = pa.array(vectors(start, min(rows, start + BLOCK), 64).ravel())
                writer.write_table(pa.table([pa.FixedSizeListArray.from_arrays(flat, 64)], names=["vector"]))
        command = [sys.executable, "-m", "benchmarks.tokenizer", "--stream", str(path)]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        return json.loads(told) | {"table_mib": path.stat().st_size / 2**20}


def stream(path: str) -> dict[str, float]:
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    first = torch.from_numpy(vectors(0, 3 * 256, 64))
    codebook, before = Codebook([part / (level + 1) for level, part in enumerate(first.split(256))]), peak_mib()
    started, used, rows = time.perf_counter(), time.process_time(), 0
    for batch in pq.ParquetFile(path, pre_buffer=False).iter_batches(65_536):  # else all of it is read ahead
        flat = batch.column(0).flatten().to_numpy()
        rows += len(encode(codebook, torch.tensor(flat.reshape(-1, 64))))
    taken = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
    return taken | {"rows": rows, "peak_mib": peak_mib(), "peak_before_mib": before}


def titles(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    words = [
        f"{a}{b}"
        for a in ("sun", "river", "stone", "cloud", "ember", "moss")
        for b in ("song", "fall", "light", "ways", "gate")
    ]
    return [" ".join(rng.choice(words, rng.integers(2, 31))) for _ in range(count)]


def encode_cell(system: str, count: int) -> dict[str, Any]:
    from pipelines.engines import Engines  # here, because the start of our workers is measured
    from pipelines.text_encoder import encode_days, encoder_source

    texts, settings = titles(count), EmbedConfig()
    source = encoder_source(settings.encoder)
    if source is None:
        raise SystemExit("The extra `text` is not installed; run make setup.")
    if system == ENCODER_PEER:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(source)
        model.max_seq_length = settings.text_length
        started = time.perf_counter()
        model.encode(texts, batch_size=settings.text_batch, show_progress_bar=False)
        return {"seconds": time.perf_counter() - started, "startup_seconds": 0.0}
    engines = Engines(ResourceConfig())
    ray, taken = engines.ray(), []
    for part in (texts[:1], texts):
        started = time.perf_counter()
        encode_days(ray, [part], source, settings)
        taken.append(time.perf_counter() - started)
    engines.stop()
    return {"startup_seconds": taken[0], "seconds": taken[1]}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cells(full: str) -> Iterator[tuple[str, dict[str, int], str]]:
    """Work, size and system."""
    for rows, width, codes in WHOLE if full == "1" else SMALL:
        for system in (*OURS, *PEERS):
            if system != "scikit-learn elkan" or rows * codes <= ELKAN_CELLS:
                yield FIT, {"rows": rows, "dimensions": width, "codes": codes}, system
    for system in (ENCODER, ENCODER_PEER):
        yield ENCODE, {"titles": TITLES[full]}, system
    yield STREAM, {"rows": STREAMED[full], "dimensions": 64, "codes": 256}, "lazyrec, 1 worker"


def measure(work: str, size: dict[str, int], system: str) -> dict[str, Any]:
    if work == STREAM:
        found = stream_cell(size["rows"])
    else:
        found = encode_cell(system, size["titles"]) if work == ENCODE else fit_cell(system, *size.values())
    return {"work": work, "size": size, "system": system, **found}


def print_tables(rows: list[dict[str, Any]]) -> None:
    fits = [row for row in rows if row["work"] == FIT]
    base = {json.dumps(row["size"]): row["inertia"] for row in fits[::-1] if row["system"] in OURS}
    faiss_seconds = {json.dumps(row["size"]): row["seconds"] for row in fits if row["system"] == "faiss"}
    head = "rows | dimensions | codes | system | seconds | of faiss | cpu, s | start, s | peak, MiB | losses | bits"
    print(f"| {head} |\n{'|---' * 11}|")
    for row in fits:
        ours = base.get(json.dumps(row["size"]), row["inertia"])
        loss = " / ".join(f"{value / own:.4f}" for value, own in zip(row["inertia"], ours, strict=True))
        size = " | ".join(f"{value:,}" for value in row["size"].values())
        start = f"{row['startup_seconds']:.1f}" if row["system"] in OURS else ""
        share = row["seconds"] / faiss_seconds.get(json.dumps(row["size"]), float("nan"))
        taken = f"{row['seconds']:.1f} | {share:.2f} | {row['cpu_seconds']:.1f} | {start} | {row['peak_mib']:.0f}"
        print(f"| {size} | {row['system']} | {taken} | {loss} | {row['bits']} |")
    for row in (row for row in rows if row["work"] == ENCODE):
        count, net = row["size"]["titles"], row["seconds"] - row["startup_seconds"]
        print(
            f"\n{ENCODE}, {row['system']}: {count:,} in {row['seconds']:.1f} s, {count / net:.0f} a second after the start."
        )
    for row in (row for row in rows if row["work"] == STREAM):
        print(
            f"\n{STREAM}: {row['rows']:,} rows ({row['table_mib']:,.0f} MiB) in {row['seconds']:.1f} s, "
            f"peak {row['peak_mib']:.0f} MiB, of which {row['peak_before_mib']:.0f} before the first row."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="run every cell again")
    for name in ("cell", "worker", "stream"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts = {
        arguments.cell: lambda: measure(*json.loads(arguments.cell)),
        arguments.worker: lambda: our_part(*json.loads(arguments.worker)),
        arguments.stream: lambda: stream(arguments.stream),
    }
    if todo := next((given for given in parts if given), None):
        print(json.dumps(parts[todo]()))
        return
    OUT.parent.mkdir(parents=True, exist_ok=True)
    rows = [] if arguments.fresh or not OUT.is_file() else [json.loads(line) for line in OUT.read_text().splitlines()]
    for cell in cells("1" if os.environ.get("FULL") == "1" else "0"):
        if any((row["work"], row["size"], row["system"]) == cell for row in rows):
            continue
        command = [sys.executable, "-m", "benchmarks.tokenizer", "--cell", json.dumps(cell)]
        rows.append(
            json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        )
        OUT.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print_tables(rows)


if __name__ == "__main__":
    main()
