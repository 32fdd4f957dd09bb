"""How does an InternImage run become a folder that transformers loads by remote code of ours, without a build?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pretrain.export.agreement import Agreement, compare, random_images
from pretrain.export.fresh_process import FreshProcessError, run_fresh
from pretrain.export.internimage import in_layout
from pretrain.export.keys import Keys
from pretrain.export.names import NotProven
from pretrain.export.own_features import own_features
from pretrain.export.preprocessor import write_preprocessor
from pretrain.export.trained import Trained
from pretrain.models import internimage_layouts as layouts
from pretrain.models.internimage import INTERNIMAGE

WEIGHTS = "model.safetensors"
REMOTE_CODE = Path(__file__).parent / "remote_code"
FILES = ("configuration_internimage.py", "modeling_internimage.py", "internimage_network.py")
PROBE = Path(__file__).parent / "transformers_probe.py"
AUTO_MAP = {
    "AutoConfig": "configuration_internimage.InternImageConfig",
    "AutoModel": "modeling_internimage.InternImageModel",
    "AutoBackbone": "modeling_internimage.InternImageBackbone",
    "AutoModelForImageClassification": "modeling_internimage.InternImageForImageClassification",
}


def write(trained: Trained, folder: Path) -> dict[str, Keys]:
    """Writes weights, config.json, preprocessor_config.json and the remote code; tells of every tensor."""
    tensors, keys = in_layout(trained, "huggingface", INTERNIMAGE[trained.run.backbone.size])
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config(trained), indent=1) + "\n")
    write_preprocessor(trained.run.views, folder)
    for name in FILES:
        shutil.copyfile(REMOTE_CODE / name, folder / name)
    return {WEIGHTS: keys}


def has_embedding(trained: Trained) -> bool:
    return trained.towers.has_embedding and trained.run.pool.kind == "attention"


def has_classifier(trained: Trained) -> bool:
    return has_embedding(trained) and trained.towers.has_categories


def config(trained: Trained) -> dict[str, Any]:
    """config.json: the published fields, and what the head is."""
    run = trained.run
    fields = layouts.config_to_published(INTERNIMAGE[run.backbone.size])
    fields |= {
        "architectures": ["InternImageModel"],
        "model_type": "internimage",
        "auto_map": AUTO_MAP,
        "use_clip_projector": has_embedding(trained),
        "head": "clip_projector" if has_embedding(trained) else "tokens",
        "token_width": run.backbone.token_width,
        "pooled_width": run.pool.width,
        "pool_heads": run.pool.heads,
        "has_classifier": has_classifier(trained),
        "torch_dtype": "float32",
    }
    if has_classifier(trained):
        fields["id2label"] = dict(enumerate(trained.facts.categories))
        fields["label2id"] = {name: index for index, name in enumerate(trained.facts.categories)}
    return fields


@torch.inference_mode()
def prove(trained: Trained, folder: Path) -> list[Agreement]:
    """Compares all outputs of the folder, as a process without this project computes them, at two sizes.

    Raises NotProven.
    """
    stride = INTERNIMAGE[trained.run.backbone.size].strides[-1]
    sizes = (trained.run.views.size, trained.run.views.size + stride)
    outputs = probe(folder, {str(size): random_images(size) for size in sizes})
    agreements = []
    for size in sizes:
        ours = dict(own_features(trained, size))
        ours |= {
            f"backbone stage{name.removeprefix('stage ')}": stage_map
            for name, stage_map in ours.items()
            if name.startswith("stage ")
        }
        found = {key.split("/")[1]: tensor for key, tensor in outputs.items() if key.startswith(f"{size}/")}
        for key, theirs in found.items():
            theirs = theirs.permute(0, 2, 3, 1) if "stage" in key else theirs
            agreements.append(compare(WEIGHTS, key, size, ours[key], theirs))
    return agreements


def probe(folder: Path, images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs of the folder by transformers in a fresh process; NotProven unless every class loads strictly."""
    try:
        outputs, told = run_fresh(PROBE, images, str(folder.resolve()))
    except FreshProcessError as error:
        raise NotProven(f"transformers does not load the folder: {error}") from error
    wrong = {name: keys for name, keys in told.items() if keys}
    if wrong:
        raise NotProven(f"transformers does not load the folder strictly: {wrong}")
    return outputs


def how_to_load(trained: Trained) -> str:
    """For the model card."""
    names = [f"stage{index + 1}" for index in range(INTERNIMAGE[trained.run.backbone.size].num_stages)]
    lines = [
        "```python",
        "from transformers import AutoConfig, AutoImageProcessor, AutoModel",
        "",
        'processor = AutoImageProcessor.from_pretrained("FOLDER")',
        'model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True)',
        'inputs = processor(image, return_tensors="pt")',
        "output = model(**inputs, output_hidden_states=True)",
        "tokens, embedding, maps = output.tokens, output.pooler_output, output.hidden_states",
        "```",
        "",
        "The three Python files beside the weights are plain torch: read them, then trust them. "
        + _said_of_heads(trained),
        "",
        "As backbone of a transformers head, for example UperNet. With a name on a hub "
        "`AutoBackbone.from_pretrained(NAME, trust_remote_code=True, out_features=...)` takes the place of the "
        "first two steps; transformers 5 refuses folders there:",
        "",
        "```python",
        "from transformers import AutoBackbone, AutoConfig, UperNetConfig, UperNetForSemanticSegmentation",
        "from transformers.dynamic_module_utils import get_class_from_dynamic_module",
        "",
        'InternImageBackbone = get_class_from_dynamic_module("modeling_internimage.InternImageBackbone", "FOLDER")',
        f'backbone = InternImageBackbone.from_pretrained("FOLDER", out_features={names})',
        "",
        'AutoConfig.register("internimage", type(backbone.config), exist_ok=True)',
        "AutoBackbone.register(type(backbone.config), InternImageBackbone, exist_ok=True)",
        "segmenter = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone.config, num_labels=150,",
        f"    auxiliary_in_channels=backbone.channels[{len(names) - 2}]))",
        "segmenter.backbone.load_state_dict(backbone.state_dict())",
        "```",
    ]
    return "\n".join(lines)


def _said_of_heads(trained: Trained) -> str:
    if has_classifier(trained):
        return (
            "`AutoModelForImageClassification` gives logits of the "
            f"{len(trained.facts.categories)} categories of the run."
        )
    embedding = "" if has_embedding(trained) else " `pooler_output` is the mean of the tokens."
    return (
        "`AutoModelForImageClassification` takes the folder with a new classifier: the run has none that "
        f"stands on attention pooling.{embedding}"
    )
