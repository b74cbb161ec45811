"""Sharded training (FSDP2) over two gloo processes: the weights of one process, whole in the checkpoint, and back."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from model.decoder import Decoder
from pipelines.train_loop import share
from pipelines.training_state import gathered, restore_training, shard, training_tensors
from schemas.model_config import MoeConfig
from tests.model.requests import catalogue, random_requests, small_decoder

ITEMS, STEPS, CPU = catalogue(30), 4, torch.device("cpu")
TIMEOUT = datetime.timedelta(seconds=120)


def decoder_of(seed: int) -> Decoder:
    return small_decoder(seed, moe=MoeConfig(experts=3, active=2, width=8, first_dense=1))


def trained(decoder: Decoder, rank: int, world: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    for seed in range(STEPS):
        whole = random_requests(8, 30, seed)
        mine, weight = share(whole, rank, world)
        loss = decoder.loss(mine, ITEMS)
        (loss.total * loss.targets * weight * world / len(whole.target_items)).backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=TIMEOUT)
    decoder = decoder_of(0)
    shard(decoder, CPU)
    optimizer = trained(decoder, rank, 2)
    tensors = training_tensors(decoder, optimizer, None)
    assert bool(tensors) == (rank == 0)
    if rank == 0:
        torch.save(tensors, f"{folder}/state.pt")
    dist.barrier()
    other = decoder_of(1)
    shard(other, CPU)
    again = torch.optim.AdamW(other.parameters(), lr=1e-2)
    restore_training(torch.load(f"{folder}/state.pt"), other, again, None)
    back = training_tensors(other, again, None)
    if rank == 0:
        assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)
    whole = gathered(other, CPU)
    if rank == 0:
        torch.save(whole.state_dict(), f"{folder}/whole.pt")
    dist.destroy_process_group()


@pytest.mark.long
def test_two_sharded_processes_train_like_one(tmp_path: Path) -> None:
    mp.spawn(one_rank, (str(tmp_path),), nprocs=2)
    alone = decoder_of(0)
    wanted = training_tensors(alone, trained(alone, 0, 1), None)
    got, whole = torch.load(tmp_path / "state.pt"), torch.load(tmp_path / "whole.pt")
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(got[name].double(), value.double(), atol=2e-5), name
    assert all(torch.equal(value, got[f"weights/{name}"]) for name, value in whole.items())


def test_a_state_comes_back_whole() -> None:
    decoder = decoder_of(0)
    tensors = training_tensors(decoder, trained(decoder, 0, 1), None)
    other = decoder_of(1)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    restore_training(tensors, other, optimizer, None)
    back = training_tensors(other, optimizer, None)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)
