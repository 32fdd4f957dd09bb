"""Of which parts is the ONNX graph of a Swin? Windows and masks of any grid, padded and shifted as timm does."""

from __future__ import annotations

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from pretrain.export.onnx_parts import TO_LAST, Parts, Placed

END = 2**31  # behind every place of an axis
FAR = -100.0  # added to the scores of tokens that the shift has brought into one window


def add_swin(parts: Parts, swin: nn.Module, prefix: str) -> Placed:
    """Tokens [b, l, d] of the last stage, behind the last norm."""
    embedding, here = swin.patch_embed, f"{prefix}patch_embed."
    x = parts.transposed(parts.convolved(embedding.proj, f"{here}proj.", parts.images), TO_LAST)
    x = parts.normalised(embedding.norm, f"{here}norm.", x)
    for number, stage in enumerate(swin.layers):
        if not isinstance(stage.downsample, nn.Identity):
            x = _merged(parts, stage.downsample, f"{prefix}layers.{number}.downsample.", x)
        for index, block in enumerate(stage.blocks):
            x = _block(parts, block, number + 1, f"{prefix}layers.{number}.blocks.{index}.", x)
    x = parts.normalised(swin.norm, f"{prefix}norm.", x)
    shape = parts.numbers(0, -1, x.example.shape[-1])
    return parts.node("Reshape", [x.value, shape], {}, x.example.flatten(1, 2))


def _merged(parts: Parts, merging: nn.Module, prefix: str, x: Placed) -> Placed:
    """[b, 2 h, 2 w, c] -> [b, h, w, 2 c]: four neighbours in one: left ones from above, then right ones."""
    quarters = []
    for right, down in ((0, 0), (0, 1), (1, 0), (1, 1)):
        starts, ends, along, steps = (down, right), (END, END), (1, 2), (2, 2)
        taken = [x.value, *(parts.numbers(*one) for one in (starts, ends, along, steps))]
        quarters.append(parts.node("Slice", taken, {}, x.example[:, down::2, right::2]))
    example = torch.cat([one.example for one in quarters], dim=-1)
    x = parts.node("Concat", [one.value for one in quarters], {"axis": 3}, example)
    x = parts.normalised(merging.norm, f"{prefix}norm.", x)
    return parts.linear(merging.reduction, f"{prefix}reduction.", x)


def _block(parts: Parts, block: nn.Module, stage: int, prefix: str, x: Placed) -> Placed:
    """Attention in windows and MLP on [b, h, w, c], of any height and width."""
    y = parts.normalised(block.norm1, f"{prefix}norm1.", x)
    for axis, steps in enumerate(block.shift_size, 1):
        y = _rolled(parts, y, steps, axis)
    high, wide = block.window_size
    kind = f"{'shifted' if any(block.shift_size) else 'plain'}_of_stage_{stage}"
    axes = {0: Dim("batch"), 1: high * Dim("rows"), 2: wide * Dim("columns")}
    (y,) = parts(kind, Windows(block), prefix, [_padded(parts, y, high, wide)], [axes])
    h, w = x.example.shape[1:3]
    size = parts.node("Shape", [x.value], {"start": 1, "end": 3}, torch.tensor([h, w]))
    taken = [y.value, parts.numbers(0, 0), size.value, parts.numbers(1, 2)]
    y = parts.node("Slice", taken, {}, y.example[:, :h, :w])
    for axis, steps in enumerate(block.shift_size, 1):
        y = _rolled(parts, y, -steps, axis)
    x = parts.node("Add", [x.value, y.value], {}, x.example)
    y = parts.linear(block.mlp.fc1, f"{prefix}mlp.fc1.", parts.normalised(block.norm2, f"{prefix}norm2.", x))
    y = parts.linear(block.mlp.fc2, f"{prefix}mlp.fc2.", parts.activated(y))
    return parts.node("Add", [x.value, y.value], {}, x.example)


def _rolled(parts: Parts, x: Placed, steps: int, axis: int) -> Placed:
    """What stands first comes last, `steps` of an axis; of a negative number the other way round."""
    if not steps:
        return x
    along, here = parts.numbers(axis), parts.numbers(steps)
    last = parts.node("Slice", [x.value, here, parts.numbers(END), along], {}, x.example)
    first = parts.node("Slice", [x.value, parts.numbers(0), here, along], {}, x.example)
    return parts.node("Concat", [last.value, first.value], {"axis": axis}, x.example)


def _padded(parts: Parts, x: Placed, high: int, wide: int) -> Placed:
    """With zeros below and on the right, to whole windows."""
    h, w = x.example.shape[1:3]
    missing = torch.tensor([-h % high, -w % wide])
    size = parts.node("Shape", [x.value], {"start": 1, "end": 3}, torch.tensor([h, w]))
    size = parts.node("Neg", [size.value], {}, missing)
    size = parts.node("Mod", [size.value, parts.numbers(high, wide)], {}, missing)
    pads = parts.node("Concat", [parts.numbers(0, 0), size.value], {"axis": 0}, missing)
    inputs = [x.value, pads.value, ir.Value(name=""), parts.numbers(1, 2)]
    return parts.node("Pad", inputs, {}, F.pad(x.example, (0, 0, 0, int(missing[1]), 0, int(missing[0]))))


class Windows(nn.Module):
    """Attention in windows on [b, rows of windows x their height, columns x their width, c]."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.attn, self.window, self.shift = block.attn, tuple(block.window_size), tuple(block.shift_size)

    def forward(self, x: Tensor) -> Tensor:
        (b, h, w, c), (high, wide), (down, right) = x.shape, self.window, self.shift
        rows, columns = h // high, w // wide  # windows
        windows = x.view(b, rows, high, columns, wide, c).permute(0, 1, 3, 2, 4, 5)
        mask = None
        if down or right:
            region = 3 * regions(h, high, down)[:, None] + regions(w, wide, right)
            region = (
                region.view(rows, high, columns, wide).transpose(1, 2).reshape(rows * columns, high * wide)
            )
            mask = (region[:, None, :] != region[:, :, None]).to(x.dtype)[:, None] * FAR
        found = self._within(windows.reshape(b, rows * columns, high * wide, c), mask)
        return found.view(b, rows, columns, high, wide, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)

    def _within(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """Of [b, windows, tokens, c], all tokens of a window ask all others."""
        attn = self.attn
        q, k, v = attn.qkv(windows).unflatten(-1, (3, attn.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        scores = (q * attn.scale) @ k.transpose(-2, -1) + attn._get_rel_pos_bias()
        if mask is not None:
            scores = scores + mask
        return attn.proj((scores.softmax(-1) @ v).transpose(2, 3).flatten(3))


def regions(length: int | torch.SymInt, window: int, shift: int) -> Tensor:  # torch 2.11 traces a symbol
    """Which of three stretches of a side each place lies in, 0, 1 or 2: those that met only by the shift."""
    place = torch.arange(length)
    return (place >= length - window).long() + (place >= length - shift).long()
