"""Do mmsegmentation and mmdetection 3.x load what `--to openmmlab` writes, and train on it?

    OMP_NUM_THREADS=1 python benchmarks/openmmlab_loads.py --make DIR      # makes the environment by pip, 0.5 GB
    OMP_NUM_THREADS=1 python benchmarks/openmmlab_loads.py --python PATH   # or uses the one of this interpreter

Exports backbones with random weights (`--sizes`, InternImage-T and ViT-B/16), builds every configuration file
by the toolkits in an environment of their own (mmcv-lite: its compiled operators are missing, so Mask R-CNN is built
and not run), compares the backbones' maps at two sizes and makes one training step of three of them. Writes
benchmarks/results/openmmlab_loads.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.environment import make
from benchmarks.record import keep
from pretrain.config import Run
from pretrain.export.agreement import random_images
from pretrain.export.formats import export
from pretrain.export.fresh_process import run_fresh
from pretrain.export.openmmlab import PROBE
from pretrain.export.trained import read_trained
from pretrain.facts import DataFacts
from pretrain.recipes import load
from tests.evaluate.runs import write_run
from tests.fakes import shrink

STEP = Path(__file__).resolve().parent / "openmmlab_step.py"
FACTS = DataFacts(categories=("apple", "boat", "cat", "door", "egg"), vocab_size=100)
RECIPES = {"internimage": "m3i.internimage_h", "vit": "m3i.vit_b16"}
# Newer ones do not fit together: mmsegmentation wants mmcv below 2.2, mmpretrain transformers 4 and an importlib
# metadata without further needs. All without their own requirements, which name versions of numpy and torch.
REQUIREMENTS = (
    "mmengine==0.10.7", "mmcv-lite==2.1.0", "mmsegmentation==1.2.2", "mmdet==3.3.0", "mmpretrain==1.2.0",
    "transformers==4.46.3", "tokenizers==0.20.3", "huggingface_hub==0.26.5", "importlib_metadata==6.8.0",
    "addict==2.4.0", "yapf==0.43.0", "prettytable==3.18.0", "terminaltables==3.1.10", "pycocotools==2.0.11",
    "shapely==2.2.0", "matplotlib==3.11.2", "contourpy==1.3.3", "cycler==0.12.1", "fonttools==4.68.0",
    "kiwisolver==1.5.1", "pyparsing==3.3.3", "model-index==0.1.11", "ordered-set==4.1.0", "mat4py==0.6.0",
    "Markdown==3.11.3", "zipp==4.1.2",
)  # fmt: skip


def run_of(size: str) -> Run:
    family = size.split("_")[0]
    small = shrink(load(RECIPES[family]))
    return replace(small, backbone=replace(small.backbone, size=size))


def measure(size: str, python: Path, place: Path) -> dict[str, object]:
    """The proof and a training step of one backbone with random weights."""
    folder = write_run(place / size, run_of(size), FACTS, steps=(0,))
    trained = read_trained(folder, folder / "checkpoints" / "step_000000", "teacher")
    started = time.perf_counter()
    exported = export(trained, "openmmlab", place / f"{size}-export", str(python))
    seconds = time.perf_counter() - started
    assert not exported.unproven, exported.unproven
    _, told = run_fresh(PROBE, {"64": random_images(64)}, "toolkit", str(exported.folder), python=str(python))
    command = [python, "-I", "-W", "ignore", STEP, exported.folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"no training step of {size}: {done.stderr[-3000:]}")
    return {
        "backbone_parameters": sum(p.numel() for p in trained.towers.encoder.parameters()),
        "seconds_of_export_and_proof": round(seconds, 1),
        "min_cosine": min(a.cosine for a in exported.proof),
        "max_difference": max(a.max_difference for a in exported.proof),
        "toolkits": told,
        "training_step": json.loads(done.stdout.strip().splitlines()[-1]),
        "proof": [asdict(agreement) for agreement in exported.proof if agreement.output.endswith("-1")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--make", type=Path, metavar="DIR", help="folder of a new environment")
    place.add_argument("--python", type=Path, help="interpreter that has the toolkits")
    parser.add_argument("--sizes", nargs="+", default=["internimage_t", "vit_b16"], help="backbone.size")
    options = parser.parse_args()
    python = options.python or make(options.make, REQUIREMENTS)
    with tempfile.TemporaryDirectory() as scratch:
        found = {size: measure(size, python, Path(scratch)) for size in options.sizes}
    keep(
        "openmmlab_loads",
        "mmsegmentation and mmdetection build every exported configuration file and load its weights bit by bit; "
        "those for ADE20K and COCO give our features at two sizes; UperNet, Mask2Former and DINO for COCO make a "
        "training step",
        torch.device("cpu"),
        requirements=REQUIREMENTS,
        backbones=found,
    )


if __name__ == "__main__":
    main()
