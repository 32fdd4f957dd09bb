"""Which checkpoint of a run does a name mean?"""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoint import checkpoint_folder, checkpoints_of, latest, steps_in
from pretrain.intact import verify


def find_checkpoint(run_folder: Path, name: str) -> Path:
    """Folder of the checkpoint "first" (step 0, before any training), "last" (the newest whole one) or a step.

    Raises FileNotFoundError (no run, no such checkpoint, or not whole) and ValueError (no such name).
    """
    if not run_folder.is_dir():
        raise FileNotFoundError(f"{run_folder} is no folder: name the --out folder of a pre-training run")
    if name == "last":
        folder = latest(checkpoints_of(run_folder))
        if folder is None:
            raise FileNotFoundError(
                f"{run_folder} holds no whole checkpoint: name the --out folder of `deepspeed pretrain/main.py`, "
                "after its first checkpoint was written"
            )
        return folder
    if name != "first" and not name.isdecimal():
        raise ValueError(
            f"step {name!r} is unknown; choose from ['first', 'last'] or give a number such as 400"
        )
    folder = checkpoint_folder(run_folder, 0 if name == "first" else int(name))
    problem = verify(folder, hashes=False) if folder.is_dir() else "there is none"
    if problem is not None:
        steps = sorted(steps_in(checkpoints_of(run_folder)))
        whole = [step for step in steps if verify(checkpoint_folder(run_folder, step), hashes=False) is None]
        remedy = (
            f"choose one of the whole ones, steps {whole}" if whole else "the run holds no whole checkpoint"
        )
        raise FileNotFoundError(f"{folder} cannot be used, since {problem}: {remedy}")
    return folder
