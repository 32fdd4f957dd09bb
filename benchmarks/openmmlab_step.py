"""Do the exported configuration files train? One step each of UperNet, Mask2Former and DINO, by the toolkits.

python -I benchmarks/openmmlab_step.py FOLDER prints JSON: losses by configuration file. Run by openmmlab_loads.py in
the toolkits' environment; Mask R-CNN has no step without mmcv's compiled operators.
"""

import importlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "pretrain" / "export"))
sys.path.insert(0, sys.argv[1])

NoOperators = importlib.import_module("openmmlab_probe").NoOperators

SIZE = 320  # pixels: as many positions as DINO takes for its 900 queries
FILES = ("upernet_ade20k.py", "mask2former_ade20k.py", "dino_coco.py")


def segmentation_sample():
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo={"img_shape": (SIZE, SIZE), "pad_shape": (SIZE, SIZE)})
    sample.gt_sem_seg = PixelData(
        data=torch.randint(0, 5, (1, SIZE // 32, SIZE // 32)).repeat_interleave(32, 1)
    )
    sample.gt_sem_seg = PixelData(data=sample.gt_sem_seg.data.repeat_interleave(32, 2))
    return sample


def detection_sample():
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    shape = {"img_shape": (SIZE, SIZE), "batch_input_shape": (SIZE, SIZE), "ori_shape": (SIZE, SIZE)}
    sample = DetDataSample(metainfo=shape)
    boxes = torch.tensor([[10.0, 20.0, 100.0, 150.0], [60.0, 60.0, 300.0, 280.0]])
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([1, 7]))
    return sample


def step(file: Path) -> dict[str, float]:
    """Losses of one step; every parameter group has moved."""
    from mmengine.config import Config
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import init_default_scope

    config = Config.fromfile(str(file))
    config = Config(json.loads(json.dumps(config.to_dict()).replace('"SyncBN"', '"BN"')))
    scope = config.default_scope
    for part in ("models", "engine"):
        importlib.import_module(f"{scope}.{part}")
    init_default_scope(scope)
    model = importlib.import_module(f"{scope}.registry").MODELS.build(config.model)
    model.init_weights()
    model.train()
    stored = torch.load(config.model.backbone.init_cfg.checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.backbone.state_dict().items())
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    sample = segmentation_sample if scope == "mmseg" else detection_sample
    losses = model.loss(torch.randn(2, 3, SIZE, SIZE), [sample(), sample()])
    total, told = model.parse_losses(losses)
    wrapper.update_params(total)
    still = [name for name, p in model.backbone.named_parameters() if torch.equal(p, before[name])]
    assert torch.isfinite(total) and len(still) < len(before) // 10, (float(total), still)
    rates = sorted({group["lr"] for group in wrapper.param_groups})
    return {
        "loss": float(told["loss"]),
        "groups": len(wrapper.param_groups),
        "smallest_rate": rates[0],
        "largest_rate": rates[-1],
        "backbone_parameters_that_stayed": len(still),
    }


def main() -> None:
    torch.manual_seed(0)
    try:
        import mmcv._ext  # noqa: F401
    except ImportError:
        sys.modules["mmcv._ext"] = NoOperators("mmcv._ext")
    print(json.dumps({name: step(Path(sys.argv[1]) / name) for name in FILES}))


if __name__ == "__main__":
    main()
