"""What the ranker of `benchmarks.code_ranker` reads: histories strictly before the request, roles by day, codes by item."""

from __future__ import annotations

import numpy as np

from benchmarks.click_data import Reading, read_click_data
from model.seeding import hash64
from pipelines import embed, quantitative_codes
from pipelines.engines import Engines
from schemas.feedback import BITS
from schemas.lake import Lake
from tests.pipelines.small_catalogue import DAYS, calendar, context, sequence, small_lake, write
from tests.pipelines.test_quantitative_codes import CONFIG, rows_of

READING = Reading(("click", "long_view"), ("click",), history=4, train=10_000, buckets=10_000)


def test_impressions_hold_what_was_known_before_their_request(lake: Lake, engines: Engines) -> None:
    small_lake(lake)
    rng = np.random.default_rng(0)
    plays = [
        sequence(user, day, [*rng.integers(0, 120, 4), 1030], [*(rng.random(4) < 0.6), True])
        for user in range(12)
        for day in DAYS
    ]
    for row in plays:  # requests of two impressions at two times, and of two at one
        start = row["ts_us"][0]
        row |= {"request_ids": [1, 1, 2, 2, 3], "ts_us": [start, start + 1, start + 1, start + 1, start + 2]}
    write(lake, "user_sequences", plays, DAYS, mark="2")
    embed.run(context("embed", lake, engines, CONFIG))
    quantitative_codes.run(context("codes", lake, engines, CONFIG))
    data, codes = read_click_data(lake, calendar(), READING), rows_of(lake)
    ids = sorted(codes)
    events = [
        (
            row["user_id"],
            row["date"],
            item,
            ts,
            row["ts_us"][row["request_ids"].index(request)],
            feedback & BITS["click"] != 0,
        )
        for row in plays
        for item, ts, request, feedback in zip(
            row["item_ids"], row["ts_us"], row["request_ids"], row["feedback"], strict=True
        )
    ]
    assert {role: len(part) for role, part in data.parts.items()} == {"train": 180, "validation": 60, "test": 60}
    found = {
        (int(user), int(item), tuple(history), label)
        for part in data.parts.values()
        for user, item, history, label in zip(
            part.users_I, part.items_I, part.history_IH.tolist(), part.labels_IY[:, 0].tolist(), strict=True
        )
    }
    expected = set()
    for user, _, item, _, before, clicked in events:
        past = [
            (ts, place, other)
            for place, (u, _, other, ts, _, liked) in enumerate(events)
            if u == user and ts < before and liked
        ]
        history = [ids.index(other) for _, _, other in sorted(past, reverse=True)][:4]
        bucket = 1 + int(hash64(np.array([user]), 1)[0]) % READING.buckets
        expected.add((bucket, ids.index(item), (*history, *[-1] * (4 - len(history))), float(clicked)))
    assert found == expected
    shown = {item for _, day, item, *_ in events if day in calendar().train}
    tested = [item for _, day, item, *_ in events if day == DAYS[4]]
    assert data.unseen.sum() == sum(item not in shown for item in tested) and data.num_users == 12
    for place, item in enumerate(ids):
        assert [ids[near - 1] for near in data.items.vq_NK[place].tolist()] == codes[item]["vq"]
        own = data.items.rq_NL[place] - data.items.rq_NL.min(0).values
        assert own.tolist() == (np.array(codes[item]["rq"]) - np.min([row["rq"] for row in codes.values()], 0)).tolist()
    assert len({*data.items.rq_NL[:, 0].tolist()} & {*data.items.rq_NL[:, 1].tolist()}) == 0
