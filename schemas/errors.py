"""Errors that a person reads: one clear sentence each, with the exit code that a scheduler acts on."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_ANEW = 3  # of `lazyrec drift`, whose verdict is CLUSTER_ANEW
EXIT_RETRY = 75  # EX_TEMPFAIL: an upstream partition is missing, or the lake is busy


CLUSTER_ANEW = "cluster anew"


class LazyRecError(Exception):
    """Says what is wrong, where, and what to do. The command line prints it without a traceback."""

    exit_code = EXIT_FAILED


class ConfigError(LazyRecError):
    """A wrong key, type or value in the configuration or on the command line."""

    exit_code = EXIT_USAGE


class MissingUpstream(LazyRecError):
    """A partition that a stage reads is not there yet, or another run holds the lake: retry later."""

    exit_code = EXIT_RETRY


class ContractViolation(LazyRecError):
    """Data or an artifact does not match its contract: schema, protocol, version or counts."""
