"""For each play, how many plays of its group lie strictly before it in time, and how many of those are no longer.

Counting pairs would be quadratic for a heavy user. Instead plays are put in order of time and numbered by length within
their group; then the bits of these numbers are looked at one by one, the highest first, while plays that agree in the
bits so far stand together, in order of time: a play whose bit is 1 is longer than all those that stand before it with a 0.
That is one pass over flat arrays for each bit of the largest group, and no loop over groups; a group takes part in as many
passes as its own size has bits.
"""

from __future__ import annotations

import numpy as np

from jobs.jagged import Ints, offsets_of, starts


def earlier_plays(groups: Ints, ts_us: Ints, play_ms: Ints, counts: np.ndarray) -> tuple[Ints, Ints]:
    """earlier [N], no_longer [N]: the plays of the same group at times strictly before each play's, and those of them whose
    play time is not larger. `counts` bool [N]: a play without it asks, and is seen by none."""
    in_time = np.lexsort((-play_ms, ts_us, groups))  # of equal times the longer first, so that no play counts its equals
    groups, ts_us, play_ms, counts = groups[in_time], ts_us[in_time], play_ms[in_time], counts[in_time]
    first = starts(groups)
    sizes = np.diff(np.append(first, len(groups)))
    earlier = _earlier(groups, ts_us, counts)
    no_longer = _smaller_before(_numbers(groups, ts_us, play_ms, first, sizes), first, sizes, counts)
    return _in_order(in_time, earlier), _in_order(in_time, no_longer)


def earlier_counts(groups: Ints, ts_us: Ints, counts: np.ndarray) -> Ints:
    """earlier [N], as `earlier_plays` gives it."""
    in_time = np.lexsort((ts_us, groups))
    return _in_order(in_time, _earlier(groups[in_time], ts_us[in_time], counts[in_time]))


def _earlier(groups: Ints, ts_us: Ints, counts: np.ndarray) -> Ints:
    """Of plays in order of group and time."""
    first, moments, above = starts(groups), starts(groups, ts_us), offsets_of(counts)
    before = np.repeat(above[moments], np.diff(np.append(moments, len(groups))))
    return before - np.repeat(above[first], np.diff(np.append(first, len(groups))))


def _in_order(places: Ints, values: Ints) -> Ints:
    found = np.empty_like(values)
    found[places] = values
    return found


def _numbers(groups: Ints, ts_us: Ints, play_ms: Ints, first: Ints, sizes: Ints) -> Ints:
    """The plays of each group numbered by length, equal ones by time, and of equal times the last first."""
    place = np.arange(len(groups))
    ascending = np.lexsort((-place, ts_us, play_ms, groups))
    return _in_order(ascending, place) - np.repeat(first, sizes)


def _smaller_before(numbers: Ints, first: Ints, sizes: Ints, counts: np.ndarray) -> Ints:
    """For each play how many that count stand before it in its group with a smaller number. Groups are whole runs of the
    arrays, from `first` on; the largest are moved to the front, since only they take part in the first passes."""
    largest_first = np.argsort(-sizes, kind="stable")
    sizes, found = sizes[largest_first], np.zeros(len(numbers), np.int64)
    offsets = offsets_of(sizes)
    at = np.arange(len(numbers)) + np.repeat(first[largest_first] - offsets[:-1], sizes)  # where each play comes from
    block = np.repeat(offsets[:-1], sizes)  # where the plays that agree so far begin
    for bit in reversed(range(int(sizes.max(initial=0)).bit_length())):
        size = int(offsets[np.searchsorted(-sizes, -(1 << bit), "left")])  # of the groups with more than 2^bit plays
        if size:
            _one_bit(bit, at[:size], block[:size], numbers, counts, found)
    return found


def _one_bit(bit: int, at: Ints, block: Ints, numbers: Ints, counts: np.ndarray, found: Ints) -> None:
    """Counts the plays whose `bit` decides, and puts those with a 0 first; changes `at`, `block` and `found`."""
    ones = ((numbers[at] >> bit) & 1).astype(bool)
    zeros_above, counted_above = offsets_of(~ones), offsets_of(~ones & counts[at])
    found[at[ones]] += counted_above[:-1][ones] - counted_above[block[ones]]
    begins = starts(block)
    ends = np.append(begins[1:], len(block))
    zeros = np.repeat(zeros_above[ends] - zeros_above[begins], ends - begins)  # of the block
    zeros_before = zeros_above[:-1] - zeros_above[block]
    place = np.where(ones, zeros + np.arange(len(block)) - zeros_before, block + zeros_before)
    at[place] = at.copy()
    block += np.where(ones, zeros, 0)
    block[place] = block.copy()
