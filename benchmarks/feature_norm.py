"""What do batch statistics change in the demo? Three runs of 300 steps on the same batches, side by side.

    OMP_NUM_THREADS=1 python benchmarks/feature_norm.py --labelled data/demo/labelled/train \
        --captioned data/demo/captioned/train

One process without DeepSpeed, float32, the recipe `m3i.demo` with no feature norm, with that of the tokens alone, and
with those of tokens and embedding; same seed. Prints and writes losses and what pretrain.collapse measures of
every target (a spread `std` below half of 1 / sqrt(width) is a collapse).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.record import keep
from data_prep.schema import TOKENIZER_FOLDER
from pretrain.balance import BalanceTracker
from pretrain.collapse import measure
from pretrain.config import Run
from pretrain.data.loader import Loader
from pretrain.optim import learning_rate, make_optimizer, teacher_momentum
from pretrain.pretrainer import Pretrainer
from pretrain.recipes import load
from pretrain.targets import TargetEncoders
from pretrain.towers import Towers

VARIANTS = {  # name -> backbone.token_norm, pool.norm
    "none": ("none", "none"),
    "tokens": ("batch", "none"),
    "tokens and embedding": ("batch", "batch"),
}


def follow(name: str, run: Run, folders: dict[str, Path], steps: int) -> list[dict[str, Any]]:
    """Losses and what is measured of the targets at every 25th step of a plain training loop."""
    has_text = any(source.supervision == "text" for source in run.data.values())
    tokenizer = folders["captioned"] / TOKENIZER_FOLDER if has_text else None
    loader = Loader(run, folders, tokenizer, rank=0, world=1)
    torch.manual_seed(run.seed)
    model, teacher = Pretrainer(run, loader.facts), Towers(run, loader.facts)
    teacher.load_state_dict(model.student.state_dict())
    teacher.requires_grad_(False).eval()
    optimizer, tracker, rows = make_optimizer(model, run.optim), BalanceTracker(run.objective.gamma), []
    for step, batch in zip(range(steps), loader, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, run)
        losses = model(batch=batch, encoders=TargetEncoders(teacher), tracker=tracker)
        optimizer.zero_grad()
        losses.total.backward()
        tracker.advance()
        optimizer.step()
        with torch.no_grad():
            share = 1 - teacher_momentum(step, run)
            torch._foreach_lerp_(list(teacher.parameters()), list(model.student.parameters()), share)
            for average, current in zip(teacher.buffers(), model.student.buffers(), strict=True):
                average.copy_(average.lerp(current, share) if current.is_floating_point() else current)
        if step % 25 == 0 or step == steps - 1:
            nats = {name: round(value.item(), 4) for name, value in losses.nats.items()}
            rows.append({"step": step, **nats, "collapse": rounded(measure(losses.seen))})
            print(name, rows[-1], flush=True)
    loader.close()
    return rows


def rounded(measured: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """To four decimals, which is what a reader of a table compares."""
    return {
        name: {quantity: round(value, 4) for quantity, value in of_one.items()}
        for name, of_one in measured.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--labelled", type=Path, required=True)
    parser.add_argument("--captioned", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    folders = {"labelled": options.labelled, "captioned": options.captioned}
    run = load("m3i.demo")
    found = {}
    for name, (of_tokens, of_embedding) in VARIANTS.items():
        backbone, pool = replace(run.backbone, token_norm=of_tokens), replace(run.pool, norm=of_embedding)
        found[name] = follow(name, replace(run, backbone=backbone, pool=pool), folders, options.steps)
    keep(
        "feature_norm",
        "without batch statistics the teacher's features collapse, with those of the tokens they do not",
        torch.device("cpu"),
        collapsed_below=round(0.5 * run.backbone.token_width**-0.5, 4),
        runs=found,
    )


if __name__ == "__main__":
    main()
