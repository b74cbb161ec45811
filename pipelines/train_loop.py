"""The training loop: the same function in this process, in one worker or in many (Ray Train).

Every worker reads the same batches and trains on its share of each, so the global batch does not depend on their
number. A checkpoint holds weights, optimiser state, position and the state of every worker's random numbers; a run that
is killed and started again ends with the weights of the unbroken one, bit for bit on one worker (without `train.compile`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from model.architectures import build_decoder
from model.chunked_cross_entropy import Weigh
from model.context import context_tokens
from model.decoder import Decoder, Outputs, code_nll
from model.device_rate import peak_rate
from model.feed_forward import mixtures
from model.flops import FORWARD_AND_BACKWARD, forward_flops
from model.positives import take_rows
from model.requests import Requests
from pipelines.checkpoints import load_model, newest_state, refuse_other_codebook, save_model, save_state
from pipelines.descent import Descent, sparse_tables
from pipelines.devices import random_state, require_compiler, set_random_state, worker_device
from pipelines.example_stream import Batch, Position
from pipelines.item_start import VECTORS, items_with_rows, start_at_vectors, vectors_of
from pipelines.run_artifacts import CHECKPOINTS, RunArtifacts
from pipelines.training_data import TrainingData, open_data
from pipelines.training_state import averaged, gathered, replicated, restore_training, shard, training_tensors
from pipelines.validation import NDCG, Validation
from schemas.config import Config
from schemas.lineage import starts_at_vectors

SAY_SECONDS = 10.0
HISTORY = "history.json"
BEST, MODEL = "best", "model"
ITEM_LOSS, ITEM_SHARE, ITEM_MEMORY = "item_loss", "item_share", "item_memory"


def train_loop(settings: dict[str, Any]) -> None:
    """`settings`: config (Config), lake, calendar, pins, folder (str), identity, optionally initial (the folder of
    a model to continue) and artifacts (RunArtifacts, which get states and weights as they come), and, in this process
    only, say (one line of progress) and failpoint (called with the number of each finished step)."""
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
    flops: float = 0.0
    norms: list[Tensor] = field(default_factory=list)  # of the gradient, a step
    since: float = field(default_factory=time.perf_counter)


@dataclass
class Step:
    """What a batch gives: the loss to descend, and this worker's sums for the meter."""

    loss: Tensor
    nll_L: Tensor
    targets: int
    further: Tensor


@dataclass
class Best:
    """The best epoch by validation NDCG; epoch 0: none was validated yet."""

    ndcg: float = -1.0
    epoch: int = 0
    waited: int = 0  # epochs since

    def better(self, ndcg: float, epoch: int) -> bool:
        """Takes an epoch's NDCG; whether it is the best."""
        if ndcg > self.ndcg:
            self.ndcg, self.epoch, self.waited = ndcg, epoch, 0
            return True
        self.waited += 1
        return False


class Training:
    """Next-token prediction on the stream; an objective with more than that overrides `objective`."""

    further: tuple[str, ...] = ()  # names of the further sums, reported per target
    of_item_head: tuple[str, ...] = (ITEM_LOSS,)  # those that follow with an item head
    expert_load: Tensor | float = 1.0  # of the busiest expert of the deepest mixture, over the mean

    def __init__(self, settings: dict[str, Any], data: TrainingData, rank: int, world: int) -> None:
        self.settings, self.data, self.rank, self.world = settings, data, rank, world
        self.config: Config = settings["config"]
        self.folder = Path(settings["folder"])
        self.artifacts: RunArtifacts | None = settings.get("artifacts")
        train = self.config.train
        self.device = worker_device(train.num_workers)
        self.items = data.items.to(self.device)
        torch.manual_seed(train.seed)  # the same weights on every worker
        self.decoder = build_decoder(self.config.model, data.catalogue.sizes, data.engaged_mask).to(self.device)
        self.decoder.recompute = train.recompute
        if settings.get("initial"):
            initial, description = load_model(settings["initial"])
            refuse_other_codebook(Path(settings["initial"]), description, data.catalogue.codebook_version)
            self.decoder.load_state_dict(initial.state_dict())
        else:
            self._start_items()
        if self.decoder.item_head is not None:
            self.further = (*self.further, *self.of_item_head)
        self.model: nn.Module = self.decoder
        self.sharded = train.shard and world > 1
        tables = sparse_tables(self.decoder, train)
        if self.sharded:
            shard(self.decoder, self.device, tables)
        elif world > 1:
            self.model = replicated(self.decoder, tables)
        self.descent = Descent(self.decoder, tables, train)
        self.average = averaged(self.decoder, train.average)
        if train.compile:
            require_compiler(self.device)
            self.decoder.compile_blocks()
        self.best = Best()
        torch.manual_seed(train.seed + 1 + rank)  # dropout
        self.step, self.pending, self.spent = 0, 0, 0.0  # operations
        self.position = Position(data.stream.version)
        self.history: list[dict[str, float]] = []
        self.peak = peak_rate(self.device, torch.bfloat16 if train.precision == "bfloat16" else torch.float32)
        self.meter = self._meter()
        self.said = time.perf_counter()

    def _start_items(self) -> None:
        table, data = self.decoder.context.fields.items, self.data
        if table is not None and len(table.own_ids):
            table.give_rows(items_with_rows(data, len(table.own_ids)))
        if starts_at_vectors(self.config):
            found = vectors_of(data.lake, self.settings["pins"][VECTORS], data.catalogue, data.calendar)
            start_at_vectors(self.decoder, data.items, *found)

    def result(self) -> Decoder:
        """What is validated and saved, whole on the first worker. Every worker must ask for it."""
        if self.average:
            return cast(Decoder, self.average.module)
        return gathered(self.decoder, self.device) if self.sharded else self.decoder

    def run(self) -> None:
        self._resume()
        if not (self._is_spent() or self._is_enough()):  # a run that was killed after its last epoch has had enough
            self._epochs()
        self._report(final=True)
        self._checkpoint()
        result = self.result()
        if self.rank == 0:
            self._save(result)

    def _epochs(self) -> None:
        for batch in self._timed(self.data.stream.batches(self.position)):
            if not self._train(batch):
                continue
            if batch.ends_epoch or self._is_spent():
                self._validate(batch.after.epoch + (not batch.ends_epoch))
            if self.step % self.config.train.checkpoint_steps == 0:
                self._checkpoint()
            if self.settings.get("failpoint"):
                self.settings["failpoint"](self.step)
            if self._is_spent() or (batch.ends_epoch and self._is_enough()):
                return

    def _save(self, result: Decoder) -> None:
        if self.config.train.patience and self.best.epoch:
            best, _ = load_model(self.folder / BEST)
            result = best.to(self.device)
        if result.item_head is not None and result.item_head.memory is not None:
            self.history.append({"step": self.step, ITEM_MEMORY: self.validation.fill_memory(result)})
        if result.item_head is not None:
            self.history.append({"step": self.step, ITEM_SHARE: self.validation.choose_share(result)})
        save_model(self.folder, result, self.data.description(result))
        if self.artifacts:
            self.artifacts.log_weights(self.folder, MODEL)
        (self.folder / HISTORY).write_text(json.dumps(self.history))

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.meter.waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def _train(self, batch: Batch) -> bool:
        """One batch; whether it ended a step."""
        settings = self.config.train
        self.pending += 1
        ends_step = self.pending == settings.accumulate or batch.ends_epoch
        self.model.train()
        with self._without_exchange(not ends_step):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                step = self.objective(dataclasses.replace(batch, requests=batch.requests.to(self.device)))
            (step.loss / settings.accumulate).backward()
        self.meter.nll_L += step.nll_L
        self.meter.further += step.further
        self.meter.targets += step.targets
        flops = self._flops(batch.requests)
        self.meter.flops += flops / self.world
        self.spent += flops
        if ends_step:
            self._descend(batch)
        return ends_step

    def _without_exchange(self, wanted: bool) -> AbstractContextManager[None]:
        """Gradients stay with the worker until the batch that ends the step."""
        if self.sharded:
            cast(FSDPModule, self.decoder).set_requires_gradient_sync(not wanted)
            return nullcontext()
        return self.model.no_sync() if wanted and self.world > 1 else nullcontext()  # type: ignore[operator]

    def _descend(self, batch: Batch) -> None:
        settings = self.config.train
        progress = max(batch.progress, self._spent_share())
        rate = settings.learning_rate * schedule(self.step, progress, settings.warmup_steps)
        self.meter.norms.append(self.descent.step(rate))
        self._balance()
        if self.average:
            self.average.update_parameters(self.decoder)
        self.step, self.pending, self.position = self.step + 1, 0, batch.after
        if self.step % settings.min_log_interval == 0:
            self._report(progress, rate)

    def _balance(self) -> None:
        """Evens the experts' load out, by that of all workers."""
        for part in mixtures(self.decoder):
            if self.world > 1:
                dist.all_reduce(part.load)
            self.expert_load = part.load.max() / part.load.double().mean()
            part.balance(part.load)

    def _flops(self, requests: Requests) -> float:
        """Forward and backward of a whole batch, at its mean lengths."""
        rows, targets = len(requests), len(requests.target_items)
        context = int(context_tokens(requests, self.config.model, self.data.engaged_mask).sum()) / rows
        read, items = len(requests.lifelong_items) / rows, len(self.items)
        work = forward_flops(self.config.model, self.decoder.sizes, context, targets / rows, rows, read, items)
        return FORWARD_AND_BACKWARD * work.total

    def _spent_share(self) -> float:
        """What part of the budget of operations is spent; 0 without one."""
        budget = 1e12 * self.config.train.budget_tflop
        return min(1.0, self.spent / budget) if budget else 0.0

    def _is_spent(self) -> bool:
        return self._spent_share() == 1

    def objective(self, batch: Batch) -> Step:
        mine, weight = share(batch.requests, self.rank, self.world)
        nll_TL, outputs = self._nll(mine)
        item_nll = nll_TL.new_zeros(()) if outputs.item_nll is None else outputs.item_nll * len(nll_TL) * weight
        nll_TL = nll_TL * weight
        # DDP averages gradients over workers, so each divides by its part of the whole batch's targets.
        targets = len(batch.requests.target_items)
        loss = (nll_TL.sum() / self.data.levels + self.config.train.item_loss * item_nll) * self.world / targets
        return Step(loss, nll_TL.detach().sum(0), len(nll_TL) * weight, item_nll.detach()[None][: len(self.further)])

    def _nll(self, requests: Requests, weigh: Weigh | None = None) -> tuple[Tensor, Outputs]:
        """[T, L] of the codes of the targets, smoothed as configured, and all that the model says of them."""
        outputs: Outputs = self.model(requests, self.items, True, weigh)
        codes_TL = self.items.codes[requests.target_items]
        return code_nll(outputs.logits, codes_TL, self.config.train.label_smoothing), outputs

    def _validate(self, epoch: int) -> None:
        """Adds the validation figures to the history and keeps the best epoch; the first worker alone."""
        decoder = self.result().eval()
        if self.rank:
            return
        found = self.validation.figures(decoder, ranked=self.config.train.patience > 0)
        if not found:
            return
        self.history.append({"step": self.step, **found})
        line = f"epoch {epoch}: validation loss {found['validation_loss']:.4f}"
        if NDCG in found:
            line += f", NDCG {found[NDCG]:.4f}"
            if self.best.better(found[NDCG], epoch):
                save_model(self.folder / BEST, decoder, self.data.description(decoder))
                if self.artifacts:
                    self.artifacts.log_weights(self.folder / BEST, BEST)
        self._say(line, force=True)

    @cached_property
    def validation(self) -> Validation:
        return Validation(self.data, self.items)

    def _is_enough(self) -> bool:
        """Whether the last epochs brought nothing, the same on every worker."""
        patience = self.config.train.patience
        enough = torch.tensor([bool(patience) and self.best.waited >= patience], dtype=torch.int64, device=self.device)
        if self.world > 1:
            dist.broadcast(enough, 0)
        return bool(enough)

    def _report(self, progress: float = 1.0, rate: float | None = None, final: bool = False) -> None:
        meter, elapsed = self.meter, time.perf_counter() - self.meter.since
        sums = torch.cat([torch.tensor([float(meter.targets)], device=self.device), meter.nll_L, meter.further])
        if self.world > 1:
            dist.all_reduce(sums)
        targets = sums[0].item()
        if targets:
            means = (sums[1:] / targets).tolist()
            per_level, further = means[: self.data.levels], means[self.data.levels :]
            row = {"step": self.step, "loss": float(np.mean(per_level))}
            row |= {f"loss_level_{i + 1}": value for i, value in enumerate(per_level)}
            row |= dict(zip(self.further, further, strict=True))
            row |= {"seconds": elapsed, "waited": meter.waited, "targets": targets, "flops": meter.flops}
            row |= {"mfu": meter.flops / max(elapsed, 1e-9) / self.peak}
            if meter.norms:
                row["gradient_norm"] = float(torch.stack(meter.norms).mean())
            if rate is not None:
                row["learning_rate"] = rate
            if mixtures(self.decoder):
                row["expert_load"] = float(self.expert_load)
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
        zeros = partial(torch.zeros, device=self.device)
        return Meter(zeros(self.data.levels), zeros(len(self.further)))

    def _checkpoint(self) -> None:
        tensors = training_tensors(self.decoder, self.descent.optimizers, self.average) | {"random": self._random_states()}
        if self.rank == 0:
            sums = (self.meter.nll_L.tolist(), self.meter.further.tolist())
            meter = {"nll": sums[0], "further": sums[1], "targets": self.meter.targets}
            state = {"step": self.step, "position": self.position.as_dict(), "history": self.history, "meter": meter}
            state |= {"best": dataclasses.asdict(self.best), "spent": self.spent}
            saved = save_state(self.folder / CHECKPOINTS, self.step, tensors, state)
            if self.artifacts:
                self.artifacts.log_state(saved)
        if self.world > 1:
            dist.barrier()

    def _random_states(self) -> Tensor:
        """uint8 [workers, bytes], of the device that draws dropout."""
        own = random_state(self.device)
        if self.world == 1:
            return own[None]
        shared = own.to(self.device)
        states = [torch.empty_like(shared) for _ in range(self.world)]
        dist.all_gather(states, shared)
        return torch.stack(states).cpu()

    def _resume(self) -> None:
        found = newest_state(self.folder / CHECKPOINTS)
        if found is None:
            return
        tensors, state = found
        restore_training(tensors, self.decoder, self.descent.optimizers, self.average)
        self.step, self.history, self.best = state["step"], state["history"], Best(**state["best"])
        self.position, self.spent = Position(**state["position"]), state.get("spent", 0.0)
        meter = state["meter"]
        self.meter.nll_L, self.meter.targets = torch.tensor(meter["nll"], device=self.device), meter["targets"]
        self.meter.further = torch.tensor(meter["further"], device=self.device)
        if self.rank < len(tensors["random"]):  # more workers than before start with fresh numbers
            set_random_state(tensors["random"][self.rank], self.device)
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
