"""Which folders can guide a pre-training? THE table of frozen encoders, and the guide that a folder holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.command import no_folder
from pretrain.initial.bounds import explained_by, require_statistics, weights_of
from pretrain.models.guides import huggingface, open_clip_vit, own, tokenizer
from pretrain.models.guides.guide import Guide, Opened

__all__ = ["Guide", "open_guide"]


@dataclass(frozen=True)
class Format:
    is_folder: Callable[[Path], bool]
    open_folder: Callable[[Path], Opened]
    weights: Callable[[Path], list[str]] | None = None
    """Names of the files of weights that it loads, where another program made them: they are judged before."""


# The first that knows a folder opens it: many hold a Hugging Face model and the same one for open_clip.
ENCODERS: dict[str, Format] = {
    "the --out folder of one of our runs": Format(own.is_run, own.open_run),
    "one of its folders checkpoints/step_N": Format(own.is_checkpoint, own.open_checkpoint),
    "a Hugging Face folder (config.json with model_type, model.safetensors)": Format(
        huggingface.is_folder, huggingface.open_folder, huggingface.weights_in
    ),
    "an open_clip folder (open_clip_config.json, open_clip_model.safetensors)": Format(
        open_clip_vit.is_folder, open_clip_vit.open_folder, open_clip_vit.weights_in
    ),
}
TOKENIZER = "a tokenizer of `python -m pretrain.codebook` (codebook.json)"


def open_guide(folder: Path) -> Guide:
    """The frozen encoder, or the tokenizer, that a folder holds: float32, on the CPU, in eval mode.

    Nothing is fetched and no code of the folder is run. FileNotFoundError without the folder; ValueError for a
    folder of no known kind, and for one that is damaged or holds no vision encoder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"guide {no_folder(folder)}: name one of {', '.join((*ENCODERS, TOKENIZER))}")
    if tokenizer.is_folder(folder):
        return tokenizer.open_folder(folder, _open_encoder)
    return Guide(_open_encoder(folder))


@torch.no_grad()
def _require_sound(opened: Opened) -> Opened:
    """ValueError for weights or pixel statistics that are not finite, and for an encoder that tells no two images
    apart: training would take them for a diverging or a perfect student.
    """
    bad = [name for name, weight in opened.tower.state_dict().items() if not weight.isfinite().all()]
    if bad:
        raise ValueError(
            f"guide {opened.folder} has {len(bad)} weights that are not finite, such as {bad[0]}: copy it again"
        )
    require_statistics(opened.mean, opened.std, f"guide {opened.folder}")
    side = opened.patch * opened.grid
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    first, second = (opened.tower(image[None]) for image in images)  # as much memory as of one was tried
    if torch.equal(first, second):
        raise ValueError(
            f"guide {opened.folder} gives two images the same features: it is not trained, or its weights are lost"
        )
    return opened


def _open_encoder(folder: Path) -> Opened:
    for known in ENCODERS.values():
        try:
            if known.is_folder(folder):
                if known.weights is None:
                    return _require_sound(known.open_folder(folder))
                with explained_by(weights_of(folder, known.weights(folder)), folder):
                    return _require_sound(known.open_folder(folder))
        except (ValueError, OSError):
            raise
        except Exception as error:  # of any library, for settings that it did not expect
            told = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise ValueError(
                f"guide {folder} cannot be opened ({told}): its settings do not fit, copy or save it again"
            ) from error
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    raise ValueError(
        f"guide {folder} holds {', '.join(found[:8]) or 'nothing'}{', ...' * (len(found) > 8)}, which is none of: "
        f"{'; '.join((*ENCODERS, TOKENIZER))}"
    )
