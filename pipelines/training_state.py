"""What a checkpoint holds of a model in training, as tensors by name: weights, optimiser state, moving average."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model.decoder import Decoder

OPTIMIZER_KEYS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


def averaged(decoder: Decoder, decay: float) -> AveragedModel | None:
    """A moving average of the weights that starts at them; None without decay."""
    return AveragedModel(decoder, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None


def training_tensors(
    decoder: Decoder, optimizer: torch.optim.Optimizer, average: AveragedModel | None
) -> dict[str, Tensor]:
    tensors = {f"weights/{name}": value for name, value in decoder.state_dict().items()}
    for name, parameter in decoder.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer/{key}/{name}"] = value
    if average is not None:
        tensors |= {f"average/{name}": value for name, value in average.state_dict().items()}
    return tensors


def restore_training(
    tensors: Mapping[str, Tensor], decoder: Decoder, optimizer: torch.optim.Optimizer, average: AveragedModel | None
) -> None:
    """The inverse, onto the device of the decoder."""
    decoder.load_state_dict(_below(tensors, "weights/"))
    for name, parameter in decoder.named_parameters():
        state = {key: tensors[f"optimizer/{key}/{name}"].to(parameter.device) for key in OPTIMIZER_KEYS}
        optimizer.state[parameter] = state
    if average is not None:
        average.load_state_dict(_below(tensors, "average/"))


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
