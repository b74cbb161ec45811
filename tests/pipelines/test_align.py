"""Alignment on a small lake: whose rewards a batch learns from, any number of workers, and when there is nothing to do."""

from __future__ import annotations

import dataclasses
import datetime

import numpy as np
import pyarrow as pa
import pytest
import torch

from model.gbpo import gbpo_loss
from pipelines import align
from pipelines.align_loop import Aligning
from pipelines.collate import EVERY_TARGET
from pipelines.engines import Engines
from pipelines.example_stream import Batch, Position
from pipelines.exposures import load_exposures
from pipelines.ray_tables import replace_days
from pipelines.stage import StageContext
from pipelines.training_data import open_data
from schemas.feedback import mask_of
from schemas.lake import Lake
from schemas.lineage import ALIGN, StagePlan
from schemas.tables import IMPRESSIONS, REWARDS
from tests.pipelines.examples import CONFIG, DAYS, calendar, day_us, example_rows, write_lake

ROWS = example_rows(12)
LEVELS = 3
POSITIVE = mask_of(CONFIG.targets.positive)


def write_rewards(lake: Lake, watched: bool = True) -> dict[int, tuple[float | None, bool, list[float] | None]]:
    """Random rewards of every target, and behaviour of some under codebook c1, of some under another; what to expect."""
    rng = np.random.default_rng(4)
    expected, rewards, impressions = {}, [], []
    for row in ROWS:
        for impression in row["target_impression_ids"]:
            quantile = float(np.float32(rng.random())) if watched and rng.random() < 0.8 else None
            negative = bool(rng.random() < 0.2)
            book = [None, "c1", "other"][rng.integers(3)]
            log_probs = rng.uniform(-3, 0, LEVELS).astype(np.float32).tolist() if book else None
            expected[impression] = (quantile, negative, log_probs if book == "c1" else None)
            day = {"date": row["date"], "user_id": row["user_id"], "impression_id": impression}
            rewards.append(day | {"quantile": quantile, "negative": negative})
            ts = datetime.datetime.fromtimestamp(day_us(row["date"]) / 1e6, datetime.UTC)
            made = {"behaviour_log_probs": log_probs, "behaviour_codebook": book, "behaviour_policy": "model/1"}
            impressions.append(day | {"request_id": 1, "item_id": 1, "ts": ts} | made)
    stamps = dict.fromkeys(DAYS, "x")
    replace_days(lake, "rewards", pa.Table.from_pylist(rewards, schema=REWARDS.schema), stamps)
    replace_days(lake, "impressions", pa.Table.from_pylist(impressions, schema=IMPRESSIONS.schema), stamps)
    return expected


def pins_of(lake: Lake, pins: dict[str, int]) -> dict[str, int]:
    return pins | {name: lake.version(name) for name in ("rewards", "impressions")}


def test_exposures_are_found_by_impression(lake: Lake, ray_module) -> None:
    expected = write_rewards(lake)
    days = DAYS[1:3]
    exposures = load_exposures(lake, pins_of(lake, {}), days, "c1", LEVELS)
    asked = [i for row in ROWS for i in row["target_impression_ids"]] + [-5]
    here = {i for row in ROWS if row["date"] in days for i in row["target_impression_ids"]}
    for impression, quantile, negative, old in zip(asked, *exposures.of(torch.tensor(asked)), strict=True):
        wanted = expected[impression] if impression in here else (None, False, None)
        assert (None if quantile.isnan() else quantile.item(), negative.item()) == wanted[:2]
        assert (None if old.isnan().any() else old.tolist()) == wanted[2]


@pytest.fixture
def aligning(lake: Lake, ray_module):
    """Makes `Aligning` for one of several workers, all with the same weights and without dropout."""
    pins = write_lake(lake, ROWS)
    write_rewards(lake)
    fields = ("item", *CONFIG.model.fields)
    config = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, dropout=0.0, fields=fields, item_head=True)
    )
    pins = pins_of(lake, pins)

    def make(rank: int = 0, world: int = 1) -> Aligning:
        torch.manual_seed(0)
        data = open_data(config, lake, calendar(), pins, DAYS[:3], EVERY_TARGET)
        settings = {"config": config, "pins": pins, "folder": "unused"}
        made = Aligning(settings, data, rank, 1)
        made.world = world  # without a process group: the objective alone is asked
        return made

    return make


def batches_of(aligning: Aligning) -> list[Batch]:
    return list(aligning.data.stream.batches(Position(aligning.data.stream.version)))


def test_the_loss_of_a_batch_is_the_mean_over_its_workers(aligning) -> None:
    alone, pair = aligning(), [aligning(rank, 2) for rank in range(2)]
    for batch in batches_of(alone)[:4]:
        whole, parts = alone.objective(batch), [one.objective(batch) for one in pair]
        assert sum(part.targets for part in parts) == whole.targets
        assert torch.allclose(sum(part.nll_L for part in parts), whole.nll_L, atol=1e-4)
        assert torch.allclose(sum(part.further for part in parts), whole.further, atol=1e-4)
        assert sum(part.loss.item() for part in parts) / 2 == pytest.approx(whole.loss.item(), abs=1e-5)


def test_a_batch_learns_from_positives_and_judged_exposures_alone(aligning) -> None:
    one = aligning()
    for batch in batches_of(one)[:4]:
        step = one.objective(batch)
        requests = batch.requests
        positive = (requests.target_feedback & POSITIVE) != 0
        assert step.targets == int(positive.sum())
        _, negative, _ = one._exposures(batch.segment).of(requests.target_impressions)
        assert step.further[2] == negative.sum()
        judged, kept, advantage, _ = one._judged(batch)
        assert (kept | (advantage != 0)).all() or len(judged.target_items) == 1
        assert len(judged.target_items) == len(kept) == len(advantage)


def test_the_policy_moves_the_item_head_as_it_moves_codes(aligning) -> None:
    """By the definition of the loss over whole rows of logits, without chunks and without weights."""
    one = aligning()
    one.config = dataclasses.replace(one.config, train=dataclasses.replace(one.config.train, item_loss=0.7))
    head, batch = one.decoder.item_head, batches_of(one)[1]
    states = []
    handle = head.norm.register_forward_hook(lambda _module, _inputs, output: states.append(output))
    one.decoder.zero_grad()
    one.objective(batch).loss.backward()
    handle.remove()
    found = head.query.bias.grad.clone()
    judged, positive, advantage, _ = one._judged(batch)
    assert (advantage > 0).any() and (advantage < 0).any()
    vectors = one.decoder.item_vectors(one.items).detach()
    liked = one.decoder.liked(judged, vectors)[judged.target_rows()].detach()
    logits = (head.query(states[0].detach()) + liked) @ vectors.T
    log_probs = torch.log_softmax(logits, 1).gather(1, judged.target_items[:, None])[:, 0]
    policy = gbpo_loss(log_probs, torch.full_like(log_probs, torch.nan), advantage).sum() / (advantage != 0).sum()
    one.decoder.zero_grad()
    (0.7 * (-log_probs[positive].sum() / positive.sum() + one.config.align.weight * policy)).backward()
    assert torch.allclose(head.query.bias.grad, found, atol=1e-6)


def context_of(lake: Lake, engines: Engines, pins: dict[str, int], config=CONFIG) -> StageContext:
    plan = StagePlan(ALIGN, expected={"align": {DAYS[2]: "aligned"}}, todo={"align": (DAYS[2],)})
    plan.inputs = {"train": {DAYS[2]: "trained"}}
    known = {"codebook_version": "c1", "parameters": 1, "trained_until": DAYS[2].isoformat()}
    lake.write_manifest("train", "trained", known)
    return StageContext(config, lake, calendar(), plan, engines, pins_of(lake, pins), lambda line: None)


def test_without_watch_times_the_trained_model_is_the_result(lake: Lake, engines: Engines) -> None:
    pins = write_lake(lake, ROWS)
    write_rewards(lake, watched=False)
    result = align.run(context_of(lake, engines, pins))
    assert "no watch times" in result.skipped
    assert result.manifest["model"] == {"stage": "train", "identity": "trained"}
    off = dataclasses.replace(CONFIG, align=dataclasses.replace(CONFIG.align, enabled=False))
    assert align.run(context_of(lake, engines, pins, off)).skipped == "align.enabled is false"
