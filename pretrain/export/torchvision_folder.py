"""How does a run become a folder that gives torchvision's detectors their backbone, without this project?"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pretrain.export.agreement import Agreement, compare, random_images
from pretrain.export.described import write_description
from pretrain.export.keys import Keys
from pretrain.export.names import NotProven
from pretrain.export.own_features import own_features
from pretrain.export.trained import Trained
from pretrain.models.internimage import INTERNIMAGE

WEIGHTS = "backbone.pth"
REMOTE_CODE = Path(__file__).parent / "remote_code"


@dataclass(frozen=True)
class Network:
    """What backbones of one family differ in."""

    file: str  # of remote_code
    prefix: str  # of the tensors in our towers
    maps: Callable[[Trained, int], dict[str, Tensor]]  # ours for images of that size, channels last


def internimage_maps(trained: Trained, size: int) -> dict[str, Tensor]:
    stages = (one for name, one in own_features(trained, size).items() if name.startswith("stage "))
    return {str(index): one for index, one in enumerate(stages)}


def vit_maps(trained: Trained, size: int) -> dict[str, Tensor]:
    grid = size // trained.towers.encoder.stride
    return {"0": own_features(trained, size)["tokens"].unflatten(1, (grid, grid))}


NETWORKS = {  # by backbone.family
    "internimage": Network("internimage_network", "encoder.dcnv3.", internimage_maps),
    "vit": Network("vit_network", "encoder.vit.", vit_maps),
}


def write(trained: Trained, folder: Path) -> dict[str, Keys]:
    """Writes weights, config.json and the code that reads them; tells what became of every tensor."""
    network, state = NETWORKS[trained.run.backbone.family], trained.towers.state_dict()
    written = {name: name.removeprefix(network.prefix) for name in state if name.startswith(network.prefix)}
    torch.save({"model": {theirs: state[ours] for ours, theirs in written.items()}}, folder / WEIGHTS)
    write_description(trained, folder, WEIGHTS, network=network.file)
    for name in ("hubconf.py", f"{network.file}.py"):
        shutil.copyfile(REMOTE_CODE / name, folder / name)
    skipped = {name: "no part of the feature maps" for name in state if name not in written}
    return {WEIGHTS: Keys(written, skipped).require_whole(state, written.values())}


@torch.inference_mode()
def prove(trained: Trained, folder: Path) -> list[Agreement]:
    """Loads the folder by torch.hub, strictly, and compares every map at two sizes.

    Raises NotProven.
    """
    try:
        body = torch.hub.load(str(folder), "body", source="local").eval()
    except RuntimeError as error:
        raise NotProven(f"torch.hub does not load the folder: {error}") from error
    family, backbone = trained.run.backbone.family, trained.towers.encoder
    step = (
        INTERNIMAGE[trained.run.backbone.size].strides[-1] if family == "internimage" else 2 * backbone.stride
    )
    agreements = []
    for side in (trained.run.views.size, trained.run.views.size + step):
        ours, theirs = NETWORKS[family].maps(trained, side), body(random_images(side))
        if ours.keys() != theirs.keys():
            raise NotProven(f"the folder gives the maps {list(theirs)} instead of {list(ours)}")
        agreements += [
            compare(WEIGHTS, f"map {name}", side, ours[name], theirs[name].permute(0, 2, 3, 1))
            for name in ours
        ]
    return agreements


def how_to_load(trained: Trained) -> str:
    """For the model card."""
    pyramid = (
        "an FPN over its stages"
        if trained.run.backbone.family == "internimage"
        else "ViTDet's simple pyramid"
    )
    return "\n".join(
        (
            "```python",
            "import json",
            "",
            "import torch",
            "from torchvision.models.detection import MaskRCNN",
            "",
            'told = json.load(open("FOLDER/config.json"))',
            'backbone = torch.hub.load("FOLDER", "backbone", source="local")     # runs hubconf.py of this folder',
            'model = MaskRCNN(backbone, 91, image_mean=told["image_mean"], image_std=told["image_std"])',
            "```",
            "",
            f"`backbone` is the trained network with {pyramid}, which is new and not trained: maps at strides of 4",
            "to 32 pixels and one more for anchors, `out_channels` each. `body` is the network alone. Torch and",
            "torchvision are all that is needed.",
        )
    )
