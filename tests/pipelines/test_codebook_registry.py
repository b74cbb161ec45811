"""A codebook is registered once, can be looked up by what tables name, and is refused in another's place."""

from __future__ import annotations

import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlflow
import numpy as np
import pytest
import torch

from model.rq_kmeans import Codebook
from pipelines.bundle import write_bundle
from pipelines.catalogue import Catalogue, load_catalogue
from pipelines.checkpoints import refuse_other_codebook, save_model
from pipelines.codebook import load_codebook, read_codebook, save_codebook
from pipelines.codebook_registry import register_codebook
from pipelines.stage import StageContext
from pipelines.tracking import Tracker
from schemas.config import Config
from schemas.errors import ContractViolation
from schemas.lake import Lake, lake_of
from tests.model.requests import catalogue as small_items
from tests.model.requests import small_decoder
from tests.pipelines.small_catalogue import DAYS, write

MANIFEST = {"levels": 2, "codes": 4, "items": 9}


def made(lake: Lake, identity: str, renumbered: bool = False) -> Codebook:
    """A complete artifact of stage tokenize."""
    order = [torch.tensor([2, 0, 3, 1]), torch.arange(4)] if renumbered else None
    codebook = Codebook([torch.randn(4, 3) for _ in range(2)], order)
    save_codebook(lake.artifact("tokenize", identity), codebook, identity)
    lake.write_manifest("tokenize", identity, MANIFEST | {"earlier": {"codebook": "a"} if renumbered else None})
    return codebook


def test_each_codebook_is_one_version_that_its_identity_finds(tmp_path: Path, tracking_uri: str) -> None:
    config = Config(lake=str(tmp_path / "lake"), tracking_uri=tracking_uri)
    lake = lake_of(config)
    codebooks = {identity: made(lake, identity, renumbered=identity == "b") for identity in ("a", "b")}
    tracker = Tracker(config, lake)
    numbers: list[str] = []
    for attempt, identity in enumerate(("a", "b", "a")):
        with tracker.stage("tokenize", f"{identity} {attempt}") as run_id:
            calendar = SimpleNamespace(fit_day=datetime.date(2026, 1, 3))
            parts: Any = SimpleNamespace(run_id=run_id, lake=lake, config=config, calendar=calendar)
            numbers.append(register_codebook(cast(StageContext, parts), identity))
    tracker.finish({}, None)
    assert numbers == ["1", "2", "1"]
    (found,) = tracker.client.search_model_versions("name = 'lazyrec-codebook' and tags.codebook = 'b'")
    assert (found.tags["fit_day"], found.tags["levels"], found.tags["earlier"]) == ("2026-01-03", "2", "a")
    folder = mlflow.artifacts.download_artifacts(found.source, dst_path=str(tmp_path / "copy"))
    again = read_codebook(Path(folder))
    pairs = zip(again.centroids + (again.order or []), codebooks["b"].centroids + (codebooks["b"].order or []), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert {path.suffix for path in Path(folder).iterdir()} == {".json", ".safetensors"}


def test_a_file_of_another_codebook_is_refused(lake: Lake) -> None:
    made(lake, "a")
    made(lake, "b")
    (lake.artifact("tokenize", "a") / "codebook.safetensors").replace(
        lake.artifact("tokenize", "b") / "codebook.safetensors"
    )
    with pytest.raises(ContractViolation, match="is codebook a, not b"):
        load_codebook(lake, "b")


def test_ids_that_do_not_fit_their_codebook_are_refused(lake: Lake) -> None:
    made(lake, "a")
    for codes, fits in (([3, 0], True), ([4, 0], False), ([0, 0, 0], False), ([-1, 0], False)):
        row = {"item_id": 1, "date": DAYS[2], "codes": codes, "codebook_version": "a", "rank": 0}
        version = write(lake, "semantic_ids", [row], DAYS)
        if fits:
            assert load_catalogue(lake, version, DAYS[2], DAYS[4]).sizes == (4, 4)
            continue
        with pytest.raises(ContractViolation, match="do not fit codebook a, whose levels have 4, 4 codes"):
            load_catalogue(lake, version, DAYS[2], DAYS[4])


def test_a_model_of_another_codebook_goes_into_no_bundle(tmp_path: Path) -> None:
    items = small_items(20)
    codes = items.codes[:-1].numpy().astype(np.int32)
    catalogue = Catalogue(
        np.arange(20), codes, np.zeros(20, np.int32), np.full(20, np.datetime64(DAYS[0])), "b", (8,) * codes.shape[1]
    )
    save_codebook(tmp_path / "codebook", Codebook([torch.randn(8, 2) for _ in range(3)]), "a")
    codebook = tmp_path / "codebook" / "codebook.safetensors"
    for learned, message in (("a", "learned codebook a"), ("b", "is codebook a, not b")):
        save_model(tmp_path / "model", small_decoder(), {"codebook_version": learned})
        with pytest.raises(ContractViolation, match=message):
            write_bundle(tmp_path / "bundle", tmp_path / "model", codebook, catalogue, items, {}, {})
    with pytest.raises(ContractViolation, match="learned codebook None"):
        refuse_other_codebook(tmp_path, {}, "b")
