"""How do a training engine and those who only want the weights read a checkpoint?"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from pretrain import randomness
from pretrain.checkpoint.ranges import Files, rank_name
from pretrain.checkpoint.snapshot import Trainable
from pretrain.checkpoint.store import Store
from pretrain.checkpoint.stores import store_at
from pretrain.collectives import rank, world_size
from pretrain.config import Run
from pretrain.data.remote import Place
from pretrain.facts import DataFacts
from pretrain.models.undrawn import undrawn
from pretrain.towers import Towers

STUDENT_PREFIX = "student."  # of the towers among the weights that are trained
PREFIXES = {"teacher": "", "student": STUDENT_PREFIX}


def read_json(folder: Place, name: str) -> Any:
    """What a JSON file of a checkpoint says; FileNotFoundError without it."""
    return json.loads(store_at(folder).read(name))


def left_out(folder: Place) -> set[int]:
    """Numbers of the batches that a run had left out of its order when it was saved."""
    return set(read_json(folder, "state.json").get("guard", {}).get("left_out", ()))


@torch.no_grad()
def restore(engine: Trainable, folder: Place) -> None:
    """Puts the engine into the state that was saved, on any number of ranks, at any ZeRO stage, in any precision.

    All ranks call it; each reads only what it owns. The engine was built for the same run.
    """
    if engine.before_move is not None:
        engine.before_move()  # a save may still be reading
    store, state = store_at(folder), read_json(folder, "state.json")
    files, owned = Files(store), engine.owned
    starts = {part.name: part.start for part in owned.slices}
    owned.begin_moments(state["optimizer_steps"])
    wanted = {name: (starts[name], target) for name, target in owned.masters().items()}
    files.fill("student", "student", wanted)
    if state["optimizer_steps"]:
        for moment, tensors in owned.moments().items():
            wanted = {name: (starts[name], target) for name, target in tensors.items()}
            files.fill("student", "optimizer", wanted, prefix=f"{moment}/")
    owned.publish()
    saved = load(bytes(store.read("student/buffers.safetensors")))
    for name, buffer in owned.buffers.items():
        buffer.copy_(saved[name])
    average = {s.name: torch.empty(s.numel) for s in engine.average.slices if s.numel}
    starts = {part.name: part.start for part in engine.average.slices}
    files.fill("teacher", "teacher", {name: (starts[name], values) for name, values in average.items()})
    engine.average.load_state(average, load(bytes(store.read("teacher/buffers.safetensors"))))
    engine.balance.load_state_dict(state["balance"])
    engine.guard.load_state_dict(state["guard"])
    engine.steps_done = state["step"]
    if state["world"] == world_size():  # others draw from what each step seeds
        randomness.restore(read_json(folder, f"random/{rank_name(rank())}.json"))


def load_teacher(folder: Place) -> dict[str, Tensor]:
    """The teacher's float32 average and buffers by name, whole, on the CPU; one process, without DeepSpeed.

    ValueError when the checkpoint is not whole.
    """
    return _whole(folder, "teacher")


def load_student(folder: Place) -> dict[str, Tensor]:
    """The student's float32 master weights and buffers by name, as `load_teacher`."""
    weights = _whole(folder, "student")
    return {
        name.removeprefix(STUDENT_PREFIX): values
        for name, values in weights.items()
        if name.startswith(STUDENT_PREFIX)
    }


WEIGHTS: dict[str, Callable[[Place], dict[str, Tensor]]] = {"teacher": load_teacher, "student": load_student}


def load_towers(
    folder: Place, which: str = "teacher", parts: Collection[str] | None = None
) -> tuple[Run, DataFacts, Towers]:
    """The recipe, the facts, and the teacher or student as a float32 module in eval mode on the CPU.

    Of `parts`, names of modules right in the towers (all of them if None), the weights are read, straight into the
    module; the others are on the meta device, without numbers. Feature norms are folded into the layers before
    them: what is evaluated and exported has none. ValueError when the checkpoint is not whole, or not of its recipe.
    """
    if which not in WEIGHTS:
        raise ValueError(f"which={which!r} is unknown; choose from {sorted(WEIGHTS)}")
    store = store_at(folder)
    run = Run.from_json(store.read("run.json").decode())
    facts = DataFacts.from_json(store.read("facts.json").decode())
    require_whole(store, f"{which}/")
    with undrawn():
        towers, prefix = Towers(run, facts), PREFIXES[which]
    for name, module in towers.named_children():
        if parts is not None and name not in parts:
            module.to("meta")
    files, saved = Files(store), load(bytes(store.read(f"{which}/buffers.safetensors")))
    targets = {f"{prefix}{name}": parameter.detach() for name, parameter in towers.named_parameters()}
    kept = towers.state_dict().keys()
    buffers = {f"{prefix}{name}": b for name, b in towers.named_buffers() if name in kept}
    there = {
        name: tuple(entry["shape"]) for name, entry in files.layout(which).items() if name.startswith(prefix)
    }
    there |= {name: tuple(values.shape) for name, values in saved.items() if name.startswith(prefix)}
    here = {name: tuple(values.shape) for name, values in (targets | buffers).items()}
    if there != here:
        odd = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
        raise ValueError(
            f"{folder} holds other tensors than its recipe builds: {odd[0]} of {there.get(odd[0])} instead of "
            f"{here.get(odd[0])} ({len(odd)} in all): it was written by another version, take that one"
        )
    real = {name: target for name, target in targets.items() if not target.is_meta}
    files.fill(which, which, {name: (0, target.view(-1)) for name, target in real.items()})
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(saved[name])
    towers.requires_grad_(False).eval().fold_norms()
    return run, facts, towers


def _whole(folder: Place, whose: str) -> dict[str, Tensor]:
    """Parameters and buffers of "student" or "teacher", the parameters in their shapes."""
    store = store_at(folder)
    require_whole(store, f"{whose}/")
    files = Files(store)
    shapes = {name: entry["shape"] for name, entry in files.layout(whose).items()}
    weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    files.fill(whose, whose, {name: (0, values.view(-1)) for name, values in weights.items()})
    return weights | load(bytes(store.read(f"{whose}/buffers.safetensors")))


def require_whole(store: Store, of: str) -> None:
    """ValueError unless every byte of the files whose names begin with `of` is as it was written."""
    problem = store.problem(hashes=True, of=of)
    if problem is not None:
        raise ValueError(f"checkpoint {store} cannot be used, since {problem}: take another one")
