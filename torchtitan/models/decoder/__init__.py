"""The decoder that families share: attention and feed-forward layers, dense or with experts."""

from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.decoder.attention import SelfAttention
from torchtitan.models.decoder.model import Decoder, TransformerBlock

__all__ = ["Decoder", "DecoderArgs", "SelfAttention", "TransformerBlock"]
