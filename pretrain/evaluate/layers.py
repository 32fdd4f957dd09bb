"""In which order do the layers of an encoder stand between image and tokens, and what is the mean of each?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from timm.models import group_parameters
from torch import Tensor, nn

from pretrain.models.internimage import InternImage

LAYER = "layer "  # and its number from 1, a name of its mean
LISTS = ("blocks", "layers", "levels")  # where a trunk has its layers
NUM_LAYERS = 4  # the last ones, as DINO's linear evaluation has them (arXiv 2104.14294, appendix F)

# Trunks that do not tell it themselves, in timm's notation: group -> patterns of names and what orders them;
# 99999 joins the group before. InternImage: stem, then block by block; what follows a stage's last block is of it.
MATCHERS: dict[type[nn.Module], dict[str, Any]] = {
    InternImage: {
        "stem": r"^patch_embed",
        "blocks": [
            (r"^levels\.(\d+)\.blocks\.(\d+)", None),
            (r"^levels\.(\d+)\.(?!blocks)", (99999,)),
        ],
    }
}


class UnknownOrder(ValueError):
    """An encoder does not tell in which order its layers stand."""


def layer_order(encoder: nn.Module) -> dict[str, int]:
    """Name of a parameter -> number of its layer, from 0 at the image; token heads after the trunk are left out.

    Raises UnknownOrder for a trunk that does not tell it.
    """
    name, trunk, matcher = _trunk(encoder)
    found = group_parameters(trunk, matcher, reverse=True)
    return {f"{name}.{parameter}": layer for parameter, layer in found.items()}


def decay_of_depth(decay: float, depth: int, layers: int) -> float:
    """The rate of a layer / that of the next one in a backbone of `layers`, when `decay` is given for one of `depth`.

    That of a deeper one is milder: its first layer learns as fast as the first of `depth`. So ViT-B's 0.65 becomes
    0.90 for InternImage-H's 50 layers, as InternImage publishes, and ViTDet's 0.7 becomes 0.83 for ViT-L (0.8 there).
    """
    return decay ** min(1.0, (depth + 1) / (layers + 1))


@contextmanager
def layer_means(encoder: nn.Module) -> Iterator[dict[str, Float[Tensor, "b _"]]]:
    """What is filled, while inside, with the mean over the positions of each of the last NUM_LAYERS layers.

    Layers are a ViT's blocks, without its class token, and the stages of Swin and InternImage. Nothing is filled
    for an encoder of unknown order.
    """
    try:
        _, trunk, _ = _trunk(encoder)
    except UnknownOrder:
        yield {}
        return
    layers = next((getattr(trunk, name) for name in LISTS if hasattr(trunk, name)), ())
    prefix = getattr(trunk, "num_prefix_tokens", 0)
    means: dict[str, Tensor] = {}

    def keep(number: int, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output  # a stage of InternImage gives two maps
        means[f"{LAYER}{number}"] = output.flatten(1, -2)[:, prefix:].mean(dim=1)

    first = max(len(layers) - NUM_LAYERS, 0)
    hooks = [
        layer.register_forward_hook(lambda _, __, output, n=first + i + 1: keep(n, output))
        for i, layer in enumerate(layers[first:])
    ]
    try:
        yield means
    finally:
        for hook in hooks:
            hook.remove()


def names_without_decay(encoder: nn.Module) -> set[str]:
    """Parameters of more than one dimension that the trunk exempts from weight decay, such as a class token."""
    name, trunk, _ = _trunk(encoder)
    exempt = trunk.no_weight_decay() if hasattr(trunk, "no_weight_decay") else set()
    return {f"{name}.{parameter}" for parameter in exempt}


def _trunk(encoder: nn.Module) -> tuple[str, nn.Module, Any]:
    """Name, module and timm's matcher of the child that holds the layers."""
    for name, child in encoder.named_modules():
        if not name:
            continue
        if hasattr(child, "group_matcher"):  # timm's models
            return name, child, child.group_matcher(coarse=False)
        if type(child) in MATCHERS:
            return name, child, MATCHERS[type(child)]
    known = sorted(kind.__name__ for kind in MATCHERS)
    raise UnknownOrder(
        f"{type(encoder).__name__} has neither a timm model nor one of {known} in it, so the order of its layers is "
        "unknown: add it to MATCHERS in pretrain/evaluate/layers.py"
    )
