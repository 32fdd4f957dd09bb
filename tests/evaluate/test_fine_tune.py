"""Does fine-tuning learn, repeat itself, and leave the towers alone?"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pretrain.checkpoint import load_towers
from pretrain.evaluate import fine_tune_order
from pretrain.evaluate import protocols as protocols_module
from pretrain.evaluate.asked import Protocols
from pretrain.evaluate.augment import rand_augment
from pretrain.evaluate.evidence import NotMeasured
from pretrain.evaluate.fine_tune import Classifier, encoder_of, fine_tune, predict
from pretrain.evaluate.fine_tune_order import Examples
from pretrain.evaluate.fine_tune_recipes import RECIPES, FineTune
from pretrain.evaluate.layers import decay_of_depth, layer_order
from pretrain.evaluate.protocols import evaluate_checkpoint, measure_subject
from pretrain.evaluate.published_encoder import EncoderAlone, PublishedEncoder
from pretrain.evaluate.sets import read_manifests
from pretrain.evaluate.subjects import Subject, find_subjects
from pretrain.export.__main__ import export_run
from pretrain.facts import DataFacts
from pretrain.models.backbone import build_encoder
from pretrain.models.pooling import prepend_mean
from pretrain.recipes import load
from tests.evaluate.runs import write_run
from tests.evaluate.sets import COLORS
from tests.fakes import shrink

CPU = torch.device("cpu")
QUICK = FineTune(epochs=1, batch=8)


@pytest.fixture(scope="module")
def steps(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of untrained weights of each backbone."""
    facts = DataFacts(categories=tuple(COLORS), vocab_size=0)
    vit = write_run(tmp_path_factory.mktemp("vit"), shrink(load("m3i.vit_b16")), facts, steps=(0,))
    folders = {"internimage": run_folder, "vit": vit}
    return {name: folder / "checkpoints" / "step_000000" for name, folder in folders.items()}


def tuned(step: Path, data: Path, **changes: Any) -> dict[str, Tensor]:
    """Weights of the classifier after the quick recipe with changes, on the 40 training images."""
    run, _, towers = load_towers(step)
    train = Examples(data / "train", torch.arange(40))
    model = fine_tune(towers, run, train, len(COLORS), replace(QUICK, **changes), device=CPU)
    return model.state_dict()


@pytest.mark.parametrize("backbone", ["internimage", "vit"])
def test_learns_and_leaves_the_towers_alone(backbone: str, steps: dict[str, Path], data: Path) -> None:
    run, _, towers = load_towers(steps[backbone])
    before = {name: value.clone() for name, value in towers.state_dict().items()}
    train, heldout = (
        Examples(data / split, torch.arange(n)) for split, n in (("train", 40), ("heldout", 20))
    )
    model = fine_tune(towers, run, train, len(COLORS), replace(QUICK, epochs=6, base_lr=1e-2), device=CPU)
    predicted = predict(model, run, heldout, device=CPU)
    labels = torch.arange(20) % len(COLORS)  # as the set was written
    assert (predicted == labels).float().mean() > 0.8  # chance is a quarter
    assert all(torch.equal(value, before[name]) for name, value in towers.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in towers.parameters())
    start = dict(towers.encoder.named_parameters())
    assert [
        n for n, p in model.encoder.named_parameters() if torch.equal(p, start[n])
    ] == []  # all have moved


def test_one_seed_gives_one_result_and_another_seed_another(steps: dict[str, Path], data: Path) -> None:
    first, again, other = (tuned(steps["vit"], data, seed=seed, mixup=0.8, cutmix=1.0) for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_global_generators_neither_matter_nor_move(steps: dict[str, Path], data: Path) -> None:
    np.random.seed(3)
    torch.manual_seed(3)
    first = tuned(steps["vit"], data, mixup=0.8)
    assert np.random.rand() == np.random.RandomState(3).rand()  # mixing left numpy's generator as it was
    np.random.seed(4)
    torch.manual_seed(4)
    again = tuned(steps["vit"], data, mixup=0.8)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["head.weight"], tuned(steps["vit"], data)["head.weight"])


def test_the_same_workers_read_many_short_epochs(
    steps: dict[str, Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders, made = [], fine_tune_order.DataLoader
    monkeypatch.setattr(
        fine_tune_order, "DataLoader", lambda *args, **more: loaders.append(args) or made(*args, **more)
    )
    monkeypatch.setattr(fine_tune_order, "STEPS_AT_ONCE", 3)
    cut = tuned(steps["vit"], data, epochs=5, batch=40)
    assert len(loaders) == 2  # of three and of two epochs, a step each
    monkeypatch.setattr(fine_tune_order, "STEPS_AT_ONCE", 100)
    whole = tuned(steps["vit"], data, epochs=5, batch=40)
    assert len(loaders) == 3
    assert all(torch.equal(value, whole[name]) for name, value in cut.items())


def test_rate_follows_the_root_of_the_batch(steps: dict[str, Path], data: Path) -> None:
    # AdamW's first step moves a weight by its rate against the sign of its gradient; the head starts at zero, so
    # that no decay acts on it, and one batch of 40 is the whole epoch.
    moved = tuned(steps["vit"], data, batch=40, warmup=0.0)["head.weight"].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 2e-3 * (40 / 1024) ** 0.5), rtol=1e-3, atol=0)


def test_rates_fall_layer_by_layer_towards_the_image(steps: dict[str, Path]) -> None:
    for step in steps.values():
        model = Classifier(load_towers(step)[2].encoder, 4)
        groups = model.groups(FineTune(layer_decay=0.5, weight_decay=0.3))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
        decays = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
        assert scales.keys() == dict(model.named_parameters()).keys()
        assert scales["head.weight"] == 1.0 and decays["head.weight"] == 0.3 and decays["head.bias"] == 0.0
        order = layer_order(model.encoder)
        last = max(order.values()) + 1  # the head's
        assert {scales[f"encoder.{name}"] for name in order} == {0.5 ** (last - k) for k in range(last)}
        assert all(scales[f"encoder.{name}"] == 0.5 ** (last - layer) for name, layer in order.items())
        assert len({value for value in decays.values()}) == 2


def test_a_deep_backbone_decays_milder_so_that_its_first_layers_learn() -> None:
    with torch.device("meta"):
        run = load("m3i.internimage_h")
        model = Classifier(build_encoder(run.backbone, run.views.size), 4)
    scales = {group["lr_scale"] for group in model.groups(FineTune())}
    assert min(scales) == pytest.approx(0.65**13)  # as the first layer of a ViT-B
    assert sorted(scales)[1] / min(scales) == pytest.approx(1 / 0.8960, abs=1e-4)
    assert decay_of_depth(0.65, 12, 12) == 0.65 and decay_of_depth(0.7, 12, 2) == 0.7
    assert decay_of_depth(0.95, 50, 33) == 0.95  # given for InternImage-H


def test_layers_are_numbered_from_the_stem_through_the_blocks(steps: dict[str, Path]) -> None:
    vit = layer_order(load_towers(steps["vit"])[2].encoder)
    assert vit["vit.cls_token"] == vit["vit.patch_embed.proj.weight"] == 0
    assert (vit["vit.blocks.0.attn.qkv.weight"], vit["vit.blocks.1.mlp.fc1.weight"]) == (1, 2)
    assert vit["vit.norm.weight"] == 2
    inter = layer_order(load_towers(steps["internimage"])[2].encoder)
    assert all(layer == 0 for name, layer in inter.items() if "patch_embed" in name)
    # A stage's downsampling belongs to its last block, and every block is a layer of its own.
    blocks = sorted({tuple(map(int, n.split(".")[2:5:2])) for n in inter if ".blocks." in n})
    for number, (level, block) in enumerate(blocks):
        of_block = {v for n, v in inter.items() if n.startswith(f"dcnv3.levels.{level}.blocks.{block}.")}
        assert of_block == {number + 1}
    ends = {level: number + 1 for number, (level, _) in enumerate(blocks)}
    for name, layer in inter.items():
        if "downsample" in name:
            assert layer == ends[int(name.split(".")[2])]


def test_encoder_without_known_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"order of its layers is unknown: add it to MATCHERS"):
        layer_order(nn.Sequential(nn.Linear(2, 2)))


def test_layers_of_unknown_order_are_no_reason_to_end(run_folder: Path, data: Path) -> None:
    """Of a model that does not tell them their means are not measured, nor is it fine-tuned; the rest is."""
    run, facts, _ = load_towers(run_folder / "checkpoints" / "step_000003")
    trunk = nn.Conv2d(3, 8, 32, 32)
    encoder = PublishedEncoder(trunk, lambda trunk, images: prepend_mean(trunk(images).flatten(2).mT), 64)
    subject = Subject("plain", run, facts, EncoderAlone(encoder), None)
    folders = {split: data / split for split in ("train", "heldout")}
    protocols = Protocols(probes=("knn", "linear_sweep"), ks=(5,), fine_tune=FineTune(epochs=1))
    measured = measure_subject(subject, folders, read_manifests(folders), protocols, torch.device("cpu"))
    rows = {name: outcome.record for name, outcome in measured.outcomes.items()}
    assert rows["knn"]["accuracy"] is not None
    assert rows["linear_sweep"]["accuracy"] is rows["fine_tune"]["accuracy"] is None
    assert (
        "order of its layers" in rows["linear_sweep"]["reason"] and "MATCHERS" in rows["fine_tune"]["reason"]
    )


def test_divergence_is_told_as_not_measured(steps: dict[str, Path], data: Path) -> None:
    with pytest.raises(NotMeasured, match=r"loss of fine-tuning was (nan|inf) in epoch 1"):
        tuned(steps["vit"], data, base_lr=1e38, warmup=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs=0, updates=0: one of the two must be at least 1"),
        ({"updates": 5}, "epochs=30, updates=5: one of the two"),
        ({"epochs": 0, "updates": -1}, "updates=-1"),
        ({"batch": 7}, "positive and even"),
        ({"layer_decay": 0.0}, r"layer_decay=0\.0 must lie in \(0, 1\]"),
        ({"warmup": 1.0}, r"must lie in \[0, 1\)"),
        ({"scale": (0.9, 0.5)}, "two rising fractions"),
        ({"mixup": -0.1}, "must not be negative"),
        ({"drop_path": 1.0}, r"drop_path=1\.0 must be probabilities"),
    ],
)
def test_impossible_recipes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineTune(**changes)


def test_row_of_the_result_has_recipe_and_interval(steps: dict[str, Path], data: Path) -> None:
    protocols = Protocols(probes=("knn",), fine_tune=QUICK, ks=(5,))
    rows = evaluate_checkpoint(steps["internimage"], data / "train", data / "heldout", protocols)
    row = rows["fine_tune"]
    assert set(rows) == {"knn", "fine_tune", "dropped"}
    assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
    assert (row["n"], row["train_images"], row["chance"]) == (20, 40, 0.25)
    assert row["precision"] == "float32"  # of a CPU
    assert row["recipe"]["epochs"] == 1 and row["recipe"]["base_lr"] == FineTune.base_lr


def test_recipe_of_the_paper_learns_by_its_seed_alone(steps: dict[str, Path], data: Path) -> None:
    paper = asdict(replace(RECIPES["paper"], epochs=2, batch=8, base_lr=1e-2))
    state = np.random.get_state()[1].copy()
    first, again = (tuned(steps["vit"], data, **paper) for _ in range(2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert (np.random.get_state()[1] == state).all()
    for part in ("rand_augment", "erasing", "drop_path"):  # each of them changes what is learnt
        off = paper | {part: type(paper[part])()}
        assert not torch.equal(first["head.weight"], tuned(steps["vit"], data, **off)["head.weight"]), part


def test_dropping_branches_ends_with_the_training(steps: dict[str, Path]) -> None:
    for step in steps.values():
        run, _, towers = load_towers(step)
        model = Classifier(encoder_of(towers, run, 0.5), 4, drops=True).train()
        images = torch.randn(2, 3, run.views.size, run.views.size)
        torch.nn.init.normal_(model.head.weight)
        first, second = model(images), model(images)
        assert not torch.equal(first, second)
        model.eval()
        expected = model.head(towers.encoder(images).mean(dim=1))
        torch.testing.assert_close(model(images), expected)


def test_recipe_of_the_paper_trains_an_export_like_its_run(
    steps: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    paper = replace(RECIPES["paper"], epochs=1, batch=8, base_lr=1e-2)
    run, _, towers = load_towers(steps["vit"])
    (exported,) = export_run([str(steps["vit"].parents[1]), "--to", "timm", "--out", str(tmp_path / "timm")])
    folder = exported.folder
    subject = find_subjects(folder, [])[0].open()
    train, heads = Examples(data / "train", torch.arange(40)), []
    for whose in (towers, subject.towers):
        model = fine_tune(whose, run, train, len(COLORS), paper, device=CPU)
        heads.append(model.state_dict()["head.weight"])
    torch.testing.assert_close(heads[1], heads[0])  # which it would not be without the same branches dropped


def test_branches_that_cannot_be_dropped_are_told_before_images_are_read(
    run_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, facts, _ = load_towers(run_folder / "checkpoints" / "step_000003")
    trunk = nn.Conv2d(3, 8, 32, 32)
    encoder = PublishedEncoder(trunk, lambda trunk, images: prepend_mean(trunk(images).flatten(2).mT), 64)
    subject = Subject("plain", run, facts, EncoderAlone(encoder), None)
    folders = {split: data / split for split in ("train", "heldout")}
    monkeypatch.setattr(protocols_module, "extract", lambda *_, **__: pytest.fail("images are read"))
    message = (
        r"drop_path=0\.1 needs blocks that drop branches, and Conv2d has none: .* --fine-tune-recipe small"
    )
    with pytest.raises(ValueError, match=message):
        asked = Protocols(probes=("knn",), fine_tune=RECIPES["paper"])
        measure_subject(subject, folders, read_manifests(folders), asked, CPU)


def test_augmented_view_depends_on_its_seed_alone() -> None:
    view = (torch.arange(3 * 32 * 32) % 256).to(torch.uint8).view(3, 32, 32)
    one, same, other = (
        rand_augment(view, RECIPES["paper"].rand_augment, (0.5,) * 3, seed) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other) and one.shape == view.shape
