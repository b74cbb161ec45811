"""What a scheduler and a person see when something is wrong: one sentence, the right exit code, no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cli import main
from schemas.errors import EXIT_RETRY, EXIT_USAGE, MissingUpstream
from schemas.lake import Lake
from schemas.locks import lake_lock
from tests.conftest import REPOSITORY

DEMO = str(REPOSITORY / "conf" / "demo.yaml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run"], "--config"),
        (["run", "--config", "nowhere.yaml"], "no such configuration file"),
        (["fly", "--config", DEMO], "fly"),
        (["run", "--config", DEMO, "--set", "train.epochs"], "KEY=VALUE"),
        (["run", "--config", DEMO, "--set", "train.epoch=1"], "did you mean 'epochs'"),
        (["sequences", "--config", DEMO, "--date", "yesterday"], "YYYY-MM-DD"),
        (["run", "--config", DEMO, "--set", "source.path=nowhere"], "nowhere is not there"),
        (["run", "--config", DEMO, "--set", "simulate="], "source.path is empty"),
        (["simulate", "--config", DEMO, "--set", "simulate=", "--out", "x"], "no section `simulate`"),
    ],
)
def test_wrong_usage_is_one_sentence_and_code_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], tracking_uri: str
) -> None:
    if "--config" in arguments and arguments[0] != "fly":
        arguments = [*arguments, "--set", f"lake={tmp_path}/lake", "--set", f"tracking_uri={tracking_uri}"]
    assert main(arguments) == EXIT_USAGE
    printed = capsys.readouterr()
    assert printed.out == ""
    sentence = [line for line in printed.err.splitlines() if line.startswith("lazyrec: ")]
    assert len(sentence) == 1
    assert words in sentence[0]
    assert "Traceback" not in printed.err


def test_a_stage_before_its_inputs_is_retried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tracking_uri: str
) -> None:
    lake = ["--set", f"lake={tmp_path}/lake", "--set", f"tracking_uri={tracking_uri}"]
    assert main(["sequences", "--config", DEMO, *lake]) == EXIT_RETRY
    assert "run `lazyrec ingest` first" in capsys.readouterr().err


def test_a_second_run_on_a_lake_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], tracking_uri: str) -> None:
    lake = ["--set", f"lake={tmp_path}/lake", "--set", f"tracking_uri={tracking_uri}"]
    with lake_lock(Lake(f"{tmp_path}/lake")):
        assert main(["run", "--config", DEMO, *lake]) == EXIT_RETRY
    assert "Another run (process " in capsys.readouterr().err


def test_a_killed_run_releases_the_lake(tmp_path: Path) -> None:
    code = (
        "import sys, time; from schemas.lake import Lake; from schemas.locks import lake_lock\n"
        "with lake_lock(Lake(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(MissingUpstream, match=str(holder.pid)), lake_lock(Lake(str(tmp_path))):
        pass
    holder.kill()
    holder.wait()
    with lake_lock(Lake(str(tmp_path))):
        pass
