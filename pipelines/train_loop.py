"""The training loop: the same function in this process, in one worker or in many (Ray Train).

Every worker reads the same batches and trains on its share of each, so the global batch does not depend on their
number. A checkpoint holds weights, optimiser state, position and the state of every worker's random numbers; a run that
is killed and started again ends with the weights of the unbroken one, bit for bit on one worker.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.architectures import build_decoder
from model.decoder import Decoder, code_nll
from model.item_table import ItemTable
from model.positives import take_rows
from model.requests import Requests
from pipelines.checkpoints import load_model, newest_state, refuse_other_codebook, save_model, save_state
from pipelines.example_stream import Batch, Position
from pipelines.training_data import TrainingData, open_data
from schemas.config import Config

SAY_SECONDS = 10.0
HISTORY = "history.json"
CHECKPOINTS = "checkpoints"


def train_loop(settings: dict[str, Any]) -> None:
    """`settings`: config (Config), lake, calendar, pins, folder (str), identity, optionally initial (the folder of
    a model to continue), and, in this process only, say (one line of progress) and failpoint (called with the number of
    each finished step)."""
    config: Config = settings["config"]
    context = ray.train.get_context()
    with torch.random.fork_rng(devices=[]), limited_threads(config.train.threads):
        data = open_data(config, settings["lake"], settings["calendar"], settings["pins"])
        Training(settings, data, context.get_world_rank(), context.get_world_size()).run()


class limited_threads:
    """Sets PyTorch's threads for a while; 0 leaves them."""

    def __init__(self, threads: int) -> None:
        self.wanted, self.before = threads, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self.wanted or self.before)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


@dataclass
class Meter:
    """Sums since the last report, of this worker; `further` are those of an objective of its own."""

    nll_L: Tensor
    further: Tensor
    targets: int = 0
    waited: float = 0.0
    since: float = field(default_factory=time.perf_counter)


@dataclass
class Step:
    """What a batch gives: the loss to descend, and this worker's sums for the meter."""

    loss: Tensor
    nll_L: Tensor
    targets: int
    further: Tensor


class Training:
    """Next-token prediction on the stream; an objective with more than that overrides `objective`."""

    further: tuple[str, ...] = ()  # names of the further sums, reported per target

    def __init__(self, settings: dict[str, Any], data: TrainingData, rank: int, world: int) -> None:
        self.settings, self.data, self.rank, self.world = settings, data, rank, world
        self.config: Config = settings["config"]
        self.folder = Path(settings["folder"])
        torch.manual_seed(self.config.train.seed)  # the same weights on every worker
        self.decoder = build_decoder(self.config.model, data.catalogue.sizes, data.engaged_mask)
        self.model: nn.Module = self.decoder if world == 1 else nn.parallel.DistributedDataParallel(self.decoder)
        self.optimizer = torch.optim.AdamW(
            _groups(self.decoder, self.config.train.weight_decay), lr=self.config.train.learning_rate, fused=True
        )
        if settings.get("initial"):
            initial, description = load_model(settings["initial"])
            refuse_other_codebook(Path(settings["initial"]), description, data.catalogue.codebook_version)
            self.decoder.load_state_dict(initial.state_dict())
        torch.manual_seed(self.config.train.seed + 1 + rank)  # dropout
        self.step = 0
        self.position = Position(data.stream.version)
        self.history: list[dict[str, float]] = []
        self.meter = self._meter()
        self.started = self.said = time.perf_counter()

    def run(self) -> None:
        self._resume()
        for batch in self._timed(self.data.stream.batches(self.position)):
            self._train(batch)
            if batch.ends_epoch:
                self._validate(batch.after.epoch)
            if self.step % self.config.train.checkpoint_steps == 0:
                self._checkpoint()
            if self.settings.get("failpoint"):
                self.settings["failpoint"](self.step)
        self._report(final=True)
        self._checkpoint()
        if self.rank == 0:
            save_model(self.folder, self.decoder, self.data.description(self.decoder))
            (self.folder / HISTORY).write_text(json.dumps(self.history))

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.meter.waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def _train(self, batch: Batch) -> None:
        settings = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(self.step, batch.progress, settings.warmup_steps)
        self.model.train()
        step = self.objective(batch)
        step.loss.backward()
        nn.utils.clip_grad_norm_(self.decoder.parameters(), settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.nll_L += step.nll_L
        self.meter.further += step.further
        self.meter.targets += step.targets
        self.step, self.position = self.step + 1, batch.after
        if self.step % settings.min_log_interval == 0:
            self._report(batch.progress)

    def objective(self, batch: Batch) -> Step:
        mine, weight = share(batch.requests, self.rank, self.world)
        nll_TL = self._nll(mine, self.config.train.label_smoothing) * weight
        # DDP averages gradients over workers, so each divides by its part of the whole batch's targets.
        loss = nll_TL.sum() * self.world / (len(batch.requests.target_items) * self.data.levels)
        return Step(loss, nll_TL.detach().sum(0), len(nll_TL) * weight, torch.zeros(0))

    def _nll(self, requests: Requests, label_smoothing: float = 0.0) -> Tensor:
        items: ItemTable = self.data.items
        return code_nll(self.model(requests, items), items.codes[requests.target_items], label_smoothing)

    @torch.no_grad()
    def _validate(self, epoch: int) -> None:
        """Mean loss on a sample of validation requests; the first worker alone computes it."""
        requests = self.data.validation()
        if self.rank or not len(requests):
            return
        self.decoder.eval()
        parts = []
        for rows in torch.arange(len(requests)).split(self.config.train.batch_requests):
            some = take_rows(requests, rows)
            parts.append(code_nll(self.decoder(some, self.data.items), self.data.items.codes[some.target_items]))
        per_level = torch.cat(parts).mean(0).tolist()
        row = {"step": self.step, "validation_loss": float(np.mean(per_level))}
        self.history.append(row | {f"validation_loss_level_{i + 1}": v for i, v in enumerate(per_level)})
        self._say(f"epoch {epoch}: validation loss {row['validation_loss']:.4f} on {len(requests)} requests", force=True)

    def _report(self, progress: float = 1.0, final: bool = False) -> None:
        meter, elapsed = self.meter, time.perf_counter() - self.meter.since
        sums = torch.cat([torch.tensor([float(meter.targets)]), meter.nll_L, meter.further])
        if self.world > 1:
            dist.all_reduce(sums)
        targets = sums[0].item()
        if targets:
            means = (sums[1:] / targets).tolist()
            per_level, further = means[: self.data.levels], means[self.data.levels :]
            row = {"step": self.step, "loss": float(np.mean(per_level))}
            row |= {f"loss_level_{i + 1}": value for i, value in enumerate(per_level)}
            row |= dict(zip(self.further, further, strict=True))
            row |= {"seconds": elapsed, "waited": meter.waited, "targets": targets}
            self.history.append(row)
            speed = targets / max(elapsed, 1e-9)
            line = f"step {self.step}, {progress:.0%}: loss {row['loss']:.4f}, {speed:.0f} targets/s"
            self._say(line, force=final)
            if self.world > 1:
                ray.train.report({"line": line})
        self.meter = self._meter()

    def _say(self, line: str, force: bool = False) -> None:
        say, now = self.settings.get("say"), time.perf_counter()
        if say and self.rank == 0 and (force or now - self.said >= SAY_SECONDS):
            self.said = now
            say(line)

    def _meter(self) -> Meter:
        return Meter(torch.zeros(self.data.levels), torch.zeros(len(self.further)))

    def _checkpoint(self) -> None:
        states = self._random_states()
        if self.rank == 0:
            tensors = {f"weights/{name}": value for name, value in self.decoder.state_dict().items()}
            for name, parameter in self.decoder.named_parameters():
                for key, value in self.optimizer.state[parameter].items():
                    tensors[f"optimizer/{key}/{name}"] = value
            tensors["random"] = states
            sums = (self.meter.nll_L.tolist(), self.meter.further.tolist())
            meter = {"nll": sums[0], "further": sums[1], "targets": self.meter.targets}
            state = {"step": self.step, "position": self.position.as_dict(), "history": self.history, "meter": meter}
            save_state(self.folder / CHECKPOINTS, self.step, tensors, state)
        if self.world > 1:
            dist.barrier()

    def _random_states(self) -> Tensor:
        """uint8 [workers, bytes]."""
        own = torch.get_rng_state()
        if self.world == 1:
            return own[None]
        states = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(states, own)
        return torch.stack(states)

    def _resume(self) -> None:
        found = newest_state(self.folder / CHECKPOINTS)
        if found is None:
            return
        tensors, state = found
        weights = {n.removeprefix("weights/"): t for n, t in tensors.items() if n.startswith("weights/")}
        self.decoder.load_state_dict(weights)
        for name, parameter in self.decoder.named_parameters():
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[parameter] = {key: tensors[f"optimizer/{key}/{name}"] for key in keys}
        self.step, self.history = state["step"], state["history"]
        self.position = Position(**state["position"])
        meter = state["meter"]
        self.meter.nll_L, self.meter.targets = torch.tensor(meter["nll"]), meter["targets"]
        self.meter.further = torch.tensor(meter["further"])
        if self.rank < len(tensors["random"]):  # more workers than before start with fresh numbers
            torch.set_rng_state(tensors["random"][self.rank])
        self._say(f"resumed at step {self.step}", force=True)


def share(requests: Requests, rank: int, world: int) -> tuple[Requests, int]:
    """This worker's part of a batch and its weight: 0 where there was nothing left for it."""
    if world == 1:
        return requests, 1
    rows = torch.arange(len(requests))[rank::world]
    return (take_rows(requests, rows), 1) if len(rows) else (take_rows(requests, torch.tensor([0])), 0)


def schedule(step: int, progress: float, warmup_steps: int) -> float:
    """Factor of the learning rate: linear warm-up by steps, cosine decay by the part of the run that is done."""
    return min(1.0, (step + 1) / max(warmup_steps, 1)) * 0.5 * (1 + math.cos(math.pi * progress))


def _groups(decoder: Decoder, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices of linear maps only: neither embeddings, gains nor biases."""
    tables = {id(m.weight) for m in decoder.modules() if isinstance(m, nn.Embedding)}
    decayed = [p for p in decoder.parameters() if p.dim() == 2 and id(p) not in tables]
    chosen = {id(p) for p in decayed}
    rest = [p for p in decoder.parameters() if id(p) not in chosen]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
