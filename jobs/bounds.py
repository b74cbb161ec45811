"""What a value of a raw log may be, whatever reads it: the readers in Spark, and `lazyrec check` without an engine."""

from __future__ import annotations

import datetime

DAY_MS = 86_400_000
FIRST_MS = DAY_MS  # times before 1970-01-02 are zeros or seconds taken for milliseconds
LAST_MS = 4_133_980_799_999  # the end of the year 2100
FUTURE = "is in the future"  # why a row is refused, after the name of the column of its time
LONGEST_MS = 7 * DAY_MS  # of a play or an item; more is no plausible measurement
MAX_ID = 2**63 - 1
INTEGER = r"^(0|-?[1-9][0-9]*)$"  # as an integer is written; 007 and +7 are text
# As JSON writes numbers, signs and points before and after apart: no 1500f, no hexadecimal. An exponent of nine digits
# would occupy a decimal for hours.
NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?$"
LONGEST_NUMBER = 64  # characters of a time
NO_ID = ("nan", "null", "none")  # what programs write, in any case, where they have no value
TRUE, FALSE = ("true", "t", "yes", "y"), ("false", "f", "no", "n")
ROUNDING = 1e-3  # a log-probability may exceed 0 by no more


def latest_time(future_days: int | None, moment: datetime.datetime) -> datetime.datetime | None:
    """The last time that what is read at `moment` can have; null where the year 2100 alone ends them. An exposure is logged
    after it was shown, so a later time is that of a broken clock; the days are for clocks and zones that differ."""
    return None if future_days is None else moment + datetime.timedelta(days=future_days)
