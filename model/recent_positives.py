"""The newest positives of a user strictly before a moment, for many moments at once."""

from __future__ import annotations

import numpy as np


def recent_positives(
    users_I: np.ndarray, before_us_I: np.ndarray, users_P: np.ndarray, ts_us_P: np.ndarray, items_P: np.ndarray, length: int
) -> np.ndarray:
    """int64 [I, length]: for each moment the items of the user's positives with ts < before, newest first, -1 behind them.

    Users, times (UTC microseconds) and items are int64; positives come in any order, those at one time keep it. Work: two
    binary searches a moment.
    """
    times, users = np.unique(np.concatenate([ts_us_P, before_us_I])), np.unique(np.concatenate([users_P, users_I]))
    row_P, row_I = np.searchsorted(users, users_P), np.searchsorted(users, users_I)
    key_P = row_P * len(times) + np.searchsorted(times, ts_us_P)  # one integer orders by user, then time
    order_P = np.argsort(key_P, kind="stable")
    key_P, items_P = key_P[order_P], items_P[order_P]
    first_I = np.searchsorted(key_P, row_I * len(times))
    end_I = np.searchsorted(key_P, row_I * len(times) + np.searchsorted(times, before_us_I))
    place_IH = end_I[:, None] - 1 - np.arange(length)
    known_IH = place_IH >= first_I[:, None]
    padded = np.append(items_P.astype(np.int64), -1)
    return padded[np.where(known_IH, place_IH, len(items_P))]
