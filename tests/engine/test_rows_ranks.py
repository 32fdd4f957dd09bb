"""Does every row of the table learn the same under ZeRO-3 on two ranks as alone, on ViT and InternImage?

`python test_rows_ranks.py FOLDER` is one rank of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import pytest
import torch

from pretrain.collectives import mean_over_ranks, rank, world_size
from pretrain.config import Run
from pretrain.data.batch import Batch
from pretrain.objectives import OBJECTIVES
from pretrain.recipes import load
from tests.engine.launch import start
from tests.fakes import FACTS, random_batch, shrink

STEPS, IMAGES = 3, 8
TOLERANCE = 2e-4  # float32 sums in another order, through three AdamW steps
FAMILIES = ("vit", "internimage")


def row_run(row: str, family: str) -> Run:
    """A row at the sizes of a test; every rank sees its own half of IMAGES."""
    run = shrink(load("m3i.vit_b16" if row == "m3i" else f"rows.{row}"))
    backbone = replace(run.backbone, family=family, size=f"{family}_tiny", drop_path=0.0)
    # Without warm-up Adam turns the rounding of gradients that are near 0 into whole steps at the full rate.
    optim = replace(run.optim, warmup=2 * STEPS)
    return replace(run, batch=IMAGES, steps=2 * STEPS, backbone=backbone, optim=optim)


def share(batch: Batch) -> Batch:
    """This rank's part of a batch, in the order of the whole."""
    cut = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return Batch(**{name: value.chunk(world_size())[rank()] for name, value in cut.items()})


def learn(run: Run) -> dict[str, Any]:
    """Losses of every step; parameters that did not move; whether the teacher moved."""
    from tests.engine.whole_engine import float32_engine  # here: only ranks need DeepSpeed

    name = "zero3" if world_size() > 1 else "zero1"  # alone, a rank partitions nothing
    engine = float32_engine(run, FACTS, name)
    before = {key: value.clone() for key, value in engine.average.state().items()}
    curve = []
    for step in range(STEPS):
        losses = engine.step(share(random_batch(run, IMAGES, seed=step)))
        curve.append({name: mean_over_ranks(value).item() for name, value in losses.nats.items()})
        curve[-1]["grad_norm"] = float(engine.grad_norm)
    after = engine.average.state()
    still = [key for key, value in before.items() if value.numel() and torch.equal(value, after[key])]
    return {"curve": curve, "still": still}


def run_rank(folder: Path) -> None:
    """Every row on this rank's share of the same batches; rank 0 leaves FOLDER/world_W.json."""
    from pretrain.engine import start_distributed
    from pretrain.main import quieten

    quieten()
    torch.set_num_threads(1)
    start_distributed()
    found = {f"{row}-{family}": learn(row_run(row, family)) for family in FAMILIES for row in OBJECTIVES}
    if rank() == 0:
        (folder / f"world_{world_size()}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Outcome by number of ranks; one launch each, since most of its time is imports."""
    folder = tmp_path_factory.mktemp("rows")
    outcomes = {}
    for world in (1, 2):
        codes, output = start(folder, world=world, script=Path(__file__))
        assert codes == [0] * world, f"{world} ranks ended with {codes}:\n{output}"
        outcomes[world] = json.loads((folder / f"world_{world}.json").read_text())
    return outcomes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", OBJECTIVES)
def test_a_row_at_two_ranks_equals_one_rank(worlds: dict[int, Any], row: str, family: str) -> None:
    computed, expected = (worlds[world][f"{row}-{family}"] for world in (2, 1))
    assert len(computed["curve"]) == STEPS
    assert set(computed["curve"][0]) == {*OBJECTIVES[row].targets, "grad_norm"}
    for step, (found, wanted) in enumerate(zip(computed["curve"], expected["curve"], strict=True)):
        assert found == pytest.approx(wanted, rel=TOLERANCE), f"step {step}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", OBJECTIVES)
def test_a_row_moves_every_part_of_the_teacher(worlds: dict[int, Any], row: str, family: str) -> None:
    assert [worlds[world][f"{row}-{family}"]["still"] for world in (1, 2)] == [[], []]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run_rank(Path(sys.argv[1]))
