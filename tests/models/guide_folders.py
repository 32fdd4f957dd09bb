"""What do the folders look like that guides are opened from? Tiny random models, saved by their own libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, ViTConfig, ViTImageProcessor, ViTModel

from pretrain.facts import DataFacts
from pretrain.recipes import load
from tests.evaluate.runs import write_run
from tests.fakes import shrink

Module = TypeVar("Module", bound=nn.Module)
SIZE, PATCH, WIDTH, SHARED = 32, 8, 32, 24  # pixels, pixels, of the encoders, of CLIP's common space
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)  # as in no published model
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": WIDTH, "intermediate_size": 64}


def random_views(num: int, size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (num, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def pixels(views: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return (views / 255 - shift) / scale


def shaken(build: Callable[[], Module], seed: int = 0) -> Module:
    """A module, the same every time, with all weights moved, so that none is idle."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = build()
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def clip_folder(folder: Path, *, with_processor: bool = True, **text: int) -> CLIPModel:
    config = CLIPConfig(
        text_config={**LAYERS, "vocab_size": 50, **text},
        vision_config={**LAYERS, "image_size": SIZE, "patch_size": PATCH},
        projection_dim=SHARED,
    )
    model = shaken(lambda: CLIPModel(config))
    model.save_pretrained(folder)
    if with_processor:
        CLIPImageProcessor(image_mean=list(MEAN), image_std=list(STD)).save_pretrained(folder)
    return model


def vit_folder(folder: Path, *, with_processor: bool = True) -> ViTModel:
    config = ViTConfig(**LAYERS, image_size=SIZE, patch_size=PATCH)
    model = shaken(lambda: ViTModel(config, add_pooling_layer=False))
    model.save_pretrained(folder)
    if with_processor:
        ViTImageProcessor(image_mean=list(MEAN), image_std=list(STD)).save_pretrained(folder)
    return model


def open_clip_folder(folder: Path, *, vocab: int = 50, **vision: object) -> nn.Module:
    folder.mkdir()
    tower = {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": 2, "head_width": 8, **vision}
    config = {
        "embed_dim": SHARED,
        "vision_cfg": tower,
        "text_cfg": {"context_length": 8, "vocab_size": vocab, "width": 32, "heads": 4, "layers": 1},
    }
    settings = {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    model = shaken(lambda: open_clip.model.CLIP(**config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def own_run(folder: Path) -> Path:
    """A run of ViT at 64 pixels and patches of 16, with checkpoints of steps 0 and 3."""
    return write_run(folder, shrink(load("rows.mim_feature")), DataFacts((), 0))
