"""Drift of synthetic items: the yardstick holds without a shift, and chance is taken off what few items do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from model.drift import CodebookUse, codebook_use, divergence, known_codes, level_drifts
from model.rq_kmeans import Codebook, encode, fit
from schemas.config import TokenizeConfig

COUNTS = arrays(np.int64, 6, elements=st.integers(0, 9)).filter(lambda counts: counts.sum() > 0)


def points(count: int, seed: int, heaps: int = 12) -> torch.Tensor:
    centres = 3 * torch.randn(heaps, 8, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    return centres[torch.randint(heaps, (count,), generator=g)] + torch.randn(count, 8, generator=g)


@pytest.fixture(scope="module")
def fitted() -> tuple[Codebook, CodebookUse]:
    x = points(400, 1)
    found = fit(x.clone(), torch.arange(400), TokenizeConfig(levels=2, codes=24, iterations=6))
    use = codebook_use(found.codebook, x, found.codes_NL.numpy())
    assert use.squares_L == pytest.approx([curve[-1] for curve in found.inertia], rel=1e-6)
    return found.codebook, use


def levels_of(fitted: tuple[Codebook, CodebookUse], x: torch.Tensor) -> tuple[list[float], list[float]]:
    codebook, use = fitted
    drifts = level_drifts(use, codebook_use(codebook, x, encode(codebook, x).numpy()))
    return [level.growth for level in drifts], [level.excess for level in drifts]


@pytest.mark.parametrize("count", [5, 60, 400])
def test_items_of_the_same_kind_show_no_drift(fitted: tuple[Codebook, CodebookUse], count: int) -> None:
    growth, excess = levels_of(fitted, points(count, 2))
    assert max(growth) < 1.15 and max(excess) < 0.1


def test_items_elsewhere_show_in_the_residuals(fitted: tuple[Codebook, CodebookUse]) -> None:
    growth, _ = levels_of(fitted, points(60, 2) + 4)
    assert growth[0] > 1.5


def test_items_of_two_heaps_alone_show_in_the_use_of_codes(fitted: tuple[Codebook, CodebookUse]) -> None:
    growth, excess = levels_of(fitted, points(60, 2, heaps=2))
    assert growth[0] < 1.2 and excess[0] > 0.25


def test_a_fit_of_as_many_codes_as_items_gives_no_yardstick() -> None:
    x = points(20, 1)
    found = fit(x.clone(), torch.arange(20), TokenizeConfig(levels=1, codes=20, iterations=2))
    use = codebook_use(found.codebook, x, found.codes_NL.numpy())
    (level,) = level_drifts(use, codebook_use(found.codebook, x + 9, encode(found.codebook, x + 9).numpy()))
    assert level.expected == np.inf and level.growth == 0


@given(COUNTS, COUNTS)
def test_divergence_is_symmetric_and_lies_between_0_and_ln_2(a: np.ndarray, b: np.ndarray) -> None:
    assert divergence(a, b) == pytest.approx(divergence(b, a), abs=1e-12)
    assert -1e-12 <= divergence(a, b) <= np.log(2) + 1e-12
    assert divergence(a, 3 * a) == pytest.approx(0, abs=1e-12)
    assert divergence(np.array([1, 0]), np.array([0, 5])) == pytest.approx(np.log(2))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2))), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2))))
def test_known_codes_are_those_of_a_set(codes: list[tuple[int, int]], held: list[tuple[int, int]]) -> None:
    arrays_of = (np.array(part, np.int32).reshape(-1, 2) for part in (codes, held))
    assert known_codes(*arrays_of).tolist() == [code in set(held) for code in codes]
