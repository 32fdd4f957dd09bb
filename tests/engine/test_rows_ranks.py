"""Does every row of the table learn, go on and export under ZeRO-3 on two ranks as alone, on its backbones?

`python test_rows_ranks.py FOLDER` is one rank of it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import pytest
import torch
from torch import Tensor

from pretrain.collectives import mean_over_ranks, rank, world_size
from pretrain.config import Run
from pretrain.data.batch import Batch
from pretrain.evaluate.checkpoints import find_checkpoint
from pretrain.export.formats import export
from pretrain.export.trained import read_trained
from pretrain.objectives import OBJECTIVES
from pretrain.recipes import load
from tests.engine.launch import start
from tests.fakes import FACTS, random_batch, shrink

STEPS, IMAGES = 2, 8  # a quiet and a loud step
TIMEOUT = 900  # seconds for all rows of a launch; about 240 on two free cores
SAVED = 1  # steps before the checkpoint from which the last step is done again
TOLERANCE = 2e-4  # float32 sums in another order
# AdamW makes whole steps of the rounding of gradients near 0: compared are steps at a tiny rate, and one at a usual
# rate has to move every weight.
QUIET, LOUD = 1e-6, 1e-3
UNSEEN = ("key.bias", "k_bias")  # a softmax does not see what all keys share: no gradient but rounding
# Ranks and ZeRO-3 meet a row's heads and losses, and a family's blocks: every row once, the methods on all families.
SAME_BUT_FOR_A_NUMBER = ("m3i_gamma_0.2", "m3i_gamma_0.5", "m3i_gamma_5.0")  # of m3i_gamma_2.0
FAMILIES = {row: ("vit",) for row in OBJECTIVES if row not in SAME_BUT_FOR_A_NUMBER}
FAMILIES |= {row: ("vit", "internimage") for row in ("m3i", "mvp")}
FAMILIES |= {"hvp_mtl": ("vit", "internimage", "swin")}
CASES = [(row, family) for row, families in FAMILIES.items() for family in families]
FORMATS = {"vit": "timm", "internimage": "internimage", "swin": "timm"}


def row_run(row: str, family: str) -> Run:
    """A row at the sizes of a test; every rank sees its own half of IMAGES."""
    run = load("m3i.vit_b16" if row == "m3i" else f"rows.{row}")
    run = shrink(replace(run, backbone=replace(run.backbone, family=family, drop_path=0.0)))
    # With weight decay a weight would move without any gradient.
    optim = replace(run.optim, lr=QUIET, final_lr=QUIET, warmup=0, weight_decay=0.0)
    return replace(run, batch=IMAGES, steps=2 * STEPS, optim=optim)


def share(batch: Batch) -> Batch:
    """This rank's part of a batch, in the order of the whole."""
    cut = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return Batch(**{name: value.chunk(world_size())[rank()] for name, value in cut.items()})


def learn(run: Run, out: Path) -> dict[str, Any]:
    """Losses of a quiet and of a loud step, the latter also as a resumed run repeats it; what it did not move."""
    from pretrain import checkpoint
    from pretrain.ema import local_master, local_slices
    from tests.engine.whole_engine import float32_engine  # here: only ranks need DeepSpeed

    name = "zero3" if world_size() > 1 else "zero1"  # alone, a rank partitions nothing
    engine = float32_engine(run, FACTS, name, smooth=True)
    model = engine._student.module
    parameters = dict(model.named_parameters())
    owned = [part for part in local_slices(model) if part.numel]

    def masters() -> dict[str, Tensor]:
        return {s.name: local_master(parameters[s.name], s.numel).clone() for s in owned}

    def step() -> dict[str, float]:
        losses = engine.step(share(random_batch(run, IMAGES, seed=engine.steps_done)))
        nats = {name: mean_over_ranks(value).item() for name, value in losses.nats.items()}
        return nats | {"grad_norm": float(engine.grad_norm)}

    kept, weights = checkpoint.checkpoints_of(out), masters()
    teacher = {key: value.clone() for key, value in engine.average.state().items()}
    curve = [step() for _ in range(SAVED)]
    if world_size() > 1:
        checkpoint.Saver(engine, kept, FACTS, None).save(wait=True)
    engine.run = replace(run, optim=replace(run.optim, lr=LOUD, final_lr=LOUD))
    curve += [step() for _ in range(STEPS - SAVED)]
    resumed = curve[SAVED:]
    if world_size() > 1:
        checkpoint.restore(engine, checkpoint.folder_in(kept, SAVED))
        resumed = [step() for _ in range(STEPS - SAVED)]
    moved = {"student": (weights, masters()), "teacher": (teacher, engine.average.state())}
    still = [
        f"{whose}: {key}"
        for whose, (before, after) in moved.items()
        for key, value in after.items()
        if torch.equal(value, before[key]) and not key.endswith(UNSEEN)
    ]
    return {"curve": curve, "resumed": resumed, "still": still}


def run_rank(folder: Path) -> None:
    """Every row on this rank's share of the same batches; rank 0 leaves FOLDER/world_W.json."""
    from pretrain.distributed import start_distributed
    from pretrain.main import quieten

    quieten()
    torch.set_num_threads(1)
    start_distributed()
    found = {
        f"{row}-{family}": learn(row_run(row, family), folder / f"{row}-{family}") for row, family in CASES
    }
    if rank() == 0:
        (folder / f"world_{world_size()}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def worlds(folder: Path) -> dict[int, dict[str, Any]]:
    """Outcome by number of ranks; one launch each, since most of its time is imports."""
    outcomes = {}
    for world in (1, 2):
        codes, output = start(folder, world=world, script=Path(__file__), timeout=TIMEOUT)
        assert codes == [0] * world, f"{world} ranks ended with {codes}:\n{output}"
        outcomes[world] = json.loads((folder / f"world_{world}.json").read_text())
    return outcomes


@pytest.mark.parametrize(("row", "family"), CASES)
def test_a_row_at_two_ranks_equals_one_rank(worlds: dict[int, Any], row: str, family: str) -> None:
    computed, expected = (worlds[world][f"{row}-{family}"] for world in (2, 1))
    assert len(computed["curve"]) == STEPS
    assert set(computed["curve"][0]) == {*OBJECTIVES[row].targets, "grad_norm"}
    for step, (found, wanted) in enumerate(zip(computed["curve"], expected["curve"], strict=True)):
        assert all(map(math.isfinite, found.values()))
        assert found == pytest.approx(wanted, rel=TOLERANCE), f"step {step}"


@pytest.mark.parametrize(("row", "family"), CASES)
def test_a_row_moves_every_weight_and_every_part_of_the_teacher(
    worlds: dict[int, Any], row: str, family: str
) -> None:
    assert [worlds[world][f"{row}-{family}"]["still"] for world in (1, 2)] == [[], []]


@pytest.mark.parametrize(("row", "family"), CASES)
def test_a_resumed_row_repeats_the_step_after_its_checkpoint(
    worlds: dict[int, Any], row: str, family: str
) -> None:
    outcome = worlds[2][f"{row}-{family}"]
    assert outcome["resumed"] == outcome["curve"][SAVED:]


@pytest.mark.parametrize(("row", "family"), CASES)
def test_a_row_exports_with_proof_from_two_ranks(
    worlds: dict[int, Any], folder: Path, row: str, family: str
) -> None:
    out = folder / f"{row}-{family}"
    trained = read_trained(out, find_checkpoint(out, "last"), "teacher")
    exported = export(trained, FORMATS[family], out / "exported")
    assert exported.proof and all(agreement.cosine > 0.9999 for agreement in exported.proof)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run_rank(Path(sys.argv[1]))
