"""What does one rank of a test do? `python ranks.py FOLDER SCENARIO ...` under RANK, WORLD_SIZE and so on.

Rank 0 leaves FOLDER/result.json, one entry a scenario, from which the tests draw their conclusions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from pretrain import checkpoint, intact  # noqa: E402
from pretrain.checkpoint import saver as saver_module  # noqa: E402
from pretrain.checkpoint.snapshot import Snapshot  # noqa: E402
from pretrain.collectives import mean_over_ranks, rank, world_size  # noqa: E402
from pretrain.config import Guard, Teacher  # noqa: E402
from pretrain.main import quieten  # noqa: E402

quieten()

from pretrain.distributed import start_distributed  # noqa: E402
from pretrain.ds_config import resolve_config  # noqa: E402
from pretrain.ema import local_master  # noqa: E402
from pretrain.engine import Engine  # noqa: E402
from tests.engine.toy import FACTS, build_toy, toy_batch, toy_run  # noqa: E402

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> ds config, what is changed in its ZeRO section
    "zero1": ("zero1", {}),
    "zero2": ("zero2", {}),
    "zero3": ("zero3", {}),  # all toy weights are below its persistence threshold
    "zero3_divided": ("zero3", {"stage3_param_persistence_threshold": 0}),
    "zero3_hpz": ("zero3_hpz", {"stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": 2}),
    "zero3_offload": ("zero3_offload", {}),
}
ALONE = {  # variant of two ranks -> that with which one rank goes on
    "zero1": "zero3",
    "zero2": "zero1",
    "zero3": "zero3_offload",
    "zero3_divided": "zero2",
    "zero3_offload": "zero3_divided",
}
BY_FOUR = {  # variant of one rank -> that with which four go on
    "zero3": "zero2",
    "zero1": "zero3_divided",
    "zero3_offload": "zero1",
    "zero2": "zero3_offload",
    "zero3_divided": "zero3",
}


def engine_of(variant: str, run: Any, *, bfloat16: bool = False, drop: float = 0.0) -> Engine:
    name, changes = VARIANTS[variant]
    ds_config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    ds_config["bf16"]["enabled"] = bfloat16
    ds_config["zero_optimization"] |= changes
    config, _ = resolve_config(ds_config, run, torch.device("cpu"))
    return Engine(*build_toy(drop), run, config)


def run_steps(engine: Engine, until: int) -> list[dict[str, float]]:
    curve = []
    while engine.steps_done < until:
        batch = toy_batch(engine.steps_done, engine.run.batch, rank(), world_size())
        losses = engine.step(batch)
        curve.append({name: mean_over_ranks(value).item() for name, value in losses.nats.items()})
        curve[-1] |= {
            "grad_norm": float(engine.grad_norm),
            "image_norm": engine.balance.image_norm.item(),
            "label_norm": engine.balance.label_norm.item(),
            "weight": engine.balance.weight.item(),
        }
    return curve


def save(engine: Engine, place: Path) -> Path:
    """The checkpoint of the engine's present step, written to the end."""
    checkpoint.Saver(engine, place, FACTS, None).save(wait=True)
    return checkpoint.folder_in(place, engine.steps_done)


def compare_stages(folder: Path) -> dict[str, Any]:
    """Five steps under every variant, checkpoints after three and five, and what the teacher answers to a probe."""
    probe = toy_batch(99, 4).views[:, 0].float() / 255
    result = {}
    for variant in VARIANTS:
        engine = engine_of(variant, toy_run())
        curve = run_steps(engine, 3)
        save(engine, folder / variant)
        curve += run_steps(engine, 5)
        saved = save(engine, folder / variant)
        result[variant] = {
            "curve": curve,
            "checkpoint": str(saved),
            "probe": engine.teacher(probe).flatten().tolist(),
        }
    return result


def go_on(folder: Path, taken: Path, names: dict[str, str], until: int, *, bfloat16: bool = False) -> dict:
    """From the checkpoints of another launch in `taken`, by variants of their own: what a save at once would keep,
    and the steps to `until`, with a checkpoint after them.
    """
    result = {}
    for taken_from, variant in names.items():
        engine = engine_of(variant, toy_run(), bfloat16=bfloat16)
        folder_before = checkpoint.folder_in(taken / taken_from, until - 1)
        checkpoint.restore(engine, folder_before)
        again = save(engine, folder / f"{variant}_again")
        result[variant] = {
            "before": str(folder_before),
            "again": str(again),
            "curve": run_steps(engine, until),
        }
        save(engine, folder / variant)
    return result


def go_on_alone(folder: Path) -> dict[str, Any]:
    """Step four, on one rank and at another stage than before."""
    return go_on(folder, folder.parent / "compare_stages", ALONE, 4)


def go_on_in_bfloat16(folder: Path) -> dict[str, Any]:
    """The same in the other precision."""
    return go_on(folder, folder.parent / "compare_stages", ALONE, 4, bfloat16=True)


def go_on_by_four(folder: Path) -> dict[str, Any]:
    """Step five, on four ranks."""
    return go_on(folder, folder.parent / "go_on_alone", BY_FOUR, 5)


def average_in_bfloat16(folder: Path) -> dict[str, Any]:
    """Largest error of the teacher's average against the sum over all steps, weights in bfloat16."""
    result = {}
    run = dataclasses.replace(toy_run(), teacher=Teacher(0.999, 0.999))
    for variant in ("zero1", "zero2", "zero3", "zero3_offload"):
        engine = engine_of(variant, run, bfloat16=True)
        student = dict(engine._student.module.student.named_parameters())
        owned = [part for part in engine.average.slices if part.numel]
        expected = [local_master(student[part.name], part.numel).double() for part in owned]
        naive = [values.bfloat16() for values in expected]
        started = [values.clone() for values in expected]
        for step in range(10):
            run_steps(engine, step + 1)
            masters = [local_master(student[part.name], part.numel) for part in owned]
            expected = [0.999 * e + 0.001 * m.double() for e, m in zip(expected, masters, strict=True)]
            naive = [n.lerp(m.bfloat16(), 0.001) for n, m in zip(naive, masters, strict=True)]
        average = engine.average.state().values()
        pairs = list(zip(average, expected, started, naive, strict=True))
        result[variant] = {
            "dtype": str(engine._teacher.module.embed.weight.dtype if engine.stage == 3 else engine.dtype),
            "error": max((a.double() - e).abs().max().item() for a, e, _, _ in pairs),
            "moved": min((e - s).abs().max().item() for _, e, s, _ in pairs),
            "naive_error": max((n.double() - e).abs().max().item() for _, e, _, n in pairs),
        }
    return result


def stop_and_resume(folder: Path) -> dict[str, Any]:
    """Six steps with dropout, and the last three again by a new engine from the checkpoint after three."""
    result = {}
    for variant in ("zero1", "zero2", "zero3", "zero3_offload"):
        engine = engine_of(variant, toy_run(), drop=0.3)
        run_steps(engine, 3)
        saved = save(engine, folder / variant)
        straight = run_steps(engine, 6)
        resumed = engine_of(variant, toy_run(), drop=0.3)
        checkpoint.restore(resumed, saved)
        result[variant] = {"straight": straight, "resumed": run_steps(resumed, 6)}
    return result


def refuse_what_is_bad(folder: Path) -> dict[str, Any]:
    """Two steps, a batch whose gradient on rank 1 alone is not finite or a spike, two more: what moves in each."""
    result = {}
    run = dataclasses.replace(toy_run(), guard=Guard(window=2, deviations=0.1))
    for variant, poison in product(("zero1", "zero2", "zero3", "zero3_offload"), (math.nan, math.inf, 1e4)):
        engine = engine_of(variant, run)
        owned = [part for part in engine.average.slices if part.numel]

        def state(engine: Engine = engine, owned: Any = owned) -> list[torch.Tensor]:
            """Masters, moments, teacher, buffers, loss balance."""
            weights = dict(engine._student.module.student.named_parameters())
            moments = [
                values
                for of_one in engine._optimizer.state.values()
                for values in of_one.values()
                if torch.is_tensor(values)
            ]
            balance = engine.balance.state_dict()
            return [
                torch.cat([local_master(weights[part.name], part.numel).clone() for part in owned]),
                torch.cat([values.flatten().float() for values in moments]),
                torch.cat([average.clone() for average in engine.average.state().values()]),
                torch.cat([buffer.flatten().float() for buffer in engine._student.module.buffers()]),
                torch.tensor([*balance["averages"], *balance["counts"], balance["weight"]]),
            ]

        run_steps(engine, 2)
        before, backward = state(), engine._student.backward
        if rank() == 1:
            engine._student.backward = lambda total, scale=poison, run=backward: run(total * scale)
        engine.step(toy_batch(2, run.batch, rank(), world_size()), asks_to_stop=rank() == 1)
        asked, verdict, after = engine.is_asked_to_stop, engine.verdict, state()
        engine._student.backward = backward
        rest = run_steps(engine, 4)
        straight = engine_of(variant, run)
        run_steps(straight, 2)
        result[f"{variant}-{poison}"] = {
            "stands_still": [torch.equal(a, b) for a, b in zip(before, after, strict=True)],
            "reasons": verdict.reasons,
            "asked": [asked, engine.is_asked_to_stop],
            "left_out": sorted(engine.guard.left_out),
            "skipped_steps": engine.skipped_steps,
            "rest": rest,
            "straight": run_steps(straight, 4),
        }
    return result


def die_while_saving(folder: Path) -> dict[str, Any]:
    """A whole checkpoint after one step, SIGKILL just before the one after two is published."""
    engine = engine_of("zero3", toy_run())
    run_steps(engine, 1)
    saver = checkpoint.Saver(engine, folder, FACTS, None)
    saver.save(wait=True)
    run_steps(engine, 2)
    intact.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    saver.save(wait=True)
    raise AssertionError("SIGKILL did not come")


def copy_fails(folder: Path) -> dict[str, Any]:
    """Rank 1 cannot copy what it owns: what each rank hears of it; then it can."""
    saver_module.PATIENCE = 20.0
    engine = engine_of("zero2", toy_run())
    saver, copy = checkpoint.Saver(engine, folder, FACTS, None), Snapshot.copy

    def fail(snapshot: Snapshot) -> None:
        copy(snapshot)
        raise MemoryError("no memory is left on the device")

    Snapshot.copy = fail if rank() == 1 else copy
    saver.save()
    told: list[str] = [""] * world_size()
    try:
        saver.finish()
    except OSError as error:
        torch.distributed.all_gather_object(told, str(error))
    Snapshot.copy = copy
    before = sorted(checkpoint.steps_in(folder))
    saver.save(wait=True)
    return {"told": told, "before": before, "after": sorted(checkpoint.steps_in(folder))}


SCENARIOS = {
    "copy_fails": copy_fails,
    "go_on_alone": go_on_alone,
    "go_on_in_bfloat16": go_on_in_bfloat16,
    "go_on_by_four": go_on_by_four,
    "compare_stages": compare_stages,
    "average_in_bfloat16": average_in_bfloat16,
    "stop_and_resume": stop_and_resume,
    "refuse_what_is_bad": refuse_what_is_bad,
    "die_while_saving": die_while_saving,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    start_distributed()
    place, *names = sys.argv[1:]
    outcome = {}
    for name in names:
        outcome[name] = SCENARIOS[name](Path(place) / name)
        if rank() == 0:
            (Path(place) / "result.json").write_text(json.dumps(outcome))
