"""Feedback of one exposure packed into an integer, so that a history carries one small column of labels.

The bits are part of the table contract: jobs pack them, the collate step and the rules for targets unpack them.
"""

from __future__ import annotations

from collections.abc import Iterable

# The boolean columns of `impressions`, in bit order; appending is safe, reordering is not.
FLAGS = ("click", "long_view", "like", "follow", "comment", "forward", "profile_enter", "hate")
RATED_HIGH = "rated_high"  # a rating at or above the configured threshold
WATCHED_HIGH = "watched_high"  # played longer than most plays of like duration, where the configuration asks for it
BITS: dict[str, int] = {name: 1 << position for position, name in enumerate((*FLAGS, RATED_HIGH, WATCHED_HIGH))}
NUM_BITS = BITS[RATED_HIGH].bit_length()  # that models read, the lowest; the last follows from play time and duration


def mask_of(names: Iterable[str]) -> int:
    """OR of the bits of `names`; raises KeyError for a name that is no feedback bit."""
    mask = 0
    for name in names:
        mask |= BITS[name]
    return mask
