"""The command line: parses, calls, prints. The last line on standard output is one JSON object.

Exit codes: 0 done or skipped, 1 failed, 2 wrong usage or configuration, 3 `drift` advises a new codebook, 75 an upstream
partition is missing, D is newer than the log or the lake is busy (a scheduler retries).
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml

from schemas.calendar import DayRange
from schemas.config import Config
from schemas.errors import CLUSTER_ANEW, EXIT_ANEW, EXIT_DONE, EXIT_FAILED, ConfigError
from schemas.lineage import STAGES
from schemas.loader import load_config, parse_date
from schemas.outages import explained, sentence_of

APPENDING = ("embed", "tokenize")  # stages that fit on one day and append to that on later ones
STAGE_NAMES = ("ingest", *(spec.name for spec in STAGES))


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`.")


def parser() -> argparse.ArgumentParser:
    root = Parser(prog="lazyrec", description="From raw impression logs to a registered generative recommender.")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    summaries = {spec.name: spec.summary for spec in STAGES} | {"ingest": "raw logs to tables; bad rows aside"}
    _command(commands, "run", "every stage in order, or the night of --date; skips what is done", force=True, date=True)
    for name in STAGE_NAMES:
        stage = _command(commands, name, summaries[name], force=True, date=True)
        if name in APPENDING:
            stage.add_argument("--append", action="store_true", help="the new items of --date alone, and never a fit")
    backfill = _command(
        commands, "backfill", "late or corrected days, and every Spark table that depends on them", force=True
    )
    backfill.add_argument("--from", dest="first", required=True, metavar="DATE", help="the first such day, YYYY-MM-DD")
    backfill.add_argument("--to", dest="last", metavar="DATE", help="the last such day; default: the newest")
    simulate = _command(commands, "simulate", "logs, users and videos in KuaiRand's format")
    simulate.add_argument("--out", required=True, help="folder to write")
    _command(commands, "report", "write the HTML report of the lake again")
    organisers = _command(commands, "organisation-report", "what each way to organise impressions would make of the log")
    organisers.add_argument("--date", help="the log up to the end of this day, YYYY-MM-DD; default: all of it")
    _command(commands, "check", "what is wrong with the source and its mapping, before anything runs")
    _command(commands, "plan", "what a run, or the night of --date, would do, and why", date=True)
    costs = _command(commands, "flops", "parameters and operations of the model and its peers, beside the paper's tables")
    costs.add_argument("--size", metavar="NAME", help="one of the papers' models instead of the configuration's: v2-1b ...")
    costs.add_argument("--context", type=int, metavar="N", help="context tokens; default: all that the model can read")
    costs.add_argument("--targets", type=int, default=5, metavar="K", help="that share a request's context; default: 5")
    _command(commands, "drift", "whether the items appended to the codebook, or those of --date, fit it", date=True)
    _command(commands, "status", "tables, artifacts, model versions, runs and the lock")
    promote = _command(commands, "promote", "make a version whose gates passed the champion", force=True)
    promote.add_argument("--version", required=True, type=int, metavar="N", help="of the registered model")
    _command(commands, "rollback", "give the alias champion back to the version that held it before")
    maintain = _command(commands, "maintain", "merge small files; remove old files and artifacts that nothing needs")
    maintain.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    maintain.add_argument("--retention-days", type=int, metavar="N", help="default: maintenance.retention_days")
    forget = _command(commands, "forget", "delete users from every table, and keep them out")
    forget.add_argument("--user", action="append", default=[], type=int, metavar="ID", help="of table users; repeatable")
    forget.add_argument("--source-id", action="append", default=[], metavar="TEXT", help="the source's own id; repeatable")
    forget.add_argument("--purge", action="store_true", help="remove old versions at once, those that models pin too")
    tables = commands.add_parser("tables", help="the contracts of the tables", description="the contracts of the tables")
    tables.add_argument("name", nargs="?", metavar="NAME", help="one table; default: all")
    return root


def _command(commands: Any, name: str, summary: str, force: bool = False, date: bool = False) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary)
    command.add_argument("--config", required=True, help="YAML file, see conf/")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, e.g. --set train.epochs=3"
    )
    command.add_argument("--quiet", action="store_true", help="no progress, only the JSON line")
    if force:
        command.add_argument("--force", action="store_true", help="do it again even if nothing has changed")
    if date:
        command.add_argument("--date", help="this day alone, YYYY-MM-DD")
    return command


def overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` arguments with values read as YAML."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {pair!r} is not KEY=VALUE.")
        found[key] = yaml.safe_load(value)
    return found


def range_of(first: str, last: str | None) -> DayRange:
    """The days of --from and --to."""
    days = DayRange(parse_date(first, "--from"), parse_date(last, "--to") if last else datetime.date.max)
    if days.last < days.first:
        raise ConfigError(f"--to {days.last} is before --from {days.first}; give the earlier day first.")
    return days


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        options = parser().parse_args(arguments)
        answer = execute(options)
    except KeyboardInterrupt:
        sys.stderr.write("lazyrec: stopped; the lake holds the last committed versions, and the same command goes on.\n")
        return EXIT_FAILED
    except Exception as error:
        known = sentence_of(error)
        if known is None:
            raise  # a defect of this program: its traceback is what helps
        sys.stderr.write(f"lazyrec: {known}\n")
        return known.exit_code
    sys.stdout.write(json.dumps(answer) + "\n")
    return EXIT_ANEW if answer.get("verdict") == CLUSTER_ANEW else EXIT_DONE


def execute(options: argparse.Namespace) -> dict[str, Any]:
    from pipelines import operator_commands

    if options.command == "tables":
        return operator_commands.tables(options.name)
    config = load_config(options.config, overrides(options.set))
    with explained(config):
        if options.command == "check":
            from pipelines import source_check

            return source_check.run(config, options.quiet)
        if options.command in operator_commands.NAMES:
            return operator_commands.execute(options, config)
        return run_command(options, config)


def run_command(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """What starts engines: a stage, the whole run, late days, a simulation, a report."""
    from pipelines import run
    from pipelines.outcome import backfill_answer, print_summary, stage_answer, summary_answer
    from pipelines.progress import Progress

    progress = Progress(options.quiet)
    if options.command == "simulate":
        return stage_answer(run.simulate_only(config, options.out, progress))
    if options.command == "report":
        return {"stage": "report", "status": "done", "report": str(run.report_only(config))}
    if options.command == "backfill":
        return backfill_answer(run.run_backfill(config, range_of(options.first, options.last), options.force, progress))
    date = parse_date(options.date) if options.date else None
    if options.command == "organisation-report":
        from pipelines import organisation_report

        return organisation_report.run(config, date, options.quiet)
    if options.command == "run":
        summary = run.run_all(config, options.force, progress, date)
        if not options.quiet:
            print_summary(summary)
        return summary_answer(summary)
    if getattr(options, "append", False):
        return stage_answer(run.run_append(options.command, config, options.force, date, progress))
    return stage_answer(run.run_one(options.command, config, options.force, date, progress))


if __name__ == "__main__":
    sys.exit(main())
