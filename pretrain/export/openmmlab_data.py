"""Which data, schedules and loops do the papers train heads with? Parts of 3.x configuration files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]

SHORT_SIDES = tuple((side, 1333) for side in range(480, 801, 32))  # multi-scale training (arXiv 2005.12872)


@dataclass(frozen=True)
class Schedule:
    """Learning rates as in m3i's appendix and the published InternImage configurations."""

    batch: int  # images, over all GPUs
    per_gpu: int
    lr: float  # of the head, at that batch
    weight_decay: float
    layer_decay: float
    warmup: int  # iterations
    length: int  # iterations for segmentation, epochs for detection
    milestones: tuple[int, ...] = ()  # epochs after which the rate falls to a tenth
    clip: float | None = None


def optimisation(schedule: Schedule, depths: tuple[int, ...]) -> Config:
    """Optimizer, layer-wise decay and clipping; the batch that the rate is meant for."""
    wrapper: Config = {
        "type": "OptimWrapper",
        "optimizer": {
            "type": "AdamW",
            "lr": schedule.lr,
            "betas": (0.9, 0.999),
            "weight_decay": schedule.weight_decay,
        },
        "constructor": "BackboneLayerDecay",
        "paramwise_cfg": {"decay_rate": schedule.layer_decay, "depths": list(depths)},
    }
    if schedule.clip is not None:
        wrapper["clip_grad"] = {"max_norm": schedule.clip, "norm_type": 2}
    return {
        "optim_wrapper": wrapper,
        "auto_scale_lr": {"enable": False, "base_batch_size": schedule.batch},
    }


def _warmup(schedule: Schedule) -> Config:
    return {"type": "LinearLR", "start_factor": 1e-3, "by_epoch": False, "begin": 0, "end": schedule.warmup}


def iterations(schedule: Schedule) -> Config:
    """Linear decay over iterations, validation ten times."""
    every = schedule.length // 10
    decay = {
        "type": "PolyLR",
        "power": 1.0,
        "eta_min": 0.0,
        "begin": schedule.warmup,
        "end": schedule.length,
        "by_epoch": False,
    }
    return {
        "param_scheduler": [_warmup(schedule), decay],
        "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": schedule.length, "val_interval": every},
        "val_cfg": {"type": "ValLoop"},
        "test_cfg": {"type": "TestLoop"},
        **_runtime("mmseg", "Seg", by_epoch=False, every=every),
    }


def epochs(schedule: Schedule) -> Config:
    """Steps after epochs, validation after every one."""
    steps = {
        "type": "MultiStepLR",
        "by_epoch": True,
        "begin": 0,
        "end": schedule.length,
        "milestones": list(schedule.milestones),
        "gamma": 0.1,
    }
    return {
        "param_scheduler": [_warmup(schedule), steps],
        "train_cfg": {"type": "EpochBasedTrainLoop", "max_epochs": schedule.length, "val_interval": 1},
        "val_cfg": {"type": "ValLoop"},
        "test_cfg": {"type": "TestLoop"},
        **_runtime("mmdet", "Det", by_epoch=True, every=1),
    }


def _runtime(scope: str, kind: str, by_epoch: bool, every: int) -> Config:
    return {
        "default_scope": scope,
        "default_hooks": {
            "timer": {"type": "IterTimerHook"},
            "logger": {"type": "LoggerHook", "interval": 50, "log_metric_by_epoch": by_epoch},
            "param_scheduler": {"type": "ParamSchedulerHook"},
            "checkpoint": {
                "type": "CheckpointHook",
                "by_epoch": by_epoch,
                "interval": every,
                "max_keep_ckpts": 2,
            },
            "sampler_seed": {"type": "DistSamplerSeedHook"},
            "visualization": {"type": f"{kind}VisualizationHook"},
        },
        "env_cfg": {
            "cudnn_benchmark": scope == "mmseg",
            "mp_cfg": {"mp_start_method": "fork", "opencv_num_threads": 0},
            "dist_cfg": {"backend": "nccl"},
        },
        "visualizer": {
            "type": f"{kind}LocalVisualizer",
            "vis_backends": [{"type": "LocalVisBackend"}],
            "name": "visualizer",
        },
        "log_processor": {"by_epoch": by_epoch, "type": "LogProcessor", "window_size": 50},
        "log_level": "INFO",
        "load_from": None,
        "resume": False,
    }


def _loader(dataset: Config, sampler: str, batch: int, shuffle: bool) -> Config:
    return {
        "batch_size": batch,
        "num_workers": 4,
        "persistent_workers": True,
        "sampler": {"type": sampler, "shuffle": shuffle},
        "dataset": dataset,
    }


def ade20k(schedule: Schedule, crop: int) -> Config:
    """ADE20K of 2016 with 150 classes, below data/ade/ADEChallengeData2016."""
    scale, keep = (crop * 4, crop), {"keep_ratio": True}
    train = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "reduce_zero_label": True},
        {"type": "RandomResize", "scale": scale, "ratio_range": (0.5, 2.0), **keep},
        {"type": "RandomCrop", "crop_size": (crop, crop), "cat_max_ratio": 0.75},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "PhotoMetricDistortion"},
        {"type": "PackSegInputs"},
    ]
    test = [train[0], {"type": "Resize", "scale": scale, **keep}, train[1], train[-1]]

    def split(folder: str, pipeline: list[Config]) -> Config:
        return {
            "type": "ADE20KDataset",
            "data_root": "data/ade/ADEChallengeData2016",
            "data_prefix": {"img_path": f"images/{folder}", "seg_map_path": f"annotations/{folder}"},
            "pipeline": pipeline,
        }

    evaluation = _loader(split("validation", test), "DefaultSampler", 1, False)
    metric = {"type": "IoUMetric", "iou_metrics": ["mIoU"]}
    return {
        "train_dataloader": _loader(split("training", train), "InfiniteSampler", schedule.per_gpu, True),
        "val_dataloader": evaluation,
        "test_dataloader": evaluation,
        "val_evaluator": metric,
        "test_evaluator": metric,
    }


@dataclass(frozen=True)
class Boxes:
    """A detection data set in COCO's format."""

    type: str
    root: str
    train: tuple[str, str]  # annotations, folder of images
    val: tuple[str, str]
    metric: str
    classes: int
    per_image: int  # detections that are scored
    score: float  # below which none is


BOXES = {
    "coco": Boxes(
        "CocoDataset",
        "data/coco/",
        ("annotations/instances_train2017.json", "train2017/"),
        ("annotations/instances_val2017.json", "val2017/"),
        "CocoMetric",
        80,
        100,
        0.05,
    ),
    "lvis": Boxes(
        "LVISV1Dataset",
        "data/lvis_v1/",
        ("annotations/lvis_v1_train.json", ""),
        ("annotations/lvis_v1_val.json", ""),
        "LVISMetric",
        1203,
        300,
        1e-4,
    ),
}


def boxes(name: str, schedule: Schedule, jitter: int | None, has_masks: bool) -> Config:
    """A data set with multi-scale training, or with large-scale jitter to `jitter` pixels (arXiv 2012.07177)."""
    data = BOXES[name]
    load = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True, "with_mask": has_masks},
    ]
    if jitter is None:
        views = [{"type": "RandomChoiceResize", "scales": list(SHORT_SIDES), "keep_ratio": True}]
        test_scale = (1333, 800)
    else:
        size = (jitter, jitter)
        crop = {"type": "RandomCrop", "crop_type": "absolute_range", "crop_size": size}
        views = [
            {"type": "RandomResize", "scale": size, "ratio_range": (0.1, 2.0), "keep_ratio": True},
            {**crop, "recompute_bbox": True, "allow_negative_crop": True},
            {"type": "FilterAnnotations", "min_gt_bbox_wh": (1e-2, 1e-2)},
        ]
        test_scale = size
    train = [*load, {"type": "RandomFlip", "prob": 0.5}, *views, {"type": "PackDetInputs"}]
    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    test = [
        load[0],
        {"type": "Resize", "scale": test_scale, "keep_ratio": True},
        load[1],
        {"type": "PackDetInputs", "meta_keys": keys},
    ]

    def split(part: tuple[str, str], **options: Any) -> Config:
        place = {"data_root": data.root, "ann_file": part[0], "data_prefix": {"img": part[1]}}
        return {"type": data.type, **place, **options}

    filters = {"filter_empty_gt": jitter is None and has_masks, "min_size": 32}
    training = split(data.train, filter_cfg=filters, pipeline=train)
    if name == "lvis":  # repeat factor sampling (arXiv 1908.03195)
        training = {"type": "ClassBalancedDataset", "oversample_thr": 1e-3, "dataset": training}
    loader = _loader(training, "DefaultSampler", schedule.per_gpu, True)
    evaluation = _loader(split(data.val, test_mode=True, pipeline=test), "DefaultSampler", 1, False)
    metric = {"type": data.metric, "ann_file": data.root + data.val[0]}
    metric["metric"] = ["bbox", "segm"] if has_masks else "bbox"
    return {
        "train_dataloader": loader | {"batch_sampler": {"type": "AspectRatioBatchSampler"}},
        "val_dataloader": evaluation,
        "test_dataloader": evaluation,
        "val_evaluator": metric,
        "test_evaluator": metric,
    }
