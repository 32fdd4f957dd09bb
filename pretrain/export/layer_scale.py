"""How does LayerScale go into a ViT that has none? Its factors are multiplied into the projections before it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

SCALED = {"attn.proj": "ls1", "mlp.fc2": "ls2"}  # projection -> the LayerScale behind it
FOLDED = "LayerScale, multiplied into the projection before it"


def folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's tensors of a ViT without LayerScale, computing the same."""
    tensors = {}
    for key, tensor in state.items():
        block, kind = key.rpartition(".")[::2]
        if block.split(".")[-1] in SCALED.values():
            continue
        for projection, scale in SCALED.items():
            gamma = state.get(f"{block.removesuffix(projection)}{scale}.gamma")
            if block.endswith(projection) and gamma is not None:
                tensor = tensor * (gamma[:, None] if kind == "weight" else gamma)
        tensors[key] = tensor
    return tensors
