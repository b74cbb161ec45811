"""The codebook as files: `codebook.safetensors` in an artifact of stage `tokenize` or `codes`, with level_0 to level_L-1,
and order_0 to order_L-1 where its codes were renumbered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model.rq_kmeans import Codebook
from schemas.errors import ContractViolation, MissingUpstream
from schemas.lake import Lake

FILE = "codebook.safetensors"


def sizes_of(codes: int | Sequence[int], levels: int) -> tuple[int, ...]:
    """The codes of each level, where a manifest has one number for all of them or one for each."""
    return (codes,) * levels if isinstance(codes, int) else tuple(codes)


def save_codebook(folder: Path, codebook: Codebook, version: str = "") -> None:
    """`version` is the identity that tables name; a draft has none."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"level_{level}": values for level, values in enumerate(codebook.centroids)}
    tensors |= {f"order_{level}": values for level, values in enumerate(codebook.order or ())}
    save_file(
        {name: values.cpu().contiguous() for name, values in tensors.items()}, folder / FILE, {"codebook_version": version}
    )


def codebook_manifest(lake: Lake, version: str) -> dict[str, Any]:
    """What the fit left beside the codebook of `version`. Raises MissingUpstream where the lake has no complete one."""
    manifest = lake.manifest("tokenize", version)
    if manifest is None:
        raise MissingUpstream(f"The lake {lake.root} holds no codebook {version}; run stage tokenize.")
    return manifest


def load_codebook(lake: Lake, version: str) -> Codebook:
    """The frozen codebook of `version`. Raises MissingUpstream where the lake has no complete one, ContractViolation where
    the file there is another's."""
    codebook_manifest(lake, version)
    folder = lake.artifact("tokenize", version)
    refuse_other_file(folder / FILE, version)
    return read_codebook(folder)


def refuse_other_file(path: Path, version: str) -> None:
    """Raises ContractViolation where a file of centroids names another codebook; those of earlier releases name none."""
    with safe_open(path, framework="pt") as tensors:
        found = (tensors.metadata() or {}).get("codebook_version", version)
    if found != version:
        raise ContractViolation(f"{path} is codebook {found}, not {version}; put its own file back, or fit it anew.")


def read_codebook(folder: Path) -> Codebook:
    tensors = load_file(folder / FILE)
    levels = range(sum(name.startswith("level_") for name in tensors))
    order = [tensors[f"order_{level}"] for level in levels] if "order_0" in tensors else None
    return Codebook([tensors[f"level_{level}"] for level in levels], order)
