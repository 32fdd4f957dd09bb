"""Does a stranger's folder that is evaluated say what is wrong with it, before it takes memory or gives
random numbers?
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch

from pretrain.evaluate.published import open_published
from pretrain.evaluate.subjects import open_model
from pretrain.export import internimage, safetensors_file
from pretrain.export.trained import Trained
from pretrain.facts import DataFacts
from pretrain.models import internimage_layouts as layouts
from pretrain.recipes import load
from pretrain.towers import Towers
from tests.fakes import shrink
from tests.memory import little_memory

SWIN = {"img_size": 32, "embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
TINY = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}


def timm_folder(folder: Path, architecture: str, arguments: dict[str, Any], **told: Any) -> dict[str, Any]:
    """Writes config and weights of a random model; the config."""
    model = timm.create_model(architecture, **{"num_classes": 0} | arguments)
    config = {"architecture": architecture, "num_classes": 0, "model_args": arguments, "pretrained_cfg": told}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return config


@pytest.mark.parametrize("more", [{"img_size": 4096}, {"dynamic_img_size": True}], ids=["told", "any size"])
def test_an_image_of_more_tokens_than_memory_holds_is_refused(more: dict[str, Any], tmp_path: Path) -> None:
    """300 kB of weights, and 16 million patches of one pixel."""
    arguments = TINY | {"embed_dim": 96, "patch_size": 1, "pos_embed": "none"} | more
    timm_folder(tmp_path, "vit_tiny_patch16_224", arguments, input_size=[3, 4096, 4096])
    told = r"takes more than 4 GiB of memory for one image of 4096 pixels"
    with little_memory(), pytest.raises(ValueError, match=told):
        open_published(tmp_path)
    assert open_published(tmp_path, 32).encoder.stride == 1


def test_many_tokens_that_take_little_memory_are_no_reason_to_refuse(tmp_path: Path) -> None:
    """As published: Swin of 384 pixels has 9216 tokens in its first stage."""
    timm_folder(
        tmp_path,
        "swin_tiny_patch4_window7_224",
        SWIN | {"img_size": 384, "window_size": 12},
        input_size=[3, 384, 384],
    )
    assert open_published(tmp_path).encoder.stride == 8


@pytest.mark.parametrize(
    ("architecture", "arguments", "told", "lost"),
    [
        ("dla46_c", {}, {}, "base_layer.0.weight"),
        (
            "vit_tiny_patch16_224",
            TINY | {"num_classes": 0},
            {"classifier": "head", "num_classes": 5},
            "norm.bias",
        ),
    ],
    ids=["never strict", "not strict for other labels"],
)
def test_a_weight_that_a_file_lacks_is_told_where_timm_is_not_strict(
    architecture: str, arguments: dict[str, Any], told: dict[str, Any], lost: str, tmp_path: Path
) -> None:
    config = timm_folder(tmp_path, architecture, arguments, input_size=[3, 32, 32], **told)
    config["num_classes"] = told.get("num_classes", 0)
    (tmp_path / "config.json").write_text(json.dumps(config))
    open_published(tmp_path)
    state = torch.load(tmp_path / "pytorch_model.bin")
    del state[lost]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=rf"lacks 1 weights of \w+, such as {re.escape(lost)}, .*save the whole"
    ):
        open_published(tmp_path)


def test_timm_weights_of_more_blocks_than_the_settings_tell_are_refused(tmp_path: Path) -> None:
    """Which timm passes over where the file is of other labels."""
    told = {"classifier": "head", "num_classes": 5, "input_size": [3, 32, 32]}
    config = timm_folder(tmp_path, "vit_tiny_patch16_224", TINY | {"num_classes": 0}, **told)
    config |= {"model_args": TINY | {"num_classes": 0, "depth": 1}, "num_classes": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"12 tensors of blocks that its settings do not tell of, such as blocks\.1"
    ):
        open_published(tmp_path)


def linked(file: Path, elsewhere: Path) -> None:
    """The file lies there from now on, and a link to it in its place."""
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def test_a_link_leads_a_timm_folder_to_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    timm_folder(folder, "vit_tiny_patch16_224", TINY, input_size=[3, 32, 32])
    linked(folder / "config.json", tmp_path / "config.json")
    with pytest.raises(
        ValueError, match=r"config\.json is a link that leads out of the folder, to .*: copy it"
    ):
        open_published(folder)


@pytest.mark.parametrize(
    ("kind", "recipe", "file"),
    [
        (internimage, "m3i.internimage_h", "internimage.pth"),
        (safetensors_file, "m3i.vit_b16", "towers.safetensors"),
    ],
)
def test_a_link_leads_an_export_to_no_other_folder(
    kind: ModuleType, recipe: str, file: str, tmp_path: Path
) -> None:
    run, facts, folder = shrink(load(recipe)), DataFacts((), 0), tmp_path / "model"
    folder.mkdir()
    towers = Towers(run, facts).requires_grad_(False).eval()
    towers.fold_norms()
    kind.write(Trained(run, facts, towers, "teacher", "step_000003", {}, None, {}), folder)
    linked(folder / file, tmp_path / file)
    with pytest.raises(
        ValueError, match=rf"{file} is a link that leads out of the folder.* name that file itself"
    ):
        open_model(folder, None)
    assert open_model(folder / file, None).run.views.size == run.views.size  # it was named
    linked(folder / "config.json", tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config\.json is a link that leads out of the folder"):
        open_model(folder / file, None)


@pytest.mark.parametrize("layout", ["plain", "huggingface"])
def test_weights_of_more_blocks_than_the_settings_tell_are_refused(layout: str, tmp_path: Path) -> None:
    """They would be computed with in part; heads, which nothing reads, may stand beside them."""
    run, facts = shrink(load("m3i.internimage_h")), DataFacts(("red", "blue"), 0)
    towers = Towers(run, facts).requires_grad_(False).eval()
    internimage.write(Trained(run, facts, towers, "teacher", "step_000003", {}, None, {}), tmp_path)
    file, told = tmp_path / "internimage.pth", json.loads((tmp_path / "config.json").read_text())
    plain = torch.load(file, weights_only=True)["model"]
    assert any(name.startswith("head.") for name in plain)
    stages, blocks = len(told["depths"]), told["depths"][-1]

    def opened(more: tuple[str, ...] = (), **changed: Any) -> None:
        torch.save(layouts.write(plain | dict.fromkeys(more, torch.ones(2)), layout), file)
        (tmp_path / "config.json").write_text(json.dumps(told | changed))
        open_published(tmp_path)

    opened(("conv_head.0.weight",))
    last = f"levels.{stages - 1}.blocks."
    one_more = {name.replace(f"{last}{blocks - 1}.", f"{last}{blocks}."): t for name, t in plain.items()}
    plain |= one_more
    named = re.escape(f"{last}{blocks}.")
    with pytest.raises(ValueError, match=rf"tensors are of no part of it, such as .*{named}.* again"):
        opened()
    opened(depths=[*told["depths"][:-1], blocks + 1])
    with pytest.raises(ValueError, match=r"1 tensors are of no part of it, such as (model\.)?levels\.9\.foo"):
        opened(("levels.9.foo",), depths=[*told["depths"][:-1], blocks + 1])
