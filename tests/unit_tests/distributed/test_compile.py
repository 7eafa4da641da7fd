"""What compiled code is kept by."""

import torch
from torch import nn

from torchtitan.config import Compile
from torchtitan.distributed.compile import apply_compile, digest_of


def test_kept_code_is_not_that_of_other_operators(tmp_path):
    with torch.compiler.config.patch(cache_key_tag="mine"):
        for _ in range(2):
            apply_compile({"layer": nn.Linear(2, 2)}, Compile(enable=True, backend="eager"))
        mine, *ours = torch.compiler.config.cache_key_tag.split()
        assert mine == "mine" and len(ours) == 2 and ours[0] == "torchtitan"
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "operator.py").write_text("one result")
    before = digest_of(tmp_path)
    assert before == digest_of(tmp_path)
    (tmp_path / "inner" / "operator.py").write_text("two results")
    assert digest_of(tmp_path) != before
