"""Is one thing measured alike as a run, a checkpoint or an export, from shards or folders, on one rank or two?"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import pytest
import timm
import torch

from pretrain.data.shards import ShardFolder
from pretrain.evaluate.__main__ import main
from pretrain.evaluate.evaluation import evaluate, result_of
from pretrain.evaluate.published import open_published
from pretrain.evaluate.subjects import find_subjects, open_model
from pretrain.export import (
    detectron2_file,
    huggingface_internimage,
    huggingface_vit,
    internimage,
    openmmlab,
    safetensors_file,
    timm_folder,
    torchvision_folder,
)
from pretrain.export.__main__ import export_run
from pretrain.export.trained import Trained, read_trained
from pretrain.facts import DataFacts
from pretrain.recipes import load
from pretrain.towers import Towers
from tests.engine.launch import start
from tests.evaluate.runs import write_run
from tests.evaluate.sets import COLORS, write_set
from tests.fakes import shrink
from tests.memory import little_memory

PROBES = ["--probes", "knn,linear,dense,knn_embedding,classifier"]


def rows_of(place: Path, data: Path, out: Path, *options: str) -> dict[str, Any]:
    found = evaluate([str(place), "--data", str(data), "--out", str(out), "--k", "5", *PROBES, *options])
    (rows,) = found["checkpoints"].values()
    return rows


def accuracies(rows: dict[str, Any]) -> dict[str, float]:
    return {name: row["accuracy"] for name, row in rows.items() if name != "dropped"}


@pytest.fixture(scope="module")
def of_run(run_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return rows_of(run_folder, data, tmp_path_factory.mktemp("of_run") / "result.json", "--steps", "3")


@pytest.fixture(scope="module")
def folders(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in class folders, named so that the order of categories is that of the shards."""
    place = tmp_path_factory.mktemp("folders")
    for split in ("train", "heldout"):
        shards = ShardFolder(data / split)
        for number in range(len(shards)):
            sample = shards.sample(number)
            category = int(sample["cls"])
            name = f"{category}_{list(COLORS)[category]}"
            (place / split / name).mkdir(parents=True, exist_ok=True)
            (place / split / name / f"{number:03d}.png").write_bytes(sample["png"])
    return place


def test_checkpoint_and_class_folders_are_measured_like_the_run(
    run_folder: Path, data: Path, folders: Path, of_run: dict[str, Any], tmp_path: Path
) -> None:
    step = run_folder / "checkpoints" / "step_000003"
    assert accuracies(rows_of(step, data, tmp_path / "a.json")) == accuracies(of_run)
    plain = rows_of(step, folders, tmp_path / "b.json")
    assert plain["dense"] == {"accuracy": None, "reason": "the data set has no masks"}
    for name in ("knn", "linear"):  # the images come in another order, their features are the same
        assert plain[name]["accuracy"] == of_run[name]["accuracy"] and plain[name]["n"] == 20


def test_exports_are_measured_like_their_runs(
    run_folder: Path, data: Path, of_run: dict[str, Any], tmp_path: Path
) -> None:
    vit = write_run(tmp_path / "vit", shrink(load("m3i.vit_b16")), DataFacts(tuple(COLORS), 0), steps=(3,))
    for run, name in ((run_folder, "internimage"), (vit, "timm")):
        folder = export_run([str(run), "--to", name, "--out", str(tmp_path / name)])[0].folder
        expected = of_run if run is run_folder else rows_of(run, data, tmp_path / "x.json", "--steps", "3")
        found = rows_of(folder, data, tmp_path / f"{name}.json", "--fine-tune", "1")
        for row in ("knn", "linear", "dense"):
            assert found[row]["accuracy"] == pytest.approx(expected[row]["accuracy"], abs=2e-3), (name, row)
        assert 0 <= found["fine_tune"]["accuracy"] <= 1
        for row in ("knn_embedding", "classifier"):
            assert "a run itself, or its export --to safetensors, brings" in found[row]["reason"], row
    result = json.loads((tmp_path / "timm.json").read_text())
    assert list(result["checkpoints"]) == ["timm"] and result["image_size"] == 64
    file = tmp_path / "internimage" / "internimage.pth"
    assert accuracies(rows_of(file, data, tmp_path / "y.json")) == accuracies(
        rows_of(file.parent, data, tmp_path / "z.json")
    )


def test_result_of_a_checkpoint_lies_in_its_run_and_of_a_model_beside_it(
    run_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = run_folder / "checkpoints" / "step_000000"
    before = sorted(step.parent.iterdir())
    evaluate([str(step), "--data", str(data), "--probes", "knn"])
    made = run_folder / "step_000000.evaluation.json"
    made.unlink()
    assert sorted(step.parent.iterdir()) == before
    monkeypatch.chdir(step)
    assert result_of(Path()) == made and result_of(run_folder) == run_folder / "evaluation.json"
    alone = tmp_path / "step_000000"
    alone.mkdir()
    (alone / "run.json").touch()
    assert result_of(alone) == tmp_path / "step_000000.evaluation.json"


def test_damaged_models_are_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    where = [str(folder), "--data", str(data), "--probes", "knn"]
    for config, told in (
        ("{", "is no JSON"),
        ('{"channels": 16}', "internimage.pth is missing"),
        ("{}", "is no model that is evaluated, as"),
    ):
        (folder / "config.json").write_text(config)
        assert main(where) == 1
        assert told in capsys.readouterr().err
    (tmp_path / "alone.bin").touch()
    assert main([str(tmp_path / "alone.bin"), *where[1:]]) == 1
    assert re.search(
        r"error: .*alone.bin is no model that is evaluated.*export --to", capsys.readouterr().err
    )
    assert main([str(tmp_path), *where[1:]]) == 1
    assert "holds no whole checkpoint: name the --out folder" in capsys.readouterr().err
    tiny = {"channels": 16, "depths": [1, 1, 1, 1], "groups": [1, 2, 4, 8], "use_clip_projector": True}
    (folder / "config.json").write_text(json.dumps(tiny))
    torch.save({"model": {"levels.0.norm.0.weight": torch.ones(16)}}, folder / "internimage.pth")
    assert main(where) == 1 and "does not fit its config.json" in capsys.readouterr().err
    for fields, told in (
        ({"channels": "wide"}, "describes no InternImage"),
        ({"channels": 10**9}, "tells a model by the number 1000000000, where none is above"),
        ({"channels": 2**14}, "its settings do not belong to its weights"),
        ({"depths": [10**9, 1, 1, 1]}, "tells a model by the number 1000000000"),
    ):
        (folder / "config.json").write_text(json.dumps(tiny | fields))
        assert main(where) == 1 and told in capsys.readouterr().err
    (folder / "config.json").write_text(json.dumps(tiny))
    (folder / "internimage.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert main(where) == 1 and "is no archive as torch.save writes" in capsys.readouterr().err


class Greedy:
    """Reserves memory when it is read, which `weights_only=True` allows."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (10**12,)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"architecture": "vit_tiny_patch16_224"}, "pytorch_model.bin"),
        ({"channels": 16, "depths": [1, 1, 1, 1], "groups": [1, 2, 4, 8]}, "internimage.pth"),
    ],
)
def test_hostile_weights_are_not_read(config: dict[str, Any], name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"weight": Greedy()}, tmp_path / name)
    with pytest.raises(ValueError, match=r"would call '.*bytearray' when it is read"):
        open_published(tmp_path)
    torch.save({"model": {"weight": 3}}, tmp_path / name)
    with pytest.raises(ValueError, match="holds no tensors by name"):
        open_published(tmp_path)
    torch.save({"weight": torch.tensor([1.0, torch.nan])}, tmp_path / name)
    with pytest.raises(ValueError, match="weight holds other than finite numbers"):
        open_published(tmp_path)


TIMM = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}}
INTERNIMAGE = {"channels": 16, "groups": [1, 2, 4, 8]}
CLIP = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (TIMM | {"model_args": {"depth": 10**4}}, "pytorch_model.bin"),
        (TIMM | {"model_args": {"img_size": 2**17}}, "pytorch_model.bin"),
        (INTERNIMAGE | {"depths": [1, 1, 10**4, 1]}, "internimage.pth"),
        (INTERNIMAGE | {"channels": 2**16, "depths": [1, 1, 1, 1]}, "internimage.pth"),
        (CLIP | {"num_hidden_layers": 10**9}, "pytorch_model.bin"),
    ],
    ids=["timm, depth", "timm, size", "internimage, depth", "internimage, width", "huggingface"],
)
def test_a_config_that_its_weights_do_not_explain_is_refused(
    config: dict[str, Any], name: str, tmp_path: Path
) -> None:
    """Before it takes memory: a billion layers, or 30 GB of positions, come from 300 bytes."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"levels.0.blocks.0.norm1.weight": torch.zeros(4)}, tmp_path / name)
    told = r"where its weights are 1 tensors that explain at most 520 of"
    with little_memory(), pytest.raises(ValueError, match=told):
        open_published(tmp_path)


def test_images_that_no_memory_holds_are_refused(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=0)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    config: dict[str, Any] = {"architecture": "resnet10t", "num_classes": 0}
    for more, told in (
        ({"pretrained_cfg": {"input_size": [3, 10**6, 10**6]}}, "tells images of 1000000 pixels a side"),
        (
            {"model_args": {"stem_width": 10**9}},
            r"tells a model by the number 1000000000, where none is above",
        ),
        (
            {"model_args": {"device": "cpu"}},
            r"arguments by name without \['cache_dir', .*'device', 'dtype'\]",
        ),
        ({"model_args": {"pretrained_strict": False}}, r"without .* or what begins with 'pretrained'"),
        ({"model_args": 5}, r"has model_args 5, which must be arguments by name"),
        ({"pretrained_cfg": None}, r"has pretrained_cfg None, which must be settings by name"),
        ({"pretrained_cfg": {"input_size": 5}}, r"has input_size 5, which must be \[3, height, width\]"),
        ({"pretrained_cfg": {"input_size": [3, 10**6, 64]}}, "tells images of 1000000 pixels a side"),
        ({"pretrained_cfg": {"mean": None}}, r"has mean=None, .* which must be three finite numbers each"),
        ({"pretrained_cfg": {"mean": [124, 116, 104]}}, r"none beyond 1, as pixels lie in .*divide by 255"),
        ({"pretrained_cfg": {"mean": "abc"}}, r"has mean='abc', .* which must be three finite numbers each"),
        ({"pretrained_cfg": {"std": [1, 1, 0]}}, r"std=\[1, 1, 0\] .* std above 0"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | more))
        with pytest.raises(ValueError, match=told):
            open_published(tmp_path)


def test_an_export_of_all_towers_is_opened_whole(tmp_path: Path) -> None:
    run, facts = shrink(load("m3i.vit_b16")), DataFacts(tuple(COLORS), 0)
    towers = Towers(run, facts).requires_grad_(False).eval()
    towers.fold_norms()
    safetensors_file.write(Trained(run, facts, towers, "teacher", "step_000003", {}, None, {}), tmp_path)
    (named,) = find_subjects(tmp_path, [])
    found = named.open()
    assert (found.run, found.facts.categories) == (run, facts.categories)
    state = found.towers.state_dict()
    assert all(torch.equal(state[name], value) for name, value in towers.state_dict().items())
    told = json.loads((tmp_path / "config.json").read_text())
    told["facts"]["vocab_size"] = 10**10
    for text in ("{}", "{", json.dumps(told)):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"does not fit its config\.json .*: export it again"):
            named.open()


TEXTS = ["--k", "5", "--probes", "knn,classifier,zero_shot,retrieval_image,retrieval_text"]


def test_an_export_of_all_towers_reads_captions_like_its_run(
    run_folder: Path, data: Path, tmp_path: Path
) -> None:
    (exported,) = export_run([str(run_folder), "--to", "safetensors", "--out", str(tmp_path / "whole")])
    folder = exported.folder
    rows = []
    for place, steps in ((run_folder, ["--steps", "3"]), (folder, [])):
        out = str(tmp_path / f"{len(steps)}.json")
        found = evaluate([str(place), "--data", str(data), "--out", out, *steps, *TEXTS])
        rows += found["checkpoints"].values()
    assert rows[0] == rows[1] and all(rows[1][name]["n"] == 20 for name in TEXTS[-1].split(","))
    assert "`tokenizer/` is the captions' own" in (folder / "README.md").read_text()
    told = json.loads((folder / "config.json").read_text())
    told["facts"]["sha256"] = {"tokenizer": "9f"}
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"tokenizer has \d+ tokens and SHA-256 .* and 9f: export it again"):
        find_subjects(folder, [])[0].open()
    shutil.rmtree(folder / "tokenizer")  # as exports of before
    assert find_subjects(folder, [])[0].open().encode is None


WRITERS = {
    "internimage": (internimage, huggingface_internimage, torchvision_folder, openmmlab),
    "vit": (timm_folder, huggingface_vit, torchvision_folder, openmmlab, detectron2_file),
}


@pytest.mark.parametrize("family", WRITERS)
def test_every_format_that_the_importer_reads_is_measured_like_the_run(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By kNN; without the head of the tokens, like the file of all of InternImage that has lost it."""
    run = shrink(load({"internimage": "m3i.internimage_h", "vit": "m3i.vit_b16"}[family]))
    run = replace(run, views=replace(run.views, mean=(0.5, 0.4, 0.3), std=(0.25, 0.5, 0.2)))
    place = write_run(tmp_path / "run", run, DataFacts(tuple(COLORS), 0), steps=(3,))
    trained = read_trained(place, place / "checkpoints" / "step_000003", "teacher")
    for split, count in (("train", 2), ("heldout", 1)):
        write_set(tmp_path / "data" / split, split, count, seed=count, text=False)

    def knn(where: Path, *options: str) -> tuple[dict[str, Any], str]:
        given = [
            str(where),
            "--data",
            str(tmp_path / "data"),
            "--out",
            str(tmp_path / "out.json"),
            "--k",
            "3",
        ]
        found = evaluate([*given, "--probes", "knn", *options])
        return found["checkpoints"].popitem()[1]["knn"], found["recipe"]

    of_run, _ = knn(place, "--steps", "last")
    images, of_last_stage = torch.randn(2, 3, 64, 64), None
    with torch.inference_mode():
        tokens = trained.towers.encoder(images, summary=True)
    for writer in WRITERS[family]:
        folder = tmp_path / writer.__name__.rpartition(".")[2]
        folder.mkdir()
        files = writer.write(trained, folder)
        (folder / "keys.json").write_text('{"proof": [{"size": 64}]}')
        for name in files:
            found = open_published(folder / name)
            views = found.views
            assert (views.size, views.mean, views.std) == (run.views.size, run.views.mean, run.views.std)
            with torch.inference_mode():
                theirs = found.encoder(images, summary=True)
            if found.note:
                of_last_stage = theirs if of_last_stage is None else of_last_stage
            torch.testing.assert_close(theirs, of_last_stage if found.note else tokens, atol=1e-5, rtol=1e-4)
        row, recipe = knn(folder)
        assert ("its tokens are those of the last stage" in capsys.readouterr().out) == bool(found.note)
        assert found.note in recipe and (found.note or row == of_run), folder
    if family == "internimage":
        whole = torch.load(tmp_path / "internimage" / "internimage.pth")["model"]
        kept = {name: one for name, one in whole.items() if not name.startswith("dcnv3_head")}
        torch.save({"model": kept}, tmp_path / "internimage" / "internimage.pth")
        with torch.inference_mode():
            theirs = open_published(tmp_path / "internimage").encoder(images, summary=True)
        torch.testing.assert_close(theirs, of_last_stage)
        assert knn(tmp_path / "internimage")[0] == row  # of openmmlab, the last one


def test_exports_that_are_not_evaluated_say_which_are(tmp_path: Path) -> None:
    told = r"an export --to {}, which {}: name the run itself, or export it --to one of huggingface, "
    (tmp_path / "keys.json").write_text('{"format": "openmmlab"}')
    with pytest.raises(
        ValueError, match=told.format("openmmlab", r"has no config\.json, as those of before")
    ):
        find_subjects(tmp_path, [])[0].open()
    (tmp_path / "keys.json").write_text('{"format": "caffe"}')
    for _ in range(2):
        with pytest.raises(ValueError, match=told.format("caffe", "is not evaluated here")):
            find_subjects(tmp_path, [])[0].open()
        (tmp_path / "config.json").write_text('{"opset": 20}')


def test_a_graph_without_its_settings_says_that_they_are_missing(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text('{"format": "onnx"}')
    (tmp_path / "model.onnx").touch()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing, .*: export the run again"):
        open_published(tmp_path)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("towers.safetensors", {}),
        ("internimage.pth", {"channels": 16}),
        (
            "model.onnx",
            {"multiple_of": 32, "trained_size": 64, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        ),
    ],
)
def test_weights_that_are_no_regular_file_are_told(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{name} is no regular file"):
        open_model(tmp_path, None)


def test_what_an_export_tells_of_its_backbone_is_judged(tmp_path: Path) -> None:
    run = shrink(load("m3i.vit_b16"))
    torch.manual_seed(0)
    towers = Towers(run, DataFacts(tuple(COLORS), 0)).requires_grad_(False).eval()
    trained = Trained(run, DataFacts(tuple(COLORS), 0), towers, "teacher", "step_000003", {}, None, {})
    detectron2_file.write(trained, tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    arguments = told["arguments"]
    for more, why in (
        (
            {"family": "swin"},
            r"family 'swin' .* must be one of \['internimage', 'vit'\] with arguments by name",
        ),
        ({"arguments": 5}, "with arguments 5"),
        ({"arguments": {}}, r"does not fit its config\.json, export it again: 'width'"),
        ({"arguments": arguments | {"depth": 10**9}}, "tells a model by the number 1000000000"),
        ({"arguments": arguments | {"depth": 10**4}}, "its settings do not belong to its weights"),
        ({"arguments": arguments | {"depth": 3}}, "tensors are missing, such as blocks.2"),
        ({"arguments": arguments | {"heads": 7}}, r"does not fit its config\.json, export it again"),
        ({"weights": "../vitdet.pth"}, "which lies elsewhere"),
        ({"image_size": 10**6}, "tells images of 1000000 pixels a side"),
        ({"image_std": [1, 1, 0]}, "std above 0"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(told | more))
        with little_memory(), pytest.raises(ValueError, match=why):
            open_published(tmp_path)


def test_an_export_is_shown_the_pixels_of_its_run(tmp_path: Path) -> None:
    run = shrink(load("m3i.internimage_h"))
    run = replace(run, views=replace(run.views, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 0.5)))
    torch.manual_seed(0)
    towers = Towers(run, DataFacts(tuple(COLORS), 0)).requires_grad_(False).eval()
    trained = Trained(run, DataFacts(tuple(COLORS), 0), towers, "teacher", "step_000003", {}, None, {})
    internimage.write(trained, tmp_path)
    views = open_published(tmp_path).views
    assert (views.mean, views.std, views.size) == (run.views.mean, run.views.std, run.views.size)
    assert open_published(tmp_path, 96).views.size == 96
    told = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(told | {"image_mean": [0.5, torch.inf, 0.5]})
    )
    with pytest.raises(ValueError, match=r"mean=\(0.5, inf, 0.5\) must lie in \[0, 1\]"):
        open_published(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    with pytest.raises(ValueError, match="does not tell crop_size"):
        open_published(tmp_path)


def test_timm_weights_are_loaded_whole(tmp_path: Path) -> None:
    arguments = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **arguments).eval()
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": arguments}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model.forward_features(images)
        assert torch.equal(open_published(tmp_path, 32).encoder(images, summary=True), expected)
    assert open_published(tmp_path, 64).encoder(torch.randn(1, 3, 64, 64)).shape == (1, 16, 24)
    torch.save(
        {k: v for k, v in model.state_dict().items() if k != "norm.bias"}, tmp_path / "pytorch_model.bin"
    )
    with pytest.raises(ValueError, match=r"(?s)timm does not open .*Missing key.*norm\.bias"):
        open_published(tmp_path, 32)


def test_two_ranks_measure_what_one_does(
    run_folder: Path, data: Path, of_run: dict[str, Any], tmp_path: Path
) -> None:
    codes, output = start(tmp_path, str(run_folder), str(data), world=2, script=Path(__file__))
    assert codes == [0, 0], output
    result = json.loads((tmp_path / "two.json").read_text())
    rows = result["checkpoints"]["step_000003"]
    # Features differ by rounding where batches have other sizes.
    for name, accuracy in accuracies(of_run).items():
        assert rows[name]["accuracy"] == pytest.approx(accuracy, abs=2e-3), name
        assert rows[name]["n"] == of_run[name]["n"]
    assert rows["fine_tune"]["n"] == 20 and not (tmp_path / "two.fine_tuning").exists()


if __name__ == "__main__":
    place, run, data = sys.argv[1:4]
    out = str(Path(place) / "two.json")
    sys.exit(
        main([run, "--data", data, "--out", out, "--steps", "3", "--k", "5", "--fine-tune", "1", *PROBES])
    )
