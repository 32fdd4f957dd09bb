"""How are a backbone and its head trained, on one rank or several? A loop that goes on where it was stopped."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from data_prep.schema import fsync_folder, write_atomic
from pretrain.collectives import (
    from_every_rank,
    from_first_rank,
    mean_over_ranks,
    on_every_rank,
    rank,
    sum_over_ranks,
)
from pretrain.evaluate.augment import seeded
from pretrain.intact import flush
from pretrain.randomness import step_seed
from pretrain.transfer.examples import Drops
from pretrain.transfer.joint import average_gradients, with_joint_norms
from pretrain.transfer.order import Draws, batches
from pretrain.transfer.rates import Layered, rate
from pretrain.transfer.recipes import Optimisation

STATE = "training.pt"  # of an unfinished or finished training, in its folder
SAVE_SECONDS = 120.0  # between two states
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
    folder: Path,
    *,
    title: str,
) -> dict[str, int]:
    """Trains `model` in place to the last step and returns how many examples were left out, by reason.

    A collective call: the ranks share each batch, and average the gradients of losses that are means over as many
    images (see `joint`). What is drawn inside the model depends on seed, step and rank. Rank 0 keeps the state in
    `folder` every SAVE_SECONDS and at the end; the same call goes on from it with the same numbers, bit for bit on as
    many ranks of CPUs, on any number of ranks. Float32. Raises ValueError when the loss is not finite or too many
    examples cannot be used, on all ranks.
    """
    with_joint_norms(model, machine.device)
    optimizer = torch.optim.AdamW(
        Layered(model, encoder).groups(optimisation), lr=optimisation.lr, betas=optimisation.betas
    )
    path = folder / STATE
    begun, drops = on_every_rank(lambda: _load(path, model, optimizer))
    if len(set(steps := from_every_rank([begun]))) > 1:
        raise ValueError(
            f"the ranks see trainings of {steps} steps in {folder}: name an --out that all machines share"
        )
    saved, loss = time.monotonic(), torch.zeros((), device=machine.device)
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
            for group in optimizer.param_groups:
                group["lr"] = rate(step, optimisation) * group["lr_scale"]
            if batch.examples:
                with seeded(_seed(draws.seed, step)):
                    loss = loss_of(model, batch.examples)
                    optimizer.zero_grad()
                    loss.backward()
                average_gradients(model.parameters())
                if optimisation.clip:
                    nn.utils.clip_grad_norm_(model.parameters(), optimisation.clip)
                optimizer.step()
            bar.update()
            is_last = step + 1 == optimisation.steps
            is_due = rank() == 0 and time.monotonic() - saved > SAVE_SECONDS
            is_saved = is_last or bool(sum_over_ranks(torch.tensor(int(is_due))))
            if step % LOOKED_AT == 0 or is_saved:  # no state is kept from which every start would fail
                value = float(mean_over_ranks(loss))
                bar.set_postfix_str(f"loss {value:.3f}")
                if not math.isfinite(value):
                    raise ValueError(
                        f"the loss was {value} at step {step}: lower the rate or set clip, and name another --out"
                    )
            if is_saved:
                from_first_rank(lambda: _save(path, model, optimizer, step + 1, drops))  # noqa: B023  called at once
                saved = time.monotonic()
    return drops.counts


def _seed(seed: int, step: int) -> int:
    """Of what the model draws at a step, such as paths that are dropped and anchors that are looked at."""
    return step_seed(seed + 1, step, rank())


def _load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, Drops]:
    """Steps that are done and what they left out."""
    state: dict[str, Any] = {"step": 0, "drops": {}}
    if path.is_file():
        state = torch.load(path, weights_only=True, map_location="cpu")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    return state["step"], Drops(**state["drops"])


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, drops: Drops) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "drops": asdict(drops),
    }
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    flush(temporary)
    os.replace(temporary, path)
    fsync_folder(path.parent)


def require_same(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a training into its folder; ValueError when it holds a training with others."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if path.is_file():
        before = json.loads(path.read_text())
        differing = sorted(
            key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key)
        )
        if differing:
            key = differing[0]
            raise ValueError(
                f"{folder} holds a training with {key}={before.get(key)!r}, not {settings.get(key)!r} (differing: "
                f"{differing}): name another --out, or delete that folder"
            )
        return
    write_atomic(path, (json.dumps(settings, indent=1) + "\n").encode())
