"""Which folders can guide a pre-training? THE table of frozen encoders, and the guide that a folder holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pretrain.models.guides import huggingface, open_clip_vit, own, tokenizer
from pretrain.models.guides.guide import Guide, Opened

__all__ = ["Guide", "open_guide"]


@dataclass(frozen=True)
class Format:
    is_folder: Callable[[Path], bool]
    open_folder: Callable[[Path], Opened]


# The first that knows a folder opens it: many hold a Hugging Face model and the same one for open_clip.
ENCODERS: dict[str, Format] = {
    "the --out folder of one of our runs": Format(own.is_run, own.open_run),
    "one of its folders checkpoints/step_N": Format(own.is_checkpoint, own.open_checkpoint),
    "a Hugging Face folder (config.json with model_type, model.safetensors)": Format(
        huggingface.is_folder, huggingface.open_folder
    ),
    "an open_clip folder (open_clip_config.json, open_clip_model.safetensors)": Format(
        open_clip_vit.is_folder, open_clip_vit.open_folder
    ),
}
TOKENIZER = "a tokenizer of `python -m pretrain.codebook` (codebook.json)"


def open_guide(folder: Path) -> Guide:
    """The frozen encoder, or the tokenizer, that a folder holds: float32, on the CPU, in eval mode.

    Nothing is fetched and no code of the folder is run. FileNotFoundError without the folder; ValueError for a
    folder of no known kind, and for one that is damaged or holds no vision encoder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"guide {folder} is no folder: name one of {', '.join((*ENCODERS, TOKENIZER))}"
        )
    if tokenizer.is_folder(folder):
        return tokenizer.open_folder(folder, _open_encoder)
    return Guide(_open_encoder(folder))


def _require_finite(opened: Opened) -> Opened:
    """ValueError for weights that are not finite: training would take them for a diverging student."""
    weights = opened.tower.state_dict().items()
    bad = [name for name, weight in weights if not weight.isfinite().all()]
    if bad:
        raise ValueError(
            f"guide {opened.folder} has {len(bad)} weights that are not finite, such as {bad[0]}: copy it again"
        )
    return opened


def _open_encoder(folder: Path) -> Opened:
    for known in ENCODERS.values():
        if known.is_folder(folder):
            return _require_finite(known.open_folder(folder))
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    raise ValueError(
        f"guide {folder} holds {', '.join(found[:8]) or 'nothing'}{', ...' * (len(found) > 8)}, which is none of: "
        f"{'; '.join((*ENCODERS, TOKENIZER))}"
    )
