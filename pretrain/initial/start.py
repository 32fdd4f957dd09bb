"""How are the weights that `--init` names found, compared with the run, and put into it?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint import PLACE_RECORD, WEIGHTS, checkpoints_of, kept_of, latest
from pretrain.checkpoint.names import is_step
from pretrain.checkpoint.ranges import Files
from pretrain.checkpoint.read import require_whole, shapes_of
from pretrain.checkpoint.stores import read_json, store_at
from pretrain.config import Run
from pretrain.facts import DataFacts
from pretrain.given_up import given_up_by
from pretrain.initial.asked import Init
from pretrain.initial.compared import compare_config, compare_pixels
from pretrain.initial.files import digest_of, open_weights
from pretrain.initial.fit import Fit, fill, fit
from pretrain.initial.layouts import detect
from pretrain.initial.pickles import key_of
from pretrain.intact import COMPLETE
from pretrain.models.internimage_layouts import CONTAINERS, MOST_NESTED, WRAPPERS
from pretrain.place import Place, is_url
from pretrain.towers import Towers

EMA_CONTAINERS = ("state_dict_ema", "model_ema")  # of timm's training script and InternImage's
MOMENTUM_TEACHER = "mm_dcnv3."  # of InternImage's pre-training layout


@dataclass(frozen=True)
class Start:
    """Weights that fit a run, and where they came from."""

    place: Place
    which: str  # "student", "teacher" or "weights", where there are no two
    sha256: str  # of the files
    fit: Fit
    notes: tuple[str, ...] = ()  # on how the file's model saw images

    def fill(self, towers: Towers) -> None:
        """Puts them into towers that are built for the run; ValueError for numbers that are not finite."""
        try:
            fill(towers, self.fit)
        except ValueError as error:
            raise ValueError(f"--init {self.place}: {error}") from error

    def told(self) -> list[str]:
        """Lines for the console."""
        first = f"starts from the {self.which} of {self.place} (SHA-256 {self.sha256[:12]}), {self.fit}"
        return [first, *self.fit.told(), *self.notes]

    def record(self) -> dict[str, Any]:
        """What is kept of it in the run's folder."""
        place = str(self.place) if is_url(self.place) else str(Path(self.place).resolve())
        kept = {"place": place, "which": self.which, "sha256": self.sha256, "notes": list(self.notes)}
        fitted = self.fit
        return kept | {
            "layout": fitted.layout,
            "taken": fitted.taken,
            "resized": fitted.resized,
            "left": fitted.left,
            "kept": fitted.kept,
        }


def open_start(init: Init, run: Run, facts: DataFacts) -> Start:
    """The weights, compared with what the run builds; nothing of them is copied.

    FileNotFoundError where there are none; ValueError for what is damaged or hostile, and for what does not fit.
    """
    with torch.device("meta"):
        towers = Towers(run, facts)
    return start_for(init, run, towers)


def start_for(init: Init, run: Run, towers: Towers) -> Start:
    """As `open_start`, for towers of the run, which may lie on the meta device."""
    if (folder := own_checkpoint(init.place)) is not None:
        which, layout = init.which or "teacher", "towers of a run"
        # Before memory is taken for what does not fit.
        fit(_shapes(folder, which), layout, towers, run.backbone.family, init.heads, f"--init {init.place}")
        state: Mapping[str, Tensor] = WEIGHTS[which](folder)  # ValueError unless the checkpoint is finished
        digest = hashlib.sha256(bytes(store_at(folder).read(COMPLETE))).hexdigest()
        config: Mapping[str, Any] = {"run": read_json(folder, "run.json")}
        pixels: Mapping[str, Any] = {}
    else:
        opened = open_weights(Path(init.place))
        state, which = choose(opened.tensors, init)
        digest, config, pixels = hash_of(opened.files), opened.config, opened.pixels
        layout = detect(state, str(init.place))
    family, place = run.backbone.family, f"--init {init.place}"
    fitted = fit(state, layout, towers, family, init.heads, place)
    notes = compare_config(config, layout, run, place) + compare_pixels(config, pixels, run)
    return Start(init.place, which, digest, fitted, tuple(notes))


def _shapes(folder: Place, which: str) -> dict[str, Tensor]:
    """The towers of a checkpoint without their numbers; ValueError unless it is finished."""
    store = store_at(folder)
    require_whole(store, f"{which}/", hashes=False)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes_of(Files(store), which).items()}


def found(place: Place) -> Place:
    """The checkpoint that a run's place means now, which another moment may change; other places as they are."""
    return own_checkpoint(place) or place


def own_checkpoint(place: Place) -> Place | None:
    """The checkpoint of ours that a place is, or the newest one in it; None where it is another's file.

    In a run's folder those are left out from which the run has gone back; checkpoints behind a URL do not tell.
    """
    if is_url(place):
        folder: Place | None = place if is_step(place) else latest(place)
        if folder is None:
            raise FileNotFoundError(
                f"--init {place} holds no whole checkpoint: name one, or the place of all"
            )
        return folder
    folder = Path(place)
    if (folder / "teacher" / "layout.json").is_file():
        return folder
    if checkpoints_of(folder).is_dir() or (folder / PLACE_RECORD).is_file():
        return _newest(folder)
    if not folder.is_dir():
        return None
    is_of_run = folder == checkpoints_of(folder.parent)
    return latest(folder, without=given_up_by(folder.parent, folder) if is_of_run else ())


def _newest(out: Path) -> Place:
    """The newest whole checkpoint of a run that it has not given up; FileNotFoundError without one."""
    kept = kept_of(out)
    gone = given_up_by(out, kept)
    folder = latest(kept, without=gone)
    if folder is None:
        but = f" but those of steps {sorted(gone)}, from which the run has gone back" if gone else ""
        raise FileNotFoundError(
            f"--init {out} holds no whole checkpoint{but} (looked for in {kept}): wait for its "
            f"{'next' if gone else 'first'} one, or name another"
        )
    return folder


def hash_of(files: tuple[Path, ...]) -> str:
    """SHA-256 of one file, or of those of several."""
    digests = [digest_of(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def choose(content: Mapping[str, Any], init: Init) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, out of containers and wrappers, and whose they are; ValueError for what is none."""
    which = "weights"
    for _ in range(MOST_NESTED):
        averaged = next((name for name in EMA_CONTAINERS if isinstance(content.get(name), Mapping)), None)
        if averaged is not None and init.which == "teacher":
            content, which = content[averaged], "teacher"
        inner = next((name for name in CONTAINERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content, which = content[inner], "student" if averaged and which == "weights" else which
    else:
        raise ValueError(
            f"--init {init.place} holds more than {MOST_NESTED} containers in one another, or one that holds itself: "
            "save model.state_dict() alone"
        )
    if nameless := [name for name in content if not isinstance(name, str)]:
        raise ValueError(
            f"--init {init.place} has {key_of(nameless[0])} where the name of a tensor belongs: save "
            "model.state_dict() alone"
        )
    for prefix in WRAPPERS if not any(name.startswith("backbone.net.") for name in content) else ():
        if content and all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): tensor for name, tensor in content.items()}
    odd = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if odd or not content:
        raise ValueError(
            f"--init {init.place} holds {type(content[odd[0]]).__name__ if odd else 'nothing'} where tensors by name "
            f"belong (in all {len(content)} entries): save model.state_dict() alone"
        )
    if any(name.startswith(MOMENTUM_TEACHER) for name in content):
        which = init.which or "student"
        if which == "teacher":
            content = _momentum_teacher(content)
    if init.which not in (None, which):
        raise ValueError(
            f"--init {init.place} holds one set of weights, no {init.which} beside another: leave out ':{init.which}'"
        )
    return dict(content), which


def _momentum_teacher(content: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """InternImage's pre-training layout with the teacher's backbone in place of the student's."""
    kept = {
        name: tensor for name, tensor in content.items() if not name.startswith(("dcnv3.", MOMENTUM_TEACHER))
    }
    averaged = {
        f"dcnv3.{name.removeprefix(MOMENTUM_TEACHER)}": tensor
        for name, tensor in content.items()
        if name.startswith(MOMENTUM_TEACHER)
    }
    return kept | averaged
