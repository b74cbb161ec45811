"""The command line within the test's process, on the engines of the test session."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main
from schemas.errors import EXIT_DONE


@contextmanager
def shared_engines(engines: Any, folder: Path) -> Iterator[None]:
    """Commands use `engines`, which stay, and work in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.run.Engines", lambda resources: engines)
        patch.setattr(engines, "stop", lambda: None)
        patch.setattr(engines, "stop_spark", lambda: None)
        patch.chdir(folder)
        yield


def answer_of(arguments: list[str], folder: Path, code: int = EXIT_DONE) -> dict[str, Any]:
    """The JSON object of the last line on standard output; empty where there is none, as after an error."""
    out = folder / "out.txt"
    with out.open("w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert main(arguments) == code
    lines = out.read_text().splitlines()
    return json.loads(lines[-1]) if lines else {}
