"""Models and training states on disk, in safetensors and JSON: nothing goes through pickle.

A training state appears whole or not at all: it is written beside its place and renamed into it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.architectures import build_decoder
from model.decoder import Decoder
from model.item_aligner import Aligner, build_aligner
from pipelines.codebook import sizes_of
from schemas.errors import ContractViolation
from schemas.item_alignment import ItemAlignmentConfig
from schemas.loader import from_mapping, to_mapping
from schemas.model_config import ModelConfig

KEEP = 2  # states
STATE = "step_"


def save_model(folder: Path, decoder: Decoder, description: Mapping[str, Any]) -> None:
    """weights.safetensors and model.json: the sizes of the decoder, and whatever `description` adds."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {
        "model": to_mapping(decoder.config),
        "levels": decoder.levels,
        "num_codes": list(decoder.sizes),
        "engaged_mask": decoder.engaged_mask,
    }
    save_file(
        {name: t.detach().cpu().contiguous() for name, t in decoder.state_dict().items()}, folder / "weights.safetensors"
    )
    (folder / "model.json").write_text(json.dumps({**sizes, **description}, indent=2))


def load_model(folder: str | Path) -> tuple[Decoder, dict[str, Any]]:
    """The decoder in evaluation mode and the content of model.json. Raises ContractViolation where a part is missing."""
    folder = Path(folder)
    for part in ("model.json", "weights.safetensors"):
        if not (folder / part).is_file():
            raise ContractViolation(f"{folder} holds no {part}: it is no trained model; run stage train first.")
    description = json.loads((folder / "model.json").read_text())
    config = from_mapping(ModelConfig, description["model"], str(folder / "model.json"))
    decoder = build_decoder(config, sizes_of(description["num_codes"], description["levels"]), description["engaged_mask"])
    try:
        decoder.load_state_dict(load_file(folder / "weights.safetensors"))
    except RuntimeError as error:
        raise ContractViolation(f"{folder}: weights.safetensors does not fit model.json; train the model again.") from error
    return decoder.eval(), description


def save_aligner(path: Path, aligner: Aligner, settings: ItemAlignmentConfig) -> None:
    """One safetensors file; its metadata say how the aligner is built."""
    built = {"widths": json.dumps(aligner.widths), "settings": json.dumps(to_mapping(settings))}
    save_file({name: t.detach().cpu().contiguous() for name, t in aligner.state_dict().items()}, path, built)


def load_aligner(path: Path) -> Aligner:
    """The aligner in evaluation mode."""
    with safe_open(path, framework="pt") as saved:
        built = {name: json.loads(value) for name, value in saved.metadata().items()}
    settings = from_mapping(ItemAlignmentConfig, built["settings"], str(path))
    aligner = build_aligner(built["widths"], settings)
    aligner.load_state_dict(load_file(path))
    return aligner.eval()


def refuse_other_codebook(folder: Path, description: Mapping[str, Any], codebook: str) -> None:
    """Raises ContractViolation unless the model of `folder` learned the codes of `codebook`."""
    learned = description.get("codebook_version")
    if learned != codebook:
        raise ContractViolation(
            f"{folder}: the model learned codebook {learned}, whose codes mean nothing in codebook {codebook}; "
            "run stage train again."
        )


def save_state(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Saves a training state below `folder` and removes all but the newest KEEP; where it is."""
    final, draft = folder / f"{STATE}{step:09d}", folder / f".draft_{step:09d}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, draft / "state.safetensors")
    (draft / "state.json").write_text(json.dumps(state))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(draft, final)
    for old in states(folder)[:-KEEP]:
        shutil.rmtree(old)
    return final


def states(folder: Path) -> list[Path]:
    """Complete training states, oldest first."""
    return sorted(folder.glob(f"{STATE}*")) if folder.is_dir() else []


def newest_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the newest checkpoint, or None at the start."""
    found = states(folder)
    return (load_file(found[-1] / "state.safetensors"), described(found[-1])) if found else None


def described(state: Path) -> dict[str, Any]:
    """What a training state says beside its tensors."""
    found: dict[str, Any] = json.loads((state / "state.json").read_text())
    return found
