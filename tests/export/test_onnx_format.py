"""Does onnxruntime compute what pre-training computes, at a batch that the graph was not made with?"""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from pretrain.export.formats import Exported, export
from pretrain.export.names import NotProven
from pretrain.export.onnx_graph import open_graph, prove, write_graph
from pretrain.export.remote_code.internimage_network import InternImageNetwork
from tests.export.conftest import last


@pytest.fixture(scope="module")
def exported(vit_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(last(vit_run), "onnx", tmp_path_factory.mktemp("onnx") / "out")


def test_every_output_is_proven_at_two_batches(exported: Exported) -> None:
    assert [(a.output, a.size) for a in exported.proof] == [
        (f"{name} of {number} images", 64) for number in (2, 3) for name in ("class_token", "tokens")
    ]
    assert all(agreement.max_difference < 1e-4 for agreement in exported.proof)


def test_the_graph_is_sound_and_says_what_it_takes(exported: Exported) -> None:
    onnx.checker.check_model(exported.folder / "model.onnx", full_check=True)
    told = json.loads((exported.folder / "config.json").read_text())
    assert told["inputs"] == {"images": ["batch", 3, 64, 64]}
    graph = onnx.load(exported.folder / "model.onnx", load_external_data=False).graph
    assert [output.name for output in graph.output] == told["outputs"]
    assert {node.domain for node in graph.node} == {""}  # no operator of anybody's own


def test_other_weights_are_not_proven(exported: Exported, vit_run: Path) -> None:
    trained = last(vit_run)
    trained.towers.encoder.vit.patch_embed.proj.weight.data.neg_()
    with pytest.raises(NotProven, match=r"class_token of 2 images.*must exceed"):
        prove(trained, exported.folder)
    broken = exported.folder / "broken.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(NotProven, match=r"onnxruntime does not load broken\.onnx"):
        open_graph(broken)


def test_a_deformable_block_is_standard_operators_for_any_batch(tmp_path: Path) -> None:
    torch.manual_seed(
        0
    )  # the whole of an InternImage takes as long as all these tests: benchmarks/export_huge.py
    network = InternImageNetwork(8, (1,), (2,), res_post_norm=True, center_feature_scale=True).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    write_graph(Maps(network), ["map"], 16, tmp_path / "block.onnx")
    images = torch.randn(3, 3, 16, 16)
    (found,) = open_graph(tmp_path / "block.onnx").run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), network(images)[0], rtol=1e-4, atol=1e-4)
    assert "GridSample" in {node.op_type for node in onnx.load(tmp_path / "block.onnx").graph.node}


class Maps(nn.Module):
    """The maps as a tuple."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.network(images))
