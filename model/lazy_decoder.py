"""The lazy decoder (OneRec-V2, section 2.2): the Context Processor's keys and values, then lazy blocks."""

from __future__ import annotations

from torch import nn

from model.context_processor import ContextProcessor
from model.decoder import Decoder
from model.lazy_block import LazyBlock
from schemas.model_config import ModelConfig


class LazyDecoder(Decoder):
    def make_processor(self, config: ModelConfig) -> nn.Module:
        return ContextProcessor(config)

    def make_block(self, config: ModelConfig, layer: int) -> nn.Module:
        return LazyBlock(config, layer)

    def kv_index(self, layer: int) -> int:
        """Equation 9 with layers counted from 0."""
        return layer * self.config.l_kv // self.config.layers
