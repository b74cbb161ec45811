"""Codes of the fit, of the encoder and of a replay in plain NumPy are the same; so are those of 1, 2 and 4 ranks."""

from __future__ import annotations

import dataclasses
import datetime
import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model.codebook_metrics import collisions, level_use
from model.reduction import Alone, Group, Reducer, reducer_of_process
from model.rq_kmeans import Fit, Levels, encode, fit
from schemas.config import TokenizeConfig
from schemas.errors import ContractViolation
from tests.model.shards import on_ranks
from tests.model.test_kmeans import rows_of, true_labels

SETTINGS = TokenizeConfig(levels=3, codes=16, iterations=8, tolerance=1e-6)
Balance = Literal["none", "relaxed", "capped", "equal"]
NEAREST = [SETTINGS, dataclasses.replace(SETTINGS, balance="relaxed")]  # fits whose codes are nearest centroids


def same(a: Fit, b: Fit) -> bool:
    pairs = zip(a.codebook.centroids, b.codebook.centroids, strict=True)
    return a.inertia == b.inertia and all(x.numpy().tobytes() == y.numpy().tobytes() for x, y in pairs)


@pytest.mark.parametrize("settings", NEAREST, ids=lambda s: s.balance)
@pytest.mark.parametrize("kind", ["normal", "grid", "duplicates", "far"])
def test_fit_encode_and_numpy_give_the_same_codes(kind: str, settings: TokenizeConfig) -> None:
    x = rows_of(kind, 600, 11, 3)
    result = fit(x.clone(), torch.arange(600), settings)
    residual = x.numpy().copy()
    for level, centroids in enumerate(result.codebook.centroids):
        labels = true_labels(residual, centroids.numpy())
        assert np.array_equal(labels, result.codes_NL[:, level].numpy())
        residual -= centroids.numpy()[labels]
    kept = x.clone()
    assert torch.equal(encode(result.codebook, x, chunk=97), result.codes_NL)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("kind", ["normal", "grid", "duplicates", "far"])
@pytest.mark.parametrize(("ranks", "settings"), [(2, NEAREST[0]), (4, NEAREST[0]), (3, NEAREST[1])])
def test_ranks_and_order_change_nothing(kind: str, ranks: int, settings: TokenizeConfig) -> None:
    x, ids = rows_of(kind, 500, 8, 1), torch.randperm(10_000)[:500]
    alone = fit(x.clone(), ids, settings)
    parts = torch.randperm(500).tensor_split(ranks)
    results = on_ranks(ranks, lambda reducer: fit(x[parts[reducer.rank]], ids[parts[reducer.rank]], settings, reducer))
    for part, result in zip(parts, results, strict=True):
        assert same(result, alone)
        assert torch.equal(result.codes_NL, alone.codes_NL[part])


@pytest.mark.parametrize("balance", ["none", "relaxed", "capped", "equal"])
@pytest.mark.parametrize("kind", ["normal", "duplicates"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_fit_continues_after_any_level_with_the_same_bits(kind: str, balance: Balance, ranks: int) -> None:
    x, ids = rows_of(kind, 400, 8, 1), torch.randperm(10_000)[:400]
    settings = dataclasses.replace(SETTINGS, codes=(16, 5, 30), balance=balance)
    so_far: list[Levels] = []
    unbroken = fit(x.clone(), ids, settings, after_level=so_far.append)
    assert [len(levels.centroids) for levels in so_far] == [1, 2, 3]
    parts = torch.randperm(400).tensor_split(ranks)
    for earlier in so_far:
        further: list[Levels] = []

        def program(reducer: Reducer, earlier: Levels = earlier, further: list[Levels] = further) -> Fit:
            rows = parts[reducer.rank]
            keep = further.append if reducer.rank == 0 else None
            return fit(x[rows], ids[rows], settings, reducer, earlier, keep)

        for part, result in zip(parts, on_ranks(ranks, program), strict=True):
            assert same(result, unbroken)
            assert torch.equal(result.codes_NL, unbroken.codes_NL[part])
        assert [len(levels.centroids) for levels in further] == list(range(len(earlier.centroids) + 1, 4))


def gloo_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=TIMEOUT)
    reducer = reducer_of_process()
    assert isinstance(reducer, Group)
    rows = slice(0, 130) if rank == 0 else slice(130, 500)
    result = fit(rows_of("normal", 500, 8, 1)[rows], torch.arange(500)[rows], SETTINGS, reducer)
    torch.save([*result.codebook.centroids, result.codes_NL], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


TIMEOUT = datetime.timedelta(seconds=120)


def test_two_gloo_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(gloo_rank, (str(tmp_path),), nprocs=2)
    alone = fit(rows_of("normal", 500, 8, 1), torch.arange(500), SETTINGS)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for *centroids, _ in parts:
        assert all(torch.equal(a, b) for a, b in zip(centroids, alone.codebook.centroids, strict=True))
    assert torch.equal(torch.cat([codes for *_, codes in parts]), alone.codes_NL)
    assert isinstance(reducer_of_process(), Alone)


def test_appending_items_moves_no_code() -> None:
    x = rows_of("normal", 400, 6, 0)
    result = fit(x.clone(), torch.arange(400), SETTINGS)
    longer = torch.cat([rows_of("normal", 50, 6, 9), x])
    assert torch.equal(encode(result.codebook, longer)[50:], result.codes_NL)


def test_a_relaxed_start_leaves_less_and_uses_codes_more_evenly() -> None:
    """Few rows a code in a high dimension: Lloyd from drawn centroids ends with one large code and many tiny ones."""
    x, ids = rows_of("normal", 3000, 48, 0), torch.arange(3000)
    settings = dataclasses.replace(SETTINGS, codes=128, iterations=30)
    plain, relaxed = (fit(x.clone(), ids, dataclasses.replace(settings, balance=way)) for way in ("none", "relaxed"))
    assert relaxed.inertia[-1][-1] < 0.95 * plain.inertia[-1][-1]
    for level in range(3):
        entropy = [level_use(found.codes_NL[:, level], 128).entropy for found in (plain, relaxed)]
        assert entropy[1] > entropy[0] and entropy[1] > 0.95 * math.log(128)


def test_each_level_lowers_the_error() -> None:
    result = fit(rows_of("normal", 2000, 12, 0), torch.arange(2000), SETTINGS)
    last = [curve[-1] for curve in result.inertia]
    assert last[0] > last[1] > last[2] > 0


def test_another_width_is_refused() -> None:
    result = fit(rows_of("normal", 50, 6, 0), torch.arange(50), SETTINGS)
    with pytest.raises(ContractViolation, match="5 dimensions do not fit a codebook of 6"):
        encode(result.codebook, torch.zeros(3, 5))


def test_large_codebook() -> None:
    """The paper's 3 x 8,192 codes: the rows of 12,000 items find distinct places."""
    settings = TokenizeConfig(codes=8192, iterations=1)
    x = rows_of("normal", 12_000, 16, 0)
    result = fit(x.clone(), torch.arange(12_000), settings)
    assert level_use(result.codes_NL[:, 0], 8192).utilisation > 0.99
    assert torch.equal(encode(result.codebook, x), result.codes_NL)


def test_metrics_of_known_codes() -> None:
    even = level_use(torch.arange(8).repeat(3), 16)
    assert (even.utilisation, even.entropy, even.perplexity) == pytest.approx((0.5, math.log(8), 8.0))
    shared = collisions(torch.tensor([[0, 1], [0, 1], [1, 0], [0, 1], [1, 1]]))
    assert (shared.rate, shared.distinct, shared.largest) == (0.6, 3, 3)
