"""What befalls a run of two ranks, and how does it end? `python drill.py FOLDER` leaves FOLDER/result.json.

Every rank of every start is a fork of this process, which has imported torch and DeepSpeed, or is itself a fork of
one that has (warm.py): a start takes seconds less. The run is a shrunken m3i.vit_b16 through pretrain/main.py's
`start`, with files, log and exit codes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, TypedDict

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import s3fs  # noqa: E402, F401  no rank needs to import it then
import torch  # noqa: E402

import pretrain.train  # noqa: E402
from pretrain import main, recipes, resume  # noqa: E402
from pretrain.checkpoint import (  # noqa: E402
    checkpoint_folder,
    checkpoints_of,
    load_teacher,
    step_of,
    steps_in,
)
from pretrain.checkpoint.names import step_name  # noqa: E402
from pretrain.checkpoint.stores import store_at  # noqa: E402
from pretrain.config import Guard, Run  # noqa: E402
from pretrain.data.batch import Batch  # noqa: E402
from pretrain.intact import COMPLETE  # noqa: E402
from tests.engine.drill_faults import (  # noqa: E402
    PACKAGE,
    SAVING,
    START,
    Fault,
    asked_with_workers,
    at_the_start,
    both,
    broken,
    count_calls,
    data_refused,
    fill,
    free,
    in_batch,
    kill_at_call,
    lose_weights_once,
    patient,
    poison,
    poisoned_in,
    signalled,
    small_disk,
    without,
)
from tests.engine.launch import in_float32  # noqa: E402
from tests.engine.warm import do_before_forks, require_one_thread  # noqa: E402
from tests.fakes import shrink  # noqa: E402

main.quieten()


WORLD = 2
STEPS, SAVE_EVERY = 9, 3
KILLS = 20
BY_ZERO3 = "killed_1"  # of the runs that are killed, the one whose weights are divided among the ranks
LONGEST = 120.0  # seconds of a start; a start that takes longer is a failure of the drill


class End(TypedDict):
    """How a start ended."""

    codes: list[int]  # by rank; minus the signal for one that was killed
    output: str
    seconds: float


def drill_run() -> Run:
    run = shrink(recipes.load("m3i.vit_b16"))
    guard = Guard(window=4, deviations=0.0, skips=2, margin=1, rewinds=1)
    backbone = dataclasses.replace(run.backbone, drop_path=0.3, token_norm="batch")
    return dataclasses.replace(
        run, batch=4, steps=STEPS, save_every=SAVE_EVERY, guard=guard, backbone=backbone
    )


class Drill:
    """Starts runs in FOLDER."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = drill_run()
        self._num_starts = 0
        self.ds_configs = {name: in_float32(name, folder) for name in ("zero2", "zero3")}

    def start(
        self,
        name: str,
        faults: dict[int, Fault] | None = None,
        *,
        timeout: float = 30.0,
        work: Callable[[Namespace], int] | None = None,
        grace: float = LONGEST,
        kept: Path | str | None = None,
        workers: int = 0,
        **changed: Any,
    ) -> End:
        """One start of the run in FOLDER/NAME; ranks that outlive one that failed by `grace` seconds are killed.

        `kept` is where its checkpoints go, if not there; the last rank has `workers`; `changed` are other options of
        the command line.
        """
        self._num_starts += 1
        begun, log = time.monotonic(), self.folder / f"{self._num_starts:03d}-{name}.txt"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [
            self._fork(
                self.paths(name, timeout, kept, changed | {"workers": workers * (r == WORLD - 1)}),
                r,
                port,
                log,
                (faults or {}).get(r),
                work,
            )
            for r in range(WORLD)
        ]
        codes = _wait(processes, begun + LONGEST, grace)
        return {
            "codes": codes,
            "output": log.read_text(errors="replace"),
            "seconds": time.monotonic() - begun,
        }

    def _fork(
        self,
        paths: Namespace,
        rank: int,
        port: int,
        log: Path,
        fault: Fault | None,
        work: Callable[[Namespace], int] | None,
    ) -> int:
        process = os.fork()
        if process:
            return process
        code = 99
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
            sys.modules["__main__"].__file__ = main.__file__  # a loader's workers begin as those of a run do
            if fault is not None:
                fault()
            code = main.start(self.run, paths) if work is None else work(paths)
        except BaseException as error:
            import traceback

            traceback.print_exception(error)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def paths(self, name: str, timeout: float, kept: Path | str | None, changed: dict[str, Any]) -> Namespace:
        data = {source: self.folder / "data" / source for source in self.run.data}
        options = dict(
            data=data,
            out=self.folder / name,
            ds_config=self.ds_configs["zero2"],
            tokenizer=None,
            guide=None,
            workers=0,
            checkpoints=kept,
            timeout=timeout,
            micro_batches=1,
            wandb=False,
            tensorboard=False,
            price=None,
            profile=None,
            compile=False,
            evaluate_every=0,
            evaluate_data=None,
            init=None,
        )
        return Namespace(**options | changed)

    def curve(self, name: str) -> list[dict[str, Any]]:
        """What the log says of the mathematics of every step."""
        kept = ("step", "nats", "lambda", "grad_norm", "lr", "momentum")
        lines = (self.folder / name / "log.jsonl").read_text().splitlines()
        return [{key: json.loads(line)[key] for key in kept} for line in lines]

    def outcome(self, name: str, kept: Path | str | None = None) -> dict[str, Any]:
        """The curve, and the sum of every tensor of the last teacher."""
        folder = resume.newest_or_none(kept or checkpoints_of(self.folder / name))
        teacher = {} if folder is None else load_teacher(folder)
        sums = {key: value.double().sum().item() for key, value in teacher.items()}
        return {"curve": self.curve(name), "teacher": sums}


def _wait(processes: list[int], deadline: float, grace: float) -> list[int]:
    """Exit codes by rank, minus the signal of one that was killed."""
    codes: dict[int, int] = {}
    while len(codes) < len(processes):
        for process in processes:
            found, status = (0, 0) if process in codes else os.waitpid(process, os.WNOHANG)
            if found:
                codes[process] = os.waitstatus_to_exitcode(status)
                if codes[process] != main.FINISHED:
                    deadline = min(deadline, time.monotonic() + grace)
            elif process not in codes and time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[process] for process in processes]


def killed(drill: Drill) -> dict[str, Any]:
    """SIGKILL of both ranks at random calls of ours, every second time at one of a save, every fourth before the
    first batch of a start; KILLS times in all.

    A run is started again until it ends, then another one begins; the last start of the last one is not killed.
    """
    num_calls = json.loads((drill.folder / "calls").read_text())
    random, kills, during_a_save, before_a_batch, names = Random(0), 0, 0, 0, []
    problems = []
    while kills < KILLS:
        name = f"killed_{len(names)}"
        names.append(name)
        before = -1
        while True:
            where, times = (SAVING, STEPS // SAVE_EVERY) if kills % 2 else (PACKAGE, STEPS)
            number = random.randrange(1, num_calls[where] // times)  # of a step or a save
            batch = random.randrange(1, STEPS // 2 + 2)
            if kills % 4 == 2:
                number, batch = random.randrange(1, num_calls[START]), 0
            fault = {0: kill_at_call(number, where, batch)} if kills < KILLS else {}
            ds_config = drill.ds_configs["zero3" if name == BY_ZERO3 else "zero2"]
            end = drill.start(name, fault, grace=0, ds_config=ds_config)
            out = drill.folder / name
            place = checkpoints_of(out)
            folder = resume.newest_or_none(place) if steps_in(place) else None
            reached = -1 if folder is None else step_of(folder)
            lost = [
                step
                for step in steps_in(place)
                if store_at(checkpoint_folder(out, step)).problem(hashes=True)
            ]
            if lost or reached < before:
                problems.append(
                    f"{name}: checkpoints {lost} cannot be read, {reached} is the newest after {before}"
                )
            before = reached
            if -signal.SIGKILL not in end["codes"]:
                if end["codes"] != [0, 0]:
                    problems.append(f"{name} ended with {end['codes']}:\n{end['output']}")
                break
            kills += 1
            before_a_batch += batch == 0 and "step " not in end["output"]
            during_a_save += bool(list((out / "checkpoints").glob(".tmp-*")))
    outcomes = {name: drill.outcome(name) for name in names}
    return {
        "kills": kills,
        "during_a_save": during_a_save,
        "before_a_batch": before_a_batch,
        "problems": problems,
        "outcomes": outcomes,
    }


def undisturbed(drill: Drill) -> dict[str, Any]:
    """The run as it should be, and those that never had the batches which others refuse."""
    found = {}
    runs = {
        "straight": set(),
        "without_4": {4},
        "without_345": {3, 4, 5},
        "without_4_to_9": {4, 5, 6, 7, 8, 9},
    }
    for name, batches in runs.items():
        faults = dict.fromkeys(range(WORLD), without(batches))
        if name == "straight":
            faults[0] = both(faults[0], count_calls(drill.folder / "calls"))
        end = drill.start(name, faults)
        assert end["codes"] == [main.FINISHED] * WORLD, end["output"]
        found[name] = drill.outcome(name)
    return found


def asked_to_stop(drill: Drill) -> dict[str, Any]:
    """SIGTERM to rank 1 and its workers, then SIGUSR1 to rank 0 of the start that goes on, then nothing."""
    ends = [
        drill.start("asked", {1: asked_with_workers(4)}, workers=2),
        drill.start("asked", {0: in_batch(7, signalled(signal.SIGUSR1))}),
        drill.start("asked"),
    ]
    return {"ends": ends, **drill.outcome("asked")}


def asked_before_a_step(drill: Drill) -> dict[str, Any]:
    """The batch after a checkpoint is bad, and SIGTERM comes with it: the checkpoint is there already."""
    out = drill.folder / "at_once"
    shutil.copytree(drill.folder / "straight", out)
    shutil.rmtree(checkpoint_folder(out, STEPS))
    mark = checkpoint_folder(out, 6) / COMPLETE
    before = mark.stat().st_ino
    end = drill.start("at_once", {1: in_batch(6, lambda batch: signalled(signal.SIGTERM)(poison(batch)))})
    return {"ends": [end], "is_untouched": mark.stat().st_ino == before}


def one_killed(drill: Drill) -> dict[str, Any]:
    """Rank 1 dies alone; then the same command again."""
    ends = [
        drill.start("one_killed", {1: in_batch(4, signalled(signal.SIGKILL))}, timeout=20),
        drill.start("one_killed"),
    ]
    return {"ends": ends, **drill.outcome("one_killed")}


def one_hung(drill: Drill) -> dict[str, Any]:
    """Rank 1 is stopped, then, in the next start, waits for ever where it should get a batch."""
    ends, stacks = [], []
    for fault in (signalled(signal.SIGSTOP), lambda batch: time.sleep(LONGEST)):
        ends.append(drill.start("one_hung", {1: in_batch(4, fault)}, timeout=8, grace=10))
        folder = drill.folder / "one_hung" / "stacks"
        stacks.append({path.stem: path.read_text() for path in folder.glob("*.txt")})
    ends.append(drill.start("one_hung"))
    return {"ends": ends, "stacks": stacks, **drill.outcome("one_hung")}


def lost_early(drill: Drill) -> dict[str, Any]:
    """Rank 1 dies, then is stopped, before there is a watchdog; its GPU fails; it hangs where no sign can be read."""
    ranks = drill.folder / "lost_early" / "ranks"
    ends = [
        drill.start("lost_early", {1: at_the_start(signal.SIGKILL)}, timeout=8),
        drill.start("lost_early", {1: at_the_start(signal.SIGSTOP)}, timeout=2, grace=10),
        drill.start("lost_early", {1: in_batch(4, broken)}, timeout=8),
    ]
    gone = in_batch(3, lambda batch: (shutil.rmtree(ranks), batch)[1])
    asleep = in_batch(4, lambda batch: time.sleep(LONGEST))
    ends += [
        drill.start("lost_early", {0: gone, 1: asleep}, timeout=5, grace=10),
        drill.start("lost_early"),
    ]
    return {"ends": ends, **drill.outcome("lost_early")}


def poisoned(drill: Drill) -> dict[str, Any]:
    """A NaN in batch 4 of rank 1, death before the next checkpoint; the next start has neither. Then the replay."""
    ends = [
        drill.start("poisoned", {0: in_batch(6, signalled(signal.SIGKILL)), 1: in_batch(4, poison)}, grace=0),
        drill.start("poisoned"),
    ]
    bundles = sorted((drill.folder / "poisoned" / "replay").iterdir())
    again = drill.start("poisoned", work=lambda paths: main.start_replay(bundles[0]))
    mended = drill.folder / "poisoned" / "replay" / "mended"
    shutil.copytree(bundles[0], mended)
    recorded = json.loads((mended / "refused.json").read_text())
    (mended / "refused.json").write_text(json.dumps({**recorded, "norm": 1.0}))
    for number in range(WORLD):  # as where there was no room for the images: the data itself has no NaN
        (mended / f"rank_{number:05d}.safetensors").unlink()
        part = mended / f"rank_{number:05d}.json"
        part.write_text(json.dumps({**json.loads(part.read_text()), "has_images": False}))
    again_mended = drill.start("poisoned", work=lambda paths: main.start_replay(mended))
    samples = json.loads((bundles[0] / "rank_00001.json").read_text())["samples"]
    return {
        "ends": ends,
        "bundles": [bundle.name for bundle in bundles],
        "samples": samples,
        "again": again,
        "again_mended": again_mended,
        **drill.outcome("poisoned"),
    }


def poisoned_twice(drill: Drill) -> dict[str, Any]:
    """Batches 4 and 5 of rank 1 are bad whenever they come."""
    end = drill.start("twice", {1: both(*map(poisoned_in, (4, 5)))})
    return {"ends": [end], **drill.outcome("twice")}


def poisoned_for_ever(drill: Drill) -> dict[str, Any]:
    """All batches of rank 1 are bad from batch 4 on."""
    faults = both(*map(poisoned_in, range(4, 12)))
    return {"ends": [drill.start("for_ever", {1: faults})], "curve": drill.curve("for_ever")}


def poisoned_state(drill: Drill) -> dict[str, Any]:
    """The weights are lost in step 6, just before it is saved; what was saved at step 3 is sound."""
    run = drill.run
    drill.run = dataclasses.replace(run, guard=dataclasses.replace(run.guard, rewinds=2))
    end = drill.start("state", dict.fromkeys(range(WORLD), lose_weights_once(step=6)))
    drill.run = run
    return {"ends": [end], **drill.outcome("state")}


def full_disk(drill: Drill) -> dict[str, Any]:
    """No file may grow beyond 64 KiB when the checkpoint of step 6 is written; the one of step 9 may."""

    def limit(size: int) -> Callable[[Batch], Batch]:
        def change(batch: Batch) -> Batch:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            return batch

        return change

    fault = both(in_batch(4, limit(2**16)), in_batch(7, limit(resource.RLIM_INFINITY)))
    end = drill.start("full", dict.fromkeys(range(WORLD), fault))
    return {
        "ends": [end],
        "steps": sorted(steps_in(checkpoints_of(drill.folder / "full"))),
        **drill.outcome("full"),
    }


def full_tmpfs(drill: Drill) -> dict[str, Any]:
    """Somebody else fills the small disk of the checkpoints before step 6 is saved, and frees it before step 9."""
    kept = drill.folder / "small_disk"
    with small_disk(kept) as not_mounted:
        if not_mounted:
            return {"not_mounted": not_mounted}
        fault = both(in_batch(4, fill(kept)), in_batch(7, free(kept)))
        end = drill.start("tmpfs", {0: fault}, kept=kept)
        return {"ends": [end], "steps": sorted(steps_in(kept)), **drill.outcome("tmpfs", kept)}


def full_out(drill: Drill) -> dict[str, Any]:
    """The small disk of --out is full while the run refuses batches 4 and 5 and goes back, and until batch 7."""
    out, kept = drill.folder / "full_out", drill.folder / "full_out_kept"
    with small_disk(out) as not_mounted:
        if not_mounted:
            return {"not_mounted": not_mounted}
        faults = {0: both(in_batch(4, fill(out)), in_batch(7, free(out))), 1: both(*map(poisoned_in, (4, 5)))}
        end = drill.start("full_out", faults, kept=kept, tensorboard=True)
        journal = (out / "guard.jsonl").read_text().splitlines()
        events = [json.loads(line)["event"] for line in journal]
        return {"ends": [end], "events": events, **drill.outcome("full_out", kept)}


def s3_refuses(drill: Drill) -> dict[str, Any]:
    """The store of the checkpoints refuses all while step 6 is saved; step 9's is lost before the next start."""
    command = [sys.executable, "-m", "tests.data.s3"]
    kept = "s3://bucket/checkpoints"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as server:
        os.environ |= json.loads(server.stdout.readline()) | {"AWS_MAX_ATTEMPTS": "1"}

        def refuse(batch: Batch) -> Batch:
            _saved()
            os.kill(server.pid, signal.SIGUSR1)
            return batch

        def serve(batch: Batch) -> Batch:
            time.sleep(4.0)  # longer than the patience with both stores
            os.kill(server.pid, signal.SIGUSR1)
            return batch

        first = both(in_batch(4, refuse), in_batch(4, patient(1)), in_batch(7, serve), in_batch(8, patient()))
        other = both(in_batch(5, patient(1)), in_batch(8, patient()))
        ends = [drill.start("s3", {0: first, 1: other}, kept=kept)]
        steps = _apart(lambda: sorted(steps_in(kept)))
        _apart(lambda: store_at(kept).remove(step_name(STEPS)))
        ends.append(drill.start("s3", kept=kept))
        log = (drill.folder / "s3" / "log.jsonl").read_text()
        elsewhere = drill.start("s3")
        assert (drill.folder / "s3" / "log.jsonl").read_text() == log
        lost = s3_fails_when_needed(drill, server.pid)
        outcome = _apart(lambda: drill.outcome("s3", kept))
        server.terminate()
    return {"ends": ends, "steps": steps, "elsewhere": elsewhere, "lost": lost, **outcome}


def _saved() -> None:
    """Returns when this rank's saver is done with the last checkpoint: what it asks the store keeps its patience."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def s3_fails_when_needed(drill: Drill, server: int) -> End:
    """The store refuses all when the run should go back, serves again, then has the claim of another process."""
    kept = "s3://bucket/lost"

    def turn(batch: Batch) -> Batch:
        _saved()
        os.kill(server, signal.SIGUSR1)
        return batch

    def take_over(batch: Batch) -> Batch:
        store_at(kept).write(".build/claim", b'{"owner": "another"}')
        return batch

    def serve(batch: Batch) -> Batch:
        os.kill(server, signal.SIGUSR1)
        return batch

    hurry = in_batch(4, turn), in_batch(4, patient(1))
    first = both(*hurry, in_batch(6, serve), in_batch(6, patient()), in_batch(7, take_over))
    other = both(in_batch(5, patient(1)), in_batch(6, patient()), *map(poisoned_in, (4, 5, 6)))
    return drill.start("s3_lost", {0: first, 1: other}, kept=kept)


def _apart(work: Callable[[], Any]) -> Any:
    """What `work` gives, done by a fork: who has spoken to a store has a thread, which no fork of it would have."""
    reading, writing = os.pipe()
    if not os.fork():
        os.write(writing, json.dumps(work()).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as told:
        return json.loads(told.read())


def data_away(drill: Drill) -> dict[str, Any]:
    """The data of rank 1 alone cannot be had when a run goes on, then they can."""
    shutil.copytree(drill.folder / "straight", drill.folder / "away")
    shutil.rmtree(checkpoint_folder(drill.folder / "away", STEPS))
    away = {1: data_refused("http://127.0.0.1:9/set")}
    return {"ends": [drill.start("away", away), drill.start("away")], **drill.outcome("away")}


def truncated(drill: Drill) -> dict[str, Any]:
    """The newest checkpoint of the undisturbed run has lost half of a file, the one before its name."""
    shutil.copytree(drill.folder / "straight", drill.folder / "truncated")
    newest = checkpoint_folder(drill.folder / "truncated", STEPS)
    older = checkpoint_folder(drill.folder / "truncated", 6)
    older.rename(
        older.with_name(f".tmp-{older.name}-1.replaced")
    )  # as a kill leaves it in the midst of publishing
    largest = max(
        (path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    os.truncate(largest, largest.stat().st_size // 2)
    return {"ends": [drill.start("truncated")], **drill.outcome("truncated")}


SCENARIOS: dict[str, Callable[[Drill], dict[str, Any]]] = {
    "undisturbed": undisturbed,
    "killed": killed,
    "asked_to_stop": asked_to_stop,
    "asked_before_a_step": asked_before_a_step,
    "one_killed": one_killed,
    "one_hung": one_hung,
    "lost_early": lost_early,
    "poisoned": poisoned,
    "poisoned_twice": poisoned_twice,
    "poisoned_for_ever": poisoned_for_ever,
    "poisoned_state": poisoned_state,
    "full_disk": full_disk,
    "full_tmpfs": full_tmpfs,
    "full_out": full_out,
    "s3_refuses": s3_refuses,
    "data_away": data_away,
    "truncated": truncated,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    do_before_forks()
    require_one_thread()
    # A quarter second of every rank, for figures that no drill looks at.
    pretrain.train.measured_peak = lambda dtype: 1e9
    drill = Drill(Path(sys.argv[1]))
    found = {name: SCENARIOS[name](drill) for name in sys.argv[2:] or SCENARIOS}
    found["cpu_seconds"] = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    (drill.folder / "result.json").write_text(json.dumps(found))
