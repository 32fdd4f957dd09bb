"""Does a transfer from an export begin with the bits of its run, and what is told where it cannot begin?"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.evaluate.checkpoints import find_checkpoint
from pretrain.evaluate.subjects import open_model
from pretrain.export import formats
from pretrain.export.names import GRAPHS
from pretrain.export.trained import read_trained
from pretrain.initial.files import KEYS, SHA256, open_weights
from pretrain.models.guides import open_guide
from pretrain.transfer import __main__ as command
from pretrain.transfer.backbone import load_trunk
from pretrain.transfer.pretrained import Pretrained, open_pretrained
from pretrain.transfer.recipes import RECIPES
from pretrain.transfer.segment import Segmenter
from pretrain.transfer.training import STATE
from pretrain.transfer.work import RESULT
from tests.transfer.conftest import FAMILIES
from tests.transfer.test_transfer import tiny


@pytest.fixture(scope="module")
def exports(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """By family and format what the command writes but for the proof, which takes seconds."""
    place, found = tmp_path_factory.mktemp("exports"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_prove", lambda *_: ([], ""))
        for family, run in runs.items():
            trained = read_trained(run, find_checkpoint(run, "last"), "teacher")
            for name in sorted({*formats.fitting(trained.run)} - {*GRAPHS}):
                found[family, name] = formats.export(trained, name, place / family / name).folder
    return found


def built(pretrained: Pretrained) -> Segmenter:
    """The dense model as a transfer begins with it."""
    torch.manual_seed(0)
    model = Segmenter(pretrained, tiny("segment", "small"), 3)
    load_trunk(model, pretrained.encoder, is_frozen=False)
    return model.eval()


@pytest.mark.parametrize("name", ["towers.safetensors", "model.safetensors"])
def test_weights_that_are_no_regular_file_are_told(name: str, tmp_path: Path) -> None:
    told = {
        "format": "timm",
        "backbone": {"family": "vit", "size": "vit_b16", "token_width": 8},
        "views": {"size": 64, "mean": [0.5] * 3, "std": [0.5] * 3},
        "files": {name: {}},
    }
    (tmp_path / "keys.json").write_text(json.dumps(told))
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} is no regular file"):
        open_pretrained(tmp_path)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.inference_mode()
def test_every_export_gives_the_dense_model_and_the_maps_of_its_run(
    family: str, runs: dict[str, Path], exports: dict[tuple[str, str], Path]
) -> None:
    of_run = open_pretrained(find_checkpoint(runs[family], "last"))
    model, images = built(of_run), torch.randn(2, 3, 64, 96)
    maps, weights = model.net.backbone(images).feature_maps, model.state_dict()
    folders = [folder for (of, _), folder in exports.items() if of == family]
    assert len(folders) > 1
    for folder in folders:
        _, *others = told(folder)["files"]  # the first is what the folder means
        for place in (folder, *(folder / name for name in others)):
            found = open_pretrained(place)
            assert (found.backbone, found.views) == (of_run.backbone, of_run.views)
            model = built(found)
            odd = [name for name, one in model.state_dict().items() if not torch.equal(one, weights[name])]
            assert odd == [], place
            theirs = model.net.backbone(images).feature_maps
            assert all(torch.equal(one, other) for one, other in zip(theirs, maps, strict=True)), place


def test_the_command_learns_from_an_export_as_from_its_run_and_writes_beside_it(
    runs: dict[str, Path],
    exports: dict[tuple[str, str], Path],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = tiny("segment", "small")
    monkeypatch.setitem(RECIPES["segment"], "small", lambda: small)
    folder = tmp_path / "openmmlab"
    shutil.copytree(exports["internimage", "openmmlab"], folder)
    before, given = sorted(folder.rglob("*")), ["--data", str(shards)]
    assert command.main(["segment", str(runs["internimage"]), *given, "--out", str(tmp_path / "run")]) == 0
    assert command.main(["segment", str(folder), *given]) == 0
    beside = tmp_path / "openmmlab.transfer" / "segment-small-openmmlab"
    first, other = (torch.load(out / STATE, weights_only=True)["model"] for out in (tmp_path / "run", beside))
    assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)
    scores = [json.loads((out / RESULT).read_text())["scores"] for out in (tmp_path / "run", beside)]
    assert scores[0] == scores[1] and sorted(folder.rglob("*")) == before
    spoil(folder / "internimage.pth", lambda tensors: tensors["patch_embed.conv1.weight"].mul_(2))
    assert command.main(["segment", str(folder), *given]) == 1  # of other weights under the same name
    assert re.search(r"state of a transfer with weights=.*name another --out", capsys.readouterr().err)


@pytest.mark.parametrize(
    "name", ["detectron2", "huggingface", "openmmlab", "safetensors", "timm", "torchvision"]
)
def test_a_bit_that_changed_since_the_export_is_told_by_every_reader(
    name: str, exports: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exports["vit", name], folder)
    file = folder / next(iter(told(folder)["files"]))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    readers = [open_pretrained, open_weights, lambda place: open_model(place, None)]
    message = rf"{file.name} has SHA-256 \w{{12}}, keys.json .* tells \w{{12}}: .*; copy the export again, or remove"
    for read in (*readers, open_guide) if name == "huggingface" else readers:
        with pytest.raises(ValueError, match=message):
            read(folder if name != "openmmlab" or read == open_pretrained else file)
    (folder / KEYS).unlink()
    assert open_weights(file).tensors


@pytest.mark.parametrize("name", ["huggingface", "safetensors"])
def test_pixels_that_two_files_of_an_export_tell_otherwise_are_refused(
    name: str, exports: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exports["vit", name], folder)
    keys = told(folder)
    rounded = [one + 1e-8 for one in keys["views"]["std"]]
    for std in (rounded, [0.5, 0.4, 0.3]):
        (folder / KEYS).write_text(json.dumps(keys | {"views": keys["views"] | {"std": std}}))
        if std == rounded:
            open_model(folder, None)
    with pytest.raises(
        ValueError, match=r"pixels of std .* keys.json \(0.5, 0.4, 0.3\): .*copy the export again"
    ):
        open_model(folder, None)


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / KEYS).read_text())


def spoil(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Other weights, as one whose writer tells no digests."""
    content = torch.load(file, weights_only=True)
    change(next(iter(content.values())))
    torch.save(content, file)
    keys = told(file.parent)
    (file.parent / KEYS).write_text(json.dumps({name: keys[name] for name in keys if name != SHA256}))


def without(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["levels.0.blocks.0.norm1.0.weight"]


def with_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["levels.0.blocks.9.norm1.0.weight"] = torch.ones(16)


def with_a_column(tensors: dict[str, torch.Tensor]) -> None:
    tensors["patch_embed.conv1.bias"] = torch.ones(9)


def with_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["patch_embed.conv1.bias"][0] = torch.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, "1 tensors are missing, such as levels.0.blocks.0.norm1.0.weight"),
        (with_more, "1 are unexpected, such as levels.0.blocks.9.norm1.0.weight"),
        (
            with_a_column,
            r"1 have another shape: encoder.dcnv3.patch_embed.conv1.bias of \(9,\) instead of \(8,\)",
        ),
        (with_nan, "patch_embed.conv1.bias holds other than finite numbers"),
    ],
)
def test_weights_that_are_not_whole_are_refused(
    change: Callable[[dict[str, torch.Tensor]], object],
    message: str,
    exports: dict[tuple[str, str], Path],
    tmp_path: Path,
) -> None:
    shutil.copytree(exports["internimage", "torchvision"], tmp_path / "export")
    spoil(tmp_path / "export" / "backbone.pth", change)
    with pytest.raises(ValueError, match=message):
        open_pretrained(tmp_path / "export")


BACKBONE = {"family": "vit", "size": "vit_tiny", "token_width": 64}
VIEWS = {"size": 64, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
AGAIN = "export the run again, or name the run itself"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": None}, "is no export of ours, whose keys.json .*: name a run.* --init"),
        (
            {"format": "onnx"},
            "is an export --to onnx, a graph .* cannot be trained: name the run itself, or .* timm",
        ),
        (
            {"backbone": None},
            f"does not tell family, size, token_width of the backbone, as .*before: {AGAIN}",
        ),
        ({"views": {"size": 64}}, f"does not tell size, mean, std of the views.*: {AGAIN}"),
        ({"backbone": BACKBONE | {"size": "vit_b16"}}, "its settings do not belong to its weights"),
        (
            {"backbone": BACKBONE | {"size": "vit_giant"}},
            r"backbone.size='vit_giant' is unknown; choose from",
        ),
        (
            {"backbone": BACKBONE | {"family": "swin", "size": "swin_tiny"}},
            f"{AGAIN} .*a backbone of the family 'vit'",
        ),
        ({"backbone": BACKBONE | {"token_width": 10**12}}, "tells a model by the number 1000000000000"),
        ({"backbone": BACKBONE | {"code": "x"}}, f'code="x": no such field in a Backbone.*{AGAIN}'),
        ({"views": VIEWS | {"size": 10**9}}, f"images of 1000000000 pixels a side.*: {AGAIN}"),
        ({"views": VIEWS | {"size": 128}}, f"{AGAIN} .*vit.pos_embed would be resized"),
        ({"views": VIEWS | {"std": [9, 9, 9]}}, r"std=\(9.0, 9.0, 9.0\) must lie in"),
        ({"files": None}, f"tells files=None, where .*: {AGAIN}"),
        ({"files": {"../vitdet.pth": {}}}, "names the file '../vitdet.pth', which lies elsewhere"),
        ({"files": {"absent.pth": {}}}, "absent.pth is missing: copy the export again"),
    ],
    ids=str,
)
def test_what_no_transfer_can_begin_from_is_told(
    changed: Mapping[str, Any], message: str, exports: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exports["vit", "detectron2"], folder)
    shutil.copyfile(folder / "vitdet.pth", tmp_path / "vitdet.pth")
    (folder / KEYS).write_text(json.dumps(told(folder) | changed))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_pretrained(folder)


def test_a_file_that_is_none_of_an_export_s_weights_is_refused(
    exports: dict[tuple[str, str], Path],
) -> None:
    file = exports["vit", "openmmlab"] / "config.json"
    with pytest.raises(
        ValueError, match=r"is none of the files of weights .*vit_mmseg.pth.*vit_mmpretrain.pth"
    ):
        open_pretrained(file)
