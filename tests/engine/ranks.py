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
from pretrain.collectives import mean_over_ranks, rank, world_size  # noqa: E402
from pretrain.config import Teacher  # noqa: E402
from pretrain.main import quieten  # noqa: E402

quieten()

from pretrain.ema import local_master  # noqa: E402
from pretrain.engine import Engine, resolve_config, start_distributed  # noqa: E402
from tests.engine.toy import FACTS, build_toy, toy_batch, toy_run  # noqa: E402

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> ds config, what is changed in its ZeRO section
    "zero1": ("zero1", {}),
    "zero2": ("zero2", {}),
    "zero3": ("zero3", {}),  # all toy weights are below its persistence threshold
    "zero3_divided": ("zero3", {"stage3_param_persistence_threshold": 0}),
    "zero3_hpz": ("zero3_hpz", {"stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": 2}),
    "zero3_offload": ("zero3_offload", {}),
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


def compare_stages(folder: Path) -> dict[str, Any]:
    """Five steps under every variant, then a checkpoint, and what the teacher answers to a probe."""
    probe = toy_batch(99, 4).views[:, 0].float() / 255
    result = {}
    for variant in VARIANTS:
        engine = engine_of(variant, toy_run())
        curve = run_steps(engine, 5)
        saved = checkpoint.save(engine, folder / variant, FACTS, None)
        result[variant] = {
            "curve": curve,
            "checkpoint": str(saved),
            "probe": engine.teacher(probe).flatten().tolist(),
        }
    return result


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
        saved = checkpoint.save(engine, folder / variant, FACTS, None)
        straight = run_steps(engine, 6)
        resumed = engine_of(variant, toy_run(), drop=0.3)
        checkpoint.restore(resumed, saved)
        result[variant] = {"straight": straight, "resumed": run_steps(resumed, 6)}
    return result


def skip_what_is_not_finite(folder: Path) -> dict[str, Any]:
    """A step, one whose gradient is not finite on rank 1 alone, and one more: what the weights do in each."""
    result = {}
    for variant, poison in product(("zero1", "zero2", "zero3", "zero3_offload"), (math.nan, math.inf)):
        engine = engine_of(variant, toy_run())
        weights = dict(engine._student.module.student.named_parameters())
        owned = [part for part in engine.average.slices if part.numel]

        def masters(weights: Any = weights, owned: Any = owned) -> torch.Tensor:
            return torch.cat([local_master(weights[part.name], part.numel).clone() for part in owned])

        run_steps(engine, 1)
        before, backward = masters(), engine._student.backward
        teacher = [average.clone() for average in engine.average.state().values()]
        if rank() == 1:
            engine._student.backward = lambda total, scale=poison, run=backward: run(total * scale)
        run_steps(engine, 2)
        skipped, engine._student.backward = masters(), backward
        taught = list(engine.average.state().values())
        is_teacher_still = all(torch.equal(a, b) for a, b in zip(teacher, taught, strict=True))
        run_steps(engine, 3)
        result[f"{variant}-{poison}"] = {
            "is_teacher_still": is_teacher_still,
            "moved": (skipped - before).abs().max().item(),
            "moved_afterwards": (masters() - skipped).abs().max().item(),
            "skipped_steps": engine.skipped_steps,
        }
    return result


def die_while_saving(folder: Path) -> dict[str, Any]:
    """A whole checkpoint after one step, SIGKILL just before the one after two is published."""
    engine = engine_of("zero3", toy_run())
    run_steps(engine, 1)
    checkpoint.save(engine, folder, FACTS, None)
    run_steps(engine, 2)
    intact.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.save(engine, folder, FACTS, None)
    raise AssertionError("SIGKILL did not come")


SCENARIOS = {
    "compare_stages": compare_stages,
    "average_in_bfloat16": average_in_bfloat16,
    "stop_and_resume": stop_and_resume,
    "skip_what_is_not_finite": skip_what_is_not_finite,
    "die_while_saving": die_while_saving,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    start_distributed()
    place, *names = sys.argv[1:]
    outcome = {name: SCENARIOS[name](Path(place) / name) for name in names}
    if rank() == 0:
        (Path(place) / "result.json").write_text(json.dumps(outcome))
