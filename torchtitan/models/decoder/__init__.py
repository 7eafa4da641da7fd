"""What families share: a decoder of attention and feed-forward layers, dense or with experts."""

from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.decoder.model import Decoder, Output, TransformerBlock

__all__ = ["Decoder", "DecoderArgs", "Output", "TransformerBlock"]
