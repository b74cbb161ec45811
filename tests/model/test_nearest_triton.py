"""The GPU's screen: its kernel run by Triton's interpreter here, and on a GPU the same bits as on a CPU."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import nearest
from model.kmeans import lloyd
from model.nearest import FUSED_ERRORS, assign, margin
from model.nearest_triton import two_nearest
from model.rq_kmeans import encode, fit
from schemas.config import TokenizeConfig
from tests.model.test_kmeans import KINDS, rows_of, true_distances, true_labels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where conftest.py asks for Triton's interpreter
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("precision", list(FUSED_ERRORS))
@pytest.mark.parametrize("kind", ["normal", "duplicates"])
@settings(max_examples=6, deadline=None)
@given(n=st.integers(1, 150), k=st.integers(2, 80), width=st.integers(1, 80), seed=st.integers(0, 99))
def test_the_kernel_gives_the_two_smallest_distances(
    precision: Literal["tf32", "tf32x3"], kind: str, n: int, k: int, width: int, seed: int
) -> None:
    x, centroids = rows_of(kind, n, width, seed).to(DEVICE), rows_of(kind, k, width, seed + 1).to(DEVICE)
    labels, gap = two_nearest(x, centroids, precision)
    truth = true_distances(x.cpu().numpy(), centroids.cpu().numpy())
    best, second = np.sort(truth, axis=1)[:, :2].T
    allowed = margin(x.norm(dim=1), centroids, *FUSED_ERRORS[precision]).cpu().numpy()
    assert (np.take_along_axis(truth, labels.cpu().numpy()[:, None], 1)[:, 0] - best <= allowed).all()
    assert (np.abs(gap.cpu().numpy() - (second - best)) <= allowed).all()


@on_gpu
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


@on_gpu
@pytest.mark.parametrize("kind", ["normal", "grid", "duplicates", "far"])
@pytest.mark.parametrize("balance", ["none", "equal", "capped"])
def test_a_fit_on_a_gpu_has_the_bits_of_one_on_a_cpu(kind: str, balance: str) -> None:
    x, ids = rows_of(kind, 5_000, 48, 2), torch.randperm(90_000)[:5_000]
    settings = TokenizeConfig(codes=(64, 64, 16), iterations=8, balance=balance)  # type: ignore[arg-type]
    here, there = fit(x.clone(), ids, settings), fit(x.cuda(), ids.cuda(), settings)
    assert here.inertia == there.inertia
    assert torch.equal(here.codes_NL, there.codes_NL.cpu())
    for a, b in zip(here.codebook.centroids, there.codebook.centroids, strict=True):
        assert a.numpy().tobytes() == b.cpu().numpy().tobytes()
    assert torch.equal(encode(here.codebook, x), encode(there.codebook, x.cuda()).cpu())


@on_gpu
@pytest.mark.parametrize("precision", list(FUSED_ERRORS))
def test_the_bounds_of_the_fused_screens_are_wide_enough(precision: Literal["tf32", "tf32x3"]) -> None:
    for width in (16, 64, 512):
        for kind in ("normal", "far"):
            x, centroids = rows_of(kind, 20_000, width, 1).cuda(), rows_of(kind, 2, width, 2).cuda()
            _, gap = two_nearest(x, centroids, precision)
            near = ((x[:, None].double() - centroids.double()) ** 2).sum(2).sort(1).values
            error = (gap - (near[:, 1] - near[:, 0])).abs()
            assert (error < 0.75 * margin(x.norm(dim=1), centroids, *FUSED_ERRORS[precision])).all()


@on_gpu
def test_lloyd_on_a_gpu_does_not_depend_on_the_chunk() -> None:
    x, ids = rows_of("normal", 3_000, 33, 4).cuda(), torch.arange(3_000).cuda()
    one, other = lloyd(x, ids, 100, chunk=65_536), lloyd(x, ids, 100, chunk=333)
    assert torch.equal(one.centroids_KD, other.centroids_KD)
    assert torch.equal(one.labels_N, other.labels_N)
