"""A small model with the computation of a flavor: sizes shrink, nothing else changes."""

from dataclasses import replace

import torch
from torch import nn

from torchtitan.config import Degrees, Parallelism
from torchtitan.models.decoder import Decoder, DecoderArgs
from torchtitan.proof.small_model import small_model
from torchtitan.proof.worlds import World
from torchtitan.protocols.model import override_fields
from torchtitan.protocols.train_spec import TrainSpec

VOCAB, LENGTH, LAYERS = 256, 96, 3
ORIGINAL_LENGTH = 32  # YaRN's, so that LENGTH lies beyond it


def small_args(args: DecoderArgs) -> DecoderArgs:
    """Return the arguments of the stand-in for a flavor."""
    alone = World(Degrees(1, 1, 1, 1, 1, 1, 1), node_size=1)
    small = override_fields(
        args, small_model(args, Parallelism(), alone, VOCAB, LAYERS), "model.args"
    )
    small = replace(small, max_seq_len=LENGTH, context_len=None)
    if getattr(small, "yarn", "off") == "auto":
        small = replace(small, yarn="on", original_seq_len=ORIGINAL_LENGTH)
    return small


def build(spec: TrainSpec, args: DecoderArgs) -> Decoder:
    """Build it with weights large enough for attention and routing to differ between tokens."""
    torch.manual_seed(0)
    model = spec.model_cls(args)
    assert isinstance(model, Decoder)
    model.init_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                nn.init.normal_(buffer, std=0.3)
    return model.eval()
