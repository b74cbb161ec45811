"""What users did with logged exposures, as alignment reads it: the reward of each impression and, where this system made
the exposure, the probability that it gave each code.

Memory: 13 + 4 L bytes an impression of the days asked for, L the levels. Behaviour counts only under the codebook in use:
codes of another one name other items.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import torch
from torch import Tensor

from pipelines.ray_tables import read_dataset
from schemas.lake import Lake


@dataclass(frozen=True)
class Exposures:
    """M impressions in ascending order of id."""

    ids: Tensor  # int64 [M]
    quantile: Tensor  # float32 [M], NaN: unknown
    negative: Tensor  # bool [M]
    old_log_probs: Tensor  # float32 [M, L], a code; NaN: not shown by this system

    def of(self, impressions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantile, negative flag and behaviour of each of `impressions` (int64 [T]); unknown ones are NaN and False."""
        place = torch.searchsorted(self.ids, impressions).clamp(max=max(len(self.ids) - 1, 0))
        known = self.ids[place] == impressions
        quantile = torch.where(known, self.quantile[place], torch.nan)
        old = torch.where(known[:, None], self.old_log_probs[place], torch.nan)
        return quantile, known & self.negative[place], old


def load_exposures(
    lake: Lake, pins: Mapping[str, int], days: Collection[datetime.date], codebook_version: str, levels: int
) -> Exposures:
    """Rewards and behaviour of the impressions of `days` at pinned versions."""
    rewards = read_dataset(lake, "rewards", pins["rewards"], ["impression_id", "quantile", "negative"], days)
    columns = rewards.iter_batches(batch_format="numpy", batch_size=None)
    parts = [(c["impression_id"], c["quantile"].astype(np.float32), c["negative"].astype(bool)) for c in columns]
    empty = (np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, bool))
    ids, quantile, negative = (np.concatenate(column) for column in zip(empty, *parts, strict=True))
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    old = np.full((len(ids), levels), np.nan, np.float32)
    shown, log_probs = _behaviour(lake, pins["impressions"], days, codebook_version, levels)
    place = np.searchsorted(ids, shown).clip(max=max(len(ids) - 1, 0))
    found = ids[place] == shown if len(ids) else np.zeros(len(shown), bool)
    old[place[found]] = log_probs[found]
    tensors = (torch.from_numpy(values) for values in (ids, quantile[order], negative[order], old))
    return Exposures(*tensors)


def _behaviour(
    lake: Lake, version: int, days: Collection[datetime.date], codebook_version: str, levels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids (int64 [M]) and log-probabilities (float32 [M, L]) of what this system showed under the codebook."""
    where = pads.field("behaviour_codebook") == codebook_version
    rows = read_dataset(lake, "impressions", version, ["impression_id", "behaviour_log_probs"], days, where)
    ids, log_probs = [np.empty(0, np.int64)], [np.empty((0, levels), np.float32)]
    for table in cast(Iterable[pa.Table], rows.iter_batches(batch_format="pyarrow", batch_size=None)):
        values = table.column("behaviour_log_probs").combine_chunks()
        whole = np.diff(values.offsets.to_numpy()) == levels
        table = table.filter(whole)
        ids.append(table.column("impression_id").to_numpy())
        flat = table.column("behaviour_log_probs").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        log_probs.append(flat.reshape(-1, levels))
    return np.concatenate(ids), np.concatenate(log_probs)


def known_quantiles(lake: Lake, version: int, days: Collection[datetime.date]) -> int:
    """Impressions of `days` with a quantile, by the statistics in the table's log."""
    actions = lake.open("rewards", version).get_add_actions(flatten=True)
    names = ("partition.date", "num_records", "null_count.quantile")
    columns = (actions.column(name).to_pylist() for name in names)
    return sum(rows - (nulls or 0) for day, rows, nulls in zip(*columns, strict=True) if day in set(days))
