"""What does `--init` ask for? Which weights a run starts from; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pretrain.place import Place, is_url, place_of

WHICH = ("student", "teacher")


@dataclass(frozen=True)
class Init:
    """Weights that a run starts from."""

    place: Place  # file or folder; URL of one of our checkpoints
    which: str | None = None  # of two that the place may hold; None = a run's teacher, a file's only ones
    heads: bool = False  # also what stands above the backbone


def init_of(text: str | None, heads: bool) -> Init | None:
    """What PATH, PATH:teacher or PATH:student says; None without.

    ValueError for heads of nothing, FileNotFoundError where nothing lies.
    """
    if text is None:
        if heads:
            raise ValueError(
                "--init-heads would be ignored, nothing is read: name the weights by --init PATH"
            )
        return None
    path, _, which = text.rpartition(":")
    named = (path, which) if which in WHICH else (text, None)
    place = place_of(named[0])
    if not is_url(place) and not Path(place).exists():
        raise FileNotFoundError(
            f"--init {place} does not exist: name a file of weights (.safetensors, .pth), a folder that holds one, "
            "or the --out folder of a run"
        )
    return Init(place, named[1], heads)
