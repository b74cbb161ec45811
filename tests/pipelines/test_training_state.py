"""Two gloo processes, sharded (FSDP2) or not: the weights of one process, whole in the checkpoint, and back."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model.decoder import Decoder, code_nll
from pipelines.descent import Descent, sparse_tables
from pipelines.train_loop import share
from pipelines.training_state import gathered, replicated, restore_training, shard, training_tensors
from schemas.config import TrainConfig
from schemas.model_config import MoeConfig
from tests.model.requests import catalogue, random_requests, small_decoder

ITEMS, STEPS, CPU = catalogue(30), 4, torch.device("cpu")
TIMEOUT = datetime.timedelta(seconds=120)


Way = tuple[str, bool]  # train.table_optimizer, and whether the workers hold parts
WAYS = [("adamw", True), ("rowwise", False), ("rowwise", True)]


class Worker:
    """A decoder and its optimisers, alone or one of two."""

    def __init__(self, seed: int, way: Way, world: int) -> None:
        moe = MoeConfig(experts=3, active=2, width=8, first_dense=1)
        self.decoder: Decoder = small_decoder(seed, moe=moe, fields=("item", "author", "tags"), item_head=True)
        settings = TrainConfig(table_optimizer=way[0], clip_norm=0.5)  # type: ignore[arg-type]
        tables = sparse_tables(self.decoder, settings)
        self.model: torch.nn.Module = self.decoder
        if world > 1 and way[1]:
            shard(self.decoder, CPU, tables)
        elif world > 1:
            self.model = replicated(self.decoder, tables)
        self.descent, self.world = Descent(self.decoder, tables, settings), world

    def train(self, rank: int) -> None:
        for seed in range(STEPS):
            whole = random_requests(8, 30, seed)
            mine, weight = share(whole, rank, self.world)
            outputs = self.model(mine, ITEMS, True, lambda log_probs, _: torch.ones_like(log_probs))
            nll_TL = code_nll(outputs.logits, ITEMS.codes[mine.target_items])
            loss = nll_TL.mean(1).sum() + outputs.item_nll
            (loss * weight * self.world / len(whole.target_items)).backward()
            self.descent.step(1e-2)

    def tensors(self) -> dict[str, torch.Tensor]:
        return training_tensors(self.decoder, self.descent.optimizers, None)

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        restore_training(tensors, self.decoder, self.descent.optimizers, None)


def one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=TIMEOUT)
    for way in WAYS:
        worker, saved = Worker(0, way, 2), f"{folder}/{way}.pt"
        worker.train(rank)
        tensors = worker.tensors()
        assert bool(tensors) == (rank == 0)
        if rank == 0:
            torch.save(tensors, saved)
        dist.barrier()
        other = Worker(1, way, 2)
        other.restore(torch.load(saved))
        back = other.tensors()
        assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)
        if way[1]:
            weights = gathered(other.decoder, CPU).state_dict()
            assert rank or all(torch.equal(value, tensors[f"weights/{name}"]) for name, value in weights.items())
    dist.destroy_process_group()


@pytest.mark.long
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    mp.spawn(one_rank, (str(tmp_path),), nprocs=2)
    for way in WAYS:
        alone = Worker(0, way, 1)
        alone.train(0)
        wanted, got = alone.tensors(), torch.load(tmp_path / f"{way}.pt")
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.allclose(got[name].double(), value.double(), atol=2e-5), (way, name)


@pytest.mark.parametrize("optimizer", ["adamw", "rowwise"])
def test_a_state_comes_back_whole(optimizer: str) -> None:
    worker, other = Worker(0, (optimizer, False), 1), Worker(1, (optimizer, False), 1)
    worker.train(0)
    tensors = worker.tensors()
    other.restore(tensors)
    back = other.tensors()
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)
    rows = {name for name, tensor in tensors.items() if name.startswith("optimizer/square_sums/")}
    assert len(rows) == (4 if optimizer == "rowwise" else 0) and all(tensors[name].dim() == 1 for name in rows)
