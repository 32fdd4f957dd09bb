"""How does a run become what mmsegmentation and mmdetection 3.x train on? Weights, modules, complete configs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from pretrain.export import openmmlab_vit
from pretrain.export.agreement import Agreement, compare, random_images
from pretrain.export.described import write_description
from pretrain.export.fresh_process import FreshProcessError, run_fresh
from pretrain.export.keys import Keys
from pretrain.export.names import NoToolkits, NotProven
from pretrain.export.openmmlab_configs import INTERNIMAGE_FILE, VIT_FILES, all_configs, write_configs
from pretrain.export.openmmlab_keys import vit_tensors
from pretrain.export.openmmlab_probe import MISSING
from pretrain.export.own_features import own_features
from pretrain.export.resized_positions import with_resized_positions
from pretrain.export.trained import Trained
from pretrain.models.internimage import INTERNIMAGE
from pretrain.models.layer_scale import FOLDED

REMOTE_CODE = Path(__file__).parent / "remote_code"
PROBE = Path(__file__).parent / "openmmlab_probe.py"
NO_PLACE = "no part of the backbone"
# By the toolkits: their backbones are those for COCO, whose maps are compared.
BUILT_ALONE = ("mask_rcnn_lvis.py", "dino_lvis.py")

Maps = dict[str, Float[Tensor, "b h w c"]]  # by position from the last: "-1", "-2", ...


@dataclass(frozen=True)
class Family:
    """What the backbones of one family differ in."""

    prefix: str  # of the backbone's tensors in our towers
    modules: tuple[str, ...]  # files that the toolkits import
    files: dict[str, Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, str]]]]
    sizes: Callable[[Trained], tuple[int, int]]  # pixels of the squares of the proof
    maps: Callable[[Trained, int], Maps]  # ours for images of that size
    prove_alone: Callable[[Trained, Path], list[Agreement]]


def write(trained: Trained, folder: Path) -> dict[str, Keys]:
    """Writes weights under every toolkit's names, modules and configuration files; tells of every tensor."""
    family, state = FAMILIES[trained.run.backbone.family], trained.towers.state_dict()
    for name in family.modules:
        shutil.copyfile(REMOTE_CODE / name, folder / name)
    write_configs(trained, folder)
    write_description(trained, folder, next(iter(family.files)))
    own = {key.removeprefix(family.prefix): t for key, t in state.items() if key.startswith(family.prefix)}
    told = {}
    for file, named in family.files.items():
        tensors, origins = named(own)
        torch.save({"state_dict": {name: tensor.detach() for name, tensor in tensors.items()}}, folder / file)
        written = {f"{family.prefix}{ours}": theirs for theirs, ours in origins.items()}
        others = [key for key in state if key not in written]
        skipped = {key: FOLDED if key.startswith(family.prefix) else NO_PLACE for key in others}
        told[file] = Keys(written, skipped).require_whole(state, tensors)
    return told


@torch.inference_mode()
def prove(trained: Trained, folder: Path) -> list[Agreement]:
    """Without a toolkit: strict keys, and the features at two sizes. Raises NotProven."""
    return FAMILIES[trained.run.backbone.family].prove_alone(trained, folder)


@torch.inference_mode()
def prove_in_toolkits(trained: Trained, folder: Path, python: str) -> list[Agreement]:
    """By the toolkits of another interpreter: every configuration file builds, loads and gives our maps.

    Raises NotProven, and NoToolkits when `python` lacks them.
    """
    family = FAMILIES[trained.run.backbone.family]
    images = {str(size): random_images(size) for size in family.sizes(trained)}
    try:
        outputs, _ = run_fresh(PROBE, images, "toolkit", str(folder.resolve()), python=python)
    except FreshProcessError as error:
        if error.code == MISSING:
            raise NoToolkits(f"in {python} {str(error).splitlines()[-1]}") from error
        raise NotProven(f"the toolkits do not build the folder: {error}") from error
    return _compared(trained, outputs, [name for name in all_configs(trained) if name not in BUILT_ALONE])


def _compared(trained: Trained, outputs: dict[str, Tensor], configs: list[str]) -> list[Agreement]:
    """What the maps of all configuration files agree in; NotProven where one of them gave none of ours."""
    family, agreements = FAMILIES[trained.run.backbone.family], []
    for size in family.sizes(trained):
        ours = family.maps(trained, size)
        for key, theirs in outputs.items():
            pixels, config, position = key.split("/")
            if pixels == str(size) and position in ours:
                where, theirs = f"map {position}", theirs.permute(0, 2, 3, 1)
                agreements.append(compare(f"{config}.py", where, size, ours[position], theirs))
    found = {(agreement.file, agreement.size) for agreement in agreements}
    for size in family.sizes(trained):
        if without := [name for name in configs if (name, size) not in found]:
            raise NotProven(f"at {size} px no map of {', '.join(without)} could be compared with ours")
    return agreements


def _internimage_sizes(trained: Trained) -> tuple[int, int]:
    return trained.run.views.size, trained.run.views.size + _config(trained).strides[-1]


def _config(trained: Trained):
    return INTERNIMAGE[trained.run.backbone.size]


def _internimage_maps(trained: Trained, size: int) -> Maps:
    maps = [one for name, one in own_features(trained, size).items() if name.startswith("stage ")]
    return {str(index - len(maps)): stage_map for index, stage_map in enumerate(maps)}


def _prove_internimage(trained: Trained, folder: Path) -> list[Agreement]:
    images = {str(size): random_images(size) for size in _internimage_sizes(trained)}
    try:
        outputs, _ = run_fresh(PROBE, images, "alone", str(folder.resolve()))
    except FreshProcessError as error:
        raise NotProven(f"the shipped module does not load the file: {error}") from error
    return _compared(trained, outputs, list(all_configs(trained)))


def _vit_sizes(trained: Trained) -> tuple[int, int]:
    return trained.run.views.size, trained.run.views.size + 4 * trained.towers.encoder.stride


def _vit_maps(trained: Trained, size: int) -> Maps:
    encoder = trained.towers.encoder
    tokens = with_resized_positions(encoder, random_images(size))[:, 1:]
    return {"-1": tokens.unflatten(1, (size // encoder.stride, -1))}


def _prove_vit(trained: Trained, folder: Path) -> list[Agreement]:
    encoder, agreements = trained.towers.encoder, []
    heads = encoder.vit.blocks[0].attn.num_heads
    for toolkit, file in VIT_FILES.items():
        state = torch.load(folder / file, weights_only=True)["state_dict"]
        for size in _vit_sizes(trained):
            images = random_images(size)
            try:
                theirs = openmmlab_vit.compute(state, toolkit, heads, images)
            except (KeyError, ValueError) as error:
                raise NotProven(f"{file} does not load: {error}") from error
            ours = with_resized_positions(encoder, images)
            agreements.append(compare(file, "class token and tokens", size, ours, theirs))
    return agreements


def how_to_load(trained: Trained) -> str:
    """For the model card."""
    family = trained.run.backbone.family
    lines = [
        "Complete configuration files for mmsegmentation 1.2 and mmdetection 3.3 lie beside the weights: UperNet "
        "and Mask2Former for ADE20K, Mask R-CNN and DINO for COCO and LVIS, with layer-wise decay. Data are read "
        "below `data/`, as the toolkits lay them out. Train with FOLDER as this folder's path:",
        "",
        "```bash",
        "PYTHONPATH=FOLDER mim train mmsegmentation FOLDER/upernet_ade20k.py --gpus 8 --launcher pytorch",
        "PYTHONPATH=FOLDER mim train mmdetection FOLDER/mask_rcnn_coco.py --gpus 8 --launcher pytorch",
        "```",
        "",
        LOADED[family],
    ]
    return "\n".join(lines)


LOADED = {
    "internimage": (
        "`internimage_openmmlab.py` registers InternImage in plain torch: no operator is built. It loads strictly, "
        "and runs without a toolkit too:\n\n"
        "```python\n"
        "import sys\n\n"
        'sys.path.insert(0, "FOLDER")\n'
        "from internimage_openmmlab import InternImage, load_strictly\n\n"
        "names = {}\n"
        'exec(open("FOLDER/upernet_ade20k.py").read(), names)\n'
        'arguments = names["model"]["backbone"]\n'
        'arguments.pop("type"), arguments.pop("init_cfg")\n'
        "backbone = InternImage(**arguments)\n"
        'load_strictly(backbone, "FOLDER/internimage.pth")\n'
        "```"
    ),
    "vit": (
        "`vit_mmseg.pth` has the names of mmsegmentation's VisionTransformer, `vit_mmpretrain.pth` those of "
        "mmpretrain's, which detection uses. Both toolkits load non-strictly: compare what they report with "
        "`keys.json`. They resize the position embedding without antialiasing, unlike pre-training, and have no "
        "relative positions.\n\n"
        "```python\n"
        "import torch\n\n"
        'state = torch.load("FOLDER/vit_mmseg.pth", weights_only=True)["state_dict"]\n'
        "```"
    ),
}

FAMILIES: dict[str, Family] = {
    "internimage": Family(
        "encoder.dcnv3.",
        ("internimage_network.py", "internimage_openmmlab.py", "layer_decay_openmmlab.py"),
        {INTERNIMAGE_FILE: lambda own: (own, {key: key for key in own})},
        _internimage_sizes,
        _internimage_maps,
        _prove_internimage,
    ),
    "vit": Family(
        "encoder.vit.",
        ("layer_decay_openmmlab.py", "simple_pyramid_openmmlab.py"),
        {file: (lambda own, toolkit=name: vit_tensors(own, toolkit)) for name, file in VIT_FILES.items()},
        _vit_sizes,
        _vit_maps,
        _prove_vit,
    ),
}
