"""How long does a whole M3I training step take on one GPU, what does it reach, and where does the time go?

    python benchmarks/m3i_step_gpu.py [--recipes internimage_h vit_b16] [--stages 1 2 3]

Recipe and engine as they are shipped, `ds_configs/zeroN.json`, bfloat16, a batch of scenes that lies on the device:
student on mixed inputs, teacher on two views, all four targets, balance, AdamW, the teacher's average. One process a
recipe and stage. Milliseconds: median of STEPS steps, and of the parts between events of the stream. Share of the
peak counts the products and convolutions that one step executes (torch's counter; nothing is computed twice but two
depth-wise steps, which it does not see) over 989 TFLOP/s, dense bfloat16 of an H100 or H200. Memory is the most that
torch held. Writes benchmarks/results/m3i_step_gpu.json; without a GPU it measures and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.record import gpu, keep
from pretrain import provenance
from pretrain.data.loader import Loader
from pretrain.data.sources import tokenizer_beside
from pretrain.distributed import start_distributed
from pretrain.ds_config import read_ds_config, resolve_config
from pretrain.engine import Engine
from pretrain.pretrainer import Pretrainer
from pretrain.recipes.m3i import RECIPES
from pretrain.towers import Towers

ROOT = Path(__file__).resolve().parent.parent
PEAK = 989e12  # operations a second
IMAGES = {"internimage_h": 384, "vit_b16": 512}  # a step; two an input
GOALS = {"internimage_h": 0.40, "vit_b16": 0.45}  # share of the peak
WARM_UP, STEPS = 4, 12


class Parts:
    """Milliseconds of calls of a step, by name; calls within calls count in both."""

    def __init__(self) -> None:
        self._events: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def follow(self, owner: Any, method: str, name: str) -> None:
        call: Callable[..., Any] = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = call(*arguments, **options)
            end.record()
            self._events[name].append((start, end))
            return result

        setattr(owner, method, timed)

    def milliseconds(self, steps: int) -> dict[str, float]:
        return {
            name: sum(start.elapsed_time(end) for start, end in events) / steps
            for name, events in self._events.items()
        }

    def clear(self) -> None:
        self._events.clear()


def measure(recipe: str, stage: int, scenes: Path, images: int) -> dict[str, Any]:
    run = replace(RECIPES[recipe](), batch=images)
    device = start_distributed()
    config, told = resolve_config(read_ds_config(ROOT / "ds_configs" / f"zero{stage}.json"), run, device)
    folders = {name: scenes for name in run.data}
    reads_text = any(source.supervision == "text" for source in run.data.values())
    tokenizer = tokenizer_beside(scenes) if reads_text else None
    loader = Loader(run, folders, tokenizer, rank=0, world=1, workers=8, device=device)
    with closing(loader):
        batch = next(iter(loader)).to(device)
    torch.manual_seed(0)
    with torch.device(device):
        model, teacher = Pretrainer(run, loader.facts), Towers(run, loader.facts)
    parameters = sum(p.numel() for p in model.parameters())
    engine = Engine(model, teacher, run, config)
    for _ in range(WARM_UP):
        engine.step(batch)
    with FlopCounterMode(display=False) as counter:
        engine.step(batch)
    torch.cuda.reset_peak_memory_stats()
    parts = Parts()
    parts.follow(engine, "teacher", "teacher, forward")
    parts.follow(engine._student, "backward", "student, backward")
    parts.follow(engine._student, "step", "optimizer")
    parts.follow(engine.average, "update", "teacher, average")
    parts.follow(engine.balance, "observe", "balance, norms")
    parts.follow(engine.balance, "advance", "balance, weight")
    engine._encoders = replace(engine._encoders, ema=engine.teacher)
    engine.step(batch)
    parts.clear()
    times = []
    for _ in range(STEPS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        losses = engine.step(batch)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    taken, operations = median(times), counter.get_total_flops()
    shares = {name: part / taken for name, part in parts.milliseconds(STEPS).items()}
    return {
        "device": told,
        "parameters": parameters,
        "images": images,
        "milliseconds": {"median": taken, "least": min(times), "most": max(times)},
        "images_per_second": images / taken * 1e3,
        "operations_a_step": operations,
        "share_of_peak": operations / taken * 1e3 / PEAK,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "shares_of_step": shares,
        "nats": {name: float(value) for name, value in losses.nats.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", choices=IMAGES, default=list(IMAGES))
    parser.add_argument("--stages", nargs="+", type=int, choices=(1, 2, 3), default=[1, 2, 3])
    parser.add_argument("--images", type=int, help="a step, in place of those of IMAGES")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # scenes and file of a measuring process
    arguments = parser.parse_args()
    device = gpu()
    if arguments.one:
        (recipe,), (stage,), (scenes, out) = arguments.recipes, arguments.stages, map(Path, arguments.one)
        out.write_text(json.dumps(measure(recipe, stage, scenes, arguments.images)))
        return
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as work:
        scenes = Path(work, "scenes")
        build = [sys.executable, "-m", "data_prep", "build", "scenes", "--out", scenes, "--count", "2000"]
        subprocess.run([*map(str, build), "--workers", "8"], cwd=ROOT, check=True)
        for recipe in arguments.recipes:
            for stage in arguments.stages:
                out, images = Path(work, "result"), arguments.images or IMAGES[recipe]
                again = [__file__, "--recipes", recipe, "--stages", stage, "--images", images]
                command = [sys.executable, *again, "--one", scenes / "train", out]
                if subprocess.run(list(map(str, command))).returncode:
                    found.setdefault(recipe, {})[f"zero{stage}"] = {"failed": True}
                    continue
                result = found.setdefault(recipe, {})[f"zero{stage}"] = json.loads(out.read_text())
                print(f"{recipe} ZeRO-{stage} on {provenance.hardware(device)}: {result}", flush=True)
                goals = {"share_of_peak": GOALS}
                keep("m3i_step_gpu", __doc__.splitlines()[0], device, goals=goals, recipes=found)


if __name__ == "__main__":
    main()
