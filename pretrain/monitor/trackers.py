"""Who else is told of a run, on request? wandb and TensorBoard."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pretrain.config import Run
from pretrain.intact import write_text

WANDB_PROJECT = "m3i"
TENSORBOARD = "tensorboard"  # folder beside the log


@runtime_checkable
class Tracker(Protocol):
    """Takes what the log takes."""

    def log(self, record: Mapping[str, Any]) -> None: ...
    def alert(self, title: str, text: str) -> None: ...
    def close(self) -> None: ...


class Wandb:
    """A run of wandb that a resume continues; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, out: Path, run: Run, first_step: int) -> None:
        import wandb

        self._run = wandb.init(
            project=WANDB_PROJECT,
            name=out.name,
            id=wandb_id(out, first_step),
            dir=str(out),
            resume="allow",
            config=dataclasses.asdict(run),
        )

    def log(self, record: Mapping[str, Any]) -> None:
        self._run.log(dict(record), step=record["step"])

    def alert(self, title: str, text: str) -> None:
        self._run.alert(title=title, text=text)

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files in OUT/tensorboard; a resume hides what came after its step."""

    def __init__(self, out: Path, run: Run, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(out / TENSORBOARD), purge_step=first_step + 1)
        self._writer.add_text("recipe", f"```json\n{run.to_json()}\n```", first_step)

    def log(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def alert(self, title: str, text: str) -> None:
        self._writer.add_text(title, text)

    def close(self) -> None:
        self._writer.close()


TRACKERS: dict[str, Callable[[Path, Run, int], Tracker]] = {"wandb": Wandb, "tensorboard": TensorBoard}


def scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every finite number of a record with its path, such as ("nats/text", 2.5)."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)


def wandb_id(out: Path, first_step: int) -> str:
    """By which wandb knows a run: drawn when it begins, the same for every start that goes on from a checkpoint."""
    path = out / "wandb_id"
    if first_step == 0 or not path.exists():
        write_text(path, secrets.token_hex(8))
    return path.read_text()
