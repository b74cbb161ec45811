"""A server of the local Ray that ends under a run ends the run with a sentence, one that is slow to start is started again,
and an orderly end says nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


SLOW_AGENT = """
import pathlib, sys, time
calls = pathlib.Path(__file__).with_name("calls")
if any("dashboard/agent.py" in argument for argument in sys.orig_argv):
    with calls.open("a") as file:
        file.write("agent ")
    time.sleep(25 if len(calls.read_text().split()) == 1 else 0)
"""


def test_a_raylet_that_ends_while_its_agent_is_slow_is_started_again(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_AGENT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], input="\n", text=True, capture_output=True, cwd=REPOSITORY, env=environment
    )
    assert run.returncode == EXIT_DONE
    assert run.stdout == "up\n"
    assert "lazyrec:" not in run.stderr
    assert (tmp_path / "calls").read_text().split() == ["agent"] * 2
