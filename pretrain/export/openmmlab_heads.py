"""Which heads do mmsegmentation and mmdetection put on a backbone? Model dicts of their 3.x configuration files.

Numbers are those of the heads' papers: UperNet (arXiv 1807.10221), Mask2Former (2112.01527), Mask R-CNN (1703.06870),
DINO (2203.03605); arguments those of mmsegmentation 1.2 and mmdetection 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Config = dict[str, Any]

WIDTH = 256  # channels inside of every head but UperNet's
QUERIES = {"mask2former": 100, "dino": 900}
STEM_STRIDE = 4  # pixels a side of one position of the first map
RELU = {"type": "ReLU", "inplace": True}
GROUP_NORM = {"type": "GN", "num_groups": 32}


def upernet(widths: Sequence[int], classes: int, crop: int) -> Config:
    """UPerHead, and an FCN head on the second last map."""
    shared = {
        "num_classes": classes,
        "dropout_ratio": 0.1,
        "norm_cfg": {"type": "SyncBN", "requires_grad": True},
        "align_corners": False,
    }
    return {
        "decode_head": {
            "type": "UPerHead",
            "in_channels": list(widths),
            "in_index": list(range(len(widths))),
            "pool_scales": (1, 2, 3, 6),
            "channels": 512,
            "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
            **shared,
        },
        "auxiliary_head": {
            "type": "FCNHead",
            "in_channels": widths[-2],
            "in_index": len(widths) - 2,
            "channels": 256,
            "num_convs": 1,
            "concat_input": False,
            "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 0.4},
            **shared,
        },
        "train_cfg": {},
        "test_cfg": {"mode": "slide", "crop_size": (crop, crop), "stride": (crop * 2 // 3, crop * 2 // 3)},
    }


def _attention() -> Config:
    return {"embed_dims": WIDTH, "num_heads": 8, "attn_drop": 0.0, "proj_drop": 0.0, "batch_first": True}


def mask2former(widths: Sequence[int], classes: int, crop: int) -> Config:
    """Mask2FormerHead on all maps; its pixel decoder reads the last three."""
    levels = min(3, len(widths))
    sine = {"num_feats": WIDTH // 2, "normalize": True}
    costs = [
        {"type": "mmdet.ClassificationCost", "weight": 2.0},
        {"type": "mmdet.CrossEntropyLossCost", "weight": 5.0, "use_sigmoid": True},
        {"type": "mmdet.DiceCost", "weight": 5.0, "pred_act": True, "eps": 1.0},
    ]
    deformable = {"embed_dims": WIDTH, "num_heads": 8, "num_levels": levels, "num_points": 4}
    head = {
        "type": "Mask2FormerHead",
        "in_channels": list(widths),
        "strides": [STEM_STRIDE * 2**index for index in range(len(widths))],
        "feat_channels": WIDTH,
        "out_channels": WIDTH,
        "num_classes": classes,
        "num_queries": QUERIES["mask2former"],
        "num_transformer_feat_level": levels,
        "align_corners": False,
        "enforce_decoder_input_project": False,
        "positional_encoding": sine,
        "pixel_decoder": {
            "type": "mmdet.MSDeformAttnPixelDecoder",
            "num_outs": levels,
            "norm_cfg": GROUP_NORM,
            "act_cfg": {"type": "ReLU"},
            "positional_encoding": sine,
            "encoder": {
                "num_layers": 6,
                "layer_cfg": {
                    "self_attn_cfg": {**deformable, "dropout": 0.0, "batch_first": True},
                    "ffn_cfg": {
                        "embed_dims": WIDTH,
                        "feedforward_channels": 1024,
                        "num_fcs": 2,
                        "act_cfg": RELU,
                    },
                },
            },
        },
        "transformer_decoder": {
            "return_intermediate": True,
            "num_layers": 9,
            "layer_cfg": {
                "self_attn_cfg": _attention(),
                "cross_attn_cfg": _attention(),
                "ffn_cfg": {
                    "embed_dims": WIDTH,
                    "feedforward_channels": 2048,
                    "num_fcs": 2,
                    "act_cfg": RELU,
                },
            },
            "init_cfg": None,
        },
        "loss_cls": {
            "type": "mmdet.CrossEntropyLoss",
            "use_sigmoid": False,
            "loss_weight": 2.0,
            "reduction": "mean",
            "class_weight": [1.0] * classes + [0.1],
        },
        "loss_mask": {"type": "mmdet.CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 5.0},
        "loss_dice": {
            "type": "mmdet.DiceLoss",
            "activate": True,
            "naive_dice": True,
            "eps": 1.0,
            "loss_weight": 5.0,
        },
        "train_cfg": {
            "num_points": 112 * 112,
            "oversample_ratio": 3.0,
            "importance_sample_ratio": 0.75,
            "assigner": {"type": "mmdet.HungarianAssigner", "match_costs": costs},
            "sampler": {"type": "mmdet.MaskPseudoSampler"},
        },
    }
    test = {"mode": "slide", "crop_size": (crop, crop), "stride": (crop * 2 // 3, crop * 2 // 3)}
    return {"decode_head": head, "train_cfg": {}, "test_cfg": test}


def _assigner(positive: float, negative: float, low_quality: bool) -> Config:
    return {
        "type": "MaxIoUAssigner",
        "pos_iou_thr": positive,
        "neg_iou_thr": negative,
        "min_pos_iou": negative,
        "match_low_quality": low_quality,
        "ignore_iof_thr": -1,
    }


def _sampler(num: int, fraction: float, add_boxes: bool) -> Config:
    return {
        "type": "RandomSampler",
        "num": num,
        "pos_fraction": fraction,
        "neg_pos_ub": -1,
        "add_gt_as_proposals": add_boxes,
    }


def _box_coder(stds: list[float]) -> Config:
    return {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": stds}


def _extractor(size: int) -> Config:
    return {
        "type": "SingleRoIExtractor",
        "roi_layer": {"type": "RoIAlign", "output_size": size, "sampling_ratio": 0},
        "out_channels": WIDTH,
        "featmap_strides": [4, 8, 16, 32],
    }


def mask_rcnn(classes: int, per_image: int, score: float) -> Config:
    """RPN, box and mask heads on five maps of a pyramid."""
    proposals = {"nms_pre": 2000, "max_per_img": 1000, "nms": {"type": "nms", "iou_threshold": 0.7}}
    proposals |= {"min_bbox_size": 0}
    sigmoid = {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0}
    return {
        "rpn_head": {
            "type": "RPNHead",
            "in_channels": WIDTH,
            "feat_channels": WIDTH,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "scales": [8],
                "ratios": [0.5, 1.0, 2.0],
                "strides": [4, 8, 16, 32, 64],
            },
            "bbox_coder": _box_coder([1.0] * 4),
            "loss_cls": sigmoid,
            "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
        },
        "roi_head": {
            "type": "StandardRoIHead",
            "bbox_roi_extractor": _extractor(7),
            "bbox_head": {
                "type": "Shared2FCBBoxHead",
                "in_channels": WIDTH,
                "fc_out_channels": 1024,
                "roi_feat_size": 7,
                "num_classes": classes,
                "bbox_coder": _box_coder([0.1, 0.1, 0.2, 0.2]),
                "reg_class_agnostic": False,
                "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
                "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
            },
            "mask_roi_extractor": _extractor(14),
            "mask_head": {
                "type": "FCNMaskHead",
                "num_convs": 4,
                "in_channels": WIDTH,
                "conv_out_channels": WIDTH,
                "num_classes": classes,
                "loss_mask": {"type": "CrossEntropyLoss", "use_mask": True, "loss_weight": 1.0},
            },
        },
        "train_cfg": {
            "rpn": {
                "assigner": _assigner(0.7, 0.3, True),
                "sampler": _sampler(256, 0.5, False),
                "allowed_border": -1,
                "pos_weight": -1,
                "debug": False,
            },
            "rpn_proposal": proposals,
            "rcnn": {
                "assigner": _assigner(0.5, 0.5, True),
                "sampler": _sampler(512, 0.25, True),
                "mask_size": 28,
                "pos_weight": -1,
                "debug": False,
            },
        },
        "test_cfg": {
            "rpn": {**proposals, "nms_pre": 1000},
            "rcnn": {
                "score_thr": score,
                "nms": {"type": "nms", "iou_threshold": 0.5},
                "max_per_img": per_image,
                "mask_thr_binary": 0.5,
            },
        },
    }


def dino(classes: int, per_image: int) -> Config:
    """DINO with four scales; its neck gives four maps."""
    attention = {"embed_dims": WIDTH, "dropout": 0.0}
    ffn = {"embed_dims": WIDTH, "feedforward_channels": 2048, "ffn_drop": 0.0}
    deformable = {**attention, "num_levels": 4}
    return {
        "num_queries": QUERIES["dino"],
        "with_box_refine": True,
        "as_two_stage": True,
        "encoder": {"num_layers": 6, "layer_cfg": {"self_attn_cfg": deformable, "ffn_cfg": ffn}},
        "decoder": {
            "num_layers": 6,
            "return_intermediate": True,
            "layer_cfg": {
                "self_attn_cfg": {**attention, "num_heads": 8},
                "cross_attn_cfg": deformable,
                "ffn_cfg": ffn,
            },
            "post_norm_cfg": None,
        },
        "positional_encoding": {
            "num_feats": WIDTH // 2,
            "normalize": True,
            "offset": 0.0,
            "temperature": 20,
        },
        "bbox_head": {
            "type": "DINOHead",
            "num_classes": classes,
            "sync_cls_avg_factor": True,
            "loss_cls": {
                "type": "FocalLoss",
                "use_sigmoid": True,
                "gamma": 2.0,
                "alpha": 0.25,
                "loss_weight": 1.0,
            },
            "loss_bbox": {"type": "L1Loss", "loss_weight": 5.0},
            "loss_iou": {"type": "GIoULoss", "loss_weight": 2.0},
        },
        "dn_cfg": {
            "label_noise_scale": 0.5,
            "box_noise_scale": 1.0,
            "group_cfg": {"dynamic": True, "num_groups": None, "num_dn_queries": 100},
        },
        "train_cfg": {
            "assigner": {
                "type": "HungarianAssigner",
                "match_costs": [
                    {"type": "FocalLossCost", "weight": 2.0},
                    {"type": "BBoxL1Cost", "weight": 5.0, "box_format": "xywh"},
                    {"type": "IoUCost", "iou_mode": "giou", "weight": 2.0},
                ],
            }
        },
        "test_cfg": {"max_per_img": per_image},
    }
