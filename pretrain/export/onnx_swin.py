"""Of which parts is the ONNX graph of a Swin? Windows and masks of any grid, padded and shifted as timm does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from pretrain.export.onnx_parts import TO_LAST, Parts, Placed, last_axes

FAR = -100.0  # added to the scores of tokens that the shift has brought into one window


def add_swin(parts: Parts, swin: nn.Module, prefix: str) -> Placed:
    """Tokens [b, l, d] of the last stage, behind the last norm."""
    embedding, here = swin.patch_embed, f"{prefix}patch_embed."
    x = parts.transposed(parts.convolved(embedding.proj, f"{here}proj.", parts.images), TO_LAST)
    x = parts.normalised(embedding.norm, f"{here}norm.", x)
    for number, stage in enumerate(swin.layers):
        if not isinstance(stage.downsample, nn.Identity):
            here = f"{prefix}layers.{number}.downsample."
            axes = {0: Dim("batch"), 1: 2 * Dim("rows"), 2: 2 * Dim("columns")}
            (x,) = parts(f"merging_of_stage_{number + 1}", Merging(stage.downsample), here, [x], [axes])
        for index, block in enumerate(stage.blocks):
            kind = f"{'shifted' if any(block.shift_size) else 'plain'}_block_of_stage_{number + 1}"
            here = f"{prefix}layers.{number}.blocks.{index}."
            (x,) = parts(kind, WindowBlock(block), here, [x], [last_axes()])
    return parts.rows(parts.normalised(swin.norm, f"{prefix}norm.", x))


class Merging(nn.Module):
    """[b, 2 h, 2 w, c] -> [b, h, w, 2 c]."""

    def __init__(self, merging: nn.Module) -> None:
        super().__init__()
        self.norm, self.reduction = merging.norm, merging.reduction

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        squares = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(squares))


class WindowBlock(nn.Module):
    """Attention in windows and MLP on [b, h, w, c], of any height and width."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.window, self.shift = tuple(block.window_size), tuple(block.shift_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        (_, h, w, _), (high, wide), (down, right) = x.shape, self.window, self.shift
        rows, columns = (h + high - 1) // high, (w + wide - 1) // wide  # windows
        x = rolled(rolled(x, down, 1), right, 2)
        x = F.pad(x, (0, 0, 0, wide - 1, 0, high - 1))[:, : rows * high, : columns * wide]
        windows = x.unflatten(1, (rows, high)).unflatten(3, (columns, wide)).permute(0, 1, 3, 2, 4, 5)
        mask = None
        if down or right:
            region = 3 * regions(x[0, :, 0, 0], high, down)[:, None] + regions(x[0, 0, :, 0], wide, right)
            region = region.unflatten(0, (rows, high)).unflatten(2, (columns, wide)).transpose(1, 2)
            region = region.flatten(2).flatten(0, 1)  # [windows, tokens of a window]
            mask = (region[:, None, :] != region[:, :, None]).to(x.dtype)[:, None] * FAR
        found = self._within(windows.flatten(3, 4).flatten(1, 2), mask)
        found = found.unflatten(2, (high, wide)).unflatten(1, (rows, columns)).transpose(2, 3)
        found = found.flatten(3, 4).flatten(1, 2)[:, :h, :w]
        return rolled(rolled(found, h - down, 1) if down else found, w - right, 2) if down or right else found

    def _within(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """Of [b, windows, tokens, c], all tokens of a window ask all others."""
        attn = self.attn
        q, k, v = attn.qkv(windows).unflatten(-1, (3, attn.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        scores = (q * attn.scale) @ k.transpose(-2, -1) + attn._get_rel_pos_bias()
        if mask is not None:
            scores = scores + mask
        return attn.proj((scores.softmax(-1) @ v).transpose(2, 3).flatten(3))


def rolled(x: Tensor, steps: int, axis: int) -> Tensor:
    """What stands first comes last, `steps` of an axis."""
    if not steps:
        return x
    length = x.shape[axis]
    return torch.cat([x.narrow(axis, steps, length - steps), x.narrow(axis, 0, steps)], axis)


def regions(along: Tensor, window: int, shift: int) -> Tensor:
    """Which of three stretches of a side each place lies in, 0, 1 or 2: those never met before the shift."""
    place, length = torch.arange(along.shape[0]), along.shape[0]
    return (place >= length - window).long() + (place >= length - shift).long()
