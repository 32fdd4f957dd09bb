"""How does a ViT run become the file that detectron2's ViTDet starts from?

Names of timm and MAE behind `backbone.net.`; the class token keeps its place in `pos_embed`. What ViTDet has besides,
`rel_pos_h/w` and the pyramid `simfp_*`, is new there. Source: detectron2's projects/ViTDet.
"""

from __future__ import annotations

from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pretrain.export.agreement import Agreement, compare, random_images
from pretrain.export.described import write_description
from pretrain.export.keys import Keys
from pretrain.export.names import NotProven
from pretrain.export.trained import Trained
from pretrain.models.backbone import BACKBONES

WEIGHTS, CONFIG = "vitdet.pth", "vitdet_config.py"
OURS, THEIRS = "encoder.vit.", "backbone.net."
NO_TOOLKIT = (
    "detectron2 itself is on no package registry and was not there: names and features were compared through the "
    "names that its ViTDet gives them, its own loader has not read the file"
)
CHECKOUT = "DETECTRON2"  # environment variable: the folder of detectron2's repository
BASE = "projects/ViTDet/configs/COCO/mask_rcnn_vitdet_b_100ep.py"  # there; model_zoo has no ViTDet
DEPTH_BETWEEN_GLOBAL = 4  # ViTDet: four blocks see the whole image, the last of each quarter
# By depth: layer-wise decay of the rate, drop path. projects/ViTDet/configs/COCO/mask_rcnn_vitdet_{b,l}_100ep.py.
SCHEDULES = {12: (0.7, 0.1), 24: (0.8, 0.4)}


def write(trained: Trained, folder: Path) -> dict[str, Keys]:
    """Writes {"model": tensors} and a lazy configuration; tells what became of every tensor."""
    state = trained.towers.state_dict()
    written = {name: THEIRS + name.removeprefix(OURS) for name in state if name.startswith(OURS)}
    assert not any(name.endswith(".gamma") for name in written), "ViTDet has no LayerScale: fold it"
    torch.save({"model": {theirs: state[ours] for ours, theirs in written.items()}}, folder / WEIGHTS)
    (folder / CONFIG).write_text(config(trained))
    write_description(trained, folder, WEIGHTS)
    skipped = {name: "no part of ViTDet's backbone" for name in state if name not in written}
    return {WEIGHTS: Keys(written, skipped).require_whole(state, written.values())}


def config(trained: Trained) -> str:
    """Overrides of detectron2's ViTDet configurations; pixels count from 0 to 255 there."""
    size, views = BACKBONES["vit"].sizes[trained.run.backbone.size], trained.run.views
    quarter = max(size.depth // DEPTH_BETWEEN_GLOBAL, 1)
    is_global = [index % quarter == quarter - 1 for index in range(size.depth)]
    mean, std = ([round(255 * value, 4) for value in values] for values in (views.mean, views.std))
    decay, drop_path = SCHEDULES.get(size.depth, SCHEDULES[12])
    return f'''"""ViTDet from these weights: `tools/lazyconfig_train_net.py --config-file FOLDER/{CONFIG}`.

Elsewhere than in the folder of detectron2's repository, {CHECKOUT}=PATH names that.
"""

import os
from functools import partial

from detectron2.config import LazyConfig
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate

_base_file = os.path.join(os.environ.get("{CHECKOUT}", "."), "{BASE}")
if not os.path.isfile(_base_file):
    raise FileNotFoundError(
        f"{{_base_file}} is no file: set {CHECKOUT} to the folder of detectron2's repository, which has projects/"
    )
dataloader, lr_multiplier, model, optimizer, train = LazyConfig.load(
    _base_file, ("dataloader", "lr_multiplier", "model", "optimizer", "train")
)
model.backbone.net.embed_dim = {size.width}
model.backbone.net.depth = {size.depth}
model.backbone.net.num_heads = {size.heads}
model.backbone.net.patch_size = {size.patch}
model.backbone.net.drop_path_rate = {drop_path}
model.backbone.net.window_block_indexes = {[i for i, one in enumerate(is_global) if not one]}
model.backbone.net.pretrain_img_size = {views.size}
model.backbone.net.pretrain_use_cls_token = True
model.pixel_mean = {mean}
model.pixel_std = {std}
model.input_format = "RGB"
optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, lr_decay_rate={decay}, num_layers={size.depth})
train.init_checkpoint = os.path.join(os.path.dirname(os.path.abspath(__file__)), "{WEIGHTS}")
'''


@torch.inference_mode()
def prove(trained: Trained, folder: Path) -> list[Agreement]:
    """Reads the names back into a fresh ViT, strictly, and compares what its last block gives at two sizes.

    Raises NotProven. That detectron2 itself reads the file is not proven: NO_TOOLKIT.
    """
    content = torch.load(folder / WEIGHTS, weights_only=True, mmap=True)["model"]
    size, views = BACKBONES["vit"].sizes[trained.run.backbone.size], trained.run.views
    model = VisionTransformer(img_size=views.size, num_classes=0, global_pool="", **size.arguments).eval()
    try:
        if not all(name.startswith(THEIRS) for name in content):
            raise RuntimeError(f"a name does not begin with {THEIRS}")
        model.load_state_dict(
            {name.removeprefix(THEIRS): tensor for name, tensor in content.items()}, assign=True
        )
    except RuntimeError as error:
        raise NotProven(f"{WEIGHTS} does not load strictly: {error}") from error
    agreements = []
    for side in (views.size, views.size + 2 * size.patch):
        images = random_images(side)
        ours, theirs = (outputs(vit, images) for vit in (trained.towers.encoder.vit, model))
        agreements += [compare(WEIGHTS, name, side, ours[name], theirs[name]) for name in ours]
    return agreements


def outputs(vit: VisionTransformer, images: Tensor) -> dict[str, Tensor]:
    """What ViTDet's pyramid is made of, and the tokens behind the last norm."""
    tokens, (last,) = vit.forward_intermediates(images, indices=1, norm=False)
    return {"last block": last.permute(0, 2, 3, 1).flatten(1, 2), "tokens": tokens}


def how_to_load(trained: Trained) -> str:
    """For the model card."""
    return "\n".join(
        (
            f"`{WEIGHTS}` is detectron2's `train.init_checkpoint`; `{CONFIG}` sets it, the backbone's sizes and the",
            "pixels' mean and deviation (RGB, 0 to 255) in its ViTDet configuration.",
            "",
            "```bash",
            f"{CHECKOUT}=PATH_OF_DETECTRON2 tools/lazyconfig_train_net.py --config-file FOLDER/{CONFIG}",
            "```",
            "",
            f"It goes out from {BASE}, which detectron2's repository holds and its package does not.",
            "It reports `rel_pos_h`, `rel_pos_w` and `simfp_*` as missing, which are new in ViTDet, and `cls_token`",
            "and `norm` as unused.",
            "",
            f"Not proven: {NO_TOOLKIT}.",
        )
    )
