"""The columns of KuaiRand's log for `tests.jobs.broken_rows`."""

from __future__ import annotations

import datetime
import random
from collections.abc import Sequence

from tests.jobs.broken_formats import BAD_INTEGERS, FIRST, LATEST, TEXTS, bad, micros, of
from tests.jobs.broken_rows import Choice, Column, Format


def kuairand_time(rng: random.Random) -> Choice:
    ms = micros(FIRST) // 1000 + rng.randrange(3 * 86_400_000)
    latest = micros(LATEST) // 1000
    edges = (86_400_000, 4_133_980_799_999, 4_102_444_800_000, latest, latest + 1)
    ms = rng.choice(edges) if rng.random() < 0.02 else ms
    return rng.choice((str(ms), str(ms), f" {ms}", f"+{ms}")), ms * 1000


def _kuairand_id(rng: random.Random) -> Choice:
    number = rng.choice((rng.randrange(1000), rng.randrange(2**63), 2**63 - 1))
    return rng.choice((str(number), f" {number} ", f"+{number}", f"00{number}")), number


def _whole(zero: int | None) -> Sequence[Choice]:
    return ("", None), ("0", zero), ("1200", 1200), (" 7 ", 7), ("604800000", 604_800_000), ("-0", zero)


KUAIRAND_FLAGS = {
    **{f"is_{name}": name for name in ("click", "like", "follow", "comment", "forward", "hate", "profile_enter")},
    "long_view": "long_view",
}
_IDS = (*BAD_INTEGERS, ("", "is missing"), ("-3", "is negative"), ("-9223372036854775808", "is negative"))
_MS = (*BAD_INTEGERS, *bad("is negative", "-20"), *bad("is out of range", "604800001", "999999999999"))
_TIMES = (*BAD_INTEGERS, ("", "is missing"), *bad("is out of range", "1650812", "0", "-1", "4133980800000", "1" + "0" * 18))
KUAIRAND = Format(
    (
        Column("user_id", "user_id", _kuairand_id, _IDS),
        Column("video_id", "item_id", _kuairand_id, _IDS),
        Column("date", "", of(("20991231", None), ("", None), ("soon", None))),
        Column("hourmin", "", of(("2560", None))),
        Column("time_ms", "ts", kuairand_time, _TIMES),
        *(
            Column(
                name,
                flag,
                of(("0", False), ("1", True), ("", None), (" 1 ", True)),
                bad("is not 0 or 1", *"2xyt", "-1", "1.0"),
            )
            for name, flag in KUAIRAND_FLAGS.items()
        ),
        Column("play_time_ms", "play_ms", of(*_whole(0)), _MS),
        Column("duration_ms", "duration_ms", of(*_whole(None)), _MS),
        *(Column(name, "", of(("0", None), ("x", None))) for name in ("profile_stay_time", "comment_stay_time", "is_rand")),
        Column("tab", "scene", of(*((text, text) for text in TEXTS), ("", None))),
    ),
    "UTC",
    now=LATEST - datetime.timedelta(days=2),
    future_days=2,
    last=datetime.date(2026, 1, 3),
)
