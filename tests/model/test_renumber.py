"""Renumbering permutes names alone, keeps what can be kept, and is the best possible on each level."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.renumber import kept_prefixes, matching_numbers, renumber_codebook, renumber_codes
from model.rq_kmeans import Codebook, encode, fit
from schemas.config import TokenizeConfig
from tests.model.test_kmeans import rows_of

KINDS = st.sampled_from(["normal", "grid", "duplicates", "far"])


def permutations(k: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.permutation(k) for _ in range(3)]


@functools.cache
def fitted(kind: str) -> tuple[torch.Tensor, Codebook, np.ndarray]:
    x = rows_of(kind, 80, 5, 0)
    result = fit(x.clone(), torch.arange(80), TokenizeConfig(levels=3, codes=16, iterations=2))
    return x, result.codebook, result.codes_NL.numpy()


def reconstructions(codebook: Codebook, codes: np.ndarray) -> torch.Tensor:
    return torch.stack([c[codes[:, level].astype(np.int64)] for level, c in enumerate(codebook.centroids)])


@given(KINDS, st.integers(0, 50))
@settings(max_examples=12, deadline=None)
def test_names_change_and_nothing_else(kind: str, seed: int) -> None:
    """On a grid and among duplicates many centroids are equally near: ties go as they went."""
    x, codebook, codes = fitted(kind)
    numbers = permutations(16, seed)
    renamed, by_number = renumber_codebook(codebook, numbers), renumber_codes(codes, numbers)
    assert np.array_equal(encode(renamed, x).numpy(), by_number)
    assert torch.equal(reconstructions(renamed, by_number), reconstructions(codebook, codes))
    new = rows_of("grid", 80, 5, seed + 1)
    assert np.array_equal(encode(renamed, new).numpy(), renumber_codes(encode(codebook, new).numpy(), numbers))


@given(KINDS, st.integers(0, 50))
@settings(max_examples=12, deadline=None)
def test_the_same_codebook_under_other_names_keeps_every_item(kind: str, seed: int) -> None:
    x, codebook, codes = fitted(kind)
    old = renumber_codes(codes, permutations(16, seed))
    found = renumber_codes(codes, matching_numbers(codes, old, [16] * codes.shape[1]))
    assert kept_prefixes(found, old) == [1.0, 1.0, 1.0]
    renamed = renumber_codebook(codebook, matching_numbers(codes, old, [16] * codes.shape[1]))
    assert np.array_equal(encode(renamed, x).numpy(), old)


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 4), max_size=60))
@settings(max_examples=40, deadline=None)
def test_no_other_numbers_keep_more_items_level_by_level(items: list[tuple[int, ...]]) -> None:
    pairs = np.array(items, np.int32).reshape(-1, 4)
    new, old = pairs[:, :2], pairs[:, 2:]
    numbers = matching_numbers(new, old, [5] * new.shape[1])
    assert all(sorted(number) == list(range(5)) for number in numbers)
    keeps = np.ones(len(items), bool)
    for level, number in enumerate(numbers):
        kept = [(keeps & (np.array(p)[new[:, level]] == old[:, level])).sum() for p in itertools.permutations(range(5))]
        keeps &= number[new[:, level]] == old[:, level]
        assert keeps.sum() == max(kept)
