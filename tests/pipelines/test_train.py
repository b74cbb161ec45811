"""Stage `train` on a small lake: order of the stream, resumption bit for bit, workers, what the stage leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from model.feed_forward import mixtures
from model.ranker import Ranker
from model.ranking_metrics import ndcg_at, target_ranks
from pipelines.baselines import DEEPER, MEMORIES
from pipelines.checkpoints import load_model, newest_state, save_model, states
from pipelines.engines import Engines
from pipelines.example_stream import ExampleStream, Position, Segment, segments_of
from pipelines.ray_tables import replace_days
from pipelines.stage import StageContext
from pipelines.train import run, train
from pipelines.train_loop import Training, share
from pipelines.training_data import TrainingData, open_data
from pipelines.validation import SHARES, Validation
from schemas.config import Config
from schemas.errors import ConfigError, ContractViolation
from schemas.lake import Lake
from schemas.lineage import TRAIN, StagePlan
from schemas.model_config import MoeConfig
from schemas.tables import SEMANTIC_IDS
from tests.model.requests import random_requests, small_decoder
from tests.pipelines.examples import (
    CONFIG,
    DAYS,
    calendar,
    day_us,
    example_rows,
    lifelong_rows,
    with_lifelong,
    with_train,
    write_lake,
    write_lifelong,
)
from tests.pipelines.test_collate import as_rows

ROWS = example_rows(20)


class Killed(Exception):
    pass


def killed_at(wanted: int) -> Callable[[int], None]:
    def kill(step: int) -> None:
        if step == wanted:
            raise Killed

    return kill


@pytest.fixture(scope="module")
def small_lake(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lake, dict[str, int]]:
    lake = Lake(str(tmp_path_factory.mktemp("train") / "lake"))
    return lake, write_lake(lake, ROWS) | {"lifelong_sequences": write_lifelong(lake, lifelong_rows())}


@pytest.fixture
def data(small_lake, ray_module) -> TrainingData:
    return opened(small_lake, CONFIG)


def opened(small_lake, config: Config) -> TrainingData:
    lake, pins = small_lake
    return open_data(config, lake, calendar(), pins)


def settings_for(small_lake, folder: Path, config: Config = CONFIG, **more: object) -> dict:
    lake, pins = small_lake
    base = {"config": config, "lake": lake, "calendar": calendar(), "pins": pins, "folder": str(folder)}
    return base | {"identity": "test"} | more


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


def losses_of(folder: Path) -> list[tuple[int, float]]:
    rows = json.loads((folder / "history.json").read_text())
    names = ("loss", "validation_loss", "item_share", "item_memory")
    return [(row["step"], next(row[name] for name in names if name in row)) for row in rows]


def impressions(stream: ExampleStream, start: Position) -> list[list[int]]:
    return [batch.requests.target_impressions.tolist() for batch in stream.batches(start)]


def test_segments_are_runs_of_days_and_parts_of_large_ones(small_lake) -> None:
    lake, pins = small_lake
    version, days = pins["training_examples"], DAYS[:3]
    assert segments_of(lake, version, days, 100) == [Segment(days, 60)]
    assert [s.days for s in segments_of(lake, version, days, 45)] == [days[:2], days[2:]]
    parts = segments_of(lake, version, days, 15)
    assert [s.days for s in parts] == [(d,) for d in days for _ in range(2)]
    for first, second in zip(parts[::2], parts[1::2], strict=True):
        assert first.between[1] == second.between[0]
        slices = [row["slice_us"] for row in ROWS if row["date"] == first.days[0]]
        assert first.between[0] <= min(slices) and max(slices) < second.between[1]


@pytest.mark.parametrize("segment_rows", [9, 25, 1000])
def test_every_positive_of_a_train_day_is_seen_once_an_epoch(small_lake, ray_module, segment_rows: int) -> None:
    stream = opened(small_lake, with_train(segment_rows=segment_rows)).stream
    wanted = sorted(
        row["target_impression_ids"][i]
        for row in ROWS
        if row["date"] in DAYS[:3]
        for i, item in enumerate(row["target_item_ids"])
        if row["target_feedback"][i] & 3 and item < 38  # the last two items got their codes later
    )
    batches = list(stream.batches(Position(stream.version)))
    ends = [i + 1 for i, batch in enumerate(batches) if batch.ends_epoch]
    assert len(ends) == 2 and ends[-1] == len(batches)
    for first, last in ((0, ends[0]), (ends[0], ends[1])):
        seen = [i for batch in batches[first:last] for i in batch.requests.target_impressions.tolist()]
        assert sorted(seen) == wanted
    progress = [batch.progress for batch in batches]
    assert progress == sorted(progress) and progress[0] == 0 and progress[-1] < 1


def test_stream_mode_is_one_pass_in_time_order(small_lake, ray_module) -> None:
    stream = opened(small_lake, with_train(mode="stream", segment_rows=9)).stream
    times = [t for batch in stream.batches(Position(stream.version)) for t in batch.requests.ts_us.tolist()]
    assert times == sorted(times) and max(times) < day_us(DAYS[3])


def test_a_stream_taken_up_at_any_position_continues(data: TrainingData) -> None:
    stream = data.stream
    whole = list(stream.batches(Position(stream.version)))
    assert impressions(stream, Position(stream.version)) == [b.requests.target_impressions.tolist() for b in whole]
    pins = {"training_examples": stream.version, **_others(data)}
    for i in range(0, len(whole), 5):
        rest = list(opened((data.lake, pins), CONFIG).stream.batches(whole[i].after))
        assert [as_rows(b.requests) for b in rest] == [as_rows(b.requests) for b in whole[i + 1 :]]
        assert [b.progress for b in rest] == [b.progress for b in whole[i + 1 :]]


def _others(data: TrainingData) -> dict[str, int]:
    return {name: data.lake.version(name) for name in ("semantic_ids", "items")}


def test_a_position_in_another_version_is_refused(data: TrainingData) -> None:
    with pytest.raises(ContractViolation, match="version 7"):
        next(data.stream.batches(Position(7)))


EVERYTHING = with_lifelong(
    with_train(accumulate=2, average=0.8, patience=2, recompute=True), lifelong_length=4, lifelong_queries=2
)
FIELDS = ("item", *EVERYTHING.model.fields)
HEAD = {"item_head": True, "item_rows": 20, "item_neighbours": 6}
EXPERTS = MoeConfig(experts=4, active=2, width=8, first_dense=1, speed=0.1)
EVERYTHING = replace(EVERYTHING, model=replace(EVERYTHING.model, moe=EXPERTS, fields=FIELDS, **HEAD))


ROWWISE = with_train(table_optimizer="rowwise", accumulate=2)
ROWWISE = replace(ROWWISE, model=replace(ROWWISE.model, fields=("item", "author", "tags")))


@pytest.mark.parametrize(("config", "kill_at"), [(CONFIG, 3), (CONFIG, 9), (EVERYTHING, 5), (ROWWISE, 5)])
def test_a_killed_run_ends_with_the_weights_of_the_unbroken_one(
    small_lake, ray_module, tmp_path, config: Config, kill_at: int
) -> None:
    assert config.model.dropout > 0
    train(settings_for(small_lake, tmp_path / "unbroken", config))

    with pytest.raises(Killed):
        train(settings_for(small_lake, tmp_path / "killed", config, failpoint=killed_at(kill_at)))
    assert not (tmp_path / "killed" / "weights.safetensors").exists()
    lines: list[str] = []
    train(settings_for(small_lake, tmp_path / "killed", config, say=lines.append))
    assert any("resumed at step" in line for line in lines) == (kill_at > 4)
    wanted, got = weights(tmp_path / "unbroken"), weights(tmp_path / "killed")
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    losses = [losses_of(tmp_path / name) for name in ("unbroken", "killed")]
    assert losses[0] == losses[1]
    assert len(states(tmp_path / "killed" / "checkpoints")) == 2


def test_a_checkpoint_of_examples_that_were_written_again_is_left_behind(ray_module, tmp_path) -> None:
    lake = Lake(str(tmp_path / "lake"))
    pins = write_lake(lake, ROWS)
    with pytest.raises(Killed):
        train(settings_for((lake, pins), tmp_path / "model", failpoint=killed_at(9)))
    lines: list[str] = []
    again = lake, pins | write_lake(lake, ROWS)
    train(settings_for(again, tmp_path / "model", say=lines.append))
    assert any("training starts anew" in line for line in lines) and not any("resumed" in line for line in lines)
    train(settings_for(again, tmp_path / "unbroken"))
    wanted, got = weights(tmp_path / "unbroken"), weights(tmp_path / "model")
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_accumulated_batches_end_steps_and_epochs_together(small_lake, ray_module, tmp_path) -> None:
    """A step ends with its last batch or the epoch, and only then is the position that a checkpoint would keep."""
    training = Training(settings_for(small_lake, tmp_path, with_train(accumulate=3)), opened(small_lake, CONFIG), 0, 1)
    pending = 0
    for batch in training.data.stream.batches(training.position):
        before, position = [p.detach().clone() for p in training.decoder.parameters()], training.position
        pending += 1
        ended = training._train(batch)
        assert ended == (pending == 3 or batch.ends_epoch)
        moved = any(not torch.equal(a, b) for a, b in zip(before, training.decoder.parameters(), strict=True))
        assert moved == ended and (training.position == (batch.after if ended else position))
        pending = 0 if ended else pending
    assert training.step > 4  # of two epochs


def test_accumulated_gradients_are_the_mean_of_the_batches(small_lake, ray_module, tmp_path) -> None:
    config = with_train(accumulate=2, clip_norm=1e9)
    config = replace(config, model=replace(config.model, dropout=0.0))
    training = Training(settings_for(small_lake, tmp_path, config), opened(small_lake, config), 0, 1)
    batches = list(training.data.stream.batches(training.position))[:2]
    wanted = [torch.zeros_like(p) for p in training.decoder.parameters()]
    for batch in batches:
        gradients = torch.autograd.grad(training.objective(batch).loss, list(training.decoder.parameters()))
        wanted = [total + part / 2 for total, part in zip(wanted, gradients, strict=True)]
    got: list[torch.Tensor] = []
    training.descent.optimizers[0].register_step_pre_hook(
        lambda *_: got.extend(p.grad.clone() for p in training.decoder.parameters())  # type: ignore[union-attr]
    )
    assert [training._train(batch) for batch in batches] == [False, True]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, wanted, strict=True))


def test_the_average_follows_the_weights_and_is_what_counts(small_lake, ray_module, tmp_path) -> None:
    config = with_train(average=0.7, epochs=1)
    training = Training(settings_for(small_lake, tmp_path, config), opened(small_lake, config), 0, 1)
    wanted: list[torch.Tensor] = []
    for batch in training.data.stream.batches(training.position):
        training._train(batch)
        now = [p.detach().clone() for p in training.decoder.parameters()]
        wanted = [0.7 * old + 0.3 * new for old, new in zip(wanted, now, strict=True)] if wanted else now
    training._save(training.result())
    saved, _ = load_model(tmp_path)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(saved.parameters(), wanted, strict=True))
    assert not torch.equal(next(saved.parameters()), next(training.decoder.parameters()))


def test_patience_ends_the_run_with_the_best_epochs_weights(small_lake, ray_module, tmp_path) -> None:
    """Without a learning rate no epoch is better than the first."""
    config = with_train(epochs=9, patience=2, learning_rate=0.0)
    train(settings_for(small_lake, tmp_path / "still", config))
    history = json.loads((tmp_path / "still" / "history.json").read_text())
    found = [row["validation_ndcg"] for row in history if "validation_ndcg" in row]
    assert len(found) == 3 and len(set(found)) == 1
    train(settings_for(small_lake, tmp_path / "moving", with_train(epochs=4, patience=9, learning_rate=0.05)))
    history = json.loads((tmp_path / "moving" / "history.json").read_text())
    found = [row["validation_ndcg"] for row in history if "validation_ndcg" in row]
    lines: list[str] = []
    (tmp_path / "still" / "weights.safetensors").unlink()  # as if killed before it was saved
    train(settings_for(small_lake, tmp_path / "still", config, say=lines.append))
    assert len(lines) == 1 and (tmp_path / "still" / "weights.safetensors").is_file()  # resumed, and nothing more
    best, _ = load_model(tmp_path / "moving" / "best")
    got, _ = load_model(tmp_path / "moving")
    assert len(found) == 4 and len(set(found)) > 1
    assert all(torch.equal(a, b) for a, b in zip(best.parameters(), got.parameters(), strict=True))


def test_a_budget_of_operations_ends_training_amid_an_epoch(small_lake, ray_module, tmp_path) -> None:
    def history(name: str, config: Config, **more: object) -> list[dict[str, float]]:
        train(settings_for(small_lake, tmp_path / name, config, **more))
        return json.loads((tmp_path / name / "history.json").read_text())

    epoch = sum(row.get("flops", 0.0) for row in history("epoch", with_train(epochs=1)))
    config = with_train(epochs=50, budget_tflop=1.4 * epoch / 1e12, min_log_interval=1)
    found = history("unbroken", config)
    steps = [row for row in found if "flops" in row]
    spent = np.cumsum([row["flops"] for row in steps])
    assert spent[-2] < 1.4 * epoch <= spent[-1]
    assert steps[-1]["learning_rate"] < 0.1 * max(row["learning_rate"] for row in steps)
    assert [row["step"] for row in found if "validation_loss" in row][-1] == steps[-1]["step"]
    with pytest.raises(Killed):
        history("killed", config, failpoint=killed_at(7))
    assert [row["step"] for row in history("killed", config)] == [row["step"] for row in found]
    wanted, got = weights(tmp_path / "unbroken"), weights(tmp_path / "killed")
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_experts_are_balanced_as_they_train(small_lake, ray_module, tmp_path) -> None:
    train(settings_for(small_lake, tmp_path, replace(EVERYTHING, train=replace(EVERYTHING.train, precision="bfloat16"))))
    decoder, _ = load_model(tmp_path)
    (mixture,) = mixtures(decoder)
    assert mixture.bias.abs().sum() > 0 and mixture.bias.unique().numel() > 1
    history = json.loads((tmp_path / "history.json").read_text())
    assert all(1 <= row["expert_load"] <= 4 for row in history if "expert_load" in row)
    reports = [row for row in history if "mfu" in row]
    assert reports and all(row["mfu"] > 0 and row["flops"] > 0 and row["gradient_norm"] > 0 for row in reports)


def test_the_item_head_learns_and_validation_weighs_it(small_lake, ray_module, tmp_path) -> None:
    config = with_train(epochs=4, learning_rate=0.02)
    config = replace(config, model=replace(config.model, fields=FIELDS, **HEAD))
    train(settings_for(small_lake, tmp_path, config))
    history = json.loads((tmp_path / "history.json").read_text())
    losses = [row["item_loss"] for row in history if "item_loss" in row]
    assert losses[-1] < losses[0]
    decoder, _ = load_model(tmp_path)
    assert history[-1]["item_share"] == decoder.item_head.share
    validation = Validation(opened(small_lake, config), opened(small_lake, config).items)

    requests, ranker = validation.data.validation(), Ranker(decoder, validation.items, validation._trie)

    def best_of(weights: tuple[float, ...], weighed: torch.Tensor, chosen: float) -> None:
        found = {}
        for weight in weights:
            weighed.fill_(weight)
            ranked = ranker.rank(requests, DEEPER, config.evaluate.beam, config.evaluate.mask_history)
            ranks = target_ranks(ranked, requests.target_rows(), requests.target_items)
            found[weight] = ndcg_at(ranks, DEEPER).mean()
        weighed.fill_(chosen)
        assert found[chosen] == pytest.approx(max(found.values())) and len(set(found.values())) > 1

    share, memory = decoder.item_head.share, decoder.item_head.memory
    best_of(SHARES, share, history[-1]["item_share"])
    share.fill_(1.0)
    best_of(MEMORIES, memory.weight, history[-2]["item_memory"])
    assert (memory.similarity > 0).any(dim=1).sum() > 1


def test_training_leaves_the_random_numbers_and_threads_of_the_process_alone(small_lake, ray_module, tmp_path) -> None:
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train(settings_for(small_lake, tmp_path, with_train(threads=1, epochs=1)))
    assert torch.equal(before, torch.get_rng_state()) and threads == torch.get_num_threads()


def test_workers_share_a_batch_without_loss_or_repetition() -> None:
    requests = random_requests(7, 30)
    for world in (1, 2, 3, 9):
        parts = [share(requests, rank, world) for rank in range(world)]
        rows = [row for part, weight in parts if weight for row in as_rows(part)]
        assert sorted(map(str, rows)) == sorted(map(str, as_rows(requests)))


@pytest.mark.long  # a second worker costs Ray over a minute of two cores
@pytest.mark.parametrize("changes", [{}, {"table_optimizer": "rowwise", "accumulate": 2, "average": 0.8}])
def test_two_workers_train_like_one(small_lake, ray_module, tmp_path, changes: dict[str, Any]) -> None:
    """Without dropout the gradient of a batch is the same sum, in another order of additions."""
    config = with_train(epochs=1, checkpoint_steps=100, **changes)
    config = replace(config, model=replace(config.model, dropout=0.0))
    train(settings_for(small_lake, tmp_path / "one", config))
    two = replace(config, train=replace(config.train, num_workers=2))
    train(settings_for(small_lake, tmp_path / "two", two))
    for (step, alone), (also, together) in zip(losses_of(tmp_path / "one"), losses_of(tmp_path / "two"), strict=True):
        assert step == also and alone == pytest.approx(together, abs=2e-4)


@pytest.mark.long  # a compiler for a minute
def test_compiled_blocks_train_like_plain_ones(small_lake, ray_module, tmp_path) -> None:
    """With recomputed activations, an average and batches that end together, too; and what is left is a plain model."""
    config = with_train(accumulate=2, average=0.8, recompute=True, epochs=1)
    config = replace(config, model=replace(config.model, dropout=0.0))
    train(settings_for(small_lake, tmp_path / "plain", config))
    compiled = replace(config, train=replace(config.train, compile=True))
    train(settings_for(small_lake, tmp_path / "compiled", compiled))
    for (step, one), (also, other) in zip(losses_of(tmp_path / "plain"), losses_of(tmp_path / "compiled"), strict=True):
        assert step == also and one == pytest.approx(other, abs=2e-4)
    wanted, got = (newest_state(tmp_path / name / "checkpoints") for name in ("plain", "compiled"))
    assert wanted is not None and got is not None and wanted[0].keys() == got[0].keys()
    plain, other = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    assert plain.keys() == other.keys()
    assert all(torch.allclose(plain[name], other[name], atol=1e-3) for name in plain)


def test_without_a_compiler_compilation_is_refused_in_a_sentence(small_lake, ray_module, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = with_train(compile=True)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        Training(settings_for(small_lake, tmp_path, config), opened(small_lake, config), 0, 1)


def test_the_stage_leaves_a_model_its_curves_and_its_figures(small_lake, engines: Engines) -> None:
    lake, pins = small_lake
    plan = StagePlan(TRAIN, expected={"train": {DAYS[2]: "abc"}}, todo={"train": (DAYS[2],)})
    lines: list[str] = []
    context = StageContext(CONFIG, lake, calendar(), plan, engines, pins, lines.append)
    result = run(context)
    decoder, description = load_model(context.folder)
    assert description["codebook_version"] == "c1" and description["num_codes"] == [8, 8, 8] and not decoder.training
    assert {"loss", "loss_level_1", "loss_level_3", "validation_loss"} <= result.series.keys()
    assert len(result.series["validation_loss"]) == 2
    assert 0 <= result.metrics["data_wait_share"] <= 1 and result.metrics["tokens_per_second"] > 0
    assert result.metrics["parameters"] == sum(p.numel() for p in decoder.parameters())
    assert lines and result.notes and "loss" in result.figures
    assert json.dumps(result.manifest)


def test_validation_is_a_sample_of_that_days_requests(data: TrainingData) -> None:
    requests = data.validation()
    assert len(requests) > 0
    assert day_us(DAYS[3]) <= requests.ts_us.min() and requests.ts_us.max() < day_us(DAYS[4])
    assert (np.diff(requests.target_offsets) > 0).all() and (requests.target_items >= 0).all()


def test_levels_and_codes_are_those_of_the_codebook_and_another_ones_weights_are_refused(
    tmp_path: Path, ray_module
) -> None:
    lake = Lake(str(tmp_path / "lake"))
    pins = write_lake(lake, ROWS)
    codes = [
        {"item_id": i, "date": DAYS[2], "codes": [i % 8, i // 8, 0, i % 11], "codebook_version": "c4", "rank": 0}
        for i in range(40)
    ]
    table = pa.Table.from_pylist(codes, schema=SEMANTIC_IDS.schema)
    pins["semantic_ids"] = replace_days(lake, "semantic_ids", table, dict.fromkeys(DAYS, "y"))
    lake.write_manifest("tokenize", "c4", {"levels": 4, "codes": 11})
    settings = settings_for((lake, pins), tmp_path / "new")
    decoder = Training(settings, opened((lake, pins), CONFIG), 0, 1).decoder
    assert (decoder.levels, decoder.sizes, decoder.heads[3].out_features) == (4, (11,) * 4, 11)
    save_model(tmp_path / "old", decoder, {"codebook_version": "c1"})
    with pytest.raises(ContractViolation, match="learned codebook c1"):
        Training(settings | {"initial": str(tmp_path / "old")}, opened((lake, pins), CONFIG), 0, 1)


def test_a_model_survives_the_disk_and_a_foreign_file_does_not(tmp_path: Path) -> None:
    decoder = small_decoder(seed=3)
    save_model(tmp_path, decoder, {"codebook_version": "c"})
    again, description = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(decoder.state_dict().values(), again.state_dict().values(), strict=True))
    assert description["codebook_version"] == "c"
    (tmp_path / "model.json").write_text((tmp_path / "model.json").read_text().replace('"layers": 2', '"layers": 3'))
    with pytest.raises(ContractViolation, match=r"weights\.safetensors"):
        load_model(tmp_path)
    with pytest.raises(ContractViolation, match=r"model\.json"):
        load_model(tmp_path / "nowhere")
