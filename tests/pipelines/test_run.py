"""The whole run on small simulated logs: what it builds, what it skips, and what the registered model is worth alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest

from pipelines.bundle import load_bundle
from pipelines.gates import better_than_popularity
from schemas.errors import ContractViolation
from schemas.lake import Lake
from schemas.tables import TABLES
from tests.conftest import REPOSITORY
from tests.pipelines.command_line import answer_of, shared_engines

SETTINGS = {
    "simulate.impressions": 12_000,
    "simulate.users": 400,
    "simulate.items": 300,
    "simulate.new_items_a_day": 10,
    "simulate.days": 5,
    "embed.sources": "[pairs, attributes]",
    "embed.weights": "[1.0, 0.5]",
    "tokenize.codes": 16,
    "model.d_model": 32,
    "model.layers": 2,
    "model.heads": 2,
    "model.g_kv": 1,
    "train.epochs": 1,
    "evaluate.beam": 20,
    "evaluate.deep_sample": 20,
    "evaluate.bootstrap": 100,
    "evaluate.sasrec_epochs": 1,
    "evaluate.sasrec_width": 32,
    "resources.spark_master": "local[2]",
    "resources.spark_heap": "2g",
    "resources.spark_partitions": 2,
    "resources.object_store_mb": 300,
}
WRITTEN = set(TABLES) - {"item_codes", "lifelong_sequences", "sessions", "recommendations", "deleted_users"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path, engines: Any) -> dict[str, Any]:
    """One run through the command line; `arguments` repeat it."""
    folder = tmp_path_factory.mktemp("run")
    database = folder / "mlflow.db"
    shutil.copy(migrated_database, database)
    settings = SETTINGS | {"lake": "lake", "tracking_uri": f"sqlite:///{database}"}
    arguments = ["run", "--config", str(REPOSITORY / "conf" / "demo.yaml"), "--quiet"]
    for key, value in settings.items():
        arguments += ["--set", f"{key}={value}"]
    with shared_engines(engines, folder):  # the lake's path is relative, as the demo's is
        yield {
            "first": answer_of(arguments, folder),
            "arguments": arguments,
            "lake": Lake(f"{folder}/lake"),
            "folder": folder,
        }


def test_the_last_line_says_what_was_built(ran: dict[str, Any]) -> None:
    answer = ran["first"]
    assert answer["stage"] == "run"
    assert answer["status"] == "done"
    served = {"recommendations"} if answer["model"]["promoted"] else set()
    assert set(answer["tables"]) == set(answer["rows"]) == WRITTEN | served
    assert set(answer["metrics"]) == {"model", "popularity", "itemknn", "sasrec", "sasrec_itemknn"}
    for cells in answer["metrics"].values():
        assert {"recall@5", "recall@10", "recall@50", "recall@500", "ndcg@5", "ndcg@10", "ndcg@50"} <= set(cells)
        assert all(0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1 for cell in cells.values())
    assert answer["model"]["name"] == "lazyrec"
    assert Path(answer["report"]).read_text().count("data:image/png") == 10
    assert answer["peak_memory_bytes"] > 0


def test_every_stage_is_one_nested_run_with_its_tables(ran: dict[str, Any]) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{ran['folder']}/mlflow.db")
    experiment = client.get_experiment_by_name("demo")
    runs = client.search_runs([experiment.experiment_id], "tags.stage != ''")
    stages = {run.data.tags["stage"]: run for run in runs}
    assert len(runs) == len(stages) == 12
    parents = {run.data.tags["mlflow.parentRunId"] for run in runs}
    assert len(parents) == 1
    inputs = {(i.dataset.name, i.tags[0].value): i.dataset.digest for i in stages["train"].inputs.dataset_inputs}
    assert inputs["training_examples", "input"] == f"v{ran['first']['tables']['training_examples']}"
    assert {run.info.status for run in runs} == {"FINISHED"}
    model = client.get_model_version("lazyrec", ran["first"]["model"]["version"])
    codebook = model.tags["codebook"]
    (found,) = client.search_model_versions(f"name = 'lazyrec-codebook' and tags.codebook = '{codebook}'")
    assert found.run_id == stages["tokenize"].info.run_id and codebook in lake_codebooks(ran["lake"])


def lake_codebooks(lake: Lake) -> set[str]:
    rows = lake.open("semantic_ids").to_pyarrow_table(columns=["codebook_version"])
    return set(rows.column("codebook_version").to_pylist())


def test_the_same_command_skips_everything_and_writes_nothing(ran: dict[str, Any]) -> None:
    again = answer_of(ran["arguments"], ran["folder"])
    assert again["status"] == "skipped"
    for name in ("tables", "rows", "metrics", "model"):
        assert again[name] == ran["first"][name]


def test_a_plan_of_what_was_run_would_do_nothing_and_one_of_other_settings_says_why(ran: dict[str, Any]) -> None:
    arguments = ["plan", *ran["arguments"][1:]]
    assert answer_of(arguments, ran["folder"])["would_run"] == []
    found = answer_of([*arguments, "--set", "train.learning_rate=0.5"], ran["folder"])
    assert found["would_run"][0] == "train"
    reasons = {stage["stage"]: stage["reasons"] for stage in found["stages"]}
    assert [text.split(" changed")[0] for text in reasons["train"]["train"]] == ["settings train.learning_rate"]


def test_a_kill_between_the_lake_and_the_mirror_repairs_itself(ran: dict[str, Any]) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{ran['folder']}/mlflow.db")
    experiment = client.get_experiment_by_name("demo").experiment_id
    lost = client.search_runs([experiment], "tags.stage = 'organise'")[0]
    client.delete_run(lost.info.run_id)
    assert answer_of(ran["arguments"], ran["folder"])["status"] == "skipped"
    mirrored = client.search_runs([experiment], "tags.stage = 'organise'")[0]
    assert mirrored.data.tags["identity"] == lost.data.tags["identity"]


def test_the_registered_model_needs_nothing_but_its_own_files(ran: dict[str, Any], tmp_path: Path) -> None:
    """Loads and predicts in a process that cannot see this checkout."""
    program = tmp_path / "serve.py"
    program.write_text(
        "import sys\n"
        "checkout, uri, model = sys.argv[1:]\n"
        "sys.meta_path = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', str(f))]\n"
        "sys.path = [p for p in sys.path if p and not (p == checkout or '__editable__' in p)]\n"
        "import mlflow, pandas as pd\n"
        "mlflow.set_tracking_uri(uri)\n"
        "served = mlflow.pyfunc.load_model(model)\n"
        "import pipelines\n"
        "assert checkout + '/pipelines' not in pipelines.__path__[0], pipelines.__path__\n"
        "times = [[10**15, 10**15 + 1, 10**15 + 2], []]\n"
        "rows = pd.DataFrame({'user_id': [1, 2], 'item_ids': [[3, 4, 10**12], []], 'ts_us': times})\n"
        "answer = served.predict(rows, params={'k': 5})\n"
        "assert answer['item_ids'].map(len).tolist() == [5, 5]\n"
        "assert answer['unknown_items'].tolist() == [1, 0]\n"
        "print('served', answer['item_ids'][1])\n"
    )
    number = ran["first"]["model"]["version"]
    uri = f"sqlite:///{ran['folder']}/mlflow.db"
    command = [sys.executable, str(program), str(REPOSITORY), uri, f"models:/lazyrec/{number}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "served" in done.stdout


def bundle_copy(ran: dict[str, Any], target: Path) -> Path:
    source = next((Path(ran["lake"].root) / "_artifacts" / "register").glob("*/bundle"))
    return Path(shutil.copytree(source, target))


def test_a_bundle_with_a_foreign_or_changed_part_is_refused(ran: dict[str, Any], tmp_path: Path) -> None:
    from pipelines.bundle import save, tensors_of

    whole = bundle_copy(ran, tmp_path / "whole")
    assert len(load_bundle(whole).catalogue) == ran["first"]["rows"]["semantic_ids"]
    foreign = bundle_copy(ran, tmp_path / "foreign")
    save(foreign / "codebook.safetensors", tensors_of(whole / "codebook.safetensors"), "another codebook")
    with pytest.raises(ContractViolation, match=r"codebook\.safetensors belongs to codebook another codebook"):
        load_bundle(foreign)
    changed = bundle_copy(ran, tmp_path / "changed")
    (changed / "config.yaml").write_text("name: other\n")
    with pytest.raises(ContractViolation, match=r"config\.yaml was changed"):
        load_bundle(changed)
    lacking = bundle_copy(ran, tmp_path / "lacking")
    (lacking / "weights.safetensors").unlink()
    with pytest.raises(ContractViolation, match=r"weights\.safetensors is missing"):
        load_bundle(lacking)


def test_prediction_agrees_with_the_ranker_on_any_batch(ran: dict[str, Any], tmp_path: Path) -> None:
    from pipelines.serving import recommend

    bundle = load_bundle(bundle_copy(ran, tmp_path / "bundle"))
    items = bundle.catalogue.item_ids[:4].tolist()
    rows = [{"user_id": u, "item_ids": items[:u], "ts_us": [10**15 + t for t in range(u)]} for u in range(5)]
    together = recommend(bundle, pd.DataFrame(rows), k=8, beam=20, mask_history=True)
    for row, answer in zip(rows, together.to_dict("records"), strict=True):
        alone = recommend(bundle, pd.DataFrame([row]), k=8, beam=20, mask_history=True).to_dict("records")[0]
        assert alone["item_ids"] == answer["item_ids"]
        assert not set(answer["item_ids"]) & set(row["item_ids"])
        assert set(answer["item_ids"]) <= set(bundle.catalogue.item_ids.tolist())


def test_the_gate_against_popularity_needs_an_interval_off_zero() -> None:
    def evaluated(low: float) -> dict[str, Any]:
        return {"differences": {"popularity": {"recall@10": {"value": 0.01, "low": low, "high": 0.02}}}}

    assert better_than_popularity(evaluated(0.001), "recall@10").passed
    assert not better_than_popularity(evaluated(0.0), "recall@10").passed
    assert not better_than_popularity({}, "recall@10").passed
