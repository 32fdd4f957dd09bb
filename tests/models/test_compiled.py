"""Which blocks does --compile take, and what does it refuse?"""

from __future__ import annotations

import pytest

from pretrain.compiled import check_compile, compile_blocks
from pretrain.config import Backbone
from pretrain.models.backbone import build_encoder


# torch 2.11 uses what it deprecates when it first compiles: torch/utils/mkldnn.py, script_method.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("family", "count"), [("vit", 2), ("swin", 5)])
def test_every_transformer_block_is_compiled_and_keeps_its_names(family: str, count: int) -> None:
    encoder = build_encoder(Backbone(family=family, size=f"{family}_tiny", drop_path_schedule="linear"), 64)
    names = list(encoder.state_dict())
    assert compile_blocks(encoder) == count
    compiled = [module for module in encoder.modules() if module._compiled_call_impl is not None]
    assert len(compiled) == count
    assert list(encoder.state_dict()) == names


def test_what_a_compiler_cannot_serve_is_refused() -> None:
    with pytest.raises(ValueError, match="under ZeRO-3, which gathers weights in hooks: take ZeRO-2"):
        check_compile("vit", stage=3)
    with pytest.raises(ValueError, match="no transformer blocks: leave it out"):
        check_compile("internimage", stage=2)
