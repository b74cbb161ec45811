"""LazyRec every night by Airflow: one command a night, harmless to repeat, so a retry needs no thought.

Exit code 75 says that the day's log is not there yet or that another run holds the lake, and 1 that something failed:
both are retried and go on from the last committed version. The DAG's data interval is the day before, whose log is then
complete. The worker needs the environment of requirements.lock; to run on a cluster of its own, put
`kubectl create` of ray_job.yaml in place of the command.
"""

from __future__ import annotations

import datetime

from airflow import DAG
from airflow.providers.standard.operators.bash import BashOperator
from airflow.timetables.interval import CronDataIntervalTimetable

with DAG(
    "lazyrec",
    schedule=CronDataIntervalTimetable("0 2 * * *", timezone="UTC"),
    start_date=datetime.datetime(2026, 1, 8, tzinfo=datetime.UTC),
    catchup=True,  # missed nights are done in order
    max_active_runs=1,  # one run a lake
    default_args={"depends_on_past": True, "retries": 12, "retry_delay": datetime.timedelta(minutes=20)},
):
    check = BashOperator(task_id="check", bash_command="lazyrec check --config /config/production_1b.yaml")
    night = BashOperator(task_id="night", bash_command="lazyrec run --config /config/production_1b.yaml --date {{ ds }}")
    state = BashOperator(task_id="status", bash_command="lazyrec status --config /config/production_1b.yaml")
    check >> night >> state
