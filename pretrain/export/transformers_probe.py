"""What does a process that has transformers and none of this project read from an exported InternImage?

python -I transformers_probe.py FOLDER IMAGES OUTPUTS: loads the folder by transformers' calls and writes, for the
images of a safetensors file, all outputs to another; the metadata says what each class reported on loading.
"""

import json
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging


def backbone_class(config, folder: str):
    """The class that AutoBackbone takes; its own from_pretrained knows names on a hub only, no folders."""
    chosen = get_class_from_dynamic_module(config.auto_map["AutoBackbone"].split("--")[-1], folder)
    with torch.device("meta"):  # only its class is wanted
        assert type(AutoBackbone.from_config(config, trust_remote_code=True)).__name__ == chosen.__name__
    return chosen


def report(told: dict) -> dict[str, list[str]]:
    return {name: sorted(map(str, keys)) for name, keys in told.items() if keys}


def main(folder: str, images_file: str, outputs_file: str) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    images, outputs, told = load_file(images_file), {}, {}
    common = {"trust_remote_code": True, "output_loading_info": True}

    model, info = AutoModel.from_pretrained(folder, **common)
    told["AutoModel"] = report(info)
    for name, pixels in images.items():
        out = model.eval()(pixels, output_hidden_states=True)
        outputs |= {f"{name}/stage {i + 1}": m for i, m in enumerate(out.hidden_states)}
        outputs[f"{name}/tokens"] = out.tokens
        if config.head == "clip_projector":
            outputs[f"{name}/embedding"] = out.pooler_output
    del model

    if config.has_classifier:
        model, info = AutoModelForImageClassification.from_pretrained(folder, **common)
        told["AutoModelForImageClassification"] = report(info)
        for name, pixels in images.items():
            outputs[f"{name}/logits"] = model.eval()(pixels).logits
        del model

    names = config.stage_names
    model, info = backbone_class(config, folder).from_pretrained(
        folder, out_features=names, output_loading_info=True
    )
    told["AutoBackbone"] = report(info)
    for name, pixels in images.items():
        maps = model.eval()(pixels).feature_maps
        outputs |= {f"{name}/backbone {stage}": m for stage, m in zip(names, maps, strict=True)}
    tensors = {name: tensor.contiguous() for name, tensor in outputs.items()}
    save_file(tensors, outputs_file, {"told": json.dumps(told)})


if __name__ == "__main__":
    main(*sys.argv[1:])
