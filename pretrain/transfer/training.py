"""How are a backbone and its head trained? A loop that goes on where it was stopped."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data_prep.schema import fsync_folder, write_atomic
from pretrain.data.faults import BadSample
from pretrain.evaluate.layers import layer_order, names_without_decay
from pretrain.optim import warm_cosine
from pretrain.transfer.examples import Drops
from pretrain.transfer.recipes import Optimisation

STATE = "training.pt"  # of an unfinished or finished training, in its folder
SAVE_SECONDS = 120.0  # between two states


def _linear(step: int, optimisation: Optimisation) -> float:
    return 1 - step / optimisation.steps


def _step(step: int, optimisation: Optimisation) -> float:
    return 0.1 ** sum(step >= share * optimisation.steps for share in optimisation.milestones)


def _cosine(step: int, optimisation: Optimisation) -> float:
    return warm_cosine(step, optimisation.steps, 0, 1.0, 0.0)


SCHEDULES: dict[str, Callable[[int, Optimisation], float]] = {
    "linear": _linear,
    "step": _step,
    "cosine": _cosine,
}


def rate(step: int, optimisation: Optimisation) -> float:
    """Rate of step `step`, from 0, of the head; linear warm-up times the schedule."""
    rise = min(1.0, (step + 1) / optimisation.warmup) if optimisation.warmup else 1.0
    return optimisation.lr * rise * SCHEDULES[optimisation.schedule](step, optimisation)


class Layered(nn.Module):
    """A model that tells timm which layer of its backbone a parameter belongs to; heads come last."""

    def __init__(self, model: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.model = model
        (path,) = (name for name, module in self.named_modules() if module is encoder)
        self._order = {f"{path}.{name}": float(layer) for name, layer in layer_order(encoder).items()}
        self._exempt = {f"{path}.{name}" for name in names_without_decay(encoder)}

    def group_matcher(self, coarse: bool) -> Callable[[str], float]:
        """Name of a parameter -> place of its layer."""
        return lambda name: self._order.get(name, math.inf)

    def groups(self, optimisation: Optimisation) -> list[dict[str, Any]]:
        """Parameter groups with `lr_scale`, the rate of a layer / that of the head."""
        decay = {"layer_decay": optimisation.layer_decay}
        groups = param_groups_layer_decay(self, optimisation.weight_decay, self._exempt, **decay)
        backbone = {id(weight) for name, weight in self.named_parameters() if name in self._order}
        for group in groups:
            if id(group["params"][0]) in backbone:  # a group holds one layer
                group["lr_scale"] *= optimisation.backbone_rate
        return groups


class Draws(Dataset):
    """Position in the order of training -> an augmented example, or why there is none.

    Every epoch has an order of its own; what a position shows depends on it and the seed alone.
    """

    def __init__(self, num_examples: int, draw: Callable[[int], Any], seed: int) -> None:
        self.num_examples, self.draw, self.seed = num_examples, draw, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, position: int) -> Any:
        epoch, place = divmod(position, self.num_examples)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.num_examples, generator=generator)
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global generator
            torch.manual_seed((self.seed + 1) * 2**40 + position)
            try:
                return self.draw(int(self._order[place]))
            except BadSample as error:
                return error.reason, str(error)


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

    The state is kept in `folder` every SAVE_SECONDS and at the end; the same call goes on from it with the same
    numbers, bit for bit on a CPU. Float32. Raises ValueError when the loss is not finite or too many
    examples cannot be used.
    """
    optimizer = torch.optim.AdamW(
        Layered(model, encoder).groups(optimisation), lr=optimisation.lr, betas=optimisation.betas
    )
    begun, drops = 0, Drops()
    path = folder / STATE
    if path.is_file():
        state = torch.load(path, weights_only=True, map_location="cpu")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        begun, drops = state["step"], Drops(**state["drops"])
    saved, loss = time.monotonic(), torch.zeros(())
    is_frozen = not any(parameter.requires_grad for parameter in encoder.parameters())
    with tqdm(total=optimisation.steps, initial=begun, desc=title, unit=" step", mininterval=1.0) as bar:
        for step, found in enumerate(_batches(draws, optimisation, begun, machine), begun):
            good = [example for example in found if not isinstance(example, tuple)]
            bad = [example for example in found if isinstance(example, tuple)]
            for reason, message in bad:
                drops.add(reason, message)
            drops.require_few(f"examples of {title}", (step + 1) * optimisation.batch, machine.max_bad)
            model.train()
            if is_frozen:
                encoder.eval()
            for group in optimizer.param_groups:
                group["lr"] = rate(step, optimisation) * group["lr_scale"]
            if good:
                whole = [
                    good[place % len(good)] for place in range(len(found))
                ]  # batch norms want more than one
                loss = loss_of(model, whole)
                optimizer.zero_grad()
                loss.backward()
                if optimisation.clip:
                    nn.utils.clip_grad_norm_(model.parameters(), optimisation.clip)
                optimizer.step()
            bar.update()
            if step % 20 == 0 or step + 1 == optimisation.steps:
                value = float(loss.detach())
                bar.set_postfix_str(f"loss {value:.3f}")
                if not math.isfinite(value):
                    raise ValueError(f"the loss was {value} at step {step}: lower the rate, or set clip")
            if time.monotonic() - saved > SAVE_SECONDS or step + 1 == optimisation.steps:
                _save(path, model, optimizer, step + 1, drops)
                saved = time.monotonic()
    return drops.counts


def _batches(
    draws: Draws, optimisation: Optimisation, begun: int, machine: Machine
) -> Iterator[Sequence[Any]]:
    positions = range(begun * optimisation.batch, optimisation.steps * optimisation.batch)
    loader = DataLoader(
        draws,
        optimisation.batch,
        sampler=positions,
        num_workers=machine.workers,
        collate_fn=list,
        generator=torch.Generator(),  # its own: the model's draws go on as they were saved
    )
    return iter(loader)


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, drops: Drops) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "step": step,
        "drops": asdict(drops),
    }
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
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
