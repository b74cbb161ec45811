"""Codebook files: `codebook.safetensors` with level_0 to level_L-1 in an artifact of stage `tokenize` or `codes`."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from model.rq_kmeans import Codebook
from schemas.errors import MissingUpstream
from schemas.lake import Lake

FILE = "codebook.safetensors"


def save_codebook(folder: Path, codebook: Codebook) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    levels = {f"level_{level}": values.cpu().contiguous() for level, values in enumerate(codebook.centroids)}
    save_file(levels, folder / FILE)


def load_codebook(lake: Lake, version: str) -> Codebook:
    """The frozen codebook of `version`. Raises MissingUpstream where the lake has no complete one."""
    if lake.manifest("tokenize", version) is None:
        raise MissingUpstream(f"The lake {lake.root} holds no codebook {version}; run stage tokenize.")
    return read_codebook(lake.artifact("tokenize", version))


def read_codebook(folder: Path) -> Codebook:
    levels = load_file(folder / FILE)
    return Codebook([levels[f"level_{level}"] for level in range(len(levels))])
