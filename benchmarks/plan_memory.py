"""How far is the planned memory of a rank from what it holds?

    OMP_NUM_THREADS=1 python benchmarks/plan_memory.py

On two ranks over gloo, in bfloat16 on the CPU: a small M3I under each ZeRO stage of tests/plan/counted.py, all
bytes that tensors hold between two steps, the most until the optimizer's step, and the most of all. What is offloaded
lies in the same memory there, and is planned with it. Of one H200: the peaks of m3i_step_gpu.json.
Each with the planned bytes and their ratio. Writes benchmarks/results/plan_memory.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.plan_traffic import WORLD, counted, setting_of  # noqa: E402
from benchmarks.record import RESULTS, keep  # noqa: E402
from pretrain.plan.machines import GIB  # noqa: E402
from pretrain.plan.memory import memory  # noqa: E402
from pretrain.plan.settings import Setting, read  # noqa: E402
from pretrain.plan.sizes import assumed_facts, sizes_of  # noqa: E402
from pretrain.recipes import load  # noqa: E402
from tests.fakes import FACTS  # noqa: E402
from tests.plan.counted import counted_run  # noqa: E402


def compared(measured: float, planned: float) -> dict[str, float]:
    return {"measured": measured, "planned": planned, "planned_over_measured": round(planned / measured, 4)}


def on_ranks() -> dict[str, Any]:
    """Bytes by ZeRO stage, at rest, in the backward pass, and at the most."""
    run, found = counted_run(WORLD), {}
    for variant, one in counted(WORLD).items():
        told = memory(run, FACTS, sizes_of(run, FACTS), setting_of(variant), WORLD, is_fused=False)
        found[variant] = {
            "at_rest": compared(one["at_rest"], told.at_rest + told.host),
            "backward": compared(one["backward"], told.backward + told.host),
            "most": compared(one["most"], told.peak + told.host),
        }
    return found


def on_a_gpu() -> dict[str, Any]:
    """Peak bytes of a whole step of the recipes, ZeRO-2 on one H200."""
    found = {}
    for name, stages in json.loads((RESULTS / "m3i_step_gpu.json").read_text())["recipes"].items():
        run = replace(load(f"m3i.{name}"), batch=stages["zero2"]["images"])
        facts = assumed_facts(run, categories=24)
        told = memory(run, facts, sizes_of(run, facts), Setting("zero2", read()["zero2"]), 1)
        found[name] = compared(stages["zero2"]["peak_memory_gib"] * GIB, told.peak)
    return found


def main() -> None:
    result = {"unit": "bytes", "goal": "within 10 %", "two_ranks": on_ranks(), "one_h200": on_a_gpu()}
    print(json.dumps(result, indent=1))
    keep("plan_memory", __doc__.splitlines()[0], torch.device("cpu"), **result)


if __name__ == "__main__":
    main()
