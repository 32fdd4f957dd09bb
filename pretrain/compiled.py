"""Which part of a model does torch.compile fuse? The blocks of its image encoder, one by one."""

from __future__ import annotations

from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block as ViTBlock
from torch import nn

BLOCKS = (ViTBlock, SwinTransformerBlock)


def check_compile(family: str, stage: int) -> None:
    """ValueError where compiling gains nothing or cannot be: InternImage's steps are operators of our own, into which
    a compiler does not look, and ZeRO-3 gathers weights in hooks, at which it stops.
    """
    if family == "internimage":
        raise ValueError("--compile would be ignored: InternImage has no transformer blocks: leave it out")
    if stage == 3:
        raise ValueError("--compile does not work under ZeRO-3, which gathers weights in hooks: take ZeRO-2")


def compile_blocks(module: nn.Module) -> int:
    """Compiles every transformer block in place, at its first call; parameters keep their names. How many there are.

    Equal blocks share one compilation. Off unless asked for: on a CPU it gains nothing
    (benchmarks/compile_blocks.py), and on a GPU nobody has measured it yet.
    """
    blocks = [block for block in module.modules() if isinstance(block, BLOCKS)]
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)
