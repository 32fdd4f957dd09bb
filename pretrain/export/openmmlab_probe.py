"""What do mmsegmentation and mmdetection, or the shipped module alone, make of an exported folder?

python -I openmmlab_probe.py alone|toolkit FOLDER IMAGES OUTPUTS, in a process that has nothing of this project; or
`check [NAME ...]`, which ends quickly with MISSING unless the toolkits and those packages are found.
`alone` builds the backbone of every configuration file without any toolkit. `toolkit` builds every model whole, by
the toolkits' registries, with its optimizer, and finds all data classes. Both write the backbone's maps to OUTPUTS,
for the images of a safetensors file; the metadata says what was done, and what is missing.
"""

import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path

TOOLKITS = ("mmengine", "mmcv", "mmseg", "mmdet")
MISSING = 4  # exit code: this interpreter has no such toolkits


def require(names: Sequence[str]) -> None:
    """Ends the process, quickly, when one of the toolkits is not there."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            print(f"{name} is missing", file=sys.stderr)
            sys.exit(MISSING)


if __name__ == "__main__" and sys.argv[1] in ("check", "toolkit"):
    require(TOOLKITS)
    if sys.argv[1] == "check":
        require(sys.argv[2:])
        sys.exit()

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


class NoOperators(types.ModuleType):
    """In place of mmcv's compiled operators, which mmcv-lite lacks: they can be imported, and raise when called."""

    __file__ = __spec__ = None

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_, **__):
            raise RuntimeError(f"mmcv's operator {name} is not built")

        return missing


def alone(folder: Path, images: dict, outputs: dict) -> dict:
    """InternImage by the module in the folder; every configuration file's own arguments."""
    names: dict = {}
    module = importlib.import_module("internimage_openmmlab")
    files = sorted(folder.glob("*_*.py"))
    configs = [file for file in files if not file.stem.endswith(("_openmmlab", "_network"))]
    computed: list = []  # arguments and maps: a billion weights serve all files that say the same of them
    for file in configs:
        source = file.read_text().replace("{{ fileDirname }}", str(folder))
        exec(compile(source, str(file), "exec"), names := {})
        arguments = dict(names["model"]["backbone"])
        assert arguments.pop("type") == "InternImage"
        maps = next((maps for before, maps in computed if before == arguments), None)
        if maps is None:
            with torch.device("meta"):  # nothing is drawn that is read at once
                backbone = module.InternImage(**arguments)
            maps = maps_of(backbone, images)
            computed.append((arguments, maps))
        keep(maps, file.stem, outputs)
    return {"configs": [file.name for file in configs]}


def maps_of(backbone: torch.nn.Module, images: dict) -> dict:
    """By size, the maps of the backbone with the weights that its `init_cfg` names."""
    backbone.init_weights()
    backbone.eval()
    return {size: backbone(pixels) for size, pixels in images.items()}


def keep(maps: dict, name: str, outputs: dict) -> None:
    """As outputs of the configuration file `name`; files of tensors hold no tensor twice."""
    for size, several in maps.items():
        outputs |= {f"{size}/{name}/{index - len(several)}": m.clone() for index, m in enumerate(several)}


def toolkit(folder: Path, images: dict, outputs: dict) -> dict:
    """Every configuration file by the toolkits."""
    told: dict = {"configs": []}
    names = (*TOOLKITS, "mmpretrain") if (folder / "vit_mmpretrain.pth").exists() else TOOLKITS
    require(names)
    told["versions"] = {name: importlib.import_module(name).__version__ for name in names}
    told["has_operators"] = importlib.util.find_spec("mmcv._ext") is not None
    if not told["has_operators"]:
        sys.modules["mmcv._ext"] = NoOperators("mmcv._ext")
    from mmengine.config import Config

    for file in sorted(folder.glob("*_ade20k.py")) + sorted(folder.glob("*_coco.py")):
        build(Config.fromfile(str(file)), file, images, outputs)
        told["configs"].append(file.name)
    for file in sorted(folder.glob("*_lvis.py")):
        build(Config.fromfile(str(file)), file, {}, outputs)
        told["configs"].append(file.name)
    return told


def build(config, file: Path, images: dict, outputs: dict) -> None:
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS

    scope = config.default_scope
    importlib.import_module(f"{scope}.models")
    importlib.import_module(f"{scope}.datasets")
    registry = MODELS if scope == "mmseg" else importlib.import_module("mmdet.registry").MODELS
    init_default_scope(scope)
    require_types(config, scope)
    if scope == "mmseg":  # SyncBN needs a GPU; the statistics are not looked at
        config = type(config)(json.loads(json.dumps(config.to_dict()).replace('"SyncBN"', '"BN"')))
    model = registry.build(config.model)
    build_optim_wrapper(model, config.optim_wrapper)
    require_equal(model.backbone, config.model.backbone.init_cfg.checkpoint)
    keep(maps_of(model.backbone, images), file.stem, outputs)
    model.eval()
    for pixels in images.values():
        model.extract_feat(pixels)
        if file.stem.startswith("upernet"):
            assert model(pixels).shape[:2] == (len(pixels), config.model.decode_head.num_classes)


def require_equal(backbone: torch.nn.Module, checkpoint: str) -> None:
    """Every tensor of the file is one of the backbone and the reverse, and arrives bit by bit."""
    backbone.init_weights()
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    found = backbone.state_dict()
    if content.keys() != found.keys():
        raise ValueError(f"{checkpoint}: other tensors than wanted: {sorted(content.keys() ^ found.keys())}")
    different = [name for name, tensor in content.items() if not torch.equal(tensor, found[name])]
    if different:
        raise ValueError(f"{checkpoint}: {len(different)} tensors did not arrive, first {different[0]}")


def require_types(config, scope: str) -> None:
    """Every class of data, evaluation, schedule and hooks that the file names exists."""
    registry = importlib.import_module(f"{scope}.registry")
    parts = {
        "train_dataloader": ("DATASETS", "TRANSFORMS", "DATA_SAMPLERS"),
        "val_dataloader": ("DATASETS", "TRANSFORMS", "DATA_SAMPLERS"),
        "val_evaluator": ("METRICS",),
        "param_scheduler": ("PARAM_SCHEDULERS",),
        "default_hooks": ("HOOKS",),
        "train_cfg": ("LOOPS",),
        "visualizer": ("VISUALIZERS", "VISBACKENDS"),
    }
    importlib.import_module(f"{scope}.evaluation")
    importlib.import_module(f"{scope}.visualization")
    importlib.import_module(f"{scope}.engine")
    for key, registries in parts.items():
        for name in types_in(config[key]):
            if not any(getattr(registry, part).get(name) for part in registries):
                raise ValueError(f"{key}: {scope} {registries} has no {name!r}")


def types_in(value) -> list[str]:
    if isinstance(value, dict):
        own = [value["type"]] if "type" in value else []
        return own + [name for part in value.values() for name in types_in(part)]
    return [name for part in value for name in types_in(part)] if isinstance(value, list | tuple) else []


def main(mode: str, folder: str, images_file: str, outputs_file: str) -> None:
    torch.set_grad_enabled(False)
    sys.path.insert(0, folder)
    outputs: dict = {}
    images = load_file(images_file)
    told = {"alone": alone, "toolkit": toolkit}[mode](Path(folder), images, outputs)
    tensors = {name: tensor.contiguous() for name, tensor in outputs.items()}
    save_file(tensors, outputs_file, {"told": json.dumps(told)})


if __name__ == "__main__":
    main(*sys.argv[1:])
