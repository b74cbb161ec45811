"""The other two organisers of Figure 3 against brute force, and which days of a lake they make."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from jobs import organise
from jobs.organisers import REPEATED
from jobs.organisers import organised as organise_rows
from jobs.tables import read, replace_days
from schemas.calendar import Calendar, calendar_of
from schemas.config import Config, OrganiseConfig, SequencesConfig, SplitConfig
from schemas.errors import ConfigError
from schemas.lake import Lake
from schemas.lineage import ORGANISE, plan
from schemas.loader import from_mapping
from tests.jobs import logs

LIMITS = SequencesConfig(3, 4)
NAIVE = Config(sequences=LIMITS, organise=OrganiseConfig("naive"))
BY_USER = Config(sequences=LIMITS, organise=OrganiseConfig("user_centric", user_events=7))
DAYS = logs.days_from(5)
SEED = 31


@pytest.fixture(scope="module")
def events() -> list[logs.Event]:
    return logs.random_log(SEED, users=15)


def organised(spark, organiser: str, config: Config, events: list[logs.Event]) -> list[logs.Row]:
    items, users = logs.random_catalogue(SEED), logs.random_users(SEED)
    sequences = logs.table_frame(spark, "user_sequences", logs.reference_sequences(events, items, config))
    return logs.collected(
        organise_rows(organiser, sequences, None, logs.table_frame(spark, "users", users), config), "training_examples"
    )


def reference_naive(events: list[logs.Event]) -> list[logs.Row]:
    """Each target of each request with the request's context, whose events are targets before it."""
    kept = ("item_ids", "play_ms", "duration_ms", "feedback")
    rows, last = [], {}
    for row in logs.reference_examples(events, logs.random_catalogue(SEED), logs.random_users(SEED), NAIVE):
        times, user_day = row["context_ts_us"], (row["user_id"], row["date"])
        requests = [
            r for r, (a, b) in zip(row["request_ids"], pairwise(row["target_start"]), strict=True) for _ in range(a, b)
        ]
        for place, request in enumerate(requests):
            last[user_day] = max(row["slice_us"], last.get(user_day, -1) + 1)
            rows.append(
                {
                    **row,
                    "slice_us": last[user_day],
                    "request_ids": [REPEATED] * len(times) + [request],
                    "request_ts_us": [*times, row["slice_us"]],
                    "history_end": [*(sum(other < ts for other in times) for ts in times), len(times)],
                    "target_start": list(range(len(times) + 2)),
                    "target_impression_ids": [REPEATED] * len(times) + [row["target_impression_ids"][place]],
                    **{f"target_{n}": [*row[f"context_{n}"], row[f"target_{n}"][place]] for n in kept},
                }
            )
    return logs.by_key(rows, "training_examples")


def reference_by_user(events: list[logs.Event], cap: int) -> list[logs.Row]:
    """Runs of about `cap` events of a user's requests, each after the `cap` events before it."""
    items, users, rows = logs.random_catalogue(SEED), logs.random_users(SEED), []
    pieces: dict[tuple[int, int], list[tuple[int, int, list[logs.Event]]]] = {}
    for (user, _, request), own in logs.grouped(events, "user_id", "date", "request_id").items():
        before = sum(e.user_id == user and e.ts_us < own[0].ts_us for e in events)
        pieces.setdefault((user, before // cap), []).append((own[0].ts_us, request, own))
    for (user, _), requests in pieces.items():
        requests.sort(key=lambda found: found[:2])
        line = logs.in_order([e for e in events if e.user_id == user])
        start, stop = (sum(e.ts_us < requests[end][0] for e in line) for end in (0, -1))
        day = requests[0][2][0].date
        attributes = logs.attributes_of(users, user, day, known_before=True)
        context = line[max(0, start - cap) : stop]
        rows.append(logs.reference_example(user, day, attributes, context, requests, items, BY_USER))
    return logs.by_key(rows, "training_examples")


def test_naive_equals_brute_force(spark, events):
    rows = organised(spark, "naive", NAIVE, events)
    assert rows == reference_naive(events)
    assert len({(row["user_id"], row["slice_us"]) for row in rows}) == len(rows) == len(events)
    assert any(max(Counter(row["context_ts_us"]).values(), default=0) > 1 for row in rows)  # ties within a context


@pytest.mark.parametrize("cap", [7, 1024])
def test_user_centric_equals_brute_force_and_trains_each_impression_once(spark, events, cap):
    config = replace(BY_USER, organise=replace(BY_USER.organise, user_events=cap))
    rows = organised(spark, "user_centric", config, events)
    assert rows == reference_by_user(events, cap)
    assert Counter(i for row in rows for i in row["target_impression_ids"]) == Counter(e.impression_id for e in events)
    assert len({(row["user_id"], row["slice_us"]) for row in rows}) == len(rows)
    assert cap < 1024 or len(rows) == len({e.user_id for e in events})


@pytest.mark.parametrize(("organiser", "config"), [("naive", NAIVE), ("user_centric", BY_USER)])
def test_no_target_sees_its_users_own_future(spark, events, organiser, config):
    """What happens after a time changes nothing that a target up to it may see."""
    day = DAYS[2]
    then = organised(spark, organiser, config, [e for e in events if e.date <= day])
    now = organised(spark, organiser, config, logs.poisoned_after(events, day))
    assert visible(then, day) == visible(now, day)
    for row in then:
        assert row["request_ts_us"] == sorted(row["request_ts_us"])
        for ts, end in zip(row["request_ts_us"], row["history_end"], strict=True):
            assert max(row["context_ts_us"][:end], default=-1) < ts


def visible(rows: list[logs.Row], day) -> set[tuple]:
    """What each target up to `day` is trained on, by its example's time."""
    end = logs.midnight_us(day) + logs.DAY_US
    found = set()
    for row in rows:
        for place, ts in enumerate(row["request_ts_us"]):
            if row["slice_us"] < end and ts < end:
                first, last = row["target_start"][place : place + 2]
                context = tuple(row["context_item_ids"][: row["history_end"][place]])
                targets = tuple(row["target_item_ids"][first:last])
                found.add((row["user_id"], row["slice_us"], ts, tuple(row["attributes"]), context, targets))
    return found


def test_figure_3_naive_repeats_a_transition_and_user_centric_learns_one_too_early(spark):
    """User 1 sees A, B at t1, t2 and C at t4; user 2 sees B at t2 and C at t3 (see test_organise for newest_only)."""
    a, b, c = 1, 2, 3
    start, events = logs.figure_3(a, b, c)
    trained = []  # (user, time of the example, A, B, time of B) in the order of the table
    for organiser, config in (("naive", Config()), ("user_centric", Config())):
        rows = sorted(organised(spark, organiser, config, events), key=lambda row: (row["slice_us"], row["user_id"]))
        trained.append([transition for row in rows for transition in transitions(row, start)])
    assert trained[0] == [(1, 2, a, b, 2), (2, 3, b, c, 3), (1, 4, a, b, 2), (1, 4, b, c, 4)]  # A -> B again at t4
    assert trained[1] == [(1, 1, a, b, 2), (1, 1, b, c, 4), (2, 2, b, c, 3)]  # B -> C of t4 before user 2's t3


def transitions(row: logs.Row, start: int) -> list[tuple[int, int, int, int, int]]:
    user, at = row["user_id"], (row["slice_us"] - start) // 1000
    return [
        (user, at, row["context_item_ids"][end - 1], item, (ts - start) // 1000)
        for ts, end, item in zip(row["request_ts_us"], row["history_end"], row["target_item_ids"], strict=True)
        if end
    ]


# --- days of a lake -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(spark, events, tmp_path_factory) -> Lake:
    """A lake with what organise reads."""
    lake = Lake(str(tmp_path_factory.mktemp("organisers") / "lake"))
    items, users = logs.random_catalogue(SEED), logs.random_users(SEED)
    rows = {
        "users": users,
        "user_sequences": logs.reference_sequences(events, items, NAIVE),
        "user_features": logs.reference_features(events, items, users, NAIVE),
    }
    for name, found in rows.items():
        replace_days(lake, name, logs.table_frame(spark, name, found), {day: f"{name} of {day}" for day in DAYS})
    return lake


def write(spark, lake: Lake, config: Config, calendar: Calendar) -> list[logs.Row]:
    """The rows after every stale day was made."""
    planned = plan(ORGANISE, config, lake, calendar)
    todo = {t: {day: planned.expected[t][day] for day in days} for t, days in planned.todo.items()}
    pins = {name: lake.version(name) for name in ("users", "user_sequences", "user_features")}
    organise.run(spark, lake, config, calendar, todo, pins)
    return logs.collected(read(spark, lake, "training_examples"), "training_examples")


def test_days_after_the_fit_are_organised_by_newest_only_whatever_the_organiser(spark, inputs, events):
    calendar = calendar_of(DAYS, SplitConfig())
    assert calendar.fit_day == DAYS[2]
    expected = logs.reference_examples(events, logs.random_catalogue(SEED), logs.random_users(SEED), NAIVE)
    later = [row for row in expected if row["date"] > calendar.fit_day]
    rows = write(spark, inputs, NAIVE, calendar)
    assert rows == logs.by_key(
        [row for row in reference_naive(events) if row["date"] <= DAYS[2]] + later, "training_examples"
    )

    rows = write(spark, inputs, BY_USER, calendar)
    trained = reference_by_user([e for e in events if e.date <= calendar.fit_day], BY_USER.organise.user_events)
    assert rows == logs.by_key([{**row, "date": calendar.fit_day} for row in trained] + later, "training_examples")
    assert plan(ORGANISE, BY_USER, inputs, calendar).done
    # A later fit day moves what lies in its partition, and makes a day of evaluation one of training.
    moved = replace(calendar, train=DAYS[:4], validation=DAYS[4:])
    assert set(plan(ORGANISE, BY_USER, inputs, moved).todo["training_examples"]) == {*DAYS[2:4]}


def test_the_default_organiser_knows_nothing_of_the_fit_day(inputs):
    calendar = calendar_of(DAYS, SplitConfig())
    moved = replace(calendar, train=DAYS[:4], validation=DAYS[4:])
    default = Config(sequences=LIMITS)
    expected = [plan(ORGANISE, default, inputs, c).expected for c in (calendar, moved)]
    assert expected[0] == expected[1]


def test_naive_by_a_split_by_user_is_refused():
    with pytest.raises(ConfigError, match=r"set split\.by to days"):
        from_mapping(Config, {"organise": {"organiser": "naive"}, "split": {"by": "user"}}, "conf.yaml")
