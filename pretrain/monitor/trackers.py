"""Who else is told of a run, on request? wandb and TensorBoard."""

from __future__ import annotations

import dataclasses
import math
import secrets
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pretrain.appended import Appended
from pretrain.config import Run
from pretrain.host import host_name
from pretrain.intact import write_text

WANDB_PROJECT = "m3i"
WANDB_ID = "wandb_id"  # file beside the log
TENSORBOARD = "tensorboard"  # folder beside the log


@runtime_checkable
class Tracker(Protocol):
    """Takes what the log takes; one for the life of a process, also where the run goes back."""

    def begin(self, step: int) -> None:
        """The run goes on after `step`: what was told of later ones is void."""

    def log(self, record: Mapping[str, Any]) -> None: ...
    def alert(self, title: str, text: str) -> None: ...
    def close(self) -> None: ...


class Wandb:
    """A run of wandb that a resume continues; WANDB_MODE=offline keeps it on this machine.

    The axis of its charts is our step and not wandb's, which never goes back: what a run that has gone back logs
    again below its last step would be dropped (docs.wandb.ai/models/track/log/customize-logging-axes).
    """

    def __init__(self, out: Path, run: Run) -> None:
        import wandb

        self._run = wandb.init(
            project=WANDB_PROJECT,
            name=out.name,
            id=wandb_id(out),
            dir=str(out),
            resume="allow",
            config=dataclasses.asdict(run),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def begin(self, step: int) -> None:
        pass  # what is logged again is drawn over what was logged before

    def log(self, record: Mapping[str, Any]) -> None:
        self._run.log(dict(record))

    def alert(self, title: str, text: str) -> None:
        self._run.alert(title=title, text=text)

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """An event file in OUT/tensorboard; where a run goes on or back it hides what came after that step.

    A record is the length of an event, its checksum, the event and its checksum (tensorboardX.record_writer); the
    writer of tensorboardX would wait for ever once its thread has met a full disk.
    """

    def __init__(self, out: Path, run: Run) -> None:
        from tensorboardX import summary

        self._summary, self._recipe = summary, f"```json\n{run.to_json()}\n```"
        folder = out / TENSORBOARD
        folder.mkdir(parents=True, exist_ok=True)
        self._file = Appended(folder / f"events.out.tfevents.{time.time_ns() // 1000}.{host_name()}")
        self._add(file_version="brain.Event:2")

    def begin(self, step: int) -> None:
        from tensorboardX.proto.event_pb2 import SessionLog

        self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        self._add(step=step, summary=self._summary.text("recipe", self._recipe))

    def log(self, record: Mapping[str, Any]) -> None:
        values = [self._summary.scalar(name, value).value[0] for name, value in scalars(record)]
        self._add(step=record["step"], summary=self._summary.Summary(value=values))

    def alert(self, title: str, text: str) -> None:
        self._add(summary=self._summary.text(title, text))

    def close(self) -> None:
        self._file.close()

    def _add(self, **event: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        content = Event(wall_time=time.time(), **event).SerializeToString()
        length = struct.pack("<Q", len(content))
        sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, content))
        self._file.add(b"".join((length, next(sums), content, next(sums))))


TRACKERS: dict[str, Callable[[Path, Run], Tracker]] = {"wandb": Wandb, "tensorboard": TensorBoard}


def scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every finite number of a record with its path, such as ("nats/text", 2.5)."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)


def wandb_id(out: Path) -> str:
    """By which wandb knows a run: drawn when it begins, the same for every start that goes on."""
    path = out / WANDB_ID
    if not path.exists():
        write_text(path, secrets.token_hex(8))
    return path.read_text()


def forget(out: Path) -> None:
    """A run begins in a folder of an earlier one, and is to be known as another."""
    (out / WANDB_ID).unlink(missing_ok=True)
