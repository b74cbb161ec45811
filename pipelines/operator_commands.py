"""The commands of an operator: they look, move the champion, tidy the lake up, or delete users from it. None but the last
starts an engine, and none waits for the lake."""

from __future__ import annotations

import argparse
from typing import Any

from pipelines.progress import answer_console
from schemas.config import Config
from schemas.loader import parse_date

NAMES = ("plan", "flops", "drift", "status", "promote", "rollback", "maintain", "forget")
WIDTH = 200  # of what goes into a file or a pipe


def execute(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Runs one of NAMES and returns its JSON line."""
    if options.command == "plan":
        from pipelines import plan_view

        views = plan_view.plan_views(config, parse_date(options.date) if options.date else None)
        if not options.quiet:
            plan_view.print_views(views, answer_console(WIDTH))
        return plan_view.answer(views)
    if options.command == "flops":
        from pipelines import flops

        costs = flops.report(config, options.size, options.context, options.targets)
        if not options.quiet:
            flops.print_report(costs, answer_console(WIDTH))
        return flops.answer(costs)
    if options.command == "drift":
        from pipelines import drift

        drifted = drift.report(config, parse_date(options.date) if options.date else None)
        if not options.quiet:
            drift.print_drift(drifted, answer_console(WIDTH))
        return drift.answer(drifted)
    if options.command == "status":
        from pipelines import status

        found = status.status_of(config)
        if not options.quiet:
            status.print_status(found, answer_console(WIDTH))
        return found
    if options.command == "maintain":
        from pipelines import maintenance

        maintained = maintenance.maintain(config, options.dry_run, options.retention_days)
        if not options.quiet:
            maintenance.print_maintained(maintained, answer_console(WIDTH))
        return maintained
    if options.command == "forget":
        from pipelines import forget

        forgotten = forget.forget(config, options.user, options.source_id, options.purge)
        if not options.quiet:
            forget.print_forgotten(forgotten, answer_console(WIDTH))
        return forgotten
    from pipelines import promotion

    if options.command == "promote":
        return promotion.promote(config, str(options.version), options.force)
    return promotion.rollback(config)


def tables(name: str | None) -> dict[str, Any]:
    """The contract of `name`, or of every table, on standard output; its JSON line."""
    from pipelines import contracts_view

    found = contracts_view.contracts(name)
    contracts_view.print_contracts(found, answer_console(WIDTH))
    return contracts_view.answer(found)
