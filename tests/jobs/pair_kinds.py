"""Swing and user-to-item by brute force in plain Python: every two users and items, the whole past of a target."""

from __future__ import annotations

import datetime
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable

from schemas.config import Config
from schemas.feedback import mask_of
from schemas.lineage import window_days
from tests.jobs import logs
from tests.jobs.logs import Event, Row

Pair = Callable[[int, int], float]
Item = Callable[[int], float]


def in_window(events: list[Event], day: datetime.date, config: Config) -> list[Event]:
    """The positives that the partition of `day` is made from."""
    mask, first = mask_of(config.targets.positive), day - datetime.timedelta(days=window_days(config))
    threshold = config.source.rating_threshold
    return [e for e in events if first <= e.date <= day and e.feedback(threshold) & mask]


def pair_rows(kind: str, day: datetime.date, weights: dict[tuple[int, int], float]) -> list[Row]:
    return [{"item_a": a, "item_b": b, "kind": kind, "weight": w, "date": day} for (a, b), w in weights.items()]


def reference_swings(
    events: list[Event], day: datetime.date, config: Config, order: Callable[[int], tuple[int, int]]
) -> list[Row]:
    """Rows of one day; `order` puts users into the order in which the cap keeps them."""
    settings = config.item_pairs
    first: dict[tuple[int, int], datetime.date] = {}
    for event in in_window(events, day, config):
        edge = event.user_id, event.item_id
        first[edge] = min(first.get(edge, day), event.date)
    size = Counter(user for user, _ in first)
    users: dict[int, set[int]] = {}
    for item in {item for _, item in first}:
        own = [u for u, i in first if i == item and size[u] <= settings.swing_items]
        users[item] = set(sorted(own, key=order)[: settings.swing_users])
    units: Counter[tuple[int, int]] = Counter()
    for u, v in itertools.combinations(sorted(size), 2):
        common = sorted(item for item, own in users.items() if u in own and v in own)
        for i, j in itertools.combinations(common, 2):
            if max(first[user, item] for user in (u, v) for item in (i, j)) == day:
                term = 1 / (math.sqrt(size[u] * size[v]) * (settings.swing_alpha + len(common)))
                units[i, j] += round(term * 2**40)
    return pair_rows("swing", day, {pair: count / 2**40 for pair, count in units.items()})


def weights_as_of(events: list[Event], day: datetime.date, config: Config) -> tuple[Pair, Item]:
    """c(a, b) and c(a) of co-occurrence as of `day`, summed in the order of distances."""
    settings = config.item_pairs
    pairs: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    items: dict[int, Counter[int]] = defaultdict(Counter)
    for own in logs.grouped(in_window(events, day, config), "user_id").values():
        for (p, early), (q, late) in itertools.combinations(enumerate(own), 2):
            gap = late.ts_us - early.ts_us
            if q - p <= settings.window and early.item_id != late.item_id and gap <= settings.max_gap_hours * 3.6e9:
                for a, b in ((early.item_id, late.item_id), (late.item_id, early.item_id)):
                    pairs[a, b][q - p] += 1
                    items[a][q - p] += 1

    def weight(counts: Counter[int]) -> float:
        total = 0.0
        for distance in sorted(counts):  # as the job does; sum() of newer Pythons rounds otherwise
            total += counts[distance] / distance
        return total

    return lambda a, b: weight(pairs.get((a, b), Counter())), lambda a: weight(items.get(a, Counter()))


def reference_triggers(events: list[Event], day: datetime.date, config: Config) -> list[Row]:
    """Rows of one day."""
    pair, item = weights_as_of(events, day, config)
    positives = in_window(events, day, config)
    targets: Counter[tuple[int, int]] = Counter()
    for target in (e for e in positives if e.date == day):
        t = target.item_id
        earlier = [e for e in positives if e.user_id == target.user_id and e.ts_us < target.ts_us and e.item_id != t]
        newest_first = dict.fromkeys(e.item_id for e in reversed(logs.in_order(earlier)))
        candidates = [h for h in list(newest_first)[: config.item_pairs.latest] if pair(h, t) > 0]
        if candidates:
            targets[min(candidates, key=lambda h: (-pair(h, t) * pair(h, t) / item(h), h)), t] += 1
    return pair_rows("user_to_item", day, {found: float(count) for found, count in targets.items()})
