"""Which configuration files make mmsegmentation and mmdetection train on an exported backbone? Complete ones.

UperNet and Mask2Former for ADE20K, Mask R-CNN and DINO for COCO and LVIS. Schedules of ViT are those of M3I's
appendix (arXiv 2211.09807); of InternImage-H those of its published configurations, which serve its other sizes too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.export import openmmlab_data as data
from pretrain.export import openmmlab_heads as heads
from pretrain.export.openmmlab_data import Config, Schedule
from pretrain.export.trained import Trained
from pretrain.models import internimage_layouts as layouts
from pretrain.models.backbone import BACKBONES
from pretrain.models.internimage import INTERNIMAGE

INTERNIMAGE_FILE = "internimage.pth"
VIT_FILES = {"mmseg": "vit_mmseg.pth", "mmpretrain": "vit_mmpretrain.pth"}
ADE20K_CLASSES = 150
LARGE = ("internimage_h", "internimage_g")  # trained on larger crops, and computing blocks again for memory
DROP_PATH = {"internimage_b": 0.4, "internimage_h": 0.5}  # published; other sizes: ours
SEGMENTATION = {  # by family; batch 16 on 8 GPUs
    "internimage": Schedule(16, 2, 2e-5, 0.05, 0.95, 1500, 160_000, clip=0.1),
    "vit": Schedule(16, 2, 1e-4, 0.05, 0.65, 1500, 160_000),
}
INSTANCES = {
    "internimage": Schedule(16, 2, 1e-4, 0.05, 0.95, 500, 36, (27, 33)),
    "vit": Schedule(64, 8, 1e-4, 0.1, 0.7, 250, 100, (89, 96)),
}
DETECTION = {  # DINO's own, layer-wise decay in place of a tenth of the rate
    "internimage": Schedule(16, 2, 1e-4, 1e-4, 0.95, 500, 12, (11,), clip=0.1),
    "vit": Schedule(16, 2, 1e-4, 1e-4, 0.7, 500, 12, (11,), clip=0.1),
}
LVIS_RATE = {"internimage": 1.0, "vit": 2.0}  # times the rate for COCO: M3I's appendix
JITTER = {"internimage": None, "vit": 1024}  # pixels of large-scale jitter; None: multi-scale training


@dataclass(frozen=True)
class Body:
    """One backbone as a toolkit takes it."""

    imports: tuple[str, ...]  # modules beside the configuration file, and of other toolkits
    backbone: Config
    neck: Config | None
    widths: tuple[int, ...]  # channels of the maps that the head sees


def pretrained(file: str) -> Config:
    return {"type": "Pretrained", "checkpoint": "{{ fileDirname }}/" + file}


def internimage(trained: Trained, first: int = 0) -> Body:
    """The stages of an InternImage from `first` on, without neck."""
    size = trained.run.backbone.size
    config = INTERNIMAGE[size]
    fields = layouts.config_to_published(config)
    del fields["use_clip_projector"]
    fields |= {"drop_path_rate": DROP_PATH.get(size, 0.2), "with_cp": size in LARGE}
    indices = tuple(range(first, config.num_stages))
    backbone = {"type": "InternImage", **fields, "out_indices": indices}
    backbone["init_cfg"] = pretrained(INTERNIMAGE_FILE)
    return Body(("internimage_openmmlab",), backbone, None, config.widths[first:])


def vit_in_mmseg(trained: Trained) -> Body:
    """mmsegmentation's VisionTransformer, four of its layers as a pyramid."""
    size = BACKBONES["vit"].sizes[trained.run.backbone.size]
    num_maps = min(4, size.depth)  # one for every level of the pyramid, or all levels take the last
    backbone = {
        "type": "VisionTransformer",
        "img_size": (trained.run.views.size,) * 2,
        "patch_size": size.patch,
        "embed_dims": size.width,
        "num_layers": size.depth,
        "num_heads": size.heads,
        "mlp_ratio": mlp_ratio(trained),
        "patch_bias": True,
        "drop_path_rate": 0.1,
        "out_indices": [size.depth * (index + 1) // num_maps - 1 for index in range(num_maps)],
        "norm_cfg": {"type": "LN", "eps": 1e-6},
        "final_norm": True,
        "interpolate_mode": "bicubic",
        "init_cfg": pretrained(VIT_FILES["mmseg"]),
    }
    return Body(("simple_pyramid_openmmlab",), backbone, pyramid(size.width, 0, 4), (heads.WIDTH,) * 4)


def vit_in_mmdet(trained: Trained, first: int, num_outs: int) -> Body:
    """mmpretrain's VisionTransformer and a simple pyramid of its last map."""
    size = BACKBONES["vit"].sizes[trained.run.backbone.size]
    backbone = {
        "type": "mmpretrain.VisionTransformer",
        "arch": {
            "embed_dims": size.width,
            "num_layers": size.depth,
            "num_heads": size.heads,
            "feedforward_channels": int(size.width * mlp_ratio(trained)),
        },
        "img_size": trained.run.views.size,
        "patch_size": size.patch,
        "drop_path_rate": 0.1,
        "out_type": "featmap",
        "out_indices": [size.depth - 1],
        "init_cfg": pretrained(VIT_FILES["mmpretrain"]),
    }
    imports, neck = ("simple_pyramid_openmmlab", "mmpretrain.models"), pyramid(size.width, first, num_outs)
    return Body(imports, backbone, neck, (heads.WIDTH,) * num_outs)


def pyramid(width: int, first: int, num_outs: int) -> Config:
    sizes = {"in_channels": width, "out_channels": heads.WIDTH, "num_outs": num_outs, "first": first}
    return {"type": "SimplePyramid", **sizes}


def mlp_ratio(trained: Trained) -> int:
    fc1 = trained.towers.encoder.vit.blocks[0].mlp.fc1
    return fc1.out_features // fc1.in_features


def depths(trained: Trained) -> tuple[int, ...]:
    size = BACKBONES[trained.run.backbone.family].sizes[trained.run.backbone.size]
    return size.depths if trained.run.backbone.family == "internimage" else (size.depth,)


def all_configs(trained: Trained) -> dict[str, Config]:
    """Every configuration file by its name."""
    configs = {}
    for name, head in (("upernet", heads.upernet), ("mask2former", heads.mask2former)):
        configs[f"{name}_ade20k.py"] = segmenter(trained, name, head)
    for name in data.BOXES:
        configs[f"mask_rcnn_{name}.py"] = mask_rcnn(trained, name)
        configs[f"dino_{name}.py"] = dino(trained, name)
    return configs


def segmenter(trained: Trained, name: str, head: Any) -> Config:
    run, family = trained.run, trained.run.backbone.family
    schedule, crop = SEGMENTATION[family], 896 if run.backbone.size in LARGE else 512
    body = internimage(trained) if family == "internimage" else vit_in_mmseg(trained)
    pixels = {"seg_pad_val": 255, "size": (crop, crop)}
    model = _model("EncoderDecoder", "SegDataPreProcessor", trained, body, pixels)
    model |= head(body.widths, ADE20K_CLASSES, crop)
    others = ("mmdet.models",) if name == "mask2former" else ()
    return {
        **_imports(body, others),
        "model": model,
        **data.ade20k(schedule, crop),
        **data.optimisation(schedule, depths(trained)),
        **data.iterations(schedule),
    }


def mask_rcnn(trained: Trained, name: str) -> Config:
    family, boxes = trained.run.backbone.family, data.BOXES[name]
    schedule = _for_data(INSTANCES[family], family, name)
    if family == "internimage":
        body = internimage(trained)
        fpn = {"type": "FPN", "in_channels": list(body.widths), "out_channels": heads.WIDTH, "num_outs": 5}
        body = Body(body.imports, body.backbone, fpn, body.widths)
    else:
        body = vit_in_mmdet(trained, first=0, num_outs=5)
    pixels = {"pad_mask": True, "pad_size_divisor": 32}
    model = _model("MaskRCNN", "DetDataPreprocessor", trained, body, pixels)
    return {
        **_imports(body),
        "model": model | heads.mask_rcnn(boxes.classes, boxes.per_image, boxes.score),
        **data.boxes(name, schedule, JITTER[family], has_masks=True),
        **data.optimisation(schedule, depths(trained)),
        **data.epochs(schedule),
    }


def dino(trained: Trained, name: str) -> Config:
    """Stages from stride 8 on, as published."""
    family, boxes = trained.run.backbone.family, data.BOXES[name]
    schedule = _for_data(DETECTION[family], family, name)
    if family == "internimage":
        body = internimage(trained, first=1)
        mapper = {"type": "ChannelMapper", "in_channels": list(body.widths), "kernel_size": 1}
        mapper |= {"out_channels": heads.WIDTH, "act_cfg": None, "norm_cfg": heads.GROUP_NORM, "num_outs": 4}
        body = Body(body.imports, body.backbone, mapper, body.widths)
    else:
        body = vit_in_mmdet(trained, first=1, num_outs=4)
    model = _model("DINO", "DetDataPreprocessor", trained, body, {"pad_size_divisor": 32})
    return {
        **_imports(body),
        "model": model | heads.dino(boxes.classes, boxes.per_image),
        **data.boxes(name, schedule, None, has_masks=False),
        **data.optimisation(schedule, depths(trained)),
        **data.epochs(schedule),
    }


def _for_data(schedule: Schedule, family: str, name: str) -> Schedule:
    times = LVIS_RATE[family] if name == "lvis" else 1.0
    return Schedule(**{**vars(schedule), "lr": schedule.lr * times})


def _imports(body: Body, others: tuple[str, ...] = ()) -> Config:
    modules = ["layer_decay_openmmlab", *body.imports, *others]
    return {"custom_imports": {"imports": modules, "allow_failed_imports": False}}


def _model(kind: str, preprocessor: str, trained: Trained, body: Body, pixels: Config) -> Config:
    views = trained.run.views
    statistics = {
        "mean": [round(255 * value, 3) for value in views.mean],
        "std": [round(255 * value, 3) for value in views.std],
    }
    model = {
        "type": kind,
        "data_preprocessor": {"type": preprocessor, **statistics, "bgr_to_rgb": True, **pixels},
        "backbone": body.backbone,
    }
    return model if body.neck is None else model | {"neck": body.neck}


def write_configs(trained: Trained, folder: Path) -> list[str]:
    """Names of the files written."""
    configs = all_configs(trained)
    for name, config in configs.items():
        task = name.removesuffix(".py").replace("_", " ")
        title = f'"""{task} on {trained.run.backbone.size} of this folder: PYTHONPATH=FOLDER."""'
        lines = [title, "", *(f"{key} = {render(value)}" for key, value in config.items())]
        (folder / name).write_text("\n".join(lines) + "\n")
    return list(configs)


def render(value: Any, indent: int = 0) -> str:
    """Python source as OpenMMLab writes it: dict(...) over several lines where one is too short."""
    if isinstance(value, dict):
        parts = [f"{key}={render(part, indent + 4)}" for key, part in value.items()]
        opening, closing = "dict(", ")"
    elif isinstance(value, list | tuple):
        parts = [render(part, indent + 4) for part in value]
        opening, closing = ("[", "]") if isinstance(value, list) else ("(", ",)" if len(value) == 1 else ")")
    else:
        return repr(value)
    line = opening + ", ".join(parts) + closing
    if len(line) + indent < 90 and "\n" not in line:
        return line
    inner = " " * (indent + 4)
    return (
        opening + "\n" + "".join(f"{inner}{part},\n" for part in parts) + " " * indent + closing.lstrip(",")
    )
