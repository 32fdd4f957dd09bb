"""Which part of a model does torch.compile fuse? The blocks of its image encoder, one by one."""

from __future__ import annotations

from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block as ViTBlock
from torch import nn

BLOCKS = (ViTBlock, SwinTransformerBlock)


def compile_blocks(module: nn.Module, stage: int) -> int:
    """Compiles every transformer block in place, at its first call; parameters keep their names. How many there are.

    Equal blocks share one compilation. ValueError where that gains nothing or cannot be: InternImage's steps are
    operators of our own, which a compiler does not look into, and ZeRO-3 gathers weights in hooks, at which it stops.
    """
    blocks = [block for block in module.modules() if isinstance(block, BLOCKS)]
    if stage == 3:
        raise ValueError("--compile does not work under ZeRO-3, which gathers weights in hooks: take ZeRO-2")
    if not blocks:
        raise ValueError("--compile would be ignored: the backbone has no transformer blocks: leave it out")
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)
