"""A model in training as whole tensors by name, for checkpoints, validation and saving: weights, optimiser state, moving
average. With `train.shard` the workers hold parts of them (FSDP2), and every worker must call the functions here together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model.architectures import build_decoder
from model.decoder import Decoder

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the first worker; the others get nothing


def averaged(decoder: Decoder, decay: float) -> AveragedModel | None:
    """A moving average of the weights that starts at them; None without decay."""
    return AveragedModel(decoder, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None


def replicated(decoder: Decoder, apart: Set[nn.Parameter] = frozenset()) -> DistributedDataParallel:
    """Of which every worker has all weights; gradients are exchanged but those of the parameters `apart`."""
    names = [name for name, parameter in decoder.named_parameters() if parameter in apart]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(decoder, names)
    return DistributedDataParallel(decoder, broadcast_buffers=False)  # each counts its own experts' load, in a buffer


def shard(decoder: Decoder, device: torch.device, apart: Set[nn.Parameter] = frozenset()) -> None:
    """Spreads weights, gradients and optimiser states over all workers, block by block, but those `apart`; in place."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in decoder.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(decoder, mesh=mesh, ignored_params=set(apart))


def gathered(decoder: Decoder, device: torch.device) -> Decoder:
    """A whole copy of a sharded decoder on the first worker; elsewhere its weights are random."""
    weights, _ = get_state_dict(decoder, (), options=WHOLE)
    whole = build_decoder(decoder.config, decoder.sizes, decoder.engaged_mask).to(device)
    if weights:
        whole.load_state_dict(weights)
    return whole


def training_tensors(
    decoder: Decoder, optimizers: Sequence[torch.optim.Optimizer], average: AveragedModel | None
) -> dict[str, Tensor]:
    weights, states = get_state_dict(decoder, optimizers, options=WHOLE)
    tensors: dict[str, Any] = {f"weights/{name}": value for name, value in weights.items()}
    by_parameter: dict[str, Any] = cast(dict[str, Any], states.get("state", {}))
    for name, state in by_parameter.items():
        tensors |= {f"optimizer/{key}/{name}": value for key, value in state.items()}
    if average is not None:
        tensors |= {f"average/{name}": value for name, value in average.state_dict().items()}
    return tensors


def restore_training(
    tensors: Mapping[str, Tensor],
    decoder: Decoder,
    optimizers: Sequence[torch.optim.Optimizer],
    average: AveragedModel | None,
) -> None:
    """The inverse; every worker has read the tensors."""
    states: dict[str, Any] = {}
    for name, value in _below(tensors, "optimizer/").items():
        key, parameter = name.split("/")
        states.setdefault(parameter, {})[key] = value
    groups = get_optimizer_state_dict(decoder, optimizers)["param_groups"]
    weights: dict[str, Any] = _below(tensors, "weights/")
    set_state_dict(
        decoder,
        optimizers,
        model_state_dict=weights,
        optim_state_dict={"state": states, "param_groups": groups},
        options=StateDictOptions(full_state_dict=True),
    )
    if average is not None:
        average.load_state_dict(_below(tensors, "average/"))


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
