"""How long does training stand still for a checkpoint, and how long does a start with another ZeRO stage take?

    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python benchmarks/checkpoint_stall.py [--width W] [--rounds N] [--note TEXT]

One process trains linear layers with ZeRO-1 in float32; the state is 16 bytes a weight: master, two moments, teacher.
In turn, a few times: what a save keeps the loop waiting (`Saver.save`, and before the next step moves the weights),
the same save waited for (written, flushed, read again, hashed twice), torch.save of the same tensors with a flush,
and DeepSpeed's save_checkpoint; also a step without a save and the one beside it, which shares the processors with it
here, and the copy by itself, which the next forward and backward pass hide. Then our checkpoint is restored by a
ZeRO-3 engine, and DeepSpeed's is converted by its ds_to_universal, which it needs before another number of ranks can
load it. Writes benchmarks/results/checkpoint_stall.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.record import keep  # noqa: E402
from pretrain.main import quieten  # noqa: E402

quieten()

from pretrain import checkpoint  # noqa: E402
from pretrain.distributed import start_distributed  # noqa: E402
from pretrain.ds_config import read_ds_config, resolve_config  # noqa: E402
from pretrain.engine import Engine  # noqa: E402
from pretrain.facts import DataFacts  # noqa: E402
from pretrain.intact import flush  # noqa: E402
from pretrain.recipes import load  # noqa: E402

LAYERS, ROWS = 4, 256
BYTES = 16  # of the state, a weight


class Layers(nn.Module):
    """A student of equal linear layers under the loss that it shrinks its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.student = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))
        self.width, self.micro_batches = width, 1

    def forward(self, batch: Any, encoders: Any, tracker: Any) -> Any:
        return SimpleNamespace(total=self.student(torch.ones(ROWS, self.width)).square().mean())


def engine_of(width: int, stage: int) -> Engine:
    run = load("m3i.demo")
    config, _ = resolve_config(
        read_ds_config(ROOT / "ds_configs" / f"zero{stage}.json") | {"bf16": {"enabled": False}},
        run,
        torch.device("cpu"),
    )
    torch.manual_seed(0)
    engine = Engine(
        Layers(width), nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS))), run, config
    )
    return engine


def step(engine: Engine) -> float:
    """One step of the optimizer and the teacher; seconds that it waited for a save."""
    loss = engine._student(batch=None, encoders=None, tracker=None)
    engine._student.backward(loss)
    waited = 0.0 if engine.before_move is None else seconds(engine.before_move)
    engine._student.step()
    engine.average.update(0.99)
    engine.steps_done += 1
    return waited


def copied(saver: checkpoint.Saver) -> float:
    """Seconds of the copy alone."""
    saver._snapshot.take()
    return seconds(saver._snapshot.copy)


def tensors_of(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """What all of these save, as plain tensors."""
    return {"master": engine.owned.masters(), **engine.owned.moments(), "teacher": engine.average.state()}


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def torch_save(engine: Engine, path: Path) -> None:
    torch.save(tensors_of(engine), path)
    flush(path)


def converted(folder: Path, out: Path) -> None:
    """DeepSpeed's conversion, by as many processes as there are processors."""
    from deepspeed.checkpoint.ds_to_universal import main

    workers = os.cpu_count() or 1
    main(
        SimpleNamespace(
            input_folder=str(folder),
            output_folder=str(out),
            num_extract_workers=workers,
            num_merge_workers=workers,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def measured(width: int, rounds: int, place: Path) -> dict[str, Any]:
    """Seconds of every round of each thing that is timed, and the bytes of what is saved."""
    names = ("stall", "ours", "torch_save", "deepspeed", "copy", "step_alone", "step_beside")
    found: dict[str, list[float]] = {name: [] for name in names}
    engine = engine_of(width, 1)
    step(engine)
    saver = checkpoint.Saver(engine, place / "ours", DataFacts((), 0), None)
    saver.save(wait=True)  # takes the memory, once a run
    for _ in range(rounds):
        found["step_alone"].append(seconds(lambda: step(engine)))
        called = seconds(saver.save)
        begun = time.perf_counter()
        found["stall"].append(called + step(engine))
        found["step_beside"].append(time.perf_counter() - begun)
        saver.finish()
        found["copy"].append(copied(saver))
        found["ours"].append(seconds(lambda: saver.save(wait=True)))
        found["torch_save"].append(seconds(lambda: torch_save(engine, place / "torch.pt")))
        shutil.rmtree(place / "deepspeed", ignore_errors=True)
        found["deepspeed"].append(
            seconds(lambda: engine._student.save_checkpoint(str(place / "deepspeed"), tag="native"))
        )
    newest = checkpoint.latest(place / "ours")
    other = engine_of(width, 3)
    restored = [seconds(lambda: checkpoint.restore(other, newest)) for _ in range(rounds)]
    to_universal = []
    for index in range(min(rounds, 3)):
        out = place / f"universal_{index}"
        to_universal.append(seconds(lambda out=out: converted(place / "deepspeed" / "native", out)))
    return {
        "state_bytes": BYTES * sum(s.numel for s in engine.owned.slices),
        "seconds": found,
        "restore_seconds": restored,
        "ds_to_universal_seconds": to_universal,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--width", type=int, default=1280, help="of the layers: 1280 gives 105 MB")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--note", default="", help="what else was running, kept in the record")
    chosen = options.parse_args()
    device = start_distributed()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(chosen.width, chosen.rounds, Path(folder))
    middle = {name: median(values) for name, values in found["seconds"].items()}
    ratios = {name: middle["stall"] / middle[name] for name in ("ours", "torch_save", "deepspeed")}
    restore = median(found["restore_seconds"])
    keep(
        "checkpoint_stall",
        "A save beside training keeps it waiting for a small part of what a save that is waited for takes.",
        device,
        note=chosen.note,
        medians=middle,
        stall_over=ratios,
        ds_to_universal_over_restore=median(found["ds_to_universal_seconds"]) / restore,
        **found,
    )
    print(json.dumps({"stall": middle["stall"], "over": ratios, "restore": restore}, indent=1))


if __name__ == "__main__":
    main()
