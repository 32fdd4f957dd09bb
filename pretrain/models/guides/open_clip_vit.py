"""How does an open_clip folder become a frozen encoder? The tokens of its ViT in the space of images and texts."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.func import functional_call

from pretrain.initial.files import own_file, read_json
from pretrain.initial.one_image import try_image
from pretrain.models.guides.guide import Opened

CONFIG = "open_clip_config.json"
WEIGHTS = ("*.safetensors", "*.bin", "*.pth")  # open_clip chooses among these


def is_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def weights_in(folder: Path) -> list[str]:
    """Name of the file whose tensors open_clip loads; empty where there is none."""
    from open_clip.factory import (
        _find_checkpoint_in_dir,
    )  # the choice itself: another file would not be judged

    chosen = _find_checkpoint_in_dir(folder)
    return [Path(chosen).name] if chosen else []


def open_folder(folder: Path) -> Opened:
    """The vision tower in the folder, read without network and without running code of it.

    ValueError for towers other than open_clip's own ViT with one class token, and for unreadable weights.
    """
    import open_clip  # takes seconds, and other guides do not need it

    if "hf_model_name" in text_settings(folder):
        raise ValueError(
            f"{folder} has a text tower that open_clip fetches from a hub: name the same model as a Hugging Face "
            "folder"
        )
    try:
        with torch.device("meta"):  # what is too large is refused here, by those who count
            open_clip.create_model(f"local-dir:{folder}", load_weights=False, device="meta")
        model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True, weights_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{folder} cannot be read by open_clip ({error}): save {CONFIG} and the whole model's weights, as "
            "open_clip_model.safetensors, there"
        ) from error
    visual = model.visual
    is_square = isinstance(visual, open_clip.transformer.VisionTransformer) and visual.attn_pool is None
    is_square = is_square and len(set(visual.grid_size)) == 1 and len(set(visual.patch_size)) == 1
    if not is_square:
        raise ValueError(
            f"{folder} has a vision tower {type(visual).__name__}, and only open_clip's VisionTransformer with "
            "square patches and without attention pooling gives a token for each patch: name another model"
        )
    tower, patch, grid = OpenClipTower(visual), visual.patch_size[0], visual.grid_size[0]
    try_image(tower, patch * grid, folder)
    files = [CONFIG, *(path.name for form in WEIGHTS for path in folder.glob(form))]
    return Opened(
        tower,
        visual.output_dim,
        patch,
        grid,
        tuple(visual.image_mean),
        tuple(visual.image_std),
        folder,
        tuple(sorted(files)),
    )


class OpenClipTower(nn.Module):
    """open_clip's own image embedding, and all last tokens through the same norm and projection."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        visual.output_tokens = True  # beside the embedding, after the last norm, before the projection

    def forward(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n l d"]:
        # timm's resampling, as open_clip's own for weights of another size: bicubic, antialiased, in float32.
        grid = images.shape[-1] // self.visual.patch_size[0]
        positions = resample_abs_pos_embed(self.visual.positional_embedding[None], [grid, grid])[0]
        summary, tokens = functional_call(self.visual, {"positional_embedding": positions}, images)
        if self.visual.final_ln_after_pool:
            tokens = self.visual.ln_post(tokens)
        return torch.cat([summary[:, None], tokens @ self.visual.proj], dim=1)


def text_settings(folder: Path) -> dict[str, Any]:
    """What the folder tells of its text tower; ValueError without a model's settings."""
    try:
        told = read_json(own_file(folder, CONFIG))["model_cfg"].get("text_cfg", {})
        return dict(told)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG} holds no model_cfg ({error!r}): save the model's configuration again"
        ) from error
