"""Does a refused step come out the same when it is run again? `pretrain/main.py --replay BUNDLE`, on as many ranks.

The run is restored from its newest checkpoint before the step, makes the steps in between again, and then that of the
bundle with the batches that lie there. Where the numbers differ, the machine and not the data was at fault.
"""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

import torch.distributed as dist

from pretrain import checkpoint, evidence, strict_json
from pretrain.collectives import from_first_rank, rank, world_size
from pretrain.data.sources import tokenizer_folder
from pretrain.distributed import start_distributed
from pretrain.ds_config import read_ds_config, resolve_config
from pretrain.guard import NORM
from pretrain.replayable import checkpoint_before
from pretrain.train import build_engine, open_loader, read_guide, with_guide

Numbers = dict[str, float]  # by what they are: a target's nats, or the norm


def replay(bundle: Path) -> bool:
    """Runs the step of a bundle again, on all ranks; rank 0 prints the numbers of both. Are all equal?

    ValueError when the bundle is none, was made by another number of ranks, or no checkpoint before it is left.
    """
    recorded, run, paths = evidence.read_bundle(bundle)
    device = start_distributed()
    if world_size() != recorded["world"]:
        raise ValueError(
            f"{bundle} was written by {recorded['world']} ranks and these are {world_size()}: start as many"
        )
    config, _ = resolve_config(read_ds_config(paths.ds_config), run, device)
    left_out = set(recorded["left_out"])
    # Every byte is read: by one rank, not by each of hundreds.
    folder = from_first_rank(lambda: checkpoint_before(paths.kept, recorded["step"], left_out))
    between = recorded["step"] - checkpoint.step_of(folder)
    if rank() == 0:  # many, where newer checkpoints were removed since
        print(f"from {folder}: {between} steps are made again before that of the bundle", flush=True)
    guide = read_guide(run, paths.guide)
    tokenizer = tokenizer_folder(run, paths.data, paths.tokenizer)
    with closing(
        open_loader(run, paths, tokenizer, device, checkpoint.step_of(folder), left_out, None)
    ) as loader:
        engine = build_engine(run, with_guide(loader.facts, guide), config, device, guide, paths)
        checkpoint.restore(engine, folder)
        engine.guard.left_out = left_out
        for batch in loader:
            if engine.steps_done == recorded["step"]:
                break
            engine.step(batch)
            if not engine.verdict.is_accepted:
                raise ValueError(
                    f"batch {engine.verdict.batch} between {folder} and the step was accepted then and is refused "
                    f"now ({', '.join(engine.verdict.reasons)}): the machine does not compute alike"
                )
    kept = evidence.read_batch(bundle, rank())
    if kept is None and rank() == 0:
        print("the bundle has no images: its samples are read from the data again", flush=True)
    losses = engine.step(batch if kept is None else kept)  # the loader stands where the run stood
    own = {name: float(nats) for name, nats in losses.nats.items()}
    of_ranks: list[Numbers] = [own] * world_size()
    dist.all_gather_object(of_ranks, own)
    found = [("all ranks", {NORM: engine.verdict.norm, **engine.verdict.losses})]
    known = [("all ranks", {NORM: recorded["norm"], **recorded["losses"]})]
    for number, numbers in enumerate(of_ranks):
        found.append((f"rank {number}", numbers))
        told = strict_json.loads((bundle / evidence.rank_file(number, "json")).read_text())
        known.append((f"rank {number}", told["losses"]))
    if rank() == 0:
        print(f"batch {recorded['batch']} after step {recorded['step']}, from {folder}:")
        print("\n".join(table(known, found)), flush=True)
    dist.destroy_process_group()
    return all(is_equal(old, new) for (_, old), (_, new) in zip(known, found, strict=True))


def is_equal(old: Numbers, new: Numbers) -> bool:
    """The same numbers, bit for bit; what is not a number equals its like."""
    return old.keys() == new.keys() and all(
        old[name] == new[name] or (math.isnan(old[name]) and math.isnan(new[name])) for name in old
    )


def table(known: list[tuple[str, Numbers]], found: list[tuple[str, Numbers]]) -> list[str]:
    """Lines of what was recorded and what came out now, by rank and name."""
    lines = [f"{'':34}{'recorded':>16}{'now':>16}"]
    for (who, old), (_, new) in zip(known, found, strict=True):
        for name in old:
            pair = {name: old[name]}, {name: new.get(name, math.nan)}
            note = "" if is_equal(*pair) else "   differs"
            lines.append(f"{who:12}{name:22}{old[name]:16.8g}{new.get(name, math.nan):16.8g}{note}")
    return lines
