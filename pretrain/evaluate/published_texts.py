"""Which vectors does a published CLIP give to captions? Its own text tower and tokenizer, of the folder alone."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from pretrain.data.text import Captions
from pretrain.evaluate.published import PublishedEncoder
from pretrain.evaluate.zero_shot import Encode
from pretrain.models.guides import huggingface, open_clip_vit

# What a folder may tell its tokenizer: the others name files, or code.
TOLD = {"clean", "strip_sep_token", "language", "reduction_mask", "additional_special_tokens"}


NONE = "no text tower came with the images' one"


class NoTexts(Exception):
    """The folder gives captions no vectors; the message says why."""


Opened = tuple[nn.Module, Encode, int, int]  # tower, tokens of captions, numbers of tokens made and known


@dataclass(frozen=True)
class Texts:
    """A text tower, float32, in eval mode, on the CPU, and what makes its tokens."""

    tower: nn.Module  # tokens [n, length] and which are real -> [n, e], in the space of the images' summary
    encode: Encode


class EncoderWithTexts(nn.Module):
    """What is asked of towers, of a published encoder whose summary lies in the space of its own texts."""

    has_embedding = has_texts = True
    has_categories = False

    def __init__(self, encoder: PublishedEncoder, texts: nn.Module) -> None:
        super().__init__()
        self.encoder, self.texts = encoder, texts

    def embed_texts(
        self, tokens: Int[Tensor, "n length"], token_mask: Bool[Tensor, "n length"]
    ) -> Float[Tensor, "n e"]:
        """Captions as unit vectors in float32."""
        return F.normalize(self.texts(tokens, token_mask).float(), dim=-1)

    def project_images(self, summary: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
        """Summaries of images as unit vectors in float32."""
        return F.normalize(summary.float(), dim=-1)


def open_texts(folder: Path) -> Texts:
    """Of a folder whose images' tower `open_guide` has opened, and so judged; nothing is fetched, no code of it run.

    NoTexts where it has no text tower in the same space, no tokenizer, or one with more tokens than the tower.
    """
    opened = next((opened for is_folder, opened in KINDS if is_folder(folder)), None)
    if opened is None:
        raise NoTexts(NONE)
    tower, encode, num_tokens, num_known = opened(folder)
    if num_tokens > num_known:
        raise NoTexts(f"the tokenizer of {folder} has {num_tokens} tokens, its text tower {num_known}")
    if not all(bool(weight.isfinite().all()) for weight in tower.parameters()):
        raise NoTexts(f"the text tower of {folder} has weights that are not finite")
    return Texts(tower.requires_grad_(False).eval(), encode)


class _OfOpenClip(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, token_mask: Tensor) -> Tensor:
        return self.model.encode_text(tokens)


def _open_open_clip(folder: Path) -> Opened:
    import open_clip  # takes seconds, and others do not need it

    settings = open_clip_vit.text_settings(folder)
    told = settings.get("tokenizer_kwargs") or {}
    if not isinstance(told, dict) or told.keys() - TOLD:
        raise NoTexts(f"the tokenizer of {folder} is told {told!r}, of which only {sorted(TOLD)} is read")
    options: dict[str, Any] = {}
    if settings.get("hf_tokenizer_name"):
        options = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}", **options)
        tokens = tokenizer([""])
    except Exception as error:  # of any library, for damaged files
        raise NoTexts(f"the tokenizer of {folder} cannot be opened ({error!r})") from error
    model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True, weights_only=True)
    del model.visual
    num_tokens = len(tokenizer.tokenizer) if settings.get("hf_tokenizer_name") else tokenizer.vocab_size
    real = torch.ones(tokens.shape[1], dtype=torch.bool)  # its towers find the end of a text by themselves
    return _OfOpenClip(model), lambda caption: (tokenizer([caption])[0], real), num_tokens, model.vocab_size


class _OfHuggingFace(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.text, self.projection = model.text_model, model.text_projection

    def forward(self, tokens: Tensor, token_mask: Tensor) -> Tensor:
        return self.projection(self.text(input_ids=tokens, attention_mask=token_mask.long()).pooler_output)


def _open_huggingface(folder: Path) -> Opened:
    if huggingface.model_type_of(folder) != "clip":
        raise NoTexts(f"{NONE}, a {huggingface.model_type_of(folder)}")
    from transformers import CLIPModel

    try:
        model = huggingface.load(folder, CLIPModel)
        settings = model.config.text_config
        captions = Captions(folder, settings.max_position_embeddings)
    except (ValueError, OSError, SafetensorError, pickle.UnpicklingError) as error:
        raise NoTexts(str(error)) from error
    return _OfHuggingFace(model), captions.encode, captions.vocab_size, settings.vocab_size


# The first that knows the folder, in the order in which `open_guide` asks.
KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Opened]], ...] = (
    (huggingface.is_folder, _open_huggingface),
    (open_clip_vit.is_folder, _open_open_clip),
)
