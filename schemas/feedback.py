"""Feedback of one exposure packed into an integer, so that a history carries one small column of labels.

The bits are part of the table contract: jobs pack them, the collate step and the rules for targets unpack them.
"""

from __future__ import annotations

from collections.abc import Iterable

# The boolean columns of `impressions`, in bit order; appending is safe, reordering is not.
FLAGS = ("click", "long_view", "like", "follow", "comment", "forward", "profile_enter", "hate")
RATED_HIGH = "rated_high"  # a rating at or above the configured threshold
BITS: dict[str, int] = {name: 1 << position for position, name in enumerate((*FLAGS, RATED_HIGH))}
NUM_BITS = len(BITS)


def mask_of(names: Iterable[str]) -> int:
    """OR of the bits of `names`; raises KeyError for a name that is no feedback bit."""
    mask = 0
    for name in names:
        mask |= BITS[name]
    return mask
