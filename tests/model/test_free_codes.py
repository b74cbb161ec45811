"""Free codes against a search over all of them in plain NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.free_codes import free_codes, keys_of
from model.rq_kmeans import Codebook

Codes = tuple[int, ...]


def small_codebook(levels: int, k: int, width: int, seed: int, grid: bool) -> Codebook:
    """On a grid many distances are equal and some centroids are."""
    g = torch.Generator().manual_seed(seed)
    values = [torch.randn(k, width, generator=g) for _ in range(levels)]
    return Codebook([v.mul(2).round() if grid else v for v in values])


def by_search(codebook: Codebook, x: np.ndarray, codes: list[Codes], held: set[Codes]) -> list[Codes]:
    """The rule in words: rounds by the length of the own prefix that is kept, rows in order, then the nearest open code."""
    every = set(itertools.product(range(codebook.codes), repeat=codebook.levels))
    found: list[Codes | None] = [None] * len(codes)
    held = set(held)
    for kept in reversed(range(codebook.levels)):
        for row, own in enumerate(codes):
            free = {leaf for leaf in every - held if leaf[:kept] == own[:kept]}
            if found[row] is None and free:
                prefix, residual = own[:kept], x[row]
                for level, code in enumerate(own[:kept]):
                    residual = residual - codebook.centroids[level][code].numpy()
                for level in range(kept, codebook.levels):
                    open_codes = sorted({leaf[level] for leaf in free if leaf[:level] == prefix})
                    centroids = codebook.centroids[level].numpy()
                    distances = [((residual.astype(np.float64) - centroids[c]) ** 2).sum() for c in open_codes]
                    code = open_codes[int(np.argmin(distances))]
                    prefix, residual = (*prefix, code), residual - centroids[code]
                found[row] = prefix
                held.add(prefix)
    return [own if new is None else new for own, new in zip(codes, found, strict=True)]


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 40), st.integers(0, 30), st.integers(0, 10_000), st.booleans())
@settings(max_examples=120, deadline=None)
def test_codes_are_those_of_a_search_over_all(levels: int, k: int, rows: int, held: int, seed: int, grid: bool) -> None:
    rng = np.random.default_rng(seed)
    codebook = small_codebook(levels, k, 2, seed, grid)
    x = rng.normal(size=(rows, 2)).astype(np.float32)
    x = (2 * x).round() if grid else x
    codes, taken = (rng.integers(0, min(k, 2), (n, levels)).astype(np.int32) for n in (rows, held))
    found = [tuple(row) for row in free_codes(codebook, torch.from_numpy(x), codes, taken).tolist()]
    held_codes = {tuple(row) for row in taken.tolist()}
    assert found == by_search(codebook, x, [tuple(row) for row in codes.tolist()], held_codes)
    free = k**levels - len(held_codes)
    assert len(set(found) - held_codes) == min(rows, free)


def test_keys_follow_the_order_of_codes() -> None:
    codes = np.array(list(itertools.product(range(3), repeat=3)), np.int32)
    assert keys_of(codes, 3).tolist() == list(range(27))
    assert keys_of(np.array([[8191] * 3]), 8192).tolist() == [8192**3 - 1]
