"""Has ViTDet's file the names and pixels of detectron2, and does the command say that detectron2 was not there?"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from pretrain.export.__main__ import UNPROVEN, main
from pretrain.export.detectron2_file import BASE, WEIGHTS, config
from pretrain.export.formats import export
from pretrain.recipes import load
from tests.export.conftest import last


def test_names_keep_the_place_of_the_class_token(vit_run: Path, tmp_path: Path) -> None:
    exported = export(last(vit_run), "detectron2", tmp_path / "out")
    tensors = torch.load(exported.folder / WEIGHTS, weights_only=True)["model"]
    assert all(name.startswith("backbone.net.") for name in tensors)
    assert tensors["backbone.net.pos_embed"].shape == (1, 1 + 16, 48)
    assert {"backbone.net.patch_embed.proj.weight", "backbone.net.blocks.1.attn.qkv.bias"} <= tensors.keys()
    assert {agreement.size for agreement in exported.proof} == {64, 96}


def test_configuration_counts_pixels_to_255_and_windows_by_quarters(vit_run: Path) -> None:
    text = config(last(vit_run))
    assert "model.pixel_mean = [123.675, 116.28, 103.53]" in text
    assert "model.pixel_std = [58.395, 57.12, 57.375]" in text
    assert 'model.input_format = "RGB"' in text and "pretrain_img_size = 64" in text


def test_configuration_goes_out_from_the_file_in_the_checkout(
    vit_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, loaded = last(vit_run), {name: MagicMock() for name in ("model", "optimizer", "train")}
    large = replace(trained, run=load("m3i.vit_b16"))
    large = replace(large, run=replace(large.run, backbone=replace(large.run.backbone, size="vit_l16")))

    def read(file: str, keys: tuple[str, ...]) -> tuple[MagicMock, ...]:
        assert file == str(tmp_path / BASE)
        return tuple(loaded.get(key, MagicMock()) for key in keys)

    monkeypatch.setitem(
        sys.modules, "detectron2.config", SimpleNamespace(LazyConfig=SimpleNamespace(load=read))
    )
    decay = SimpleNamespace(get_vit_lr_decay_rate=lambda name, **given: given)
    monkeypatch.setitem(sys.modules, "detectron2.modeling.backbone.vit", decay)
    names = {"__file__": str(tmp_path / "out" / "vitdet_config.py")}
    monkeypatch.setenv("DETECTRON2", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"set DETECTRON2 to the folder of detectron2's repository"):
        exec(config(large), dict(names))
    (tmp_path / BASE).parent.mkdir(parents=True)
    (tmp_path / BASE).touch()
    exec(config(large), names)
    net, rates = loaded["model"].backbone.net, loaded["optimizer"].params.lr_factor_func
    assert (net.depth, net.embed_dim, net.num_heads, net.drop_path_rate) == (24, 1024, 16, 0.4)
    assert sorted({*range(24)} - {*net.window_block_indexes}) == [5, 11, 17, 23]
    assert rates("a") == {"lr_decay_rate": 0.8, "num_layers": 24}
    assert loaded["train"].init_checkpoint == str(tmp_path / "out" / WEIGHTS)


def test_a_toolkit_that_was_not_there_ends_in_a_code_of_its_own(
    vit_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([str(vit_run), "--to", "detectron2", "--out", str(tmp_path / "out")])
    assert code == UNPROVEN != 1
    told = capsys.readouterr()
    assert "not proven by its toolkit: detectron2 itself is on no package registry" in told.err
    assert "compared: vitdet.pth at 64 px" in told.out and "prove" not in told.out
    assert "Not proven: detectron2 itself" in (tmp_path / "out" / "README.md").read_text()
