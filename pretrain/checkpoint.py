"""What is kept of a run, and how does it go on from there?

OUT/checkpoints/step_000400/
    deepspeed/                  model and optimizer, DeepSpeed's native files
    teacher/                    float32 moving average: rank_00000.safetensors holds a rank's slices,
                                layout.json their shapes, buffers.safetensors the averaged buffers, whole
    random/rank_00000.json      states of torch's, numpy's and Python's generators
    run.json facts.json         the resolved recipe; what the model knows of the data
    tokenizer/                  a copy, if the run has text
    state.json                  step, data position, loss balance, ranks, ZeRO stage, versions, commit, hardware
    COMPLETE                    bytes and SHA-256 of every other file; written last

All of it is written to a hidden folder, flushed and renamed: what bears the name step_N is whole unless the
disk later broke it, and `latest` finds that. OUT lies on one file system that all ranks see.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain import intact, provenance, randomness
from pretrain.collectives import from_first_rank, rank, world_size
from pretrain.config import Run
from pretrain.facts import DataFacts
from pretrain.towers import Towers

KEEP_NEWEST = 2  # besides step 0, from which evaluation tells what pre-training changed
SPARE_BYTES = 16 * 2**20  # for the small files
NATIVE_TAG = "native"  # DeepSpeed's name for the one checkpoint in a folder
_STEP_NAME = re.compile(r"step_(\d{6,})")


@runtime_checkable
class Trainable(Protocol):
    """What a checkpoint needs of pretrain.engine.Engine, which is not imported: readers need no DeepSpeed."""

    run: Run
    stage: int
    dtype: torch.dtype
    device: torch.device
    steps_done: int
    average: Any  # ema.TeacherAverage
    balance: Any  # balance.BalanceTracker
    guard: Any  # guard.StepGuard
    checkpoint_bytes: int  # of model, optimizer and teacher, all ranks together

    def save_native(self, folder: Path) -> None: ...

    def load_native(self, folder: Path) -> None: ...


def checkpoint_folder(out: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return out / "checkpoints" / f"step_{step:06d}"


def save(engine: Trainable, out: Path, facts: DataFacts, tokenizer: Path | None) -> Path:
    """Writes the checkpoint of the engine's present step and deletes old ones; all ranks call it.

    OSError when the disk is or becomes full; earlier checkpoints stay as they are.
    """
    folder = checkpoint_folder(out, engine.steps_done)
    partial = folder.with_name(f".tmp-{folder.name}")
    from_first_rank(lambda: _make_room(folder, partial, engine.checkpoint_bytes))
    digests: intact.Digests = {}

    def digest() -> None:
        digests.update(intact.digest(partial, intact.files_in(partial)[rank() :: world_size()]))

    for work in (lambda: _write(engine, partial, facts, tokenizer), digest):
        problem = _problem(work)
        problems: list[str] = [problem] * world_size()
        dist.all_gather_object(problems, problem)
        if any(problems):
            free = shutil.disk_usage(folder.parent).free
            from_first_rank(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise OSError(
                f"checkpoint {folder} could not be written with {free / 2**20:.0f} MiB free; earlier ones are "
                f"untouched: free space on that disk or name another --out ({next(filter(None, problems))})"
            )
    of_ranks: list[intact.Digests] = [{} for _ in range(world_size())]
    dist.all_gather_object(of_ranks, digests)
    together = {name: entry for of_rank in of_ranks for name, entry in of_rank.items()}
    from_first_rank(lambda: (intact.publish(partial, folder, together), _prune(out)))
    return folder


def _problem(work: Callable[[], None]) -> str:
    """What the disk has against it; empty when it is done."""
    try:
        work()
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_of_the_disk(error):
            raise
        return str(error).splitlines()[0]
    return ""


def _is_of_the_disk(error: Exception) -> bool:
    """torch.save tells a failed write as RuntimeError of its zip writer, safetensors as an error of its own."""
    by_zip_writer = any(word in str(error) for word in ("inline_container", "PytorchStreamWriter"))
    return isinstance(error, (OSError, SafetensorError)) or by_zip_writer


def restore(engine: Trainable, folder: Path) -> None:
    """Puts the engine, built for the same run, into the state that `save` wrote; all ranks call it."""
    state = json.loads((folder / "state.json").read_text())
    engine.load_native(folder / "deepspeed")
    engine.average.load_state(
        load_file(folder / "teacher" / f"{_rank_name()}.safetensors"),
        load_file(folder / "teacher" / "buffers.safetensors"),
    )
    engine.balance.load_state_dict(state["balance"])
    engine.guard.load_state_dict(state["guard"])
    engine.steps_done = state["step"]
    randomness.restore(json.loads((folder / "random" / f"{_rank_name()}.json").read_text()))


def left_out(folder: Path) -> set[int]:
    """Numbers of the batches that a run had left out of its order when it was saved."""
    return set(json.loads((folder / "state.json").read_text())["guard"]["left_out"])


def latest(out: Path, *, hashes: bool = False) -> Path | None:
    """The newest whole checkpoint of a run, or None; warns about newer ones that are broken.

    Sizes are always compared; with `hashes` every byte is read.
    """
    for step in sorted(steps_in(out), reverse=True):
        folder = checkpoint_folder(out, step)
        problem = intact.verify(folder, hashes=hashes)
        if problem is None:
            return folder
        warnings.warn(f"{folder} is skipped, since {problem}: delete it", stacklevel=2)
    return None


def load_teacher(folder: Path) -> dict[str, Tensor]:
    """The teacher's float32 average and buffers by name, whole, on the CPU; one process, without DeepSpeed.

    ValueError when the checkpoint is not whole.
    """
    problem = intact.verify(folder, hashes=True)
    if problem is not None:
        raise ValueError(f"checkpoint {folder} cannot be used, since {problem}: take another one")
    layout = json.loads((folder / "teacher" / "layout.json").read_text())
    whole = {name: torch.empty(shape).view(-1) for name, shape in layout["parameters"].items()}
    missing = {name: flat.numel() for name, flat in whole.items()}
    for index in range(layout["world"]):
        with safe_open(folder / "teacher" / f"{_rank_name(index)}.safetensors", framework="pt") as file:
            for name, start in json.loads(file.metadata()["starts"]).items():
                part = file.get_tensor(name)
                whole[name][start : start + part.numel()] = part
                missing[name] -= part.numel()
    assert not any(missing.values()), f"slices do not cover {[name for name, n in missing.items() if n]}"
    shaped = {name: flat.view(layout["parameters"][name]) for name, flat in whole.items()}
    return shaped | load_file(folder / "teacher" / "buffers.safetensors")


def load_student(folder: Path) -> dict[str, Tensor]:
    """The student's float32 master weights and buffers by name, read with DeepSpeed on one process."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    prefix = "student."
    with contextlib.redirect_stdout(None):  # it prints its progress
        weights = get_fp32_state_dict_from_zero_checkpoint(str(folder / "deepspeed"), tag=NATIVE_TAG)
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


WEIGHTS: dict[str, Callable[[Path], dict[str, Tensor]]] = {"teacher": load_teacher, "student": load_student}


def load_towers(folder: Path, which: str = "teacher") -> tuple[Run, DataFacts, Towers]:
    """The recipe, the facts, and the teacher or student as a float32 module in eval mode on the CPU.

    Feature norms are folded into the layers before them: what is evaluated and exported has none.
    """
    if which not in WEIGHTS:
        raise ValueError(f"which={which!r} is unknown; choose from {sorted(WEIGHTS)}")
    run = Run.from_json((folder / "run.json").read_text())
    facts = DataFacts.from_json((folder / "facts.json").read_text())
    weights = WEIGHTS[which](folder)
    towers = Towers(run, facts)
    targets = dict(towers.named_parameters())
    targets |= {name: buffer for name, buffer in towers.named_buffers() if name in towers.state_dict()}
    assert targets.keys() == weights.keys(), f"{folder}: {targets.keys() ^ weights.keys()} do not match"
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(weights[name])
    towers.requires_grad_(False).eval().fold_norms()
    return run, facts, towers


def _write(engine: Trainable, folder: Path, facts: DataFacts, tokenizer: Path | None) -> None:
    """Every file but COMPLETE; ranks write at the same time, the first one what they share."""
    engine.save_native(folder / "deepspeed")
    average = engine.average.state()
    starts = {part.name: part.start for part in engine.average.slices if part.numel}
    save_file(
        {name: values.cpu().contiguous() for name, values in average.items()},
        folder / "teacher" / f"{_rank_name()}.safetensors",
        metadata={"starts": json.dumps(starts)},
    )
    (folder / "random" / f"{_rank_name()}.json").write_text(json.dumps(randomness.states()))
    if rank() != 0:
        return
    buffers = {name: values.cpu().contiguous() for name, values in engine.average.buffers.items()}
    save_file(buffers, folder / "teacher" / "buffers.safetensors")
    layout = {
        "world": world_size(),
        "stage": engine.stage,
        "dtype": "float32",
        "parameters": {part.name: list(part.shape) for part in engine.average.slices},
    }
    state = {
        "step": engine.steps_done,
        "position": engine.guard.next_batch(engine.steps_done)
        * engine.run.batch,  # of the next image in the order
        "balance": engine.balance.state_dict(),
        "guard": engine.guard.state_dict(),
        "world": world_size(),
        "stage": engine.stage,
        "dtype": str(engine.dtype),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "hardware": provenance.hardware(engine.device),
    }
    (folder / "teacher" / "layout.json").write_text(json.dumps(layout, indent=1))
    (folder / "state.json").write_text(json.dumps(state, indent=1))
    (folder / "run.json").write_text(engine.run.to_json())
    (folder / "facts.json").write_text(facts.to_json())
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder / "tokenizer")


def _make_room(folder: Path, partial: Path, num_bytes: int) -> None:
    """Clears what a killed process left behind, and refuses to begin what the disk cannot hold."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left_over in (*folder.parent.glob(".tmp-*"), folder):  # a broken checkpoint of this step included
        shutil.rmtree(left_over, ignore_errors=True)
    free, needed = shutil.disk_usage(folder.parent).free, num_bytes + SPARE_BYTES
    if free < needed:
        raise OSError(
            f"{free / 2**20:.0f} MiB are free for {folder}, it needs {needed / 2**20:.0f} MiB; earlier checkpoints "
            "are untouched: free space on that disk or name another --out"
        )
    for name in ("deepspeed", "teacher", "random"):
        (partial / name).mkdir(parents=True)


def _prune(out: Path) -> None:
    for step in sorted(steps_in(out) - {0})[:-KEEP_NEWEST]:
        shutil.rmtree(checkpoint_folder(out, step))


def steps_in(out: Path) -> set[int]:
    """Steps of which a checkpoint lies in OUT, whole or not."""
    folders = (out / "checkpoints").glob("step_*")
    return {int(match[1]) for folder in folders if (match := _STEP_NAME.fullmatch(folder.name))}


def step_of(folder: Path) -> int:
    """Optimizer steps before a checkpoint was written, by its name."""
    match = _STEP_NAME.fullmatch(folder.name)
    assert match, f"{folder} is no checkpoint"
    return int(match[1])


def _rank_name(index: int | None = None) -> str:
    return f"rank_{rank() if index is None else index:05d}"
