# What this repository uses of torchx, for checks without it.
from torchx import specs as specs
