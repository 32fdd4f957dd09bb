"""Which blocks does --compile take, and what does it refuse?"""

from __future__ import annotations

import pytest

from pretrain.compiled import compile_blocks
from pretrain.config import Backbone
from pretrain.models.backbone import build_encoder


@pytest.mark.parametrize(("family", "count"), [("vit", 2), ("swin", 5)])
def test_every_transformer_block_is_compiled_and_keeps_its_names(family: str, count: int) -> None:
    encoder = build_encoder(Backbone(family=family, size=f"{family}_tiny", drop_path_schedule="linear"), 64)
    names = list(encoder.state_dict())
    assert compile_blocks(encoder, stage=2) == count
    compiled = [module for module in encoder.modules() if module._compiled_call_impl is not None]
    assert len(compiled) == count
    assert list(encoder.state_dict()) == names


def test_what_a_compiler_cannot_serve_is_refused() -> None:
    with pytest.raises(ValueError, match="under ZeRO-3, which gathers weights in hooks: take ZeRO-2"):
        compile_blocks(build_encoder(Backbone(family="vit", size="vit_tiny", drop_path=0.0), 64), stage=3)
    with pytest.raises(ValueError, match="no transformer blocks: leave it out"):
        compile_blocks(build_encoder(Backbone(size="internimage_tiny"), 64), stage=2)
