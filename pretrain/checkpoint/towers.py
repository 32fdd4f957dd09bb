"""How do the towers of a checkpoint become a module, for those who evaluate, export or look at them?"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from safetensors.torch import load
from torch import Tensor

from pretrain.checkpoint.ranges import Files
from pretrain.checkpoint.read import PREFIXES, WEIGHTS, require_whole
from pretrain.checkpoint.stores import store_at
from pretrain.config import Run
from pretrain.data.remote import Place
from pretrain.facts import DataFacts
from pretrain.models.undrawn import undrawn
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
    _require_finite(folder, real | {name: one for name, one in saved.items() if name in buffers})
    towers.requires_grad_(False).eval().fold_norms()
    return run, facts, towers


def _require_finite(folder: Place, tensors: Mapping[str, Tensor]) -> None:
    for name, values in tensors.items():
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"{folder}: {name} holds other than finite numbers, so that the training has diverged or the "
                "checkpoint is damaged: name an earlier checkpoint"
            )
