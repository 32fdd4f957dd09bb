"""How does LayerScale go into a ViT that has none? Its factors are multiplied into the projections before it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

SCALED = {
    "ls1.gamma": "attn.proj",
    "ls2.gamma": "mlp.fc2",
}  # of a block in timm: factors -> what they multiply
FOLDED = "LayerScale, multiplied into the projection before it"


def folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's tensors of a ViT without LayerScale, computing the same; what is scaled is float32.

    ValueError for factors that have no projection of their length.
    """
    tensors = dict(state)
    for scale, projection in SCALED.items():
        for name in [name for name in state if name.endswith(f".{scale}")]:
            gamma, stem = tensors.pop(name).float(), name.removesuffix(scale) + projection
            kinds = [kind for kind in ("weight", "bias") if f"{stem}.{kind}" in tensors]
            shapes = {f"{stem}.{kind}": tuple(tensors[f"{stem}.{kind}"].shape) for kind in kinds}
            if "weight" not in kinds or any(shape[:1] != tuple(gamma.shape) for shape in shapes.values()):
                raise ValueError(
                    f"{name} has {tuple(gamma.shape)} factors for the rows of {stem}, of which there are "
                    f"{shapes or 'no tensors'}: every factor needs its row; take the file from its authors again"
                )
            for key in shapes:
                values = tensors[key].float()
                tensors[key] = values * gamma.view(-1, *[1] * (values.ndim - 1))
    return tensors
