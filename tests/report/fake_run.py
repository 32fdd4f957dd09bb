"""What does a finished run look like on disk, made in a second without training?"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pretrain import intact
from pretrain.config import Run
from pretrain.data.text import Captions
from pretrain.evaluate.checkpoints import weights_of
from pretrain.facts import DataFacts
from pretrain.optim import learning_rate, teacher_momentum
from pretrain.towers import Towers


def healthy(done: float) -> dict[str, dict[str, float]]:
    """What the monitor measures of features that stay spread, the text's as codes to show all quantities."""
    counts = {"rows": 64, "width": 128}
    taught = {"std": 0.075 - 0.01 * done, "effective_rank": 30 + 8 * done, "agreement": 0.3 + 0.4 * done}
    embedding = {"std": 0.06 + 0.012 * done, "effective_rank": 20 + 5 * done}
    coded = embedding | {"code_entropy": 3.1 - done, "codes": 32}
    measured = {"image_same": taught, "image_other": taught, "embedding": embedding, "text": coded}
    return {name: values | counts for name, values in measured.items()}


def write_log(folder: Path, run: Run, steps: int, every: int = 1) -> None:
    """Lines as the monitor writes them: losses that fall, features that stay spread."""
    draw = random.Random(0)
    lines = []
    for step in range(1, steps + 1):
        if step % every and step not in (1, steps):
            continue
        done = step / steps
        noise = {name: draw.gauss(0, 0.02) for name in run.objective.targets}
        start = {"image_same": 0.52, "image_other": 0.52, "category": 3.3, "text": 3.5}
        end = {"image_same": 0.18, "image_other": 0.3, "category": 2.1, "text": 2.0}
        nats = {
            name: end[name] + (start[name] - end[name]) * math.exp(-4 * done) * (1 + noise[name])
            for name in run.objective.targets
        }
        lines.append(
            {
                "step": step,
                "time": 1.79e9 + 0.7 * step,
                "nats": nats,
                "collapse": healthy(done),
                "grad_norm": 2.0 * math.exp(-done) * (1 + abs(draw.gauss(0, 0.3))),
                "grad_norm_image": 0.02 * math.exp(-2 * done) * (1 + abs(draw.gauss(0, 0.2))),
                "grad_norm_label": 0.09 * math.exp(-done) * (1 + abs(draw.gauss(0, 0.2))),
                "lambda": 0.25 + 0.2 * done,
                "lr": learning_rate(step - 1, run),
                "momentum": teacher_momentum(step - 1, run),
                "images_per_second": 90 + draw.gauss(0, 4),
                "memory_bytes": {"host": int(1.4 * 2**30 + done * 2**27)},
                "seconds": {"data_wait": abs(draw.gauss(0.01, 0.01)), "forward": 0.2, "backward": 0.4},
                "grad_norm_by_part": {"encoder": 1.5 - done, "decoders": 1.0, "heads": 0.3, "text": 0.2},
                "nats_by_source": {"image_same": dict.fromkeys(run.data, nats["image_same"])},
                "mfu": 0.3 + 0.05 * done,
                "step_seconds": 0.7 + abs(draw.gauss(0, 0.03)),
                "dropped": {"truncated": 2},
                "skipped_steps": 0,
            }
        )
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_checkpoint(
    folder: Path, run: Run, facts: DataFacts, step: int, tokenizer: Path | None = None
) -> None:
    """A whole checkpoint as a reader sees it: the teacher of one rank, without DeepSpeed's files."""
    torch.manual_seed(step)
    towers = Towers(run, facts)
    place = folder / "checkpoints" / f"step_{step:06d}"
    partial = place.with_name(".tmp")
    (partial / "teacher").mkdir(parents=True)
    weights = {name: p.detach().float().flatten().contiguous() for name, p in towers.named_parameters()}
    starts = json.dumps(dict.fromkeys(weights, 0))
    save_file(weights, partial / "teacher" / "rank_00000.safetensors", metadata={"starts": starts})
    kept = towers.state_dict().keys()
    buffers = {name: b.contiguous() for name, b in towers.named_buffers() if name in kept}
    save_file(buffers, partial / "teacher" / "buffers.safetensors")
    shapes = {
        name: {"shape": list(p.shape), "parts": [[0, 0, p.numel()]]} for name, p in towers.named_parameters()
    }
    layout = {"world": 1, "dtype": "float32", "parameters": shapes}
    (partial / "teacher" / "layout.json").write_text(json.dumps(layout))
    (partial / "run.json").write_text(run.to_json())
    (partial / "facts.json").write_text(facts.to_json())
    state = {"step": step, "world": 2, "stage": 3, "dtype": "torch.float32", "versions": {"torch": "2.15.0"}}
    (partial / "state.json").write_text(json.dumps({**state, "commit": "0" * 40}))
    if tokenizer is not None:
        (partial / "tokenizer").mkdir()
        for path in tokenizer.iterdir():
            (partial / "tokenizer" / path.name).write_bytes(path.read_bytes())
    intact.publish(partial, place, intact.digest(partial, intact.files_in(partial)))


def evaluation(categories: tuple[str, ...], steps: tuple[int, ...]) -> dict[str, Any]:
    """A record as `python -m pretrain.evaluate` writes it."""
    draw = random.Random(1)
    count, chance = len(categories), 1 / len(categories)

    def row(accuracy: float) -> dict[str, Any]:
        interval = [max(accuracy - 0.03, 0), min(accuracy + 0.03, 1)]
        return {"accuracy": accuracy, "interval": interval, "n": 1000, "chance": chance, "majority": 0.06}

    gains = {"knn": 0.35, "linear": 0.5, "zero_shot": 0.4}
    checkpoints = {}
    for k, step in enumerate(steps):
        done = k / max(len(steps) - 1, 1)
        rows = {name: row(0.1 + gain * done) for name, gain in gains.items()}
        rows["classifier"] = {"accuracy": None, "reason": "the run has no categories"}
        checkpoints[f"step_{step:06d}"] = rows | {"dropped": {"train": {}, "heldout": {}}}
    counts = [
        [draw.randint(15, 30) if r == c else max(draw.randint(-8, 6), 0) for c in range(count)]
        for r in range(count)
    ]
    name = f"step_{steps[-1]:06d}"
    confusion = {"checkpoint": name, "probe": "linear", "counts": counts}
    return {"categories": list(categories), "checkpoints": checkpoints, "confusion": confusion}


def write_run(
    folder: Path,
    run: Run,
    categories: tuple[str, ...],
    tokenizer: Path | None,
    data: dict[str, Path],
    steps: tuple[int, ...] = (0, 40),
) -> Path:
    """A run with log, evaluation, recorded data folders and a checkpoint at each of `steps`."""
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(run.to_json())
    (folder / "data.json").write_text(json.dumps({name: str(path) for name, path in data.items()}))
    write_log(folder, run, max(*steps, 1))
    vocab_size = Captions(tokenizer, run.text.length).vocab_size if tokenizer else 0
    for step in steps:
        write_checkpoint(folder, run, DataFacts(categories, vocab_size), step, tokenizer)
    result = evaluation(categories, steps)
    result["weights"] = {name: weights_of(folder / "checkpoints" / name) for name in result["checkpoints"]}
    (folder / "evaluation.json").write_text(json.dumps(result))
    return folder
