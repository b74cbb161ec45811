"""What only a GPU can show: its labels, codebooks, scores and gradients are those of a CPU."""

from __future__ import annotations

import copy
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import nearest
from model.beam import beam_search
from model.kmeans import lloyd
from model.nearest import FUSED_ERRORS, assign, margin
from model.nearest_triton import two_nearest
from model.rq_kmeans import encode, fit
from model.trie import Trie
from schemas.config import TokenizeConfig
from tests.model.requests import random_requests, small_decoder
from tests.model.test_architectures import ITEMS, SESSIONS, SHAPES
from tests.model.test_kmeans import KINDS, rows_of, true_labels


@pytest.mark.parametrize("screen", ["fused", "products"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 400), k=st.integers(1, 200), width=st.integers(1, 300), seed=st.integers(0, 99))
def test_labels_on_a_gpu_are_the_float64_truth(screen: str, kind: str, n: int, k: int, width: int, seed: int) -> None:
    x = rows_of(kind, n, width, seed)
    centroids = torch.cat([x, rows_of(kind, 8, width, seed + 1)])[torch.randperm(n + 8)[:k]]
    with pytest.MonkeyPatch.context() as patch:
        if screen == "products":
            patch.setattr(nearest, "fused", None)
        labels = assign(x.cuda(), centroids.cuda(), chunk=170)
    assert np.array_equal(labels.cpu().numpy(), true_labels(x.numpy(), centroids.numpy()))


@pytest.mark.parametrize("kind", ["normal", "grid", "duplicates", "far"])
@pytest.mark.parametrize("balance", ["none", "relaxed", "equal", "capped"])
def test_a_fit_on_a_gpu_has_the_bits_of_one_on_a_cpu(kind: str, balance: str) -> None:
    x, ids = rows_of(kind, 5_000, 48, 2), torch.randperm(90_000)[:5_000]
    settings = TokenizeConfig(codes=(64, 64, 16), iterations=8, balance=balance)  # type: ignore[arg-type]
    here, there = fit(x.clone(), ids, settings), fit(x.cuda(), ids.cuda(), settings)
    assert here.inertia == there.inertia
    assert torch.equal(here.codes_NL, there.codes_NL.cpu())
    for a, b in zip(here.codebook.centroids, there.codebook.centroids, strict=True):
        assert a.numpy().tobytes() == b.cpu().numpy().tobytes()
    assert torch.equal(encode(here.codebook, x), encode(there.codebook, x.cuda()).cpu())


@pytest.mark.parametrize("precision", list(FUSED_ERRORS))
def test_the_bounds_of_the_fused_screens_are_wide_enough(precision: Literal["tf32", "tf32x3"]) -> None:
    for width in (16, 64, 512):
        for kind in ("normal", "far"):
            x, centroids = rows_of(kind, 20_000, width, 1).cuda(), rows_of(kind, 2, width, 2).cuda()
            _, gap = two_nearest(x, centroids, precision)
            near = ((x[:, None].double() - centroids.double()) ** 2).sum(2).sort(1).values
            error = (gap - (near[:, 1] - near[:, 0])).abs()
            assert (error < 0.75 * margin(x.norm(dim=1), centroids, *FUSED_ERRORS[precision])).all()


def test_lloyd_on_a_gpu_does_not_depend_on_the_chunk() -> None:
    x, ids = rows_of("normal", 3_000, 33, 4).cuda(), torch.arange(3_000).cuda()
    one, other = lloyd(x, ids, 100, chunk=65_536), lloyd(x, ids, 100, chunk=333)
    assert torch.equal(one.centroids_KD, other.centroids_KD)
    assert torch.equal(one.labels_N, other.labels_N)


@pytest.mark.parametrize("name", [*SHAPES, *SESSIONS])
def test_a_gpu_gives_the_scores_and_gradients_of_a_cpu(name: str) -> None:
    changes = (SHAPES | SESSIONS)[name]
    requests, decoder = random_requests(8, 30, seed=2, least=0), small_decoder(**changes)
    other = copy.deepcopy(decoder).cuda()
    there = other.loss(requests.to("cuda"), ITEMS.to("cuda"))
    here = decoder.loss(requests, ITEMS)
    assert torch.allclose(there.per_level.cpu(), here.per_level, atol=1e-5)
    there.total.backward()
    here.total.backward()
    for a, b in zip(decoder.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad.cpu(), atol=1e-5)
    trie = Trie(ITEMS.codes[:-1], torch.arange(30), [8] * 3)
    there_trie = Trie(ITEMS.codes[:-1].cuda(), torch.arange(30).cuda(), [8] * 3)
    beams = beam_search(decoder.eval(), decoder.encode(requests, ITEMS), trie, 5)
    items = ITEMS.to("cuda")
    same = beam_search(other.eval(), other.encode(requests.to("cuda"), items), there_trie, 5)
    assert torch.allclose(beams.scores, same.scores.cpu(), atol=1e-4)
