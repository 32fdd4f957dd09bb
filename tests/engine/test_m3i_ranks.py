"""Does M3I learn the same on two ranks as on one? The real loader, model and engine, five steps each.

`python test_m3i_ranks.py FOLDER` is one rank of it.
"""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.collectives import mean_over_ranks, rank, world_size
from pretrain.config import Run
from pretrain.data.batch import Batch
from pretrain.monitor import Monitor
from pretrain.monitor.ranks import Sources, nats_by_source
from pretrain.monitor.trackers import scalars
from pretrain.recipes import load
from tests.data.sets import good_set, write_tokenizer
from tests.engine.launch import start
from tests.fakes import shrink
from tests.paths import ROOT

STEPS = 5
TOLERANCE = 1e-4  # float32 sums in another order, through five AdamW steps
NONE: dict[str, Any] = {}
DIVIDED = {"stage3_param_persistence_threshold": 0}  # all weights of this model are below that of zero3
VARIANTS = {  # name -> ds config, what is changed in its ZeRO section, backbone.activation_checkpoint
    "zero1": ("zero1", NONE, "none"),
    "zero2": ("zero2", NONE, "none"),
    "zero3": ("zero3", NONE, "none"),
    "zero3_divided": ("zero3", DIVIDED, "none"),
    "zero1_selective": ("zero1", NONE, "selective"),
    "zero2_full": ("zero2", NONE, "full"),
    "zero3_divided_selective": ("zero3", DIVIDED, "selective"),
    "zero3_divided_full": ("zero3", DIVIDED, "full"),
}
SAVED = 2  # steps before the checkpoint
SAVING = "zero3_divided"  # the variant of two ranks with which one rank goes on
REFERENCE = "zero1"  # alone, a rank partitions nothing


def m3i_run() -> Run:
    """The demo at the sizes of a test, with its batch norm over all ranks and both kinds of labels."""
    run = shrink(load("m3i.demo"))
    backbone = replace(run.backbone, drop_path=0.3, token_norm="batch")
    # Without warm-up Adam turns the rounding of gradients that are near 0 into whole steps at the full rate.
    optim = replace(run.optim, warmup=2 * STEPS)
    data = {name: replace(source, weight=1.0) for name, source in run.data.items()}
    return replace(run, data=data, batch=8, steps=2 * STEPS, backbone=backbone, optim=optim)


def run_variant(
    variant: str,
    run: Run,
    facts: Any,
    batches: list[Batch],
    sources: Sources,
    saved_to: Path | None = None,
    resumed_from: Path | None = None,
) -> list[dict[str, Any]]:
    """What the log says of every step, from equal weights or a checkpoint; saves one after SAVED steps."""
    from pretrain import checkpoint
    from tests.engine.whole_engine import float32_engine  # here: only ranks need DeepSpeed

    name, changes, choice = VARIANTS[variant]
    run = replace(run, backbone=replace(run.backbone, activation_checkpoint=choice))
    engine = float32_engine(run, facts, name, changes)
    if resumed_from is not None:
        checkpoint.restore(engine, resumed_from)
    curve = []
    for batch in batches:
        if saved_to is not None and engine.steps_done == SAVED:
            checkpoint.Saver(engine, saved_to, facts, None).save(wait=True)
        losses = engine.step(batch)
        curve.append({name: mean_over_ranks(value).item() for name, value in losses.nats.items()})
        curve[-1] |= {
            "total": mean_over_ranks(losses.total).item(),
            "grad_norm": float(engine.grad_norm),
            "image_norm": engine.balance.image_norm.item(),
            "label_norm": engine.balance.label_norm.item(),
            "lambda": engine.balance.weight.item(),
            "parts": {name: norm.item() for name, norm in engine.part_norms.items()},
            "readers": {name: norm.item() for name, norm in engine.balance.reader_norms.items()},
            "by_source": nats_by_source(losses.each, sources),
        }
    return curve


WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
)  # operators for which a GPU is waited


class Waits(TorchDispatchMode):
    """Collects the places from which the host would wait for a device, other than DeepSpeed's look at the gradient
    and the guard's, which is the same wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.overloadpacket.__name__ in WAITING:
            self.told()
        return operation(*args, **(kwargs or {}))

    def told(self) -> None:
        stack = [
            frame
            for frame in traceback.extract_stack()
            if f"{ROOT}/pretrain/" in frame.filename or "deepspeed" in frame.filename
        ]
        if "deepspeed" not in stack[-1].filename and stack[-1].name != "_may_move":
            self.found.append(f"{stack[-1].filename}:{stack[-1].lineno}")


def waits_between_lines(variant: str, run: Run, facts: Any, batches: list[Batch], log: Path) -> list[str]:
    """Where the host waits in two steps that are not logged, the monitor's part included."""
    from tests.engine.whole_engine import float32_engine

    name, changes, _ = VARIANTS[variant]
    engine = float32_engine(replace(run, log_every=100), facts, name, changes)
    engine.steps_done = 1
    with Monitor(log, engine.run, 1, engine.clock) as monitor, Waits() as waits, listed(waits):
        for batch in batches[:2]:
            monitor.after_step(engine, engine.step(batch), {}, {}, {})
    return waits.found


@contextmanager
def listed(waits: Waits) -> Iterator[None]:
    """Tells of `tolist` too, which is no operator on a CPU."""
    tolist = torch.Tensor.tolist
    torch.Tensor.tolist = lambda tensor: (waits.told(), tolist(tensor))[1]
    try:
        yield
    finally:
        torch.Tensor.tolist = tolist


def run_rank(folder: Path) -> None:
    """Every variant on this rank's share of the same batches; rank 0 leaves FOLDER/world_W.json."""
    from pretrain.data.loader import Loader
    from pretrain.distributed import start_distributed
    from pretrain.main import quieten

    quieten()
    torch.set_num_threads(1)
    start_distributed()
    run = m3i_run()
    folders = {name: folder / name for name in run.data}
    place = {"rank": rank(), "world": world_size()}
    with closing(Loader(run, folders, folder / "tokenizer", **place)) as loader:
        batches = [next(loader) for _ in range(STEPS)]
        sources = Sources(tuple(run.data), loader.cycle)
    variants = VARIANTS if world_size() > 1 else (REFERENCE,)
    places = {SAVING: folder / "checkpoints"} if world_size() > 1 else {}
    curves = {
        variant: run_variant(variant, run, loader.facts, batches, sources, places.get(variant))
        for variant in variants
    }
    if world_size() == 1:  # goes on from what two ranks saved, with a loader that begins there
        with closing(Loader(run, folders, folder / "tokenizer", **place, start_step=SAVED)) as loader:
            rest = [next(loader) for _ in range(STEPS - SAVED)]
        resumed_from = folder / "checkpoints" / f"step_{SAVED:06d}"
        curves["resumed"] = run_variant(
            REFERENCE, run, loader.facts, rest, sources, resumed_from=resumed_from
        )
    logs = folder / f"log_{world_size()}"
    logs.mkdir(exist_ok=True)
    waiting = variants if world_size() == 1 else ("zero2", "zero3_divided")
    waits = {variant: waits_between_lines(variant, run, loader.facts, batches, logs) for variant in waiting}
    captioned = [batch.has_text.tolist() for batch in batches]
    if rank() == 0:
        outcome = json.dumps({"curves": curves, "captioned": captioned, "waits": waits})
        (folder / f"world_{world_size()}.json").write_text(outcome)


def launch(folder: Path, world: int) -> dict[str, Any]:
    """What `world` ranks found; AssertionError with their output when one fails."""
    codes, output = start(folder, world=world, script=Path(__file__))
    assert codes == [0] * world, f"{world} ranks ended with {codes}:\n{output}"
    return json.loads((folder / f"world_{world}.json").read_text())


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Outcome by number of ranks; one launch each, since most of its time is imports."""
    folder = tmp_path_factory.mktemp("m3i")
    good_set(folder / "labelled", has_text=False)
    good_set(folder / "captioned", sizes=(6, 9), has_category=False)
    write_tokenizer(folder / "tokenizer")
    return {world: launch(folder, world) for world in (2, 1)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_m3i_at_two_ranks_equals_one_rank(worlds: dict[int, dict[str, Any]], variant: str) -> None:
    curve, reference = worlds[2]["curves"][variant], worlds[1]["curves"][REFERENCE]
    assert len(curve) == STEPS
    for step, (computed, expected) in enumerate(zip(curve, reference, strict=True)):
        assert flat(computed) == pytest.approx(flat(expected), rel=TOLERANCE), f"step {step}"


def flat(values: dict[str, Any]) -> dict[str, float]:
    """Every number with its path."""
    return dict(scalars(values))


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_of_the_gradient_add_up_to_the_whole(worlds: dict[int, dict[str, Any]], variant: str) -> None:
    for values in worlds[2]["curves"][variant]:
        assert values["parts"].keys() == {"encoder", "decoders", "text", "heads"}
        assert math.hypot(*values["parts"].values()) == pytest.approx(values["grad_norm"], rel=1e-4)


def test_gradients_of_targets_add_up_to_those_of_the_two_sides(worlds: dict[int, dict[str, Any]]) -> None:
    for values in worlds[2]["curves"]["zero3_divided"]:
        readers = values["readers"]
        assert readers["category+text"] == pytest.approx(values["label_norm"], rel=1e-4)
        # Each image is predicted from tokens of its own, so that the two gradients are orthogonal.
        images = math.hypot(readers["image_same"], readers["image_other"])
        assert images == pytest.approx(values["image_norm"], rel=1e-4)


def test_losses_of_sources_are_those_of_their_images(worlds: dict[int, dict[str, Any]]) -> None:
    for values, has_text in zip(worlds[1]["curves"][REFERENCE], worlds[1]["captioned"], strict=True):
        by_source = values["by_source"]
        assert by_source["category"] == pytest.approx({"labelled": values["category"]}, rel=1e-5)
        assert by_source["text"] == pytest.approx({"captioned": values["text"]}, rel=1e-5)
        share = sum(has_text[0::2]) / len(has_text[0::2])  # of the first images of all pairs
        mixed = share * by_source["image_same"].get("captioned", 0.0)
        mixed += (1 - share) * by_source["image_same"].get("labelled", 0.0)
        assert mixed == pytest.approx(values["image_same"], rel=1e-5)


@pytest.mark.parametrize("world", [1, 2])
def test_between_logged_steps_the_host_never_waits_for_the_device(
    worlds: dict[int, dict[str, Any]], world: int
) -> None:
    assert set(map(tuple, worlds[world]["waits"].values())) == {()}, worlds[world]["waits"]


def test_one_rank_goes_on_from_two_as_if_there_had_been_no_stop(worlds: dict[int, dict[str, Any]]) -> None:
    resumed, straight = worlds[1]["curves"]["resumed"], worlds[2]["curves"][SAVING][SAVED:]
    for step, (computed, expected) in enumerate(zip(resumed, straight, strict=True)):
        assert flat(computed) == pytest.approx(flat(expected), rel=TOLERANCE), f"step {SAVED + step}"


def test_all_targets_are_learned_from_shares_with_unequal_labels(worlds: dict[int, dict[str, Any]]) -> None:
    reference = worlds[1]["curves"][REFERENCE]
    targets = m3i_run().objective.targets
    assert all(values[name] > 0 for values in reference for name in targets)
    assert all(reference[0][name] != pytest.approx(reference[-1][name], rel=0.01) for name in targets)
    counts = [(sum(rows[: len(rows) // 2]), sum(rows)) for rows in worlds[1]["captioned"]]
    assert any(0 < 2 * first != whole for first, whole in counts), (
        f"ranks had equal shares of texts: {counts}"
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run_rank(Path(sys.argv[1]))
