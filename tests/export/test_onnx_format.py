"""Does onnxruntime compute what pre-training computes, at sizes and batches that the graph was not made with?"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import onnx
import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from pretrain.checkpoint import load_towers
from pretrain.evaluate.asked import Protocols
from pretrain.evaluate.evaluation import evaluate
from pretrain.evaluate.fine_tune_recipes import FROZEN
from pretrain.evaluate.protocols import Measured, measure_subject
from pretrain.evaluate.published import open_published
from pretrain.evaluate.sets import read_manifests
from pretrain.evaluate.splits import SPLITS
from pretrain.evaluate.subjects import Subject, open_model
from pretrain.export.formats import Exported, export
from pretrain.export.names import NotProven
from pretrain.export.onnx_graph import OPSET, open_graph, prove
from pretrain.export.onnx_networks import add_internimage, add_tokens
from pretrain.export.onnx_parts import Parts
from pretrain.export.onnx_swin import add_swin
from pretrain.export.remote_code.internimage_network import InternImageNetwork
from tests.evaluate.sets import write_set
from tests.export.conftest import last


@pytest.fixture(scope="module")
def exported(vit_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(last(vit_run), "onnx", tmp_path_factory.mktemp("onnx") / "out")


def test_every_output_is_proven_at_two_sizes(exported: Exported) -> None:
    assert [(a.output, a.size) for a in exported.proof] == [
        (f"{name} of {number}", size)
        for size, number in ((64, "2 images"), (96, "1 image"))
        for name in ("class_token", "tokens")
    ]
    assert all(agreement.max_difference < 1e-4 for agreement in exported.proof)


def test_the_graph_is_sound_and_says_what_it_takes(exported: Exported) -> None:
    onnx.checker.check_model(exported.folder / "model.onnx", full_check=True)
    told = json.loads((exported.folder / "config.json").read_text())
    assert told["inputs"] == {"images": ["batch", 3, "height", "width"]} and told["multiple_of"] == 16
    graph = onnx.load(exported.folder / "model.onnx", load_external_data=False).graph
    assert [output.name for output in graph.output] == told["outputs"]
    assert {node.domain for node in graph.node} == {""}  # no operator of anybody's own
    weights = {one.name for one in graph.initializer}
    assert set(exported.keys["model.onnx"].written.values()) <= weights


def test_keys_tell_the_bytes_of_the_graph_and_of_its_weights(exported: Exported) -> None:
    digests = json.loads((exported.folder / "keys.json").read_text())["sha256"]
    assert digests == {
        name: sha256((exported.folder / name).read_bytes()).hexdigest()
        for name in ("model.onnx", "model.onnx.data")
    }


def test_the_towers_let_their_weights_go_where_no_format_follows(exported: Exported, vit_run: Path) -> None:
    for is_last in (False, True):
        trained = replace(last(vit_run), is_last=is_last)
        assert prove(trained, exported.folder) == exported.proof
        assert {weight.is_meta for weight in trained.towers.parameters()} == {is_last}


def test_other_weights_are_not_proven(exported: Exported, vit_run: Path) -> None:
    trained = last(vit_run)
    trained.towers.encoder.vit.patch_embed.proj.weight.data.neg_()
    with pytest.raises(NotProven, match=r"class_token of 2 images.*must exceed"):
        prove(trained, exported.folder)
    broken = exported.folder / "broken.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(NotProven, match=r"onnxruntime does not load broken\.onnx"):
        open_graph(broken)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 3), ("heldout", 2)):
        write_set(folder / split, split, count, seed=count, text=False)
    return folder


def measured(subject: Subject, data: Path, protocols: Protocols) -> Measured:
    folders = {split: data / split for split in SPLITS}
    return measure_subject(subject, folders, read_manifests(folders), protocols, torch.device("cpu"))


def test_the_graph_is_measured_like_its_run(
    exported: Exported, vit_run: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, recipe in FROZEN.items():
        monkeypatch.setitem(FROZEN, name, replace(recipe, epochs=2))
    probes = ("knn", "linear", "linear_lars", "attentive", "dense")
    protocols = Protocols((*probes, "zero_shot"), ks=(3,), frozen=tuple(FROZEN))
    run, facts, towers = load_towers(vit_run / "checkpoints" / "step_000003")
    of_run, of_graph = (
        measured(subject, data, protocols)
        for subject in (Subject("run", run, facts, towers, None), open_model(exported.folder, None))
    )
    for name in (*probes, *FROZEN):
        found, expected = (one.outcomes[name].record["accuracy"] for one in (of_graph, of_run))
        assert found == pytest.approx(expected, abs=2e-3), name
    torch.testing.assert_close(
        of_graph.evidence.heldout.tokens, of_run.evidence.heldout.tokens, rtol=1e-4, atol=1e-5
    )
    assert of_graph.outcomes["zero_shot"].record["reason"].startswith("no text tower came with")


@pytest.mark.parametrize("recipe", ["small", "paper"])
def test_what_would_train_the_weights_of_a_graph_says_what_to_name(
    recipe: str, exported: Exported, data: Path, tmp_path: Path
) -> None:
    asked = ["--probes", "knn,linear_sweep", "--fine-tune", "1", "--few-shot", "--fine-tune-recipe", recipe]
    found = evaluate([str(exported.folder), "--data", str(data), "--out", str(tmp_path / "a.json"), *asked])
    (rows,) = found["checkpoints"].values()
    assert "does not tell the order of its layers" in rows["linear_sweep"]["reason"]
    told = r"model\.onnx is a graph, whose weights are not trained: name the run itself, or export it --to another"
    for name in ("fine_tune", "few_shot_10_fine_tune"):
        assert re.match(told, rows[name]["reason"]) and rows[name]["accuracy"] is None


def test_an_internimage_is_standard_operators_for_any_size(tmp_path: Path) -> None:
    depths = (2, 0)  # blocks of one kind, traced once; the second stage has its downsampling and its norm
    network = InternImageNetwork(8, depths, (2, 2), res_post_norm=True, center_feature_scale=True)
    x3, x4 = nn.Conv2d(8, 8, 1), nn.Sequential(nn.Conv2d(16, 32, 1), nn.PixelShuffle(2))
    parts = Parts(torch.zeros(2, 3, 16, 24), OPSET)
    maps = add_internimage(parts, randomised(network), "backbone.")
    parts.output("map", maps[-1], ["batch", 16, "rows", "columns"])
    parts.output("tokens", add_tokens(parts, maps, x3, x4, "heads."), ["batch", "number", 8])

    def computed(images: Tensor) -> list[Tensor]:
        own = network(images)
        return [own[-1], (x3(own[-2]) + x4(own[-1])).flatten(2).mT]

    nodes = written_and_compared(parts, tmp_path, computed, ((2, 3, 24, 16), (1, 3, 32, 40)))
    assert "GridSample" in nodes
    weights = {
        one.name for one in onnx.load(tmp_path / "graph.onnx", load_external_data=False).graph.initializer
    }
    assert {f"backbone.{name}" for name in network.state_dict()} <= weights


def test_a_swin_keeps_its_windows_at_any_size(tmp_path: Path) -> None:
    swin = SwinTransformer(
        img_size=64,
        num_classes=0,
        global_pool="",
        embed_dim=8,
        depths=(2, 0),
        num_heads=(2, 2),
        window_size=5,
        strict_img_size=False,
    )
    assert [block.shift_size for block in swin.layers[0].blocks] == [(0, 0), (2, 2)]
    parts = Parts(torch.zeros(2, 3, 32, 48), OPSET)
    parts.output("tokens", add_swin(parts, randomised(swin), "swin."), ["batch", "number", 16])
    shapes = ((2, 3, 64, 64), (1, 3, 24, 56))  # 6 x 14 positions: windows of 5 are padded
    written_and_compared(parts, tmp_path, lambda images: [swin(images).flatten(1, 2)], shapes)


def randomised(network: nn.Module) -> nn.Module:
    """In eval mode with other numbers in each block, large enough to matter."""
    torch.manual_seed(0)
    for parameter in network.eval().parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def written_and_compared(parts: Parts, folder: Path, computed, shapes) -> set[str]:
    """Operators of the graph, once onnxruntime gave what torch gives for images of all shapes."""
    parts.save(folder / "graph.onnx")
    onnx.checker.check_model(folder / "graph.onnx", full_check=True)
    session = open_graph(folder / "graph.onnx")
    for shape in shapes:
        images = torch.randn(shape)
        found = session.run(None, {"images": images.numpy()})
        for values, own in zip(found, computed(images), strict=True):
            torch.testing.assert_close(torch.from_numpy(values), own, rtol=1e-4, atol=1e-4)
    told = {"multiple_of": 32, "trained_size": 64, "outputs": [one.name for one in session.get_outputs()]}
    pixels = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "config.json").write_text(json.dumps(told | pixels))
    images = torch.randn(2, 3, 64, 64)  # that evaluation sees, of any family
    tokens = open_published(folder / "graph.onnx").encoder(images)
    torch.testing.assert_close(tokens, computed(images)[-1], rtol=1e-4, atol=1e-4)
    return {node.op_type for node in onnx.load(folder / "graph.onnx", load_external_data=False).graph.node}
