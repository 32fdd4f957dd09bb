"""Has ViTDet's file the names and pixels of detectron2, and does the command say that detectron2 was not there?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.export.__main__ import UNPROVEN, main
from pretrain.export.detectron2_file import WEIGHTS
from pretrain.export.formats import export
from tests.export.conftest import last


def test_names_keep_the_place_of_the_class_token(vit_run: Path, tmp_path: Path) -> None:
    exported = export(last(vit_run), "detectron2", tmp_path / "out")
    tensors = torch.load(exported.folder / WEIGHTS, weights_only=True)["model"]
    assert all(name.startswith("backbone.net.") for name in tensors)
    assert tensors["backbone.net.pos_embed"].shape == (1, 1 + 16, 48)
    assert {"backbone.net.patch_embed.proj.weight", "backbone.net.blocks.1.attn.qkv.bias"} <= tensors.keys()
    assert {agreement.size for agreement in exported.proof} == {64, 96}


def test_configuration_counts_pixels_to_255_and_windows_by_quarters(vit_run: Path, tmp_path: Path) -> None:
    text = (export(last(vit_run), "detectron2", tmp_path / "out").folder / "vitdet_config.py").read_text()
    assert "model.pixel_mean = [123.675, 116.28, 103.53]" in text
    assert "model.pixel_std = [58.395, 57.12, 57.375]" in text
    assert 'model.input_format = "RGB"' in text and "pretrain_img_size = 64" in text
    compile(text, "vitdet_config.py", "exec")


def test_a_toolkit_that_was_not_there_ends_in_a_code_of_its_own(
    vit_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([str(vit_run), "--to", "detectron2", "--out", str(tmp_path / "out")])
    assert code == UNPROVEN != 1
    assert "not proven by its toolkit: detectron2 itself is on no package registry" in capsys.readouterr().err
    assert "Not proven: detectron2 itself" in (tmp_path / "out" / "README.md").read_text()
