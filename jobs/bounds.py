"""What a value of a raw log may be, whatever reads it: the readers in Spark, and `lazyrec check` without an engine."""

from __future__ import annotations

DAY_MS = 86_400_000
FIRST_MS = DAY_MS  # times before 1970-01-02 are zeros or seconds taken for milliseconds
LAST_MS = 4_133_980_799_999  # the end of the year 2100
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
