"""Does onnxruntime compute what pre-training computes, at a batch that the graph was not made with?"""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from pretrain.export.agreement import NotProven
from pretrain.export.formats import Exported, export
from pretrain.export.onnx_graph import prove
from tests.export.conftest import last


@pytest.fixture(scope="module")
def exported(internimage_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(last(internimage_run), "onnx", tmp_path_factory.mktemp("onnx") / "out")


def test_every_output_is_proven_at_two_batches(exported: Exported) -> None:
    outputs = [f"stage_{index}" for index in (1, 2, 3, 4)] + ["tokens"]
    assert [(a.output, a.size) for a in exported.proof] == [
        (f"{name} of {number} images", 64) for number in (2, 3) for name in outputs
    ]
    assert all(agreement.max_difference < 1e-4 for agreement in exported.proof)


def test_the_graph_is_sound_and_says_what_it_takes(exported: Exported) -> None:
    onnx.checker.check_model(exported.folder / "model.onnx", full_check=True)
    told = json.loads((exported.folder / "config.json").read_text())
    assert told["inputs"] == {"images": ["batch", 3, 64, 64]}
    graph = onnx.load(exported.folder / "model.onnx", load_external_data=False).graph
    assert [output.name for output in graph.output] == told["outputs"]
    assert {node.domain for node in graph.node} == {""}  # no operator of anybody's own


def test_other_weights_are_not_proven(exported: Exported, internimage_run: Path) -> None:
    trained = last(internimage_run)
    trained.towers.encoder.dcnv3.patch_embed.conv1.weight.data.neg_()
    with pytest.raises(NotProven, match=r"stage_1 of 2 images.*must exceed"):
        prove(trained, exported.folder)
    (exported.folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(NotProven, match=r"onnxruntime does not load model\.onnx"):
        prove(trained, exported.folder)


def test_a_vit_is_proven_at_two_batches(vit_run: Path, tmp_path: Path) -> None:
    proof = export(last(vit_run), "onnx", tmp_path / "out").proof
    assert [(a.output, a.size) for a in proof] == [
        (f"{name} of {number} images", 64) for number in (2, 3) for name in ("class_token", "tokens")
    ]
