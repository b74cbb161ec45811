"""The kernel of a GPU's screen, run by Triton's interpreter where there is no GPU."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.nearest import FUSED_ERRORS, margin
from model.nearest_triton import two_nearest
from tests.model.test_kmeans import rows_of, true_distances

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where conftest.py asks for Triton's interpreter


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
