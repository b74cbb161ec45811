"""Samples of requests chosen by a hash of user and time, so that they depend on no order, batch or worker."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sample:
    """Requests, or with `whole_users` users, whose hash is at most `threshold`."""

    seed: int
    threshold: np.uint64
    whole_users: bool = False

    @classmethod
    def of(cls, user_ids: np.ndarray, ts_us: np.ndarray, size: int, seed: int, whole_users: bool = False) -> Sample:
        """Chooses `size` of the requests (all where there are fewer), or whole users until they have that many."""
        hashes = np.sort(hash_of(user_ids, 0 * ts_us if whole_users else ts_us, seed))
        last = hashes[min(size, len(hashes)) - 1] if len(hashes) and size > 0 else np.uint64(0)
        return cls(seed, last, whole_users)

    def keeps(self, user_ids: np.ndarray, ts_us: np.ndarray) -> np.ndarray:
        """bool [R]."""
        return hash_of(user_ids, 0 * ts_us if self.whole_users else ts_us, self.seed) <= self.threshold


NO_REQUEST = Sample(seed=0, threshold=np.uint64(0))


def hash_of(user_ids: np.ndarray, ts_us: np.ndarray, seed: int) -> np.ndarray:
    """uint64 [R]: the same on every machine (the finaliser of SplitMix64, twice)."""
    mixed = user_ids.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for value in (np.uint64(0), ts_us.astype(np.uint64)):
        mixed = mixed ^ value
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed
