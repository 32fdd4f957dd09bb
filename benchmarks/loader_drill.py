"""Does training go on, count right and resume exactly while its data fails?

    python benchmarks/loader_drill.py

Real trainings of a shrunken m3i.demo, each a process of `pretrain/main.py` with two workers. Losses are compared bit
for bit.

With those of a training that nothing disturbs, all steps:

- store: data on S3 (a server on the loopback) that refuses 25 % of all requests and lets 5 % wait for 2 s; a worker
  is killed, then the trainer, which goes on with another number of workers;
- disk: every read of the data takes 20 ms longer; the reads that did are counted.

Lost shards change the samples of a training, from a step on that depends on how far the workers are ahead. What it
goes on with is compared with itself: the steps after the last checkpoint of one that lost shards and was let run to
its end, with the same steps of one that begins at that checkpoint, with one worker:

- loss: one shard is deleted and one truncated while training, which no worker has opened;
- open: the same of shards that the workers have open.

Writes benchmarks/results/loader_drill.json.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import keep  # noqa: E402
from data_prep.schema import Manifest  # noqa: E402
from pretrain.data.drop_list import Record, records  # noqa: E402
from pretrain.data.order import SourceOrder  # noqa: E402
from tests.data.s3 import Store, s3_store  # noqa: E402

STEPS, SAVE_EVERY, WINDOW = 32, 8, 2
SHARDS = 6  # of each source
SHRUNKEN = f"""--steps {STEPS} --save_every {SAVE_EVERY} --log_every 1 --optim.warmup 2 --batch 32 --views.size 64
    --max_bad 0.9 --data.captioned.weight 4""".split()
SLOW_READS = """
import os, time
read, told = os.pread, os.open(os.environ["SLOW_READS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def slow(*place):
    time.sleep(0.02)
    os.write(told, b".")
    return read(*place)
os.pread = slow
"""
LIMIT = 240  # seconds that one training may take


class Training:
    """One process of the trainer; `data` by name, in its environment."""

    def __init__(
        self,
        out: Path,
        data: dict[str, str],
        workers: int,
        environment: dict[str, str],
        window: int = WINDOW,
    ) -> None:
        self.out = out
        places = [f"{name}={place}" for name, place in data.items()]
        command = [sys.executable, "pretrain/main.py", "--recipe", "m3i.demo", "--data", *places]
        command += ["--out", str(out), "--workers", str(workers), *SHRUNKEN]
        command += ["--mixing.window", str(window)]
        with open(f"{out}.txt", "a") as told:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **environment}, stdout=told, stderr=subprocess.STDOUT
            )

    def until(self, step: int) -> None:
        """Waits until that step is logged."""
        until = time.monotonic() + LIMIT
        while len(losses(self.out)) < step:
            if self.process.poll() is not None or time.monotonic() > until:
                self.process.kill()
                raise RuntimeError(f"no step {step}: see {self.out}.txt")
            time.sleep(0.05)

    def kill_a_worker(self) -> None:
        """SIGKILL to a process that makes batches: the fork server's youngest child."""
        (server,) = [child for child in children(self.process.pid) if children(child)]
        os.kill(max(children(server)), signal.SIGKILL)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def finish(self) -> None:
        if self.process.wait(LIMIT):
            raise RuntimeError(f"the training ended with {self.process.returncode}: see {self.out}.txt")


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def log(out: Path) -> list[dict[str, Any]]:
    path = out / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(out: Path) -> dict[int, dict[str, float]]:
    return {line["step"]: line["nats"] for line in log(out)}


def build(folder: Path) -> dict[str, Path]:
    """Labelled and captioned scenes in six shards each."""
    places = {}
    for seed, name in enumerate(("labelled", "captioned")):
        command = [sys.executable, "-m", "data_prep", "build", "scenes", "--out", str(folder / name)]
        command += ["--count", "700", "--seed", str(seed), "--shard-size", "100"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        places[name] = folder / name / "train"
    return places


def dropped(out: Path) -> list[Record]:
    return [record for file in sorted(out.glob("dropped-rank_*.jsonl")) for record in records(file)]


def shard_of_the_third_window(folder: Path, source: int) -> str:
    """One that no worker has opened after a few steps."""
    shards = Manifest.read(folder).shards
    order = SourceOrder(0, source, [shard.num_samples for shard in shards], WINDOW)
    draws, _ = order.window(0)
    _, needed = order.window(draws.stop)
    return shards[needed[WINDOW]].name


def store_drill(place: Path, data: dict[str, Path], store: Store) -> dict[str, Any]:
    urls = {name: store.put(folder, name) for name, folder in data.items()}
    environment = {**store.environment, "M3I_CACHE": str(place / "cache")}
    store.faults.refused, store.faults.stalled, store.faults.stall = 0.25, 0.05, 2.0
    out = place / "store"
    first = Training(out, urls, 2, environment)
    first.until(4)
    first.kill_a_worker()
    first.until(SAVE_EVERY + 3)
    first.kill()
    Training(out, urls, 1, environment).finish()
    told = Path(f"{out}.txt").read_text()
    return {
        "requests": store.faults.num_requests,
        "refused": store.faults.num_refused,
        "stalled": store.faults.num_stalled,
        "workers_replaced": told.count("new ones go on from there"),
        "dropped": len(dropped(out)),
    }


def disk_drill(place: Path, data: dict[str, Path]) -> dict[str, Any]:
    (place / "slow").mkdir()
    (place / "slow" / "sitecustomize.py").write_text(SLOW_READS)
    places = {name: str(folder) for name, folder in data.items()}
    told = place / "slow" / "reads"  # of all processes, a byte each
    environment = {"M3I_CACHE": str(place / "cache"), "PYTHONPATH": str(told.parent), "SLOW_READS": str(told)}
    Training(place / "disk", places, 2, environment).finish()
    return {"dropped": len(dropped(place / "disk")), "slow_reads": told.stat().st_size}


def open_shard(training: Training, folder: Path) -> str:
    """One of the folder that a worker of the training has open."""
    (server,) = [child for child in children(training.process.pid) if children(child)]
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        for worker in sorted(children(server)):
            for link in Path(f"/proc/{worker}/fd").iterdir():
                with suppress(FileNotFoundError):  # closed meanwhile
                    if (file := link.readlink()).parent == folder and file.suffix == ".tar":
                        return file.name
        time.sleep(0.01)
    raise RuntimeError(f"no worker opened a shard of {folder}")


def loss_drill(place: Path, data: dict[str, Path], *, is_open: bool) -> dict[str, Any]:
    """Compares with itself, as the head of this file says."""
    # Where all shards make one window, those that are open are needed to the end.
    name, window = ("open", SHARDS) if is_open else ("loss", WINDOW)
    copies = {
        source: str(shutil.copytree(folder, place / f"{name}_data" / source))
        for source, folder in data.items()
    }
    environment = {"M3I_CACHE": str(place / "cache")}
    out, again = place / name, place / f"{name}_resumed"
    training = Training(out, copies, 2, environment, window)
    # Two workers are up to five steps ahead: what they have read is used before the checkpoint that is gone on from.
    training.until(STEPS - 2 * SAVE_EVERY - 2 if is_open else 2)
    lost = {}
    for number, (source, folder) in enumerate(copies.items()):
        lost[source] = (
            open_shard(training, Path(folder)) if is_open else shard_of_the_third_window(Path(folder), number)
        )
    (Path(copies["labelled"]) / lost["labelled"]).unlink()
    with (Path(copies["captioned"]) / lost["captioned"]).open("r+b") as shard:
        shard.truncate(2048)
    training.finish()
    shutil.copytree(out, again)
    shutil.rmtree(
        again / "checkpoints" / f"step_{STEPS:06d}"
    )  # as if it had been killed after the one before
    Training(again, copies, 1, environment, window).finish()
    straight, resumed = losses(out), losses(again)
    late = range(STEPS - SAVE_EVERY + 1, STEPS + 1)
    listed = [record.sample for record in dropped(out) if record.sample is not None]
    counted = sum(sum(record.causes().values()) for record in dropped(out))
    bad = {(sample.source, sample.shard) for sample in listed}
    return {
        "is_equal": all(straight[step] == resumed[step] for step in late),
        "counted": log(out)[-1]["dropped"],
        "listed": len(listed),
        "counts_are_the_list": sum(log(out)[-1]["dropped"].values()) == counted,
        "of_both_lost_shards_alone": bad == set(lost.items()),
    }


def timed(
    drill: Callable[[], dict[str, Any]], out: Path, calm: dict[int, dict[str, float]]
) -> dict[str, Any]:
    begun = time.perf_counter()
    found = drill()
    found.setdefault("is_equal", losses(out) == calm)
    waited = sum(line["seconds"]["data_wait"] for line in log(out)) / sum(
        line["step_seconds"] for line in log(out)
    )
    print(f"{out.name}: {found}", flush=True)
    return {**found, "wait_share": round(waited, 3), "seconds": round(time.perf_counter() - begun, 1)}


def main() -> None:
    place = Path(tempfile.mkdtemp(prefix="drill-"))
    data = build(place)
    calm = place / "calm"
    places = {name: str(folder) for name, folder in data.items()}
    Training(calm, places, 2, {"M3I_CACHE": str(place / "cache")}).finish()
    expected = losses(calm)
    found = {}
    with s3_store() as store:
        found["store"] = timed(lambda: store_drill(place, data, store), place / "store", expected)
    found["disk"] = timed(lambda: disk_drill(place, data), place / "disk", expected)
    found["loss"] = timed(lambda: loss_drill(place, data, is_open=False), place / "loss", expected)
    found["open"] = timed(lambda: loss_drill(place, data, is_open=True), place / "open", expected)
    keep(
        "loader_drill",
        "goal, reached or not: a failing store, slow reads and killed processes change no loss, a run that lost "
        "shards goes on from its checkpoint as it did without being stopped, and lost samples are counted right",
        torch.device("cpu"),
        steps=STEPS,
        drills=found,
    )
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
