"""Does our federated average precision agree with the lvis package, and how long do both take?

    OMP_NUM_THREADS=1 python benchmarks/lvis_agreement.py --make DIR      # makes the environment by pip, 1 MB
    OMP_NUM_THREADS=1 python benchmarks/lvis_agreement.py --python PATH   # or uses the one of this interpreter

Draws `--cases` sets of annotations and detections at random: crowded and empty images, boxes, polygons
and RLE, negative and not exhaustive categories, ignored things, equal scores, more than 300 detections. Judges each
by both, boxes and masks, and compares all thirteen measures and the AP of every category. Then one set of LVIS's
1,203 categories, for the time: ours includes the interval, which the package does not tell. Writes
benchmarks/results/lvis_agreement.json.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.environment import make
from benchmarks.record import keep
from pretrain.transfer.average_precision import truth_of
from pretrain.transfer.coco import outline_of
from pretrain.transfer.federated import federated_precision
from pretrain.transfer.lvis import FREQUENCIES, federation_of

REQUIREMENTS = ("lvis==0.5.3",)  # without its own: it asks for drawing tools, which it does not need here
KINDS = ("bbox", "segm")
# The package of 2020 takes a name of numpy that is gone, and imports its drawing.
JUDGE = """
import json, sys, time, types
import numpy
numpy.float = float
sys.modules["lvis.vis"] = types.SimpleNamespace(LVISVis=None)
import lvis
for line in sys.stdin:
    truth, found, kind = json.loads(line)
    found = json.load(open(found))
    if kind == "segm":
        found = [{k: v for k, v in one.items() if k != "bbox"} for one in found]  # or areas are those of boxes
    started = time.perf_counter()
    truth = lvis.LVIS(truth)
    judge = lvis.LVISEval(truth, lvis.LVISResults(truth, found), kind)
    judge.run()
    precision = judge.eval["precision"][:, :, :, 0]
    by_category = {truth.cats[number]["name"]: float(precision[:, :, place].mean())
                   for place, number in enumerate(judge.params.cat_ids) if (precision[:, :, place] > -1).all()}
    seconds = time.perf_counter() - started
    told = {name: float(value) for name, value in judge.results.items()}
    print(json.dumps([told, by_category, seconds]), flush=True)
"""
NAMES = {"AR300": "AR@300", "ARs": "ARs@300", "ARm": "ARm@300", "ARl": "ARl@300"}  # ours -> the package's


def outlined(draw: random.Random, box: list[float], height: int, width: int) -> dict[str, Any]:
    """An ellipse in the box, as polygon or RLE, and its area."""
    left, top, w, h = box
    if draw.random() < 0.5:
        angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
        points = np.stack([left + w * (1 + np.cos(angles)) / 2, top + h * (1 + np.sin(angles)) / 2], 1)
        return {"segmentation": [points.ravel().tolist()], "area": round(w * h * 0.75, 2)}
    y, x = np.mgrid[:height, :width]
    inside = ((x - left - w / 2) / (w / 2)) ** 2 + ((y - top - h / 2) / (h / 2)) ** 2 <= 1
    return {"segmentation": outline_of(inside.astype(np.uint8)), "area": int(inside.sum())}


def some_box(draw: random.Random, height: int, width: int) -> list[float]:
    w, h = (max(2.0, side * draw.random() ** 2) for side in (width, height))
    return [round(v, 2) for v in (draw.random() * (width - w), draw.random() * (height - h), w, h)]


def moved(draw: random.Random, box: list[float], height: int, width: int) -> list[float]:
    """Near the box, inside of the image."""
    left, top, w, h = (side + draw.gauss(0, 0.08) * box[2 + place % 2] for place, side in enumerate(box))
    left, top = min(max(left, 0.0), width - 2.0), min(max(top, 0.0), height - 2.0)
    return [round(v, 2) for v in (left, top, min(max(w, 2.0), width - left), min(max(h, 2.0), height - top))]


def drawn(seed: int, num_images: int, num_categories: int, most_things: int) -> tuple[dict[str, Any], list]:
    """Annotations in LVIS's format and detections in COCO's format of results."""
    draw = random.Random(seed)
    categories = [
        {"id": 3 * k + 1, "name": f"category {k}", "frequency": draw.choice(FREQUENCIES)}
        for k in range(num_categories)
    ]
    numbers = [category["id"] for category in categories]
    images, things, found = [], [], []
    for image in range(1, num_images + 1):
        height, width = draw.randint(40, 300), draw.randint(40, 300)
        present = draw.sample(numbers, draw.randint(0, min(num_categories, 6)))
        here = [draw.choice(present) for _ in range(draw.randint(0, most_things))] if present else []
        about: dict[str, Any] = {"image_id": image}
        boxes = []
        for category in here:
            box = some_box(draw, height, width)
            boxes.append((category, box))
            more = {"ignore": 1} if draw.random() < 0.05 else {}
            things.append(
                about | {"category_id": category, "bbox": box} | outlined(draw, box, height, width) | more
            )
        absent = [number for number in numbers if number not in here]
        images.append(
            {
                "id": image,
                "height": height,
                "width": width,
                "neg_category_ids": draw.sample(absent, min(len(absent), draw.randint(0, 5))),
                "not_exhaustive_category_ids": draw.sample(present, min(len(present), draw.randint(0, 2))),
            }
        )
        seen = [(c, moved(draw, box, height, width)) for c, box in boxes for _ in range(draw.randint(0, 2))]
        wrong = 320 if draw.random() < 0.05 else draw.randint(0, 12)
        told_of = numbers if draw.random() < 0.5 else [*present, *images[-1]["neg_category_ids"]] or numbers
        seen += [(draw.choice(told_of), some_box(draw, height, width)) for _ in range(wrong)]
        for category, box in seen:
            y, x = np.mgrid[:height, :width]
            left, top, w, h = box
            mask = (x >= left) & (x <= left + w) & (y >= top) & (y <= top + h)
            found.append(
                about
                | {"category_id": category, "bbox": box, "score": round(draw.random(), 2)}
                | {"segmentation": outline_of(mask.astype(np.uint8))}
            )
    for number, thing in enumerate(things, 1):
        thing["id"] = number
    return {"images": images, "annotations": things, "categories": categories}, found


def judged(content: dict[str, Any], found: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Ours, of the same annotations."""
    federation = federation_of(Path("drawn"), content["images"], content["categories"])
    assert federation is not None
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    return federated_precision(truth_of(sizes, content["annotations"], names), federation, found, kind)


def compare(
    case: tuple[dict[str, Any], list], place: Path, package: subprocess.Popen[str]
) -> list[dict[str, float]]:
    """By kind the greatest difference of a measure and of the AP of a category, and the seconds of both."""
    content, found = case
    (place / "truth.json").write_text(json.dumps(content))
    (place / "found.json").write_text(json.dumps(found))
    rows = []
    for kind in KINDS:
        asked = [str(place / "truth.json"), str(place / "found.json"), kind]
        assert package.stdin is not None and package.stdout is not None
        package.stdin.write(json.dumps(asked) + "\n")
        package.stdin.flush()
        told, by_category, seconds = json.loads(package.stdout.readline())
        started = time.perf_counter()
        ours = judged(json.loads(json.dumps(content)), found, kind)
        own_seconds = time.perf_counter() - started
        assert ours["by_category"].keys() == by_category.keys(), "other categories are judged"
        named = {name: NAMES.get(name, name) for name in ours if NAMES.get(name, name) in told}
        assert len(named) == len(told) == 13
        measures = [abs((-1.0 if ours[own] is None else ours[own]) - told[its]) for own, its in named.items()]
        categories = [abs(ours["by_category"][name] - value) for name, value in by_category.items()]
        rows.append(
            {
                "kind": kind,
                "AP": ours["AP"],
                "difference_of_measures": max(measures),
                "difference_of_categories": max(categories, default=0.0),
                "seconds": own_seconds,
                "seconds_of_lvis": seconds,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--make", type=Path, metavar="DIR", help="folder of a new environment")
    place.add_argument("--python", type=Path, help="interpreter that has the lvis package")
    parser.add_argument("--cases", type=int, default=40, help="random sets (%(default)s)")
    parser.add_argument(
        "--large", type=int, default=200, help="images of the set of 1,203 categories (%(default)s)"
    )
    options = parser.parse_args()
    python = options.python or make(options.make, REQUIREMENTS)
    package = subprocess.Popen(
        [python, "-W", "ignore", "-c", JUDGE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    shapes = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch, package:
        rows = []
        for seed in range(options.cases):
            case = drawn(seed, shapes.randint(1, 12), shapes.randint(1, 15), shapes.randint(1, 12))
            if case[1]:  # the package takes no empty list
                rows += compare(case, Path(scratch), package)
        large = compare(drawn(options.cases, options.large, 1203, 20), Path(scratch), package)
    every = [*rows, *large]
    keep(
        "lvis_agreement",
        "our federated AP is that of the lvis package, to rounding, on random annotations and detections",
        torch.device("cpu"),
        requirements=REQUIREMENTS,
        judged=len(rows),
        mean_AP=float(np.mean([row["AP"] for row in rows if row["AP"] is not None])),
        largest_difference_of_a_measure=max(row["difference_of_measures"] for row in every),
        largest_difference_of_a_category=max(row["difference_of_categories"] for row in every),
        large={"images": options.large, "categories": 1203, "by_kind": large},
    )


if __name__ == "__main__":
    main()
