"""How large is the gradient in each part of the model? Asked of the slices that DeepSpeed keeps, at any stage."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from deepspeed.utils import safe_get_local_grad
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.collectives import sum_over_ranks

# part -> beginnings of the names of its parameters; the rest are heads: pooling, projectors, classifier, tags
PARTS: Mapping[str, tuple[str, ...]] = {
    "encoder": ("student.encoder", "mask_patch"),
    "decoders": ("decoder", "linear"),
    "text": ("student.text", "student.text_projection", "temperature"),
}
HEADS = "heads"


def part_of(name: str) -> str:
    """The part of the model that a parameter of the Pretrainer belongs to."""
    for part, beginnings in PARTS.items():
        if any(name.startswith(f"{beginning}.") for beginning in beginnings):
            return part
    return HEADS


@torch.no_grad()
def norms_by_part(model: nn.Module, device: torch.device) -> dict[str, Float[Tensor, ""]]:
    """Norm of the mean-over-ranks gradient of every part that `model` has, before clipping, in float32.

    Between DeepSpeed's backward and step, when it holds the reduced gradient; their squares add up to the square of
    the whole gradient's norm. A collective call.
    """
    owned: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        held, local = owned.setdefault(part_of(name), []), local_gradient(parameter)
        held += [] if local is None else [local]
    squares = torch.zeros(len(owned), device=device)
    for index, held in enumerate(owned.values()):
        if held:
            norms = torch.stack(torch._foreach_norm(held, 2, dtype=torch.float32))
            squares[index] = norms.square().sum().to(device)
    return dict(zip(owned, sum_over_ranks(squares).sqrt().unbind(), strict=True))


def local_gradient(parameter: nn.Parameter) -> Tensor | None:
    """This rank's slice of a parameter's gradient, between backward and step; None where it owns nothing of it."""
    if hasattr(parameter, "ds_id"):
        return safe_get_local_grad(parameter)
    mapping = parameter._hp_mapping
    return None if mapping is None else mapping.get_lp_grad_fragment(parameter._index_in_param_group)
