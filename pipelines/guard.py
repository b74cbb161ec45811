"""The guard between ingest and training: a day unlike the days before it stops the run.

Rows and nulls come from the table's own statistics; only the flags of the day and of the `guard.days` before it are read,
a batch at a time, so that the check takes neither an engine nor memory that grows with the log. The tables keep what was
ingested: fix the source and ingest again, or accept the day.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import pyarrow as pa
import pyarrow.compute as pc

from schemas.config import Config, GuardConfig
from schemas.errors import ContractViolation
from schemas.feedback import FLAGS
from schemas.lake import Lake
from schemas.tables import PARTITION

Day = datetime.date
MEASURED = ("scene", "duration_ms", "play_ms", "rating", *FLAGS)  # columns that a source may have
DEVIATIONS = 4.0  # of a rate's sampling error that no bound counts
SHOWN = 3  # faults in one sentence


@dataclass
class DayRates:
    """One day of impressions: rows, the share of nulls of each column, the share of true values of each flag."""

    rows: int = 0
    nulls: dict[str, float] = field(default_factory=dict)
    flags: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """A measure outside its band."""

    measure: str
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.measure} is {self.value:.4g}, and the days before it allow {self.low:.4g} to {self.high:.4g}"


def check_days(lake: Lake, config: Config, days: Collection[Day] | None = None) -> None:
    """Compares `days` (default: the log's newest) each with the `guard.days` days before it.

    Raises ContractViolation naming day, measure, value and band. Days with too few before them pass.
    """
    guard = config.guard
    if not guard.enabled:
        return
    known = sorted(lake.identities("impressions"))
    for day in sorted(days) if days is not None else known[-1:]:
        before = [d for d in known if d < day][-guard.days :]
        if len(before) < guard.days:
            continue
        rates = counts_of(lake, [*before, day])
        if median(rates[d].rows for d in before) < guard.min_rows:
            continue
        add_flag_rates(lake, rates)
        faults = list(faults_of(rates[day], [rates[d] for d in before], guard))
        if faults:
            more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
            raise ContractViolation(
                f"Day {day} is unlike the {guard.days} days before it: {'; '.join(map(str, faults[:SHOWN]))}{more}. "
                "Nothing was trained. Fix the source and ingest again, or accept the day with --set guard.enabled=false."
            )


def counts_of(lake: Lake, days: Sequence[Day]) -> dict[Day, DayRates]:
    """Rows and null rates of each day by the table's statistics; a day without rows has no rates."""
    found = {day: DayRates() for day in days}
    actions = pa.table(lake.open("impressions").get_add_actions(flatten=True))
    wanted = pc.is_in(actions[f"partition.{PARTITION}"], value_set=pa.array(days, pa.date32()))
    for file in actions.filter(wanted).to_pylist():
        rates, rows = found[file[f"partition.{PARTITION}"]], file["num_records"] or 0
        for name in MEASURED if rows else ():
            nulls = rates.nulls.get(name, 0.0) * rates.rows + (file.get(f"null_count.{name}") or 0)
            rates.nulls[name] = nulls / (rates.rows + rows)
        rates.rows += rows
    return found


def add_flag_rates(lake: Lake, rates: Mapping[Day, DayRates]) -> None:
    """Reads the flags of each day, those that are not wholly null."""
    dataset = lake.open("impressions").to_pyarrow_dataset()
    for day, of_day in rates.items():
        known = [flag for flag in FLAGS if of_day.nulls.get(flag, 1.0) < 1]
        if known:
            scanner = dataset.scanner(columns=known, filter=pc.field(PARTITION) == pa.scalar(day, pa.date32()))
            of_day.flags = _flag_rates(scanner.to_batches(), known)


def _flag_rates(batches: Iterator[pa.RecordBatch], names: Sequence[str]) -> dict[str, float]:
    true, total = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for batch in batches:
        for name in names:
            true[name] += pc.sum(batch.column(name)).as_py() or 0
            total[name] += len(batch) - batch.column(name).null_count
    return {name: true[name] / total[name] for name in names if total[name]}


def faults_of(day: DayRates, before: Sequence[DayRates], guard: GuardConfig) -> Iterator[Fault]:
    """What of `day` lies outside the bands that the days before it give. Pure."""
    middle = median(other.rows for other in before)
    if middle < guard.min_rows:
        return
    low, high = guard.rows_at_least * middle, guard.rows_at_most * middle
    if not low <= day.rows <= high:
        yield Fault("the number of rows", day.rows, low, high)
    for name, rate in day.nulls.items():
        rates = [other.nulls[name] for other in before if name in other.nulls]
        low, high = min(rates, default=rate) - guard.null_rate_band, max(rates, default=rate) + guard.null_rate_band
        if not low <= rate <= high:
            yield Fault(f"the null rate of {name}", rate, max(low, 0.0), min(high, 1.0))
    for name, rate in day.flags.items():
        rates = [other.flags[name] for other in before if name in other.flags]
        if rates:
            low, high = flag_band(median(rates), day.rows * (1 - day.nulls[name]), guard.flag_rate_factor)
            if not low <= rate <= high:
                yield Fault(f"the rate of {name}", rate, max(low, 0.0), min(high, 1.0))


def flag_band(middle: float, rows: float, factor: float) -> tuple[float, float]:
    """The rates that `rows` rows may show of a flag whose usual rate is `middle`: the factor, and sampling error."""
    low, high = middle / factor, min(1.0, middle * factor)
    return low - _noise(low, rows), high + _noise(high, rows)


def _noise(rate: float, rows: float) -> float:
    return DEVIATIONS * math.sqrt(max(rate * (1 - rate), 1 / rows) / rows)
