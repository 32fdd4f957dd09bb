"""How do a training engine and those who only want the weights read a checkpoint?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from pretrain import randomness
from pretrain.checkpoint.names import WHOSE
from pretrain.checkpoint.ranges import NOT_OURS, Files, rank_name
from pretrain.checkpoint.snapshot import Trainable
from pretrain.checkpoint.store import Store
from pretrain.checkpoint.stores import read_json, store_at
from pretrain.collectives import rank, world_size
from pretrain.place import Place

STUDENT_PREFIX = "student."  # of the towers among the weights that are trained
PREFIXES = {"teacher": "", "student": STUDENT_PREFIX}


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


WEIGHTS: dict[str, Callable[[Place], dict[str, Tensor]]] = dict(
    zip(WHOSE, (load_teacher, load_student), strict=True)
)


def _whole(folder: Place, whose: str) -> dict[str, Tensor]:
    """Parameters and buffers of "student" or "teacher", the parameters in their shapes."""
    store = store_at(folder)
    require_whole(store, f"{whose}/")
    files = Files(store)
    files.require_bytes(whose)
    shapes = {name: entry["shape"] for name, entry in files.layout(whose).items()}
    weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    files.fill(whose, whose, {name: (0, values.view(-1)) for name, values in weights.items()})
    return weights | buffers_of(store, whose)


def shapes_of(files: Files, whose: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the towers' parameters and buffers, of which only the buffers are read."""
    prefix = PREFIXES[whose]
    shapes = {name: tuple(entry["shape"]) for name, entry in files.layout(whose).items()}
    shapes |= {name: tuple(values.shape) for name, values in buffers_of(files.store, whose).items()}
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def buffers_of(store: Store, whose: str) -> dict[str, Tensor]:
    """By name; ValueError for what is no such file."""
    try:
        return load(bytes(store.read(f"{whose}/buffers.safetensors")))
    except SafetensorError as error:
        raise ValueError(f"{store}/{whose}/buffers.safetensors is damaged ({error}): {NOT_OURS}") from error


def require_whole(store: Store, of: str, *, hashes: bool = True) -> None:
    """ValueError unless every byte of the files whose names begin with `of` is as it was written; without `hashes`
    only their sizes are compared.
    """
    problem = store.problem(hashes=hashes, of=of)
    if problem is not None:
        raise ValueError(f"checkpoint {store} cannot be used, since {problem}: take another one")
