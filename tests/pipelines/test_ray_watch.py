"""A server of the local Ray that ends under a run ends the run with a sentence, and an orderly end says nothing."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from pipelines.ray_watch import SERVERS
from schemas.errors import EXIT_DONE, EXIT_FAILED
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.long
PROGRAM = """
import sys
from pipelines.engines import Engines
from schemas.config import ResourceConfig
engines = Engines(ResourceConfig(ray_cpus=1, object_store_mb=100))
engines.ray()
print("up", flush=True)
sys.stdin.readline()
engines.stop()
"""


@pytest.mark.parametrize("victim", [None, *SERVERS])
def test_the_end_of_a_server_is_a_sentence(victim: str | None) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    run = subprocess.Popen([sys.executable, "-c", PROGRAM], text=True, cwd=REPOSITORY, **pipes)
    assert run.stdout is not None and run.stdout.readline() == "up\n"
    if victim is None:
        words = run.communicate("\n")[1]
        assert run.returncode == EXIT_DONE
        assert "lazyrec:" not in words
        return
    (server,) = (child for child in psutil.Process(run.pid).children() if child.name() == victim)
    server.kill()
    assert run.wait(30) == EXIT_FAILED
    assert "lazyrec: This run, or a server of Ray below it, ended" in run.communicate()[1]
