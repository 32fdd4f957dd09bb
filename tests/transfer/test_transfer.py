"""Do all backbones learn under all heads, and does a training go on where it stopped?"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pretrain import training_state
from pretrain.evaluate.augment import seeded
from pretrain.evaluate.checkpoints import find_checkpoint
from pretrain.export.__main__ import main as export_main
from pretrain.training_state import States
from pretrain.transfer import __main__ as command
from pretrain.transfer import memory, training
from pretrain.transfer.arguments import parse
from pretrain.transfer.asked import prepared, result_of
from pretrain.transfer.backbone import load_trunk
from pretrain.transfer.examples import Drops
from pretrain.transfer.order import Draws
from pretrain.transfer.places import Named, open_sets
from pretrain.transfer.pretrained import open_pretrained
from pretrain.transfer.rates import Layered, rate
from pretrain.transfer.recipes import RECIPES, Detect, Optimisation, recipe
from pretrain.transfer.training import STATE, Machine
from pretrain.transfer.work import RESULT, TASKS, Work, require_own, transfer

# pycocotools (https://github.com/ppwwyyxx/cocoapi) hands arrays to numpy in a way that is to end.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CPU = Machine(torch.device("cpu"))
TINY = {"segment": ("small",), "detect": ("small", "small_detr")}
CASES = [(task, name) for task, names in TINY.items() for name in names]


def tiny(task: str, name: str, steps: int = 2):
    numbers = recipe(task, name)
    optimisation = replace(numbers.optimisation, steps=steps, batch=2, warmup=1, drop_path=0.1)
    small = replace(numbers, size=32, optimisation=optimisation)
    return replace(small, detections=8) if isinstance(small, Detect) else small


def work(run: Path, out: Path, task: str, name: str, **more) -> Work:
    return Work(find_checkpoint(run, "last"), tiny(task, name, more.pop("steps", 2)), name, out, **more)


@pytest.mark.parametrize("family", ["internimage", "swin", "vit"])
@pytest.mark.parametrize(("task", "name"), CASES)
def test_every_backbone_learns_under_every_head(
    family: str, task: str, name: str, runs: dict[str, Path], shards: Path
) -> None:
    """The trunk begins as pre-trained, and every weight of it that the maps need gets a gradient."""
    numbers = tiny(task, name)
    pretrained = open_pretrained(find_checkpoint(runs[family], "last"))
    train_set, _ = open_sets(task, Named(shards), 0.0)
    torch.manual_seed(0)
    model, draw, loss_of = TASKS[task](
        pretrained, replace(numbers, optimisation=replace(numbers.optimisation, drop_path=0.0)), train_set
    )
    encoder = load_trunk(model, pretrained.encoder, is_frozen=False)
    trained = pretrained.encoder.state_dict()
    learning = {name: weight for name, weight in encoder.named_parameters() if weight.requires_grad}
    assert learning and all(torch.equal(weight, trained[name]) for name, weight in learning.items())
    loss_of(model.train(), [draw(0), draw(1)]).backward()
    without = [name for name, weight in learning.items() if weight.grad is None or not weight.grad.any()]
    assert [name for name in without if not name.endswith(("offset.weight", "mask.weight"))] == []


def test_rt_detr_tells_places_of_an_image_apart_before_it_learns(runs: dict[str, Path], shards: Path) -> None:
    """As transformers starts it, what its queries are chosen by would be the same everywhere: 0.01 in place of 1."""
    pretrained = open_pretrained(find_checkpoint(runs["internimage"], "last"))
    train_set, _ = open_sets("detect", Named(shards), 0.0)
    torch.manual_seed(0)
    model, draw, _ = TASKS["detect"](pretrained, tiny("detect", "small_detr"), train_set)
    seen = []
    model.net.model.enc_output.register_forward_hook(lambda module, into, out: seen.append(out))
    model.train().loss([draw(0), draw(1)])
    (places,) = seen
    assert places.std(1).mean() > 0.5


@pytest.mark.parametrize(("task", "name"), CASES)
def test_a_training_that_was_stopped_ends_as_one_that_was_not(
    task: str, name: str, runs: dict[str, Path], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = open_sets(task, Named(shards), 0.0)
    straight = transfer(work(runs["vit"], tmp_path / "straight", task, name), *sets, CPU)
    monkeypatch.setattr(training_state, "SAVE_SECONDS", -1.0)
    saves = []

    def stop(*arguments) -> None:
        save(*arguments)
        saves.append(arguments)
        raise KeyboardInterrupt

    save = States.save
    monkeypatch.setattr(States, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        transfer(work(runs["vit"], tmp_path / "stopped", task, name), *sets, CPU)
    monkeypatch.setattr(States, "save", save)
    resumed = transfer(work(runs["vit"], tmp_path / "stopped", task, name), *sets, CPU)
    states = [torch.load(tmp_path / out / STATE, weights_only=True) for out in ("straight", "stopped")]
    assert states[0]["step"] == states[1]["step"] == 2 and len(saves) == 1
    for key, weight in states[0]["model"].items():
        assert torch.equal(weight, states[1]["model"][key]), key
    assert resumed["scores"] == straight["scores"]


def test_no_state_is_kept_of_a_loss_that_is_not_finite(
    runs: dict[str, Path], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = open_sets("segment", Named(shards), 0.0)
    monkeypatch.setattr(training_state, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(training, "mean_over_ranks", lambda loss: losses.pop(0))
    losses = [1.0, float("nan")]  # of both steps, of which the second is no 20th
    with pytest.raises(
        ValueError, match=r"the loss was nan at step 1: .*lower --lr .*--clip.*name another --out"
    ):
        transfer(work(runs["vit"], tmp_path / "out", *CASES[0]), *sets, CPU)
    assert torch.load(tmp_path / "out" / STATE, weights_only=True)["step"] == 1


def test_a_frozen_backbone_stays_and_its_head_learns(
    runs: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    sets = open_sets("segment", Named(shards), 0.0)
    trained = open_pretrained(find_checkpoint(runs["swin"], "last")).encoder.state_dict()
    transfer(work(runs["swin"], tmp_path, "segment", "small", is_frozen=True), *sets, CPU)
    after = torch.load(tmp_path / STATE, weights_only=True)["model"]
    prefix = "net.backbone.pyramid.encoder."
    trunk = {name: w for name, w in trained.items() if name.startswith("swin.")}
    assert all(torch.equal(after[f"{prefix}{name}"], weight) for name, weight in trunk.items())
    assert after["net.decode_head.classifier.bias"].any()


def test_layers_further_from_the_head_learn_slower(runs: dict[str, Path], shards: Path) -> None:
    pretrained = open_pretrained(find_checkpoint(runs["vit"], "last"))
    train_set, _ = open_sets("segment", Named(shards), 0.0)
    optimisation = replace(recipe("segment", "ade20k").optimisation, backbone_rate=0.1)
    numbers = replace(tiny("segment", "small"), optimisation=optimisation)
    model, _, _ = TASKS["segment"](pretrained, numbers, train_set)
    layered = Layered(model, load_trunk(model, pretrained.encoder, is_frozen=False))
    scales = {
        id(weight): group["lr_scale"]
        for group in layered.groups(numbers.optimisation)
        for weight in group["params"]
    }
    vit = model.net.backbone.pyramid.encoder.vit
    decay = numbers.optimisation.layer_decay
    assert scales[id(model.net.decode_head.classifier.weight)] == 1.0
    depth = [scales[id(vit.patch_embed.proj.weight)], *(scales[id(b.norm1.weight)] for b in vit.blocks)]
    ratios = [below / above for below, above in pairwise(depth)]
    assert ratios == pytest.approx([decay] * len(ratios))
    assert depth[-1] == pytest.approx(0.1 * decay)


@pytest.mark.parametrize("seed", [0, 2**24 - 1, 2**28, 2**32 - 1])
def test_every_seed_that_the_command_allows_can_be_drawn_from(seed: int) -> None:
    draws = Draws(4, lambda index: (index, float(torch.rand(()))), seed)
    assert draws[5] == draws[5] != draws[6]
    assert draws[5][1] != Draws(4, draws.draw, (seed + 1) % 2**32)[5][1]
    drawn = []
    for step in (3, 3, 4):
        with seeded(training._seed(seed, step)):
            drawn.append(float(torch.rand(())))
    assert drawn[0] == drawn[1] != drawn[2]


def test_rates_of_the_schedules() -> None:
    steps = Optimisation(steps=90, batch=1, lr=2.0, warmup=4, schedule="step", milestones=(8 / 9, 17 / 18))
    assert [rate(step, steps) for step in (0, 3, 79, 80, 85)] == pytest.approx([0.5, 2, 2, 0.2, 0.02])
    linear = Optimisation(steps=100, batch=1, lr=1.0, warmup=0)
    assert [rate(step, linear) for step in (0, 50, 99)] == pytest.approx([1, 0.5, 0.01])


def test_the_command_writes_scores_and_detections_and_refuses_other_numbers(
    runs: dict[str, Path],
    coco: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    arguments = ["detect", str(runs["internimage"]), "--data", str(coco), "--out", str(out)]
    small = tiny("detect", "small")
    monkeypatch.setitem(RECIPES["detect"], "small", lambda: small)
    assert command.main([*arguments, "--train-steps", "2"]) == 0
    assert command.main([*arguments, "--train-steps", "3"]) == 1
    changed = coco / "annotations" / "instances_val.json"
    changed.write_text(changed.read_text().replace('"area": 256', '"area": 255'))
    assert command.main([*arguments, "--train-steps", "2"]) == 1
    said = capsys.readouterr()
    assert "bbox AP" in said.out and "segm AP" in said.out
    assert (
        "is the state of a transfer with numbers=" in said.err and "(differing: ['heldout_set'])" in said.err
    )
    assert "name another --out" in said.err
    result = json.loads((out / "result.json").read_text())
    assert result["scores"]["box"]["n"] == 4 and result["recipe"] == "small"
    assert all(
        found["image_id"] in (5, 6, 7, 8) for found in json.loads((out / "detections.json").read_text())
    )


def test_a_checkpoint_and_its_export_learn_as_the_run(
    runs: dict[str, Path], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tiny("segment", "small")
    monkeypatch.setitem(RECIPES["segment"], "small", lambda: small)
    step = find_checkpoint(runs["vit"], "last")
    assert export_main([str(runs["vit"]), "--to", "safetensors", "--out", str(tmp_path / "export")]) == 0
    places = {"run": runs["vit"], "step": step, "export": tmp_path / "export"}
    for name, place in places.items():
        out = str(tmp_path / "out" / name)
        assert command.main(["segment", str(place), "--data", str(shards), "--out", out, "--frozen"]) == 0
    first, *others = (
        torch.load(tmp_path / "out" / name / STATE, weights_only=True)["model"] for name in places
    )
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)


def test_a_checkpoint_in_its_run_has_its_result_there_and_goes_on_as_the_run_does(
    runs: dict[str, Path], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, alone = tmp_path / "run", tmp_path / "step_000000"
    shutil.copytree(runs["vit"], run)
    step = find_checkpoint(run, "last")
    assert step.name == alone.name
    shutil.copytree(step, alone)
    small = tiny("segment", "small")
    monkeypatch.setitem(RECIPES["segment"], "small", lambda: small)
    before = sorted((run / "checkpoints").iterdir())
    rest = ["--data", str(shards), "--frozen"]
    assert command.main(["segment", str(step), *rest]) == 0
    made = run / "transfer" / "segment-small-step_000000"
    (made / RESULT).unlink()
    assert sorted((run / "checkpoints").iterdir()) == before
    state = (made / STATE).stat().st_mtime_ns
    assert command.main(["segment", str(run), *rest]) == 0  # of the same checkpoint: it goes on
    assert (made / RESULT).is_file() and (made / STATE).stat().st_mtime_ns == state
    assert command.main(["segment", str(step), *rest, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / RESULT).is_file()
    monkeypatch.chdir(step)
    assert result_of(Path(), Path(), "x") == run / "transfer" / "x"
    assert result_of(alone, alone, "x") == tmp_path / "step_000000.transfer" / "x"


@pytest.mark.parametrize("names", [["manifest.json", "000000.tar"], ["result.json"]], ids=["data", "others'"])
def test_a_folder_of_other_files_is_no_place_for_a_transfer(
    names: list[str], runs: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).write_text("[]")
    arguments = ["segment", str(runs["vit"]), "--data", str(shards), "--out", str(tmp_path)]
    with pytest.raises(
        FileExistsError, match=rf"holds {sorted(names)[0]}.* and no transfer.*an empty or new folder"
    ):
        command.run(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    (tmp_path / "result.json").write_text(json.dumps({"task": "segment", "scores": {}}))
    require_own(tmp_path)
    require_own(tmp_path / "absent")


def test_an_image_that_breaks_later_is_counted_or_stops_the_training(
    runs: dict[str, Path], coco: Path, tmp_path: Path
) -> None:
    sets = open_sets("detect", Named(coco), 0.0)
    for name in ("3.png", "7.png"):
        (coco / "images" / name).write_bytes(b"nothing")
    bad = Machine(CPU.device, max_bad=0.0)
    with pytest.raises(
        ValueError, match=r"examples of step_000000 detect: 1 of 4 .*not_an_image 1.*3.png.*--max-bad"
    ):
        transfer(work(runs["vit"], tmp_path / "strict", "detect", "small_detr"), *sets, bad)
    result = transfer(work(runs["vit"], tmp_path / "mild", "detect", "small_detr"), *sets, CPU)
    assert result["dropped"] == {"train": {"not_an_image": 1}, "heldout": {"not_an_image": 1}}
    assert result["scores"]["box"]["n"] == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            ["--recipe", "large"],
            r"--recipe 'large' is unknown for `segment`; choose from \['ade20k', 'ade20k_internimage', 'small'\]",
        ),
        (["--max-bad", "1.5"], r"--max-bad 1.5 must lie in \[0, 1\)"),
        (["--step", "7"], "cannot be used, since there is none"),
        (["--train-steps", "0"], "--train-steps 0 must be 1 or more"),
        (["--seed", "4294967296"], r"--seed 4294967296 must lie in \[0, 4294967295\]"),
        (["--lr", "0"], "--lr 0.0 must be above 0 and finite"),
        (["--clip", "-1"], "--clip -1.0 must not be negative"),
        (["--workers", "-1"], "--workers -1 must not be negative"),
    ],
)
def test_mistakes_are_told_before_anything_is_done(
    changed: list[str], message: str, runs: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    arguments = ["segment", str(runs["vit"]), "--data", str(shards), "--out", str(tmp_path / "out"), *changed]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        command.run(arguments)


def test_a_step_is_not_asked_of_one_checkpoint(runs: dict[str, Path], shards: Path) -> None:
    (step, *_) = sorted((runs["vit"] / "checkpoints").iterdir())
    with pytest.raises(ValueError, match=r"--step last would be ignored, .* is one checkpoint: leave it out"):
        command.run(["segment", str(step), "--data", str(shards), "--step", "last"])


def test_a_full_disk_leaves_the_state_before_and_a_torn_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    states = States(tmp_path / STATE, {"seed": 1}, "transfer")
    states.save(model, optimizer, 1, {"a": 1})

    def full(state: object, file: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as changed:
        changed.setattr(torch, "save", full)
        states.save(model, optimizer, 2, {"a": 2})
    said = capsys.readouterr().err
    assert f"{STATE} could not be written ([Errno 28] No space left on device); the transfer goes on" in said
    assert states.load(model, optimizer) == (1, {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == [STATE]
    with pytest.raises(ValueError, match=r"state of a transfer with seed=1, not 2 .*name another --out"):
        States(tmp_path / STATE, {"seed": 2}, "transfer").load(model, optimizer)
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{STATE} is no sound state of a transfer .*: delete it"):
        states.load(model, optimizer)


def test_numbers_of_the_command_take_the_place_of_the_recipe_s(runs: dict[str, Path], shards: Path) -> None:
    given = ["--lr", "0.5", "--clip", "2", "--train-steps", "3"]
    asked = parse(["segment", str(runs["vit"]), "--data", str(shards), *given])
    found = prepared(asked)[0].recipe.optimisation
    expected = replace(recipe("segment", "small").optimisation, lr=0.5, clip=2.0, steps=3, warmup=1)
    assert found == expected


def test_a_resumed_training_tells_what_it_left_out_before(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    drops = Drops()
    drops.add("unreadable", "a.png: nothing")
    states = States(tmp_path / STATE, {}, "transfer")
    states.save(model, optimizer, 1, {"drops": asdict(drops)})
    resumed = Drops(**states.load(model, optimizer)[1]["drops"])
    with pytest.raises(ValueError, match=r"unreadable 1, first: a\.png: nothing"):
        resumed.require_few("examples", 4, 0.0)


def test_a_recipe_that_no_memory_suffices_for_is_told(
    runs: dict[str, Path], shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = replace(tiny("detect", "small"), size=8192)
    monkeypatch.setitem(RECIPES["detect"], "coco", lambda: huge)
    monkeypatch.setattr(memory, "available", lambda *_: 2**29)
    assert command.main(["detect", str(runs["vit"]), "--data", str(shards), "--recipe", "coco"]) == 1
    assert re.search(
        r"error: --recipe coco shows 2 images of 8192 x 8192 pixels a step on this rank, and 0.5 GiB of memory were "
        r"free for it on cpu.*: choose a smaller recipe, such as small, .*more ranks or more memory, or a GPU",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize("word", ["create", "execute"])
def test_what_onednn_cannot_do_is_lack_of_memory_where_memory_is_short(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda *_: 2**29)
    error, held = RuntimeError(f"could not {word} a primitive"), []

    def fails_with(taken: int) -> None:
        with memory.within_memory(recipe("detect", "small"), "small", torch.device("cpu")):
            held.append(torch.empty(taken, dtype=torch.uint8))
            raise error

    room = memory.free_for_this_rank()
    with pytest.raises(
        ValueError, match=r"0.5 GiB of memory were free .*primitive\): choose a smaller recipe"
    ):
        fails_with(room - 2**25)
    with pytest.raises(RuntimeError) as told:
        fails_with(room // 2)
    assert told.value is error
    monkeypatch.setattr(memory, "free_for_this_rank", lambda: None)  # and no limit
    with pytest.raises(RuntimeError) as told:
        fails_with(2**20)
    assert told.value is error


def test_a_gpu_that_has_no_memory_left_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**34, 2**36))
    told = (
        r"lvis shows 64 images of 1024 x 1024 .* 16.0 GiB .* on cuda:1.*more ranks, or a GPU of more memory"
    )
    with (
        pytest.raises(ValueError, match=told),
        memory.within_memory(recipe("detect", "lvis"), "lvis", torch.device("cuda", 1)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_ranks_of_a_host_share_its_memory_and_without_it_nothing_is_limited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "available", lambda *_: 2**34)
    alone = memory.free_for_this_rank()
    for name, value in {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert alone is not None and 2**33 < alone < 2**34 and memory.free_for_this_rank() == alone // 4
    monkeypatch.setattr(memory, "available", lambda *_: Path("/nowhere").read_text())
    assert memory.free_for_this_rank() is None
    with memory.within_memory(recipe("detect", "small"), "small", torch.device("cpu")):
        assert torch.zeros(2**20).sum() == 0
