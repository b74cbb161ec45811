"""What stands in docs/examples is what a scheduler can use: shapes of the KubeRay resource, a DAG that parses, and
commands that this release understands."""

from __future__ import annotations

import ast
import importlib.util
import shlex
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from pipelines.cli import parser
from schemas.errors import ConfigError
from tests.conftest import REPOSITORY

EXAMPLES = REPOSITORY / "docs" / "examples"
DAG_FILE = EXAMPLES / "airflow_dag.py"
RAY_JOB: dict[str, Any] = yaml.safe_load((EXAMPLES / "ray_job.yaml").read_text())


def bash_commands() -> list[str]:
    """The values of `bash_command` in the DAG's file."""
    calls = [node for node in ast.walk(ast.parse(DAG_FILE.read_text())) if isinstance(node, ast.Call)]
    keywords = [word for call in calls for word in call.keywords if word.arg == "bash_command"]
    return [ast.literal_eval(word.value) for word in keywords]


def parsed(command: str) -> Any:
    """The command as our parser reads it on some day."""
    program, *arguments = shlex.split(command.replace("{{ ds }}", "2026-01-08"))
    assert program == "lazyrec"
    return parser().parse_args(arguments)


def pods() -> dict[str, dict[str, Any]]:
    """The pod specifications of the job's cluster by group."""
    cluster = RAY_JOB["spec"]["rayClusterSpec"]
    groups = {"head": cluster["headGroupSpec"]} | {g["groupName"]: g for g in cluster["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def test_the_ray_job_runs_a_night_on_rays_own_version() -> None:
    assert (RAY_JOB["apiVersion"], RAY_JOB["kind"]) == ("ray.io/v1", "RayJob")
    options = parsed(RAY_JOB["spec"]["entrypoint"])
    assert (options.command, options.date) == ("run", "2026-01-08")
    assert RAY_JOB["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__
    assert RAY_JOB["spec"]["shutdownAfterJobFinishes"] is True


def test_the_ray_jobs_groups_are_complete_and_share_their_places() -> None:
    cluster = RAY_JOB["spec"]["rayClusterSpec"]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    places = []
    for pod in pods().values():
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
        places.append((container["image"], mounts))
    assert all(place == places[0] for place in places)
    production = yaml.safe_load((REPOSITORY / "conf" / "production_1b.yaml").read_text())
    shared = set(places[0][1].values())
    assert {production["artifacts"], production["source"]["path"]} <= shared
    assert str(Path(parsed(RAY_JOB["spec"]["entrypoint"]).config).parent) in shared


def test_the_dags_commands_are_ours() -> None:
    commands = [parsed(command) for command in bash_commands()]
    assert [options.command for options in commands] == ["check", "run", "status"]
    assert commands[1].date == "2026-01-08"
    assert {Path(options.config).name for options in commands} == {"production_1b.yaml"}
    with pytest.raises(ConfigError):
        parsed(bash_commands()[1].replace("--date", "--day"))


def test_airflow_accepts_the_dag() -> None:
    if importlib.util.find_spec("airflow") is None:
        pytest.skip("Airflow is not installed; its own parser is asked where it is")
    spec = importlib.util.spec_from_file_location("airflow_dag", DAG_FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {task.task_id for task in module.night.dag.tasks} == {"check", "night", "status"}
