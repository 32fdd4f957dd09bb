"""How are a backbone and its head trained, on one rank or several? A loop that goes on where it was stopped."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from pretrain.collectives import average_gradients, mean_over_ranks, rank
from pretrain.evaluate.augment import seeded
from pretrain.randomness import step_seed
from pretrain.training_state import States
from pretrain.transfer.examples import Drops
from pretrain.transfer.joint import with_joint_norms
from pretrain.transfer.order import Draws, batches
from pretrain.transfer.rates import Layered, rate
from pretrain.transfer.recipes import Optimisation

STATE = "training.pt"  # of an unfinished or finished training, in its folder
LOOKED_AT = 20  # steps between two looks at the loss


@dataclass(frozen=True)
class Machine:
    """What belongs to the machine."""

    device: torch.device
    workers: int = 0  # processes that read images; 0: this one
    max_bad: float = 0.01  # share of examples that may be unreadable


def train(
    model: nn.Module,
    encoder: nn.Module,
    draws: Draws,
    loss_of: Callable[[nn.Module, list[Any]], Float[Tensor, ""]],
    optimisation: Optimisation,
    machine: Machine,
    states: States,
    *,
    title: str,
) -> dict[str, int]:
    """Trains `model` in place to the last step and returns how many examples were left out, by reason.

    A collective call: the ranks share each batch, and average the gradients of losses that are means over as many
    images. What is drawn inside the model depends on seed, step and rank. The same call goes on from the last of
    `states` with the same numbers, bit for bit on as many ranks of CPUs, on any number of ranks. Float32.
    Raises ValueError when the loss is not finite or too many examples cannot be used, on all ranks.
    """
    with_joint_norms(model, machine.device)
    optimizer = torch.optim.AdamW(
        Layered(model, encoder).groups(optimisation), lr=optimisation.lr, betas=optimisation.betas
    )
    begun, more = states.load(model, optimizer)
    drops, loss = Drops(**more.get("drops", {})), torch.zeros((), device=machine.device)
    is_frozen = not any(parameter.requires_grad for parameter in encoder.parameters())
    bar = tqdm(total=optimisation.steps, initial=begun, desc=title, unit=" step", mininterval=1.0)
    with bar:
        for step, batch in enumerate(batches(draws, optimisation, begun, machine.workers), begun):
            for reason, message in batch.dropped:
                drops.add(reason, message)
            drops.require_few(f"examples of {title}", (step + 1) * optimisation.batch, machine.max_bad)
            model.train()
            if is_frozen:
                encoder.eval()
            if batch.examples:
                with seeded(_seed(draws.seed, step)):
                    loss = loss_of(model, batch.examples)
                    optimizer.zero_grad()
                    loss.backward()
                _step(model, optimizer, optimisation, step)
            bar.update()
            is_last = step + 1 == optimisation.steps
            is_due = states.is_due(is_last)
            if step % LOOKED_AT == 0 or is_due:  # no state is kept from which every start would fail
                bar.set_postfix_str(f"loss {_finite(float(mean_over_ranks(loss)), step, optimisation):.3f}")
            if is_due:
                states.save(model, None if is_last else optimizer, step + 1, {"drops": asdict(drops)})
    return drops.counts


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, optimisation: Optimisation, step: int) -> None:
    """One step by the gradients of all ranks, at the rate of the schedule."""
    average_gradients(model.parameters())
    if optimisation.clip:
        nn.utils.clip_grad_norm_(model.parameters(), optimisation.clip)
    for group in optimizer.param_groups:
        group["lr"] = rate(step, optimisation) * group["lr_scale"]
    optimizer.step()


def _finite(loss: float, step: int, optimisation: Optimisation) -> float:
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss was {loss} at step {step}: give a lower --lr than {optimisation.lr:g}, or a --clip (now "
            f"{optimisation.clip:g}, 0 is none) such as 1, and name another --out"
        )
    return loss


def _seed(seed: int, step: int) -> int:
    """Of what the model draws at a step, such as paths that are dropped and anchors that are looked at."""
    return step_seed(seed + 1, step, rank())
