"""ONE bundle: everything that a registered model needs, and the proof that its parts belong together.

    weights.safetensors  model.json       the lazy decoder
    codebook.safetensors                  centroids of every level
    items.safetensors                     the semantic-id table: item ids, codes, ranks, and the model's item fields
    trie.safetensors                      legal continuations
    config.yaml  lineage.json             the run's configuration; versions and identities of every table behind it
    manifest.json                         SHA-256 of each part, the codebook version, the bundle's format

Each part that holds codes names its codebook version. Loading refuses a changed, missing or foreign part. Nothing is
pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.item_table import ItemTable, with_unknown
from model.ranker import Ranker
from model.trie import Trie
from pipelines.catalogue import Catalogue
from pipelines.checkpoints import load_model, refuse_other_codebook
from pipelines.codebook import refuse_other_file
from schemas.errors import ContractViolation

FORMAT = 2
CODED = ("weights.safetensors", "codebook.safetensors", "items.safetensors", "trie.safetensors")
PARTS = (*CODED, "model.json", "config.yaml", "lineage.json")
EPOCH = np.datetime64("1970-01-01", "D")


@dataclass
class Bundle:
    """A loaded bundle, ready to rank."""

    ranker: Ranker
    catalogue: Catalogue
    description: dict[str, Any]  # model.json
    config: dict[str, Any]
    lineage: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def lifelong_length(self) -> int:
        """How many representatives of a long history the model reads; 0: it has no such pathway."""
        return self.ranker.decoder.config.lifelong_length


def write_bundle(
    folder: Path,
    model_folder: Path,
    codebook_file: Path,
    catalogue: Catalogue,
    items: ItemTable,
    config: Mapping[str, Any],
    lineage: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes every part and then the manifest, which it returns. Raises ContractViolation for parts of another codebook."""
    folder.mkdir(parents=True, exist_ok=True)
    version = catalogue.codebook_version
    description = json.loads((model_folder / "model.json").read_text())
    refuse_other_codebook(model_folder, description, version)
    refuse_other_file(codebook_file, version)
    save(folder / "weights.safetensors", tensors_of(model_folder / "weights.safetensors"), version)
    save(folder / "codebook.safetensors", tensors_of(codebook_file), version)
    save(folder / "items.safetensors", catalogue_tensors(catalogue) | item_tensors(items), version)
    save(folder / "trie.safetensors", trie_tensors(build_trie(catalogue)), version)
    (folder / "model.json").write_text(json.dumps(description, indent=2))
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
    (folder / "lineage.json").write_text(json.dumps(lineage, indent=2))
    manifest = {"format": FORMAT, "codebook_version": version, "sha256": {part: sha256(folder / part) for part in PARTS}}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
    return manifest


def load_bundle(folder: str | Path) -> Bundle:
    """Verifies and loads. Raises ContractViolation naming the part that does not belong."""
    folder = Path(folder)
    manifest = verify(folder)
    tensors = tensors_of(folder / "items.safetensors")
    decoder, description = load_model(folder)
    catalogue = Catalogue(
        item_ids=tensors["item_ids"].numpy(),
        codes=tensors["codes"].numpy(),
        ranks=tensors["ranks"].numpy(),
        known_on=EPOCH + tensors["known_on"].numpy().astype("timedelta64[D]"),
        codebook_version=manifest["codebook_version"],
        sizes=decoder.sizes,
    )
    fields = {name: tensors[f"field_{name}"] for name in ("codes", "authors", "tags")}
    items = ItemTable(**fields, ids=with_unknown(tensors["item_ids"], -1))
    trie = build_trie(catalogue)
    stored = tensors_of(folder / "trie.safetensors")
    if any(not torch.equal(stored[name], tensor) for name, tensor in trie_tensors(trie).items()):
        raise ContractViolation(f"{folder}: trie.safetensors does not fit items.safetensors; register the model again.")
    return Bundle(
        ranker=Ranker(decoder, items, trie),
        catalogue=catalogue,
        description=description,
        config=yaml.safe_load((folder / "config.yaml").read_text()),
        lineage=json.loads((folder / "lineage.json").read_text()),
        manifest=manifest,
    )


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after every part was found to be the one that it names."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ContractViolation(f"{folder} is no model bundle: manifest.json is missing; register the model again.")
    manifest: dict[str, Any] = json.loads(path.read_text())
    if manifest.get("format") != FORMAT:
        raise ContractViolation(
            f"{folder} has bundle format {manifest.get('format')}, this release reads format {FORMAT}; "
            "use the release that made it, or register the model again."
        )
    for part in PARTS:
        if not (folder / part).is_file():
            raise ContractViolation(f"{folder}: part {part} is missing; register the model again.")
    for part in CODED:
        found = codebook_of(folder / part)
        if found != manifest["codebook_version"]:
            raise ContractViolation(
                f"{folder}: {part} belongs to codebook {found}, the bundle to {manifest['codebook_version']}; "
                "parts of different models cannot be mixed, register the model again."
            )
    for part, expected in manifest["sha256"].items():
        if sha256(folder / part) != expected:
            raise ContractViolation(f"{folder}: {part} was changed after the bundle was made; register the model again.")
    return manifest


def build_trie(catalogue: Catalogue, device: torch.device | str = "cpu") -> Trie:
    codes, ranks = torch.from_numpy(catalogue.codes), torch.from_numpy(catalogue.ranks)
    return Trie(codes.to(device), ranks.to(device), catalogue.sizes)


def trie_tensors(trie: Trie) -> dict[str, Tensor]:
    """The arrays that define a trie, by name."""
    levels = {f"keys_{level}": keys for level, keys in enumerate(trie.keys)}
    return levels | {"leaf_items": trie.leaf_items, "leaf_starts": trie.leaf_starts}


def catalogue_tensors(catalogue: Catalogue) -> dict[str, Tensor]:
    known_on = (catalogue.known_on - EPOCH).astype(np.int64)
    arrays = {"item_ids": catalogue.item_ids, "codes": catalogue.codes, "ranks": catalogue.ranks, "known_on": known_on}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def item_tensors(items: ItemTable) -> dict[str, Tensor]:
    return {f"field_{name}": getattr(items, name).contiguous() for name in ("codes", "authors", "tags")}


def save(path: Path, tensors: Mapping[str, Tensor], codebook_version: str) -> None:
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, {"codebook_version": codebook_version})


def tensors_of(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as part:
        return {name: part.get_tensor(name) for name in part.keys()}  # noqa: SIM118 (not a mapping)


def codebook_of(path: Path) -> str:
    with safe_open(path, framework="pt") as part:
        return (part.metadata() or {}).get("codebook_version", "unknown")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
