"""How do the towers of a checkpoint become a module, for those who evaluate, export or look at them?"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from pretrain.checkpoint.ranges import NOT_OURS, Files
from pretrain.checkpoint.read import PREFIXES, WEIGHTS, buffers_of, require_whole, shapes_of
from pretrain.checkpoint.stores import store_at
from pretrain.config import Run
from pretrain.facts import DataFacts
from pretrain.initial.bounds import explained_by
from pretrain.models.undrawn import undrawn
from pretrain.place import Place
from pretrain.towers import Towers


def load_towers(
    folder: Place, which: str = "teacher", parts: Collection[str] | None = None
) -> tuple[Run, DataFacts, Towers]:
    """The recipe, the facts, and the teacher or student as a float32 module in eval mode on the CPU.

    Of `parts`, names of modules right in the towers (all of them if None), the weights are read, straight into the
    module; the others are on the meta device, without numbers. Feature norms are folded into the layers before
    them: what is evaluated and exported has none. ValueError when the checkpoint is not whole, or not of its recipe,
    and for numbers that are not finite, of which everything that is computed says nothing.
    """
    if which not in WEIGHTS:
        raise ValueError(f"which={which!r} is unknown; choose from {sorted(WEIGHTS)}")
    store = store_at(folder)
    run = Run.from_json(store.read("run.json").decode())
    facts = DataFacts.from_json(store.read("facts.json").decode())
    require_whole(store, f"{which}/")
    files, prefix = Files(store), PREFIXES[which]
    files.require_bytes(which)
    _require_same(folder, shapes_of(files, which), run, facts)
    with undrawn():
        towers = Towers(run, facts)
    for name, module in towers.named_children():
        if parts is not None and name not in parts:
            module.to("meta")
    saved = buffers_of(store, which)
    targets = {f"{prefix}{name}": parameter.detach() for name, parameter in towers.named_parameters()}
    buffers = {f"{prefix}{name}": buffer for name, buffer in _buffers(towers).items()}
    real = {name: target for name, target in targets.items() if not target.is_meta}
    files.fill(which, which, {name: (0, target.view(-1)) for name, target in real.items()})
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(saved[name])
    _require_finite(folder, real | {name: one for name, one in saved.items() if name in buffers})
    towers.requires_grad_(False).eval().fold_norms()
    return run, facts, towers


def undrawn_towers(folder: Place, run: Run, facts: DataFacts) -> Towers:
    """The towers of a recipe on the meta device, without numbers; ValueError for one that the teacher of a checkpoint
    does not explain, as of a model too large to be built."""
    files = Files(store_at(folder))
    files.require_bytes("teacher")
    return _described(folder, shapes_of(files, "teacher"), run, facts)


def _buffers(towers: Towers) -> dict[str, Tensor]:
    """Those that are kept."""
    kept = towers.state_dict().keys()
    return {name: buffer for name, buffer in towers.named_buffers() if name in kept}


def _described(folder: Place, there: Mapping[str, tuple[int, ...]], run: Run, facts: DataFacts) -> Towers:
    """The towers of a recipe on the meta device, as far as `there` explains them: it may name a million layers."""
    try:
        with torch.device("meta"):
            tensors = {name: torch.empty(shape) for name, shape in there.items()}
            with explained_by(tensors, folder):
                return Towers(run, facts)
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:  # of too large numbers
        told = str(error).partition("\n")[0]
        raise ValueError(f"the recipe of {folder} describes no model ({told}): {NOT_OURS}") from error


def _require_same(folder: Place, there: Mapping[str, tuple[int, ...]], run: Run, facts: DataFacts) -> None:
    """ValueError unless a checkpoint has the names and shapes that its recipe builds."""
    towers = _described(folder, there, run, facts)
    here = {
        name: tuple(one.shape) for name, one in (dict(towers.named_parameters()) | _buffers(towers)).items()
    }
    if there != here:
        odd = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
        raise ValueError(
            f"{folder} holds other tensors than its recipe builds: {odd[0]} of {there.get(odd[0])} instead of "
            f"{here.get(odd[0])} ({len(odd)} in all): it was written by another version, take that one"
        )


def _require_finite(folder: Place, tensors: Mapping[str, Tensor]) -> None:
    for name, values in tensors.items():
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"{folder}: {name} holds other than finite numbers, so that the training has diverged or the "
                "checkpoint is damaged: name an earlier checkpoint"
            )
