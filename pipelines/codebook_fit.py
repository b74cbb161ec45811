"""RQ-Kmeans as a Ray Train run: each worker streams its rows of item_embeddings and keeps them, all fit together.

Ray Train's own split drops rows to make shards equal; K-means needs every row exactly once and does not mind unequal
shards, hence `EveryRow`. With 0 workers the same function runs in this process. Workers leave their codes as one Parquet
file each, rank 0 the codebook, in `folder`, which must be reachable from all (the lake is). Memory of a worker: its rows
(4 x width bytes each) and the pool of seeds.

A level takes long where there are many rows, so rank 0 keeps the levels so far in `folder`. A fit that is started again
there, and the workers that Ray Train starts for lost ones, continue after them and end with the same bits. Levels of
another identity (settings, vectors) are ignored.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ray.data import DataIterator, Dataset
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig, get_context, get_dataset_shard
from ray.train.torch import TorchTrainer
from safetensors import safe_open
from safetensors.torch import save_file

from model.reduction import Reducer, reducer_of_process
from model.rq_kmeans import Codebook, Levels, fit
from pipelines.codebook import read_codebook, save_codebook
from pipelines.devices import enough_gpus, worker_device
from pipelines.embed import absolute
from pipelines.item_vectors import matrix_of
from pipelines.ray_tables import read_dataset
from pipelines.stage import StageContext
from schemas.config import RqConfig
from schemas.errors import ContractViolation
from schemas.loader import to_mapping

DATASET = "items"
VECTORS = "item_embeddings"
BLOCKS_A_WORKER = 4  # finer blocks spread the rows more evenly
LEVELS = "levels.safetensors"  # of a fit that is not done
RESTARTS = 2  # of lost workers


@dataclass(frozen=True)
class CodebookFit:
    """Codes of all fitted items, sorted by item id."""

    codebook: Codebook
    item_ids: np.ndarray  # int64 [N], sorted
    codes: np.ndarray  # int32 [N, L]
    inertia: list[list[float]]  # by level and iteration


class EveryRow(DataConfig):
    """Splits the data without dropping a row; shards may differ in size, and one may be empty."""

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *args: Any, **kwargs: Any
    ) -> list[dict[str, DataIterator]]:
        shards = datasets[DATASET].streaming_split(world_size, equal=False)
        return [{DATASET: shard} for shard in shards]


def fit_stage_codebook(context: StageContext, version: str, settings: RqConfig) -> CodebookFit:
    """Fits on the vectors of the fit day, or continues a killed run's fit; nothing is left in the artifact folder `version`
    of the stage."""
    fit_day, lake, pin = context.calendar.fit_day, absolute(context.lake), context.pins[VECTORS]
    folder = lake.artifact(context.plan.spec.name, version)
    ray = context.engines.ray()
    items = read_dataset(lake, VECTORS, pin, ["item_id", "vector"], [fit_day])
    scratch, rows = folder / "fit", lake.rows_by_day(VECTORS, pin).get(fit_day, 0)
    result = fit_codebook(ray, items, rows, settings, scratch, f"{version} {pin}")
    shutil.rmtree(scratch)
    return result


def fit_codebook(ray: Any, items: Dataset, rows: int, settings: RqConfig, folder: Path, vectors: str = "") -> CodebookFit:
    """Fits on all `rows` of `items` (item_id, vector), or continues a fit in `folder` of the same `vectors` (their name
    and version). Raises ContractViolation where a row is lost or an id repeats."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "train", ignore_errors=True)  # what Ray Train knows of a killed run
    identity = json.dumps([to_mapping(settings, identity=True), rows, vectors])
    workers = settings.num_workers
    if workers > 1:
        items = items.repartition(target_num_rows_per_block=max(1, math.ceil(rows / (workers * BLOCKS_A_WORKER))))
    TorchTrainer(
        fit_worker,
        train_loop_config={"settings": settings, "folder": str(folder.absolute()), "identity": identity},
        scaling_config=scaling(ray, workers),
        run_config=RunConfig(
            name="fit",
            storage_path=str(folder.absolute() / "train"),
            failure_config=FailureConfig(max_failures=RESTARTS if workers else 0),
        ),
        datasets={DATASET: items},
        dataset_config=EveryRow(),
    ).fit()
    return collect(folder, max(1, workers), rows)


def scaling(ray: Any, workers: int) -> ScalingConfig:
    """A GPU a worker where there are enough; CPUs such that half of them stay free for reading; rows on every node."""
    available = ray.cluster_resources()
    use_gpu = enough_gpus(available, workers)
    share = min(1.0, available.get("CPU", 1.0) / (2 * max(1, workers)))
    each = {"CPU": share, "GPU": int(use_gpu)}
    return ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=each, placement_strategy="SPREAD")


def fit_worker(config: dict[str, Any]) -> None:
    """One rank's part: gathers its rows, fits with the others, writes its codes; rank 0 also the codebook."""
    folder, settings = Path(config["folder"]), config["settings"]
    rank = get_context().get_world_rank()
    device = worker_device(settings.num_workers)
    reducer = reducer_of_process()
    ids_N, x_ND = gather_rows(get_dataset_shard(DATASET).iter_batches(batch_size=8192, batch_format="pyarrow"))
    x_ND, ids_N = common_width(x_ND.to(device), reducer), ids_N.to(device)
    earlier = common_levels(read_levels(folder, config["identity"]), reducer, device)

    def keep(levels: Levels) -> None:
        if rank == 0:
            save_levels(folder, levels, config["identity"])

    result = fit(x_ND, ids_N, settings, reducer, earlier, keep)
    write_codes(folder / f"codes-{rank}.parquet", ids_N.cpu().numpy(), result.codes_NL.cpu().numpy())
    if rank == 0:
        save_codebook(folder, result.codebook)
        (folder / "inertia.json").write_text(json.dumps(result.inertia))


def gather_rows(batches: Iterable[pa.Table]) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [n] and float32 [n, D] of all batches; D is 0 without rows. Raises ContractViolation for mixed widths."""
    ids, vectors = [np.zeros(0, np.int64)], []
    for batch in batches:
        if len(batch):
            ids.append(batch.column("item_id").to_numpy())
            vectors.append(matrix_of(batch.column("vector")))
    widths = {part.shape[1] for part in vectors}
    if len(widths) > 1:
        raise ContractViolation(f"Table item_embeddings mixes vectors of {sorted(widths)} dimensions; rerun stage embed.")
    x = np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float32)
    return torch.from_numpy(np.concatenate(ids)), torch.from_numpy(x)


def common_width(x_ND: torch.Tensor, reducer: Reducer) -> torch.Tensor:
    """A rank without rows learns the width from the others."""
    width = int(reducer.reduce(torch.tensor([x_ND.shape[1]], device=x_ND.device), "max"))
    if len(x_ND) and x_ND.shape[1] != width:
        raise ContractViolation("Table item_embeddings mixes vectors of different dimensions; rerun stage embed.")
    return x_ND if len(x_ND) else x_ND.new_zeros(0, width)


def save_levels(folder: Path, levels: Levels, identity: str) -> None:
    """They appear whole or not at all."""
    parts = {"level": levels.centroids, "labels": levels.labels}
    tensors = {
        f"{part}_{level}": each.cpu().contiguous() for part, all_ in parts.items() for level, each in enumerate(all_)
    }
    draft = folder / f"{LEVELS}.draft"
    told = {"identity": identity, "inertia": json.dumps(levels.inertia), "labels": str(len(levels.labels))}
    save_file(tensors, draft, metadata=told)
    os.replace(draft, folder / LEVELS)


def read_levels(folder: Path, identity: str) -> Levels:
    """The levels of a fit of this identity that did not end; none where there was no such fit."""
    if not (folder / LEVELS).is_file():
        return Levels([], [])
    with safe_open(folder / LEVELS, "pt") as file:
        told = file.metadata()
        if told["identity"] != identity:
            return Levels([], [])
        inertia = json.loads(told["inertia"])
        labels = [file.get_tensor(f"labels_{level}") for level in range(int(told["labels"]))]
        return Levels([file.get_tensor(f"level_{level}") for level in range(len(inertia))], inertia, labels)


def common_levels(found: Levels, reducer: Reducer, device: torch.device) -> Levels:
    """What every rank has found: a shared mount may show the newest file to some ranks only."""
    common = found.upto(int(reducer.reduce(torch.tensor([len(found.inertia)], device=device), "min")))
    centroids, labels = ([each.to(device) for each in part] for part in (common.centroids, common.labels))
    return Levels(centroids, common.inertia, labels)


def write_codes(path: Path, ids: np.ndarray, codes: np.ndarray) -> None:
    columns = {f"code_{level}": codes[:, level] for level in range(codes.shape[1])}
    pq.write_table(pa.table({"item_id": ids} | columns), path)


def collect(folder: Path, workers: int, rows: int) -> CodebookFit:
    """The codes of all ranks. Raises ContractViolation unless every row was assigned exactly once."""
    table = pa.concat_tables([pq.read_table(folder / f"codes-{rank}.parquet") for rank in range(workers)])
    table = table.sort_by("item_id")
    ids = table.column("item_id").to_numpy()
    if len(ids) != rows or (ids[1:] == ids[:-1]).any():
        raise ContractViolation(
            f"K-means saw {len(ids):,} rows ({len(np.unique(ids)):,} items) of the {rows:,} in table item_embeddings; "
            "rerun stage embed, and look for an item with two rows in one partition."
        )
    codes = np.stack([table.column(name).to_numpy() for name in table.column_names[1:]], axis=1)
    return CodebookFit(read_codebook(folder), ids, codes, json.loads((folder / "inertia.json").read_text()))
