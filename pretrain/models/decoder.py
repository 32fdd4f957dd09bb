"""What would the target view look like, patch by patch? A Transformer over owned tokens and mask tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pretrain.config import Decoder


def sin_cos(values: Float[Tensor, "*shape"], width: int) -> Float[Tensor, "*shape width"]:
    """[sin(v w_c), cos(v w_c)] with w_c = 10000^(-c / (width / 2)), c = 0 .. width / 2 - 1, in float32."""
    half = width // 2
    exponent = torch.arange(half, device=values.device, dtype=torch.float32) / half
    angles = values.float()[..., None] * 10000.0**-exponent
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def grid_positions(grid: int, width: int, device: torch.device) -> Float[Tensor, "l width"]:
    """Plain 2-D sin-cos of every patch of a square grid, row by row: half of the width for y, half for x."""
    steps = torch.arange(grid, device=device, dtype=torch.float32)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.cat([sin_cos(y.flatten(), width // 2), sin_cos(x.flatten(), width // 2)], dim=-1)


class RelativePosition(nn.Module):
    """Place of a target patch in units of the input view's patches, embedded (SiameseIM, section 3.2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(2 * width, width)

    def forward(self, relative: Float[Tensor, "n l 4"], dtype: torch.dtype) -> Float[Tensor, "n l width"]:
        """`relative` holds y', x', ln s_h, ln s_w in float32; the logarithms are stretched by 10."""
        stretched = torch.cat([relative[..., :2], 10 * relative[..., 2:]], dim=-1)
        parts = sin_cos(stretched, self.width // 2)
        return self.linear(parts.flatten(-2).to(dtype))


class DenseDecoder(nn.Module):
    """Predicts what every patch of a target view holds from the tokens that an image owns: the teacher's
    token (`dense`), a guide's, a code, or its pixels. `widths`: numbers of one prediction, by Target.output.
    """

    def __init__(self, decoder: Decoder, token_width: int, widths: dict[str, int]) -> None:
        super().__init__()
        self.width = decoder.width
        self.embed = nn.Linear(token_width, decoder.width)
        self.mask_token = nn.Parameter(torch.zeros(decoder.width))
        self.relative = RelativePosition(decoder.width)
        self.blocks = nn.ModuleList(
            Block(decoder.width, decoder.heads, decoder.ffn / decoder.width, qkv_bias=True)
            for _ in range(decoder.layers)
        )
        self.norm = nn.LayerNorm(decoder.width, eps=1e-6)
        self.predict = nn.ModuleDict(
            {output: nn.Linear(decoder.width, width) for output, width in widths.items()}
        )
        trunc_normal_(self.mask_token, std=0.02)
        self.apply(init_xavier)

    def forward(
        self,
        owned: Float[Tensor, "n k d"],
        places: Int[Tensor, "n k"],
        relative: Float[Tensor, "n l 4"],
        grid: int,
        output: str,
    ) -> Float[Tensor, "n l out"]:
        """One prediction a target patch.

        owned: encoder tokens that the image owns; places: their indices in the grid; relative: where each
        target patch lies, as `pretrain.data.geometry.relative_positions` gives it.
        """
        positions = grid_positions(grid, self.width, owned.device)[places]
        seen = self.embed(owned)
        seen = seen + positions.to(seen.dtype)
        asked = self.mask_token + self.relative(relative, seen.dtype)
        tokens = torch.cat([seen, asked], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.predict[output](self.norm(tokens[:, owned.shape[1] :]))


def init_xavier(module: nn.Module) -> None:
    """A linear layer's Xavier-uniform weight and zero bias, for `nn.Module.apply`; other modules are left."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
