"""How does one of our checkpoints become a frozen encoder? The teacher's tokens, as the run saw pixels."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from pretrain.checkpoint import checkpoints_of, latest, load_towers
from pretrain.given_up import given_up_by
from pretrain.models.guides.guide import Opened

READ = ("run.json", "facts.json", "teacher/*")  # what the teacher of a checkpoint is read from


def is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir()


def is_checkpoint(folder: Path) -> bool:
    return (folder / "run.json").is_file() and (folder / "teacher" / "layout.json").is_file()


def open_run(folder: Path) -> Opened:
    """The newest whole checkpoint of a run that it has not given up; ValueError when it has none."""
    place = checkpoints_of(folder)
    gone = given_up_by(folder, place)
    checkpoint = latest(place, without=gone)
    if checkpoint is None:
        but = f" but those of steps {sorted(gone)}, from which it has gone back" if gone else ""
        raise ValueError(
            f"{folder} is a run without a whole checkpoint{but}: wait for its {'next' if gone else 'first'} one, or "
            "name another"
        )
    return open_checkpoint(checkpoint)


def open_checkpoint(folder: Path) -> Opened:
    """The teacher's image encoder of one checkpoint; ValueError when the checkpoint is damaged."""
    run, _, towers = load_towers(folder)
    encoder = towers.encoder
    files = sorted(path.relative_to(folder).as_posix() for form in READ for path in folder.glob(form))
    return Opened(
        OwnTower(encoder),
        encoder.width,
        encoder.stride,
        run.views.size // encoder.stride,
        run.views.mean,
        run.views.std,
        folder,
        tuple(files),
    )


class OwnTower(nn.Module):
    """Summary and tokens of one of our encoders."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n l d"]:
        return self.encoder(images, summary=True)
