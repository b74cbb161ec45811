"""The Context Processor (OneRec-V2, section 2.2.1, equations 1 to 4): every context token once to all keys and values.

One linear map to d_context = S_kv * L_kv * G_kv * d_head, split into chunks of G_kv * d_head, each with its own RMSNorm
over the whole chunk (the literal reading of the equations). With S_kv = 1 the value is the normalised key itself.
This is all the work that depends on the context's length; the decoder's blocks hold no key or value projection.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from model.layout import Layout
from model.norm import RMSNorm
from schemas.model_config import ModelConfig


@dataclass
class ContextKV:
    """Keys and values of R requests: one pair a KV layer, [R, G, T, d_head] each; with S_kv = 1 the same tensor."""

    pairs: list[tuple[Tensor, Tensor]]
    bias_R11T: Tensor  # 0 at tokens, -inf at padding

    def __len__(self) -> int:
        return len(self.bias_R11T)


class ContextProcessor(nn.Module):
    """Maps packed tokens and lays them out as padded keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.s_kv, self.l_kv, self.g_kv = config.s_kv, config.l_kv, config.g_kv
        self.d_head = config.d_model // config.heads
        chunk = self.g_kv * self.d_head
        self.map = nn.Linear(config.d_model, self.s_kv * self.l_kv * chunk, bias=False)
        self.norms = nn.ModuleList(RMSNorm(chunk) for _ in range(self.s_kv * self.l_kv))

    def forward(self, tokens_ND: Tensor, layout: Layout) -> ContextKV:
        chunks = self.map(tokens_ND).chunk(self.s_kv * self.l_kv, dim=1)
        heads = [self._heads(norm(chunk), layout) for norm, chunk in zip(self.norms, chunks, strict=True)]
        pairs = [(heads[i * self.s_kv], heads[i * self.s_kv + self.s_kv - 1]) for i in range(self.l_kv)]
        return ContextKV(pairs, layout.bias(heads[0].dtype))

    def _heads(self, packed_NC: Tensor, layout: Layout) -> Tensor:
        return layout.pad(packed_NC).unflatten(2, (self.g_kv, self.d_head)).transpose(1, 2)
