"""Are the weights, modules and configuration files what mmsegmentation and mmdetection 3.x take?

The toolkits themselves are asked by benchmarks/openmmlab_loads.py, in an environment of their own.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.export import openmmlab, several, toolkits
from pretrain.export.__main__ import UNPROVEN, main
from pretrain.export.formats import EXPORTERS, Exported, export
from pretrain.export.names import NoToolkits, NotProven
from pretrain.export.openmmlab import REMOTE_CODE
from pretrain.export.openmmlab_configs import all_configs, render
from pretrain.export.openmmlab_keys import vit_tensors
from pretrain.export.remote_code.layer_decay_openmmlab import has_decay, layers_above
from pretrain.export.remote_code.simple_pyramid_openmmlab import SimplePyramid
from pretrain.recipes import load
from tests.export.cards import code_of, run_alone
from tests.export.conftest import last

CONFIGS = {f"{head}_{data}.py" for head in ("mask_rcnn", "dino") for data in ("coco", "lvis")} | {
    "upernet_ade20k.py",
    "mask2former_ade20k.py",
}
TOP = {
    "custom_imports", "model", "train_dataloader", "val_dataloader", "test_dataloader", "val_evaluator",
    "test_evaluator", "optim_wrapper", "param_scheduler", "train_cfg", "val_cfg", "test_cfg", "default_scope",
    "default_hooks", "env_cfg", "visualizer", "log_processor", "log_level", "load_from", "resume", "auto_scale_lr",
}  # fmt: skip
TOOLKITS = {"mmdet.models", "mmpretrain.models"}
LAYER = {
    "mmseg": {"attn.attn.in_proj_weight", "attn.attn.in_proj_bias", "attn.attn.out_proj.weight",
              "attn.attn.out_proj.bias"},
    "mmpretrain": {"attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"},
}  # fmt: skip


@pytest.fixture(scope="module")
def internimage(internimage_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(last(internimage_run), "openmmlab", tmp_path_factory.mktemp("openmmlab") / "out")


@pytest.fixture(scope="module")
def vit(vit_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(last(vit_run), "openmmlab", tmp_path_factory.mktemp("openmmlab") / "out")


@pytest.fixture(params=["internimage", "vit"])
def exported(request: pytest.FixtureRequest) -> Exported:
    return request.getfixturevalue(request.param)


def read_config(path: Path) -> dict:
    """Names that a configuration file assigns, each once, every value a literal or dict(...)."""
    tree = ast.parse(path.read_text())
    allowed = (ast.Assign, ast.Expr)
    assert all(isinstance(node, allowed) for node in tree.body)
    names: dict = {}
    exec(compile(tree, str(path), "exec"), {}, names)
    del names["__doc__"]
    assert len([node for node in tree.body if isinstance(node, ast.Assign)]) == len(names)
    return names


def test_shipped_module_gives_our_maps_for_every_config_at_two_sizes(internimage: Exported) -> None:
    for size in (64, 96):
        found = {(a.file, a.output) for a in internimage.proof if a.size == size}
        assert {file for file, _ in found} == CONFIGS
        for name, maps in (("upernet_ade20k.py", 4), ("dino_coco.py", 3)):
            assert {(name, f"map -{index + 1}") for index in range(maps)} == {
                f for f in found if f[0] == name
            }
    assert all(agreement.max_difference < 1e-4 for agreement in internimage.proof)


def test_vit_files_give_our_tokens_at_two_sizes(vit: Exported) -> None:
    found = {(a.file, a.size) for a in vit.proof}
    assert found == {(f"vit_{toolkit}.pth", size) for toolkit in LAYER for size in (64, 128)}
    assert all(agreement.max_difference < 1e-4 for agreement in vit.proof)


def test_configs_whose_maps_are_not_there_prove_nothing(
    vit_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = last(vit_run)
    ours = {size: openmmlab._vit_maps(trained, size)["-1"] for size in (64, 128)}

    def answered(files: set[str], position: str = "-1") -> list[str]:
        outputs = {
            f"{size}/{name.removesuffix('.py')}/{position}": m.permute(0, 3, 1, 2)
            for name in files
            for size, m in ours.items()
        }
        monkeypatch.setattr(openmmlab, "run_fresh", lambda *_, **__: (outputs, {}))
        return sorted({a.file for a in openmmlab.prove_in_toolkits(trained, tmp_path, "python")})

    built = CONFIGS - set(openmmlab.BUILT_ALONE)
    assert answered(built) == sorted(built)
    for files, position in ((built - {"dino_coco.py"}, "-1"), (built, "-9"), (set(), "-1")):
        with pytest.raises(NotProven, match=r"at 64 px no map of .*dino_coco\.py could be compared"):
            answered(files, position)


def test_what_only_the_toolkits_prove_is_said_to_be_open(exported: Exported) -> None:
    assert "mmengine is missing" in exported.unproven
    assert "Not proven: nothing was loaded in the toolkits" in (exported.folder / "README.md").read_text()


def test_exit_code_tells_proven_open_and_wrong_apart(
    vit_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answers(error: Exception | None):
        def prove_in_toolkits(trained, folder, python):
            if error is not None:
                raise error
            return []

        replaced = dataclasses.replace(EXPORTERS["openmmlab"], prove_in_toolkits=prove_in_toolkits)
        monkeypatch.setitem(EXPORTERS, "openmmlab", replaced)
        return main([str(vit_run), "--to", "openmmlab", "--out", str(tmp_path / "out")])

    assert answers(NotProven("other maps")) == 1 and not (tmp_path / "out").exists()
    assert answers(NoToolkits("mmengine is missing")) == UNPROVEN != 1
    assert "give --python an interpreter that has them" in capsys.readouterr().err
    assert (tmp_path / "out" / "upernet_ade20k.py").exists()
    assert answers(None) == 0


def test_python_without_toolkits_is_refused_before_torch_is_loaded(
    vit_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        str(vit_run),
        "--to",
        "openmmlab",
        "--python",
        sys.executable,
        "--out",
        str(tmp_path / "out"),
    ]
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pretrain.export", *arguments],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1 and " torch" not in ended.stderr
    assert (
        "cannot prove openmmlab, since mmengine is missing there: install that, name another" in ended.stderr
    )
    asked = []
    monkeypatch.setattr(toolkits, "missing_toolkit", lambda program, name, *more: asked.append(more) or "")
    monkeypatch.setattr(several, "read_trained", lambda *_: (_ for _ in ()).throw(ValueError("reads")))
    assert main(arguments) == 1  # every toolkit was found: only then weights are read
    assert capsys.readouterr().err == "error: reads\n" and asked == [(), ("mmpretrain",)]


def test_python_that_is_no_program_is_refused_at_once(
    vit_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(vit_run), "--to", "openmmlab", "--python", "/no/python"]) == 1
    assert "--python /no/python is no program: give the path" in capsys.readouterr().err
    assert main([str(vit_run), "--to", "openmmlab", "--python", "/bin/ls"]) == 1
    assert "--python /bin/ls does not answer as Python 3" in capsys.readouterr().err


def test_config_files_are_python_and_whole(exported: Exported) -> None:
    folder = exported.folder
    files = {path.name for path in folder.glob("*.py")}
    assert {path for path in files if not path.endswith(("_openmmlab.py", "_network.py"))} == CONFIGS
    for name in CONFIGS:
        config = read_config(folder / name)
        assert set(config) == TOP, name
        for module in config["custom_imports"]["imports"]:
            assert module in TOOLKITS or (folder / f"{module}.py").is_file(), (name, module)
        place = config["model"]["backbone"]["init_cfg"]["checkpoint"]
        assert (folder / place.removeprefix("{{ fileDirname }}/")).is_file()
        assert config["optim_wrapper"]["constructor"] == "BackboneLayerDecay"
        assert config["model"]["data_preprocessor"]["mean"] == [123.675, 116.28, 103.53]


def test_heads_take_the_widths_of_the_maps(internimage: Exported) -> None:
    def model(name: str) -> dict:
        return read_config(internimage.folder / name)["model"]

    assert model("upernet_ade20k.py")["decode_head"]["in_channels"] == [16, 32, 64, 128]
    assert model("upernet_ade20k.py")["auxiliary_head"]["in_channels"] == 64
    assert model("mask2former_ade20k.py")["decode_head"]["in_channels"] == [16, 32, 64, 128]
    assert model("mask_rcnn_coco.py")["neck"]["in_channels"] == [16, 32, 64, 128]
    assert model("dino_lvis.py")["neck"]["in_channels"] == [32, 64, 128]
    assert model("dino_lvis.py")["backbone"]["out_indices"] == (1, 2, 3)
    assert model("dino_lvis.py")["bbox_head"]["num_classes"] == 1203


def test_numbers_of_internimage_h_are_the_published_ones(internimage_run: Path) -> None:
    configs = all_configs(dataclasses.replace(last(internimage_run), run=load("m3i.internimage_h")))
    backbone = configs["upernet_ade20k.py"]["model"]["backbone"]
    wanted = {
        "channels": 320, "depths": [6, 6, 32, 6], "groups": [10, 20, 40, 80], "mlp_ratio": 4, "drop_path_rate": 0.5,
        "layer_scale": None, "offset_scale": 1, "post_norm": False, "dw_kernel_size": 5, "res_post_norm": True,
        "level2_post_norm": True, "level2_post_norm_block_ids": [5, 11, 17, 23, 29], "center_feature_scale": True,
        "with_cp": True,
    }  # fmt: skip
    assert {name: backbone[name] for name in wanted} == wanted
    upernet = configs["upernet_ade20k.py"]
    assert upernet["model"]["decode_head"]["in_channels"] == [320, 640, 1280, 2560]
    assert upernet["model"]["auxiliary_head"]["in_channels"] == 1280
    assert upernet["optim_wrapper"]["paramwise_cfg"] == {"decay_rate": 0.95, "depths": [6, 6, 32, 6]}
    assert upernet["optim_wrapper"]["optimizer"]["lr"] == 2e-5
    assert upernet["model"]["data_preprocessor"]["size"] == (896, 896)
    assert configs["dino_coco.py"]["model"]["neck"]["in_channels"] == [640, 1280, 2560]


def test_vit_schedules_are_those_of_the_paper(vit: Exported) -> None:
    def schedule(name: str) -> tuple:
        config = read_config(vit.folder / name)
        optimizer = config["optim_wrapper"]["optimizer"]
        batch = config["auto_scale_lr"]["base_batch_size"]
        return optimizer["lr"], optimizer["weight_decay"], batch, config["param_scheduler"][0]["end"]

    assert schedule("upernet_ade20k.py") == (1e-4, 0.05, 16, 1500)
    assert schedule("mask_rcnn_coco.py") == (1e-4, 0.1, 64, 250)
    assert schedule("mask_rcnn_lvis.py") == (2e-4, 0.1, 64, 250)


def test_layer_decay_counts_the_layers_above() -> None:
    depths = [6, 6, 32, 6]
    above = {
        "backbone.levels.3.blocks.5.mlp.fc1.weight": 0,
        "backbone.levels.3.norm.0.weight": 0,
        "backbone.levels.2.downsample.conv.weight": 5,  # as the first block of the last stage
        "backbone.levels.3.blocks.0.dcn.mask.weight": 5,
        "backbone.levels.2.blocks.31.norm1.0.weight": 6,
        "backbone.levels.0.blocks.0.dcn.offset.bias": 49,
        "backbone.patch_embed.conv1.weight": 49,
        "decode_head.conv_seg.weight": 0,
    }
    assert {name: layers_above(name, depths) for name in above} == above
    vit = {
        "backbone.layers.11.ln1.weight": 1,
        "backbone.layers.0.attn.qkv.weight": 12,
        "backbone.pos_embed": 13,
        "backbone.patch_embed.projection.weight": 13,
        "backbone.ln1.weight": 0,
        "neck.levels.0.1.weight": 0,
    }
    assert {name: layers_above(name, [12]) for name in vit} == vit


def test_vectors_and_embeddings_have_no_weight_decay() -> None:
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    assert has_decay("backbone.layers.0.attn.qkv.weight", matrix)
    assert not has_decay("backbone.pos_embed", matrix) and not has_decay("backbone.ln1.weight", vector)


@pytest.mark.parametrize("toolkit", sorted(LAYER))
def test_vit_names_are_the_toolkits(vit: Exported, toolkit: str) -> None:
    names = torch.load(vit.folder / f"vit_{toolkit}.pth", weights_only=True)["state_dict"].keys()
    layer = {f"{module}.{kind}" for module in ("ln1", "ln2", "ffn.layers.0.0", "ffn.layers.1")
             for kind in ("weight", "bias")} | LAYER[toolkit]  # fmt: skip
    assert set(names) == {
        "cls_token", "pos_embed", "patch_embed.projection.weight", "patch_embed.projection.bias", "ln1.weight",
        "ln1.bias", *(f"layers.{index}.{name}" for index in (0, 1) for name in layer),
    }  # fmt: skip


def test_layer_scale_is_folded() -> None:
    state = {"blocks.0.attn.proj.weight": torch.ones(2, 2), "blocks.0.ls1.gamma": torch.tensor([2.0, 3.0])}
    tensors, origins = vit_tensors(state, "mmpretrain")
    assert tensors["layers.0.attn.proj.weight"].tolist() == [[2, 2], [3, 3]]
    assert list(origins) == ["layers.0.attn.proj.weight"]


def test_pyramid_has_every_stride() -> None:
    one = torch.randn(1, 16, 8, 8)
    outputs = SimplePyramid(16, 8, num_outs=5)([one])
    assert [tuple(m.shape) for m in outputs] == [(1, 8, side, side) for side in (32, 16, 8, 4, 2)]
    assert [m.shape[-1] for m in SimplePyramid(16, 8, num_outs=4, first=1)([one])] == [16, 8, 4, 2]
    pyramid = SimplePyramid(16, 8, num_outs=4)
    each = pyramid([one, one, one, 2 * one])
    assert torch.equal(each[0], pyramid([one])[0]) and not torch.equal(each[3], pyramid([one])[3])


def test_rendered_python_reads_back() -> None:
    value = {
        "a": [1, (2,), {"b": None, "c": "x" * 90}],
        "d": (True, 1e-05),
        "e": {},
        "f": [{"g": "h" * 50}] * 3,
    }
    assert eval(render(value)) == value


def test_module_loads_strictly_and_gives_the_stages_asked_for(
    internimage: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(REMOTE_CODE))
    InternImage = importlib.import_module("internimage_openmmlab").InternImage
    arguments = dict(read_config(internimage.folder / "dino_coco.py")["model"]["backbone"], type=None)
    del arguments["type"]
    state = torch.load(internimage.folder / "internimage.pth", weights_only=True)["state_dict"]
    prefixed = {f"backbone.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": prefixed}, tmp_path / "whole.pth")
    arguments["init_cfg"] = {"type": "Pretrained", "checkpoint": str(tmp_path / "whole.pth")}
    backbone = InternImage(**arguments)
    backbone.init_weights()
    assert torch.equal(backbone.patch_embed.conv1.weight, state["patch_embed.conv1.weight"])
    assert [m.shape[1] for m in backbone(torch.randn(1, 3, 32, 32))] == [32, 64, 128]
    del prefixed["backbone.patch_embed.conv1.bias"]
    torch.save({"state_dict": prefixed}, tmp_path / "whole.pth")
    with pytest.raises(
        ValueError, match=r"(?s)whole\.pth does not fit this backbone.*patch_embed\.conv1\.bias"
    ):
        backbone.init_weights()
    with pytest.raises(ValueError, match=r"core_op.*is not served"):
        InternImage(**arguments, core_op="DCNv2")


def test_card_runs_without_this_package(internimage: Exported, vit: Exported, tmp_path: Path) -> None:
    code = code_of(internimage.folder) + "\nimport torch\nshapes = [list(m.shape) for m in "
    code += (
        "backbone.eval()(torch.zeros(1, 3, 64, 64))]\n" + code_of(vit.folder) + "\nprint(shapes, len(state))"
    )
    printed = run_alone(code, tmp_path)
    assert printed.strip() == "[[1, 16, 16, 16], [1, 32, 8, 8], [1, 64, 4, 4], [1, 128, 2, 2]] 30"
