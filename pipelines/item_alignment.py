"""The aligner of item vectors as a Ray Train run, on the item pairs of the days up to the fit day.

A Ray task sums the pairs and leaves them as arrays in `folder`, beside the items' content; every worker maps them into
memory, reads the same batches and encodes its share of each, and the shares meet before the loss, so that the negatives
are those of the whole batch whatever the number of workers. With 0 workers the same function runs in this process. Held
out pairs end the training and choose its best epoch. A killed run begins anew: minutes, like the fit of the codebook.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ray.train import RunConfig, get_context
from ray.train.torch import TorchTrainer
from torch import Tensor, nn

from model.item_aligner import (
    Aligner,
    ContentLossFactory,
    Objective,
    Reconstruction,
    build_aligner,
    contrastive_nll,
)
from model.reduction import reducer_of_process
from model.seeding import hash64
from pipelines.checkpoints import load_aligner, save_aligner
from pipelines.codebook_fit import scaling
from pipelines.devices import worker_device
from pipelines.pair_vectors import summed_pairs
from schemas.item_alignment import ItemAlignmentConfig
from schemas.lake import Lake

WEIGHTS, HISTORY = "aligner.safetensors", "history.json"
DIRECTED = "user_to_item"
VALIDATION_BATCHES = 20  # at most


@dataclass(frozen=True)
class Pairs:
    """Pairs as rows of the items with content: int32 [P, 2], and a weight each, of mean 1 within a kind."""

    rows_P2: np.ndarray
    weights_P: np.ndarray  # float32 [P]

    def __len__(self) -> int:
        return len(self.weights_P)

    def save(self, folder: Path, name: str) -> None:
        np.save(folder / f"{name}_rows.npy", self.rows_P2)
        np.save(folder / f"{name}_weights.npy", self.weights_P)

    @staticmethod
    def load(folder: Path, name: str) -> Pairs:
        rows, weights = (np.load(folder / f"{name}_{part}.npy", mmap_mode="r") for part in ("rows", "weights"))
        return Pairs(rows, weights)


@dataclass(frozen=True)
class Alignment:
    """A trained aligner, and what its training says: one row an epoch."""

    aligner: Aligner
    history: list[dict[str, float]]

    def series(self) -> dict[str, list[tuple[int, float]]]:
        names = [name for name in self.history[0] if name != "epoch"]
        return {f"aligner_{name}": [(int(row["epoch"]), row[name]) for row in self.history] for name in names}


def align_items(
    ray: Any,
    lake: Lake,
    version: int,
    days: Sequence[datetime.date],
    ids: np.ndarray,
    blocks: Sequence[np.ndarray],
    settings: ItemAlignmentConfig,
    folder: Path,
    content_loss: ContentLossFactory = Reconstruction,
) -> Alignment | None:
    """Trains on the pairs of `days` of the items `ids` (int64 [N], sorted), whose content is `blocks` (float32 [N, W_b],
    rows of length 1 or zero). None where no pair has content on both sides. `folder` must be reachable from all workers."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    content_NW = np.concatenate(blocks, axis=1)
    kept = content_NW.any(1)
    np.save(folder / "content.npy", content_NW[kept])
    if not ray.get(ray.remote(prepare_pairs).remote(lake, version, list(days), ids[kept], settings, folder)):
        return None
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    loop = {
        "settings": settings,
        "folder": str(folder),
        "widths": [b.shape[1] for b in blocks],
        "content_loss": content_loss,
    }
    TorchTrainer(
        align_worker,
        train_loop_config=loop,
        scaling_config=scaling(ray, settings.num_workers),
        run_config=RunConfig(name="align_items", storage_path=str(folder / "train")),
    ).fit()
    return Alignment(load_aligner(folder / WEIGHTS), json.loads((folder / HISTORY).read_text()))


def prepare_pairs(
    lake: Lake,
    version: int,
    days: Sequence[datetime.date],
    ids: np.ndarray,
    settings: ItemAlignmentConfig,
    folder: Path,
) -> int:
    """Leaves the pairs that train and those that validate in `folder`; the number of the former."""
    by_day = settings.held_out == "day" and len(days) > 1
    train = rows_of(lake, version, days[:-1] if by_day else days, ids, settings)
    if by_day:
        held_out = rows_of(lake, version, days[-1:], ids, settings)
    else:
        train, held_out = split_by_share(train, settings)
    train.save(folder, "train")
    held_out.save(folder, "held_out")
    return len(train)


def rows_of(
    lake: Lake, version: int, days: Sequence[datetime.date], ids: np.ndarray, settings: ItemAlignmentConfig
) -> Pairs:
    """Pairs of all kinds between `ids`, sorted. A pair of two kinds has the sum of its weights. Where the loss has a
    direction, those of a kind without one stand in both."""
    parts = []
    for kind in settings.kinds:
        found = summed_pairs(lake, version, days, kind)
        first, second, weights = (found.column(name).to_numpy() for name in ("item_a", "item_b", "weight"))
        both = np.isin(first, ids) & np.isin(second, ids)
        ends = np.searchsorted(ids, np.stack([first, second], axis=1)[both])
        weights = weights[both] / max(weights[both].mean(), 1e-12) if both.any() else weights[both]
        parts.append((ends, weights))
        if not settings.symmetric and kind != DIRECTED:
            parts.append((ends[:, ::-1], weights))
    rows, weights = (np.concatenate(values) for values in zip(*parts, strict=True))
    distinct, places = np.unique(rows, axis=0, return_inverse=True)
    summed = np.bincount(places.ravel(), weights, len(distinct))
    return Pairs(distinct.astype(np.int32), summed.astype(np.float32))


def split_by_share(pairs: Pairs, settings: ItemAlignmentConfig) -> tuple[Pairs, Pairs]:
    """Pairs that train and pairs that are held out, by a hash of the two items, whichever comes first."""
    low, high = (hash64(side, settings.seed) for side in (pairs.rows_P2.min(1, initial=0), pairs.rows_P2.max(1, initial=0)))
    chosen = hash64(low ^ (high >> 1), settings.seed) < settings.held_out_share * 2.0**63
    return tuple(Pairs(pairs.rows_P2[part], pairs.weights_P[part]) for part in (~chosen, chosen))  # type: ignore[return-value]


def align_worker(config: dict[str, Any]) -> None:
    """One rank's part of the training; rank 0 leaves the best epoch's weights and the history in the folder."""
    with torch.random.fork_rng(devices=[]):
        Training(config).run()


class Training:
    """Epochs over the pairs in batches by seed, validated after each."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.settings: ItemAlignmentConfig = config["settings"]
        self.folder, widths = Path(config["folder"]), config["widths"]
        self.rank, self.world = get_context().get_world_rank(), get_context().get_world_size()
        self.device = worker_device(self.settings.num_workers)
        self.content_NW = np.load(self.folder / "content.npy", mmap_mode="r")
        self.train, self.held_out = (Pairs.load(self.folder, name) for name in ("train", "held_out"))
        self.log_chance_N = log_chances(self.train, len(self.content_NW)) if self.settings.popularity_correction else None
        torch.manual_seed(self.settings.seed)  # the same weights on every worker
        self.aligner = build_aligner(widths, self.settings)
        objective = Objective(self.aligner, config["content_loss"](widths, self.settings)).to(self.device)
        self.objective: nn.Module = objective if self.world == 1 else nn.parallel.DistributedDataParallel(objective)
        self.optimizer = torch.optim.AdamW(
            objective.parameters(), lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )
        torch.manual_seed(self.settings.seed + 1 + self.rank)  # dropout
        self.history: list[dict[str, float]] = []

    def run(self) -> None:
        best, kept, waited = float("inf"), self._weights(), 0
        for epoch in range(self.settings.epochs):
            row = {"epoch": float(epoch), **self._epoch(epoch)}
            if len(self.held_out):
                row["validation_loss"] = self._validate()
            self.history.append(row)
            waited += 1
            if row.get("validation_loss", -float(epoch)) < best:
                best, kept, waited = row.get("validation_loss", -float(epoch)), self._weights(), 0
            if waited == self.settings.patience:
                break
        self.aligner.load_state_dict(kept)
        if self.rank == 0:
            save_aligner(self.folder / WEIGHTS, self.aligner, self.settings)
            (self.folder / HISTORY).write_text(json.dumps(self.history))

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.aligner.state_dict().items()}

    def _epoch(self, epoch: int) -> dict[str, float]:
        """Mean losses of the epoch's batches, of this rank's shares."""
        self.objective.train()
        sums = np.zeros(2)
        steps = 0
        for places in batches(len(self.train), self.settings.batch_pairs, [self.settings.seed, epoch]):
            contrast, content = self._losses(self.train, places)
            (contrast + self.settings.content_weight * content).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            sums, steps = sums + np.array([contrast.item(), content.item()]), steps + 1
        return dict(zip(("loss", "content_loss"), (sums / steps).tolist(), strict=True))

    @torch.no_grad()
    def _validate(self) -> float:
        """The contrastive loss of held out pairs, in the order of a fixed seed; equal on every rank."""
        self.objective.eval()
        found = [
            self._losses(self.held_out, places)[0]
            for places, _ in zip(
                batches(len(self.held_out), self.settings.batch_pairs, [self.settings.seed]),
                range(VALIDATION_BATCHES),
                strict=False,
            )
        ]
        sums = reducer_of_process().gather(torch.stack(found).mean()[None])
        return float(sums.mean())

    def _losses(self, pairs: Pairs, places: np.ndarray) -> tuple[Tensor, Tensor]:
        """The contrastive loss and the content loss of a batch, times the workers: Ray Train averages their gradients."""
        rows_S2, weights_S = share(pairs, places, self.rank, self.world)
        weights_S = weights_S**self.settings.weight_power * (rows_S2[:, 0] >= 0)
        whole = pairs.weights_P[places].astype(np.float64) ** self.settings.weight_power
        factor = torch.from_numpy(weights_S * self.world / whole.sum()).float().to(self.device)
        rows_T = torch.from_numpy(rows_S2.T.reshape(-1).astype(np.int64)).to(self.device)
        content_TW = torch.from_numpy(self.content_NW[rows_T.cpu().clamp(min=0).numpy()]).to(self.device)
        vectors_TD, lost_T = self.objective(rows_T, content_TW)
        halves = zip(vectors_TD.chunk(2), rows_T.chunk(2), strict=True)
        first, second = ((vectors, rows, *self._everyone(vectors, rows)) for vectors, rows in halves)
        nll_S = self._nll(first, second)
        if self.settings.symmetric:
            nll_S = (nll_S + self._nll(second, first)) / 2
        lost_S = lost_T.view(2, -1).mean(0)
        there = torch.from_numpy(rows_S2[:, 0] >= 0).to(self.device)
        return (nll_S * factor).sum(), (lost_S * there).sum() * self.world / len(places)

    def _nll(self, near: tuple[Tensor, ...], far: tuple[Tensor, ...]) -> Tensor:
        """float32 [S]: each of this rank's vectors of one side finds its partner among all of the other side."""
        vectors_SD, rows_S = near[:2]
        candidates_CD, rows_C = far[2:]
        own_S = torch.arange(len(rows_S), device=self.device) + self.rank * len(rows_S)
        chance = None if self.log_chance_N is None else self.log_chance_N.to(self.device)[rows_C.clamp(min=0)]
        return contrastive_nll(vectors_SD, candidates_CD, own_S, rows_S, rows_C, self.settings.temperature, chance)

    def _everyone(self, vectors_SD: Tensor, rows_S: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors and rows of all ranks; gradients flow back to where a vector was made."""
        if self.world == 1:
            return vectors_SD, rows_S
        rows = [torch.empty_like(rows_S) for _ in range(self.world)]
        dist.all_gather(rows, rows_S)
        return Gathered.apply(vectors_SD), torch.cat(rows)


class Gathered(torch.autograd.Function):
    """The rows of all ranks, one below the other in rank order, all of one number; gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        summed = gradient.contiguous().clone()
        dist.all_reduce(summed)
        return summed.chunk(dist.get_world_size())[dist.get_rank()]


def batches(pairs: int, size: int, seed: Sequence[int]) -> Iterator[np.ndarray]:
    """Places of the pairs of each batch, shuffled; a short rest joins the batch before it, since few pairs have few
    negatives."""
    order = np.random.default_rng(list(seed)).permutation(pairs)
    yield from (np.sort(part) for part in np.array_split(order, max(1, pairs // size)))


def share(pairs: Pairs, places: np.ndarray, rank: int, world: int) -> tuple[np.ndarray, np.ndarray]:
    """This rank's rows [S, 2] and weights [S] of a batch: shares of one size, filled with rows of -1 and weight 0."""
    mine, size = places[rank::world], -(-len(places) // world)
    rows_S2, weights_S = np.full((size, 2), -1, np.int64), np.zeros(size)
    rows_S2[: len(mine)], weights_S[: len(mine)] = pairs.rows_P2[mine], pairs.weights_P[mine]
    return rows_S2, weights_S


def log_chances(pairs: Pairs, items: int) -> Tensor:
    """float32 [N]: the log of an item's share of all ends of pairs; one that has none counts as one end."""
    ends = np.bincount(pairs.rows_P2.ravel(), minlength=items).clip(min=1)
    return torch.from_numpy(np.log(ends / ends.sum())).float()
