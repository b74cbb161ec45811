"""The feed-forward part of a block: dense SwiGLU, or a mixture of experts in the deeper layers (OneRec-V2, section 2.2.2).

The mixture is balanced without an auxiliary loss, as in DeepSeek-V3, to which the paper refers: an expert's affinity is
sigmoid(u . e_i); the k experts of largest affinity plus bias are chosen; a gate is the affinity over the sum of the chosen
ones, without the bias. After each step the bias of an expert with less than the mean load rises by `moe.speed`, that of
one with more falls. So the bias is in no gradient and in no gate. The paper leaves open whether it keeps these details.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemas.model_config import ModelConfig

DENSE = -1  # a layer without experts


class SwiGLU(nn.Module):
    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def outputs(self) -> list[Tensor]:
        """The weights that write into the residual stream."""
        return [self.down.weight]


class MixtureOfExperts(nn.Module):
    """`shared` experts that see every token, as one of their joint width, and the `active` routed ones of each token.

    E experts of hidden width H; M tokens of all leading dimensions together, D = d_model.
    """

    bias: Tensor  # float32 [E], part of the weights on disk and of no gradient
    load: Tensor  # int64 [E], tokens since the last `balance`

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe, d_model = config.moe, config.d_model
        self.active, self.speed = moe.active, moe.speed
        self.router = nn.Linear(d_model, moe.experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(moe.experts, 2 * moe.width, d_model))
        self.down = nn.Parameter(torch.empty(moe.experts, d_model, moe.width))
        for weights in (self.gate_up, self.down):
            nn.init.uniform_(weights, -(weights.shape[2] ** -0.5), weights.shape[2] ** -0.5)  # as nn.Linear
        self.shared = SwiGLU(d_model, moe.shared * moe.width) if moe.shared else None
        self.register_buffer("bias", torch.zeros(moe.experts))
        self.register_buffer("load", torch.zeros(moe.experts, dtype=torch.int64), persistent=False)

    def outputs(self) -> list[Tensor]:
        """The weights that write into the residual stream."""
        return [self.down, *(self.shared.outputs() if self.shared else [])]

    def forward(self, x: Tensor) -> Tensor:
        x_MD = x.flatten(0, -2)
        experts_MA, gates_MA = self.route(x_MD)
        order = experts_MA.flatten().argsort(stable=True)  # tokens of an expert side by side
        counts_E = torch.bincount(experts_MA.flatten(), minlength=len(self.bias))
        if self.training:
            self.load += counts_E
        rows = order // self.active
        done = self._experts(x_MD[rows], counts_E) * gates_MA.flatten()[order, None]
        out_MD = torch.zeros_like(x_MD, dtype=done.dtype).index_add(0, rows, done)
        if self.shared is not None:
            out_MD = out_MD + self.shared(x_MD)
        return out_MD.view(x.shape).to(x.dtype)

    def route(self, x_MD: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [M, A]: the chosen experts; [M, A]: their gates."""
        affinity_ME = torch.sigmoid(self.router(x_MD).float())
        experts_MA = (affinity_ME.detach() + self.bias).topk(self.active, dim=1).indices
        chosen_MA = affinity_ME.gather(1, experts_MA)
        return experts_MA, (chosen_MA / chosen_MA.sum(1, keepdim=True)).to(x_MD.dtype)

    def _experts(self, x_PD: Tensor, counts_E: Tensor) -> Tensor:
        """[P, D]: the rows through their experts; those of expert 0 come first, and so on."""
        parts = x_PD.split(counts_E.tolist())
        done = []
        for part, gate_up, down in zip(parts, self.gate_up, self.down, strict=True):
            gate, up = F.linear(part, gate_up).chunk(2, dim=-1)
            done.append(F.linear(F.silu(gate) * up, down))
        return torch.cat(done)

    @torch.no_grad()
    def balance(self, load_E: Tensor) -> None:
        """Moves the biases by the load of a step (over all workers), and counts anew."""
        mean = load_E.double().mean()
        self.bias += self.speed * (mean - load_E).sign().to(self.bias.dtype)
        self.load.zero_()


def feed_forward(config: ModelConfig, layer: int) -> SwiGLU | MixtureOfExperts:
    """That of the layer (from 0): the first `moe.first_dense` layers are dense, all without experts, and DENSE always."""
    if config.has_experts(layer):
        return MixtureOfExperts(config)
    return SwiGLU(config.d_model, config.ffn_width * config.d_model)


def mixtures(module: nn.Module) -> list[MixtureOfExperts]:
    """All mixtures of a model, from the first layer on."""
    return [part for part in module.modules() if isinstance(part, MixtureOfExperts)]


@torch.no_grad()
def shrink(weights: Iterable[Tensor], parts: int) -> None:
    """Scales what writes into the residual stream, which keeps its size whatever the number of such `parts`."""
    for weight in weights:
        weight.mul_(parts**-0.5)
