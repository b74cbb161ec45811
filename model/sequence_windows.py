"""Long sequences cut into windows for a sequence model, so that every positive is predicted exactly once.

A user with n positives has n - 1 steps (item, next item). The first window holds the first `length` steps and predicts
at all of them; each later window ends half a length further and predicts only at the steps that no window before it
did, so that these see at least half a length of context. Windows are cut from the train positives alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.positives import Positives


@dataclass(frozen=True)
class Windows:
    """W windows over the steps: window w reads steps [start, stop) and predicts at [predict_from, stop)."""

    items: np.ndarray  # int64 [P], the positives, user after user; a step's next item is the one behind it
    start: np.ndarray  # int64 [W]
    predict_from: np.ndarray  # int64 [W]
    stop: np.ndarray  # int64 [W]

    def __len__(self) -> int:
        return len(self.start)

    @property
    def predictions(self) -> int:
        """Predicted positions an epoch."""
        return int((self.stop - self.predict_from).sum())

    def batch(self, chosen: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Packed tokens of the chosen windows: items int64 [T], offsets [B + 1], predicted bool [T], next items [T]."""
        lengths = self.stop[chosen] - self.start[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        place = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - self.start[chosen], lengths)
        predicted = place >= np.repeat(self.predict_from[chosen], lengths)
        arrays = (self.items[place], offsets, predicted, self.items[place + 1])
        return tuple(torch.from_numpy(array) for array in arrays)  # type: ignore[return-value]

    def batches(self, predictions: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
        """One epoch in random order: windows whose predicted positions fill `predictions` at a time."""
        order = generator.permutation(len(self))
        filled = np.cumsum((self.stop - self.predict_from)[order])
        cuts = np.flatnonzero(np.diff((filled - 1) // predictions)) + 1
        yield from (part for part in np.split(order, cuts) if len(part))


def cut_windows(positives: Positives, length: int) -> Windows:
    """Windows of at most `length` steps over every user with at least two positives."""
    first = positives.offsets[:-1]
    steps = np.diff(positives.offsets) - 1
    first, steps = first[steps > 0], steps[steps > 0]
    stride = max(1, length // 2)
    counts = 1 + -(-np.maximum(steps - length, 0) // stride)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    first, steps = np.repeat(first, counts), np.repeat(steps, counts)
    stop = np.minimum(length + nth * stride, steps)
    before = np.where(nth > 0, length + (nth - 1) * stride, 0)
    return Windows(positives.items, first + np.maximum(stop - length, 0), first + before, first + stop)
