"""The architectures by their names in the configuration."""

from __future__ import annotations

from collections.abc import Sequence

from model.decoder import Decoder
from model.decoder_only import DecoderOnly
from model.encoder_decoder import EncoderDecoder
from model.lazy_decoder import LazyDecoder
from schemas.model_config import ModelConfig

ARCHITECTURES: dict[str, type[Decoder]] = {
    "lazy": LazyDecoder,
    "encoder_decoder": EncoderDecoder,
    "decoder_only": DecoderOnly,
}


def build_decoder(config: ModelConfig, sizes: Sequence[int], engaged_mask: int) -> Decoder:
    """The configured architecture with random weights; see `Decoder`."""
    return ARCHITECTURES[config.architecture](config, sizes, engaged_mask)
