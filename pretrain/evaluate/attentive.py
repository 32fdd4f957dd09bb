"""How well do an image's tokens tell its category to a probe that chooses among them?

One learnable query attends to the frozen tokens, a residual MLP and a linear layer follow: the attentive probe of
V-JEPA (arXiv 2404.08471, section 4 and appendix D), which AIM (arXiv 2401.08541) and CAE (arXiv 2202.03026) have
without the MLP. Trained by AdamW on cached tokens, at several rates together on the same batches, of which each rank
has a share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from tqdm import tqdm

from pretrain.collectives import average_gradients, rank, world_size
from pretrain.evaluate.divided import division, step_rows
from pretrain.evaluate.fine_tune_recipes import images_of_step
from pretrain.optim import warm_cosine

HEAD_WIDTHS = (64, 48, 32)  # of the attention, first that divides
IMAGES_AT_ONCE = 256


@dataclass(frozen=True)
class AttentiveRecipe:
    epochs: int = 20
    warmup: float = 0.1  # fraction of the steps
    batch: int = 128  # images; of a smaller set a share
    batches: int = 16  # at least, of an epoch, as long as they hold 32 images
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)  # peaks
    weight_decay: float = 0.01
    seed: int = 0  # of the first weights and the order


class AttentiveProbe(nn.Module):
    """Frozen tokens [b, l, d] -> logits [b, k]."""

    def __init__(self, width: int, num_categories: int) -> None:
        super().__init__()
        heads = next((width // each for each in HEAD_WIDTHS if width % each == 0), 1)
        self.norm = nn.LayerNorm(width)
        self.pool = AttentionPoolLatent(width, num_heads=heads, norm_layer=nn.LayerNorm)
        self.head = nn.Linear(width, num_categories)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b k"]:
        return self.head(self.pool(self.norm(tokens)))


def train_attentive(
    tokens: Float[Tensor, "n l d"],
    labels: Int[Tensor, " n"],
    num_categories: int,
    rates: Sequence[float],
    recipe: AttentiveRecipe,
    device: torch.device,
) -> list[AttentiveProbe]:
    """One probe a rate, float32; torch's global generator is as it was.

    A collective call: a rank gives its share of the images, any number of them, and gets all probes.
    """
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(recipe.seed)
        first = AttentiveProbe(tokens.shape[2], num_categories)
    probes = []
    for _ in rates:
        probes.append(AttentiveProbe(tokens.shape[2], num_categories).to(device))
        probes[-1].load_state_dict(first.state_dict())
    groups = [{"params": list(p.parameters()), "peak": rate} for p, rate in zip(probes, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
    divided = division(len(labels))
    batch = images_of_step(divided.total, recipe.batch, recipe.batches)
    steps = recipe.epochs * (divided.total // batch)
    bar = tqdm(
        step_rows(divided, batch, recipe.epochs, recipe.seed),
        total=steps,
        desc="attentive probe",
        unit=" step",
        mininterval=1.0,
        disable=rank() > 0,
    )
    for step, rows in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = warm_cosine(step, steps, round(recipe.warmup * steps), group["peak"], 0.0)
        some, targets = tokens[rows].to(device, torch.float32), labels[rows].to(device)
        loss = sum(F.cross_entropy(probe(some), targets, reduction="sum") for probe in probes) / batch
        optimizer.zero_grad()
        (
            loss * world_size()
        ).backward()  # the mean of such gradients over the ranks is that of the batch's mean
        average_gradients(parameter for group in groups for parameter in group["params"])
        optimizer.step()
    return probes


@torch.inference_mode()
def predict(probe: AttentiveProbe, tokens: Float[Tensor, "n l d"], device: torch.device) -> Int[Tensor, " n"]:
    said = [
        probe(some.to(device, torch.float32)).argmax(dim=1).cpu() for some in tokens.split(IMAGES_AT_ONCE)
    ]
    return torch.cat(said)
