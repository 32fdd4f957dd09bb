"""Does pre-training help to segment and to detect?

    python -m data_prep build scenes --out DIR --count 4000 --seed 33
    OMP_NUM_THREADS=1 python benchmarks/dense_transfer.py --runs RUN RUN RUN --scenes DIR [--bccd DIR] --work DIR

The RUNs are of m3i.demo and differ in `--seed`, DIR/train and DIR/heldout are scenes, and --bccd holds
annotations/instances_{train,val}.json beside images/. On the untrained first and on the last checkpoint of each RUN,
with its seed, the small recipes are trained in short: UperNet, Mask R-CNN and RT-DETR on the scenes, Faster R-CNN on
bccd, on a frozen backbone and on one that is trained too (`_tuned`). A case gains clearly if in every RUN the 95 %
interval over the test images after pre-training lies above the one before. The command again goes on from what WORK
holds. Writes dense_transfer.json and .md into benchmarks/results/.

RT-DETR's rate was chosen by the AP of the pre-trained backbone, frozen, with seed 0, on the first 200 held-out scenes
of others (`data_prep build scenes --count 2200 --seed 21 --heldout 0.91`): 1e-3, 2e-3 and 4e-3 gave 7.6, 11.7 and
16.0 %; the untrained backbone had 5.8 % with 2e-3, 7.0 % with 4e-3. With all first weights as transformers draws them
4e-3 gave the pre-trained one 3.9 %, with its linear layers alone 1e-3 gave 1.2 %.

How long a detector trains together with the backbone was chosen on the same 200 scenes, after training on those of
seed 33, seed 0, for the pre-trained backbone alone: with 0.2 of the head's rate for the backbone Mask R-CNN reached
6.9 and 18.5 % AP of boxes in 150 and 400 steps, with 0.05 of it 8.0 and 17.6; RT-DETR in 400 steps 19.0 and 27.2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.record import RESULTS, is_clear, keep, measured_on, read_record, shown
from pretrain.evaluate.checkpoints import find_checkpoint
from pretrain.transfer.examples import AnnotatedSet, Example
from pretrain.transfer.formats import MAX_BAD
from pretrain.transfer.places import Named, open_sets
from pretrain.transfer.recipes import recipe
from pretrain.transfer.training import Machine
from pretrain.transfer.work import RESULT, Work, transfer

BACKBONES = {"untrained": "first", "pre-trained": "last"}
NAME = "dense_transfer"
Results = dict[str, dict[int, dict[str, Any]]]  # by backbone and seed, what is kept of a result


@dataclass(frozen=True)
class Case:
    task: str
    data: str  # an option of this script
    recipe: str = "small"
    is_frozen: bool = True
    steps: int = 150
    size: int = 64  # pixels


CASES = {
    "segment": Case("segment", "scenes", steps=200),
    "detect": Case("detect", "scenes"),
    "detect_bccd": Case("detect", "bccd", steps=100, size=128),
    "segment_tuned": Case("segment", "scenes", is_frozen=False, steps=200),
    "detect_tuned": Case("detect", "scenes", is_frozen=False, steps=400),
    "detect_rtdetr": Case("detect", "scenes", recipe="small_detr"),
    "detect_rtdetr_tuned": Case("detect", "scenes", recipe="small_detr", is_frozen=False, steps=400),
}


class Some:
    """An AnnotatedSet of the first `most` examples of another."""

    def __init__(self, whole: AnnotatedSet, most: int) -> None:
        self.whole, self.most = whole, min(most, len(whole))
        self.names, self.category_ids = whole.names, whole.category_ids
        self.image_ids, self.dropped = whole.image_ids[: self.most], whole.dropped
        self.has_masks, self.federation = whole.has_masks, whole.federation
        self.shown = None if whole.shown is None else whole.shown[: self.most]
        self.files, self.place, self.sha256 = whole.files, whole.place, whole.sha256

    def __len__(self) -> int:
        return self.most

    def example(self, index: int) -> Example:
        return self.whole.example(index)


def measure(
    name: str, case: Case, options: argparse.Namespace, which: str, run: Path, seed: int
) -> dict[str, Any]:
    """The result of one training, or of an earlier run of this script."""
    out = options.work / f"{name}-{which}-{seed}"
    if (out / RESULT).is_file():
        return json.loads((out / RESULT).read_text())
    numbers = recipe(case.task, case.recipe)
    optimisation = replace(numbers.optimisation, steps=case.steps)
    numbers = replace(numbers, optimisation=optimisation, size=case.size)
    train_set, heldout = open_sets(case.task, Named(getattr(options, case.data)), MAX_BAD)
    step = find_checkpoint(run, BACKBONES[which])
    work = Work(step, numbers, case.recipe, out, case.is_frozen, seed)
    return transfer(work, train_set, Some(heldout, options.heldout), Machine(torch.device("cpu")))


def of_record(result: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a result: no places of this machine, no scores by class."""
    scores = result["scores"]
    rows = [scores] if "accuracy" in scores else list(scores.values())
    left_out = ("iou", "by_category")
    return {row["metric"]: {k: v for k, v in row.items() if k not in left_out} for row in rows} | {
        "numbers": result["numbers"],
        "train_images": result["train_images"],
        "step": Path(result["checkpoint"]).name,
        "commit": result["commit"],
        "date": result["date"],
    }


def rows_of(kept: dict[str, Any]) -> dict[str, float]:
    """Metric -> score in per cent, of what is kept of a result."""
    scores = {name: said for name, said in kept.items() if isinstance(said, dict) and "accuracy" in said}
    return {metric: 100 * row["accuracy"] for metric, row in scores.items()}


def collected(work: Path) -> dict[str, Results]:
    """All finished trainings of `work`, of cases that have some of both backbones."""
    found: dict[str, Results] = {}
    for name in CASES:
        for which in BACKBONES:
            paths = work.glob(f"{name}-{which}-*/{RESULT}")
            results = {
                int(path.parent.name.rpartition("-")[2]): of_record(json.loads(path.read_text()))
                for path in paths
            }
            if results:
                found.setdefault(name, {})[which] = dict(sorted(results.items()))
    return {name: by for name, by in found.items() if by.keys() == BACKBONES.keys()}


def seeds_of(by_backbone: Results) -> list[int]:
    """The seeds that both backbones have."""
    return sorted(set.intersection(*(set(results) for results in by_backbone.values())))


def clear_of(by_backbone: Results) -> dict[str, bool]:
    """By metric: whether in every run the interval after pre-training lies above the one before."""
    pairs = [[by_backbone[which][seed] for which in BACKBONES] for seed in seeds_of(by_backbone)]
    metrics = rows_of(next(iter(by_backbone["untrained"].values())))
    return {metric: all(is_clear(first[metric], last[metric]) for first, last in pairs) for metric in metrics}


def results_of(record: dict[str, Any]) -> dict[str, Results]:
    """By case, what is kept of the trainings."""
    return {
        name: {which: {int(seed): kept for seed, kept in by.items()} for which, by in by_backbone.items()}
        for name, by_backbone in record["measured"].items()
    }


def table(record: dict[str, Any]) -> str:
    """Mean and standard deviation over the runs, by their seeds, of what is kept of them."""
    found = results_of(record)
    trainings = [kept for by in found.values() for results in by.values() for kept in results.values()]
    lines = [
        "Test images, % (mean and standard deviation over the runs with these seeds); clear: in every run the 95 %",
        "interval after pre-training lies above the one before; commit: of the code that measured.",
        measured_on(record, [kept["date"] for kept in trainings]),
        "",
        "| training | % | " + " | ".join(BACKBONES) + " | clear | seeds | commit |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, by_backbone in found.items():
        commits = shown(kept["commit"] for results in by_backbone.values() for kept in results.values())
        seeds, clear = seeds_of(by_backbone), clear_of(by_backbone)
        scores = {which: [rows_of(results[seed]) for seed in seeds] for which, results in by_backbone.items()}
        for metric in scores["untrained"][0]:
            cells = []
            for which in BACKBONES:
                values = [row[metric] for row in scores[which]]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}")
            cells.append("yes" if clear[metric] else "no")
            lines.append(
                f"| {name} | {metric} | {' | '.join(cells)} | {', '.join(map(str, seeds))} | {commits} |"
            )
    return "\n".join(lines) + "\n"


def claim_of(found: dict[str, Results]) -> str:
    clear = {
        (name, metric): is_clear for name, by in found.items() for metric, is_clear in clear_of(by).items()
    }
    unclear = [f"{name} {metric}" for (name, metric), is_clear in clear.items() if not is_clear]
    gained = len(clear) - len(unclear)
    told = f"a pre-trained backbone is clearly better than an untrained one in {gained} of {len(clear)} rows"
    return told + (f"; not in: {', '.join(unclear)}" if unclear else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--bccd", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--heldout", type=int, default=500, help="images that test, at most (%(default)s)")
    options = parser.parse_args()
    cases = {name: CASES[name] for name in options.cases if getattr(options, CASES[name].data)}
    runs = {json.loads((run / "recipe.json").read_text())["seed"]: run for run in options.runs}
    if len(runs) < len(options.runs):
        parser.error(f"--runs must differ in their seeds, these are of {sorted(runs)}")
    for seed, run in runs.items():
        for name, case in cases.items():
            for which in BACKBONES:
                result = measure(name, case, options, which, run, seed)
                print(name, which, seed, rows_of(of_record(result)), flush=True)
    found = collected(options.work)
    keep(
        NAME,
        claim_of(found),
        torch.device("cpu"),
        clear={name: clear_of(by_backbone) for name, by_backbone in found.items()},
        cases={name: asdict(case) for name, case in CASES.items() if name in found},
        measured=found,
    )
    told = table(read_record(NAME))
    print(told)
    (RESULTS / f"{NAME}.md").write_text(told)


if __name__ == "__main__":
    main()
