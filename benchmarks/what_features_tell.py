"""What do the features of a method tell of a scene: its category, or what stands around it?

    OMP_NUM_THREADS=2 python benchmarks/what_features_tell.py --runs OUT/runs --set DIR

For each finished run of a comparison (`python -m pretrain.compare ... --out OUT`), and for the network as the first
of them begins: a linear probe on the teacher's mean token for the category of the salient thing, its colour, its
texture, and the ground. Writes benchmarks/results/what_features_tell.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.record import keep
from pretrain.checkpoint import load_towers
from pretrain.data.shards import ShardFolder
from pretrain.evaluate.checkpoints import find_checkpoint
from pretrain.evaluate.features import extract
from pretrain.evaluate.linear import linear_probe

SPLITS = ("train", "heldout")
QUESTIONS = {
    "category": lambda record: record["category"],
    "color": lambda record: record["objects"][0]["color"],
    "texture": lambda record: record["objects"][0]["texture"],
    "ground": lambda record: record["background"],
}


def answers(folder: Path, index: Tensor, question: str) -> list[str]:
    """What the samples' records say, in the order of `index`."""
    shards = ShardFolder(folder)
    return [QUESTIONS[question](json.loads(shards.sample(int(place))["json"])) for place in index]


def told(step: Path, folder: Path) -> dict[str, float]:
    """Held-out accuracy of each question under the teacher of one checkpoint."""
    run, _, towers = load_towers(step)
    options = {"device": torch.device("cpu"), "workers": 0}
    features = [extract(towers, run, folder / split, title=split, **options) for split in SPLITS]
    found = {}
    for question in QUESTIONS:
        said = [answers(folder / split, f.index, question) for split, f in zip(SPLITS, features, strict=True)]
        names = sorted(set(said[0]))
        known = [place for place, name in enumerate(said[1]) if name in names]
        labels = torch.tensor([names.index(name) for name in said[0]])
        wanted = torch.tensor([names.index(said[1][place]) for place in known])
        predicted = linear_probe(features[0].tokens, labels, features[1].tokens[known])
        found[question] = (predicted == wanted).float().mean().item()
        found[f"{question}_chance"] = torch.bincount(wanted).max().item() / len(wanted)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--set", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folders = sorted(options.runs.glob(f"*-seed{options.seed}"))
    found = {"untrained": told(find_checkpoint(folders[0], "first"), options.set)}
    for folder in folders:
        found[folder.name] = told(find_checkpoint(folder, "last"), options.set)
        print(
            folder.name,
            {name: round(100 * value, 1) for name, value in found[folder.name].items()},
            flush=True,
        )
    keep(
        "what_features_tell",
        "after 300 steps without labels, features tell the ground and the colour rather than the category",
        torch.device("cpu"),
        measured=found,
    )


if __name__ == "__main__":
    main()
