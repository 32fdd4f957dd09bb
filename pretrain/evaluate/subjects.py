"""What is evaluated? The checkpoints of a run, one checkpoint, or an exported or published model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pretrain.checkpoint import load_towers
from pretrain.config import Mask, Run
from pretrain.data.text import Captions
from pretrain.evaluate.checkpoints import local_of, locate, weights_of
from pretrain.evaluate.published import is_published, open_published
from pretrain.evaluate.published_encoder import CONFIG, EncoderAlone, finite_tensors, require_same_pixels
from pretrain.evaluate.published_texts import NONE, EncoderWithTexts, NoTexts, open_texts
from pretrain.evaluate.zero_shot import Encode
from pretrain.export.safetensors_file import TOKENIZER, WEIGHTS
from pretrain.facts import DataFacts
from pretrain.initial.bounds import explained_by, require_pixels
from pretrain.initial.files import own_file, read_json
from pretrain.intact import verify
from pretrain.models.undrawn import undrawn
from pretrain.place import Place
from pretrain.recipes import load
from pretrain.towers import Towers

ENCODER_ALONE = (
    "of this model only the encoder is read: a run itself, or its export --to safetensors, brings embedding and "
    "category head, where its targets train them"
)


@dataclass(frozen=True)
class Subject:
    """An encoder, and what else came with it, opened."""

    name: str  # in the result
    run: Run  # its views and limits; of a published model only those are meant
    facts: DataFacts
    towers: nn.Module  # Towers or EncoderAlone, float32, eval mode, on the CPU
    encode: Encode | None  # captions to tokens; None without text
    without_text: str = ""  # why it has none, where that is known
    without_heads: str = ""  # why no embedding or category head of it is read, where that is known
    note: str = ""  # which features are measured, where they are not those that pre-training reads
    weights: str | None = (
        None  # SHA-256 of the teacher of a checkpoint, which its name does not tell from others
    )


@dataclass(frozen=True)
class Named:
    """A subject that is opened when its turn comes, where `place` is a URL after `bring` has brought it."""

    name: str
    place: Place
    open: Callable[[], Subject]


def find_subjects(
    place: Path, steps: Sequence[str], size: int | None = None, *, asked: str | None = None
) -> list[Named]:
    """What `place` names, each once; `steps` choose among the checkpoints of a run.

    `asked` is the option by which they were asked for, such as "--steps first"; None where nobody did. Raises
    FileNotFoundError and ValueError as `locate`, for a checkpoint that is not whole, and for steps that were asked of
    what is no run.
    """
    if size is not None:
        require_pixels(size, "--image-size", "give another number, or leave it out")
    is_model = place.is_file() or (place.is_dir() and is_published(place))
    if size is not None and place.is_dir() and not is_model:
        raise ValueError(f"--image-size {size} is of published models: {place} tells its own, leave it out")
    is_checkpoint = (place / "run.json").is_file() and (place / "teacher").is_dir()
    if asked and (is_checkpoint or is_model):
        raise ValueError(
            f"{asked} would be ignored, it chooses among the checkpoints of a run, and {place} is one "
            f"{'checkpoint' if is_checkpoint else 'model'}: leave it out, or name the run"
        )
    if is_checkpoint:
        problem = verify(place, hashes=False)
        if problem is not None:
            raise FileNotFoundError(f"{place} cannot be used, since {problem}: name another checkpoint")
        return [Named(place.name, place, partial(open_checkpoint, place))]
    if is_model:
        name = place.stem if place.is_file() else place.name
        return [Named(name, place, partial(open_model, place, size))]
    found = dict.fromkeys(locate(place, name) for name in steps)  # of a run's beginning the first is the last
    own = {step: local_of(place, step) for step in found}
    return [Named(folder.name, step, partial(open_checkpoint, folder)) for step, folder in own.items()]


def open_checkpoint(step: Path) -> Subject:
    run, facts, towers = load_towers(step)
    encode = Captions(step / "tokenizer", run.text.length).encode if facts.vocab_size else None
    return Subject(step.name, run, facts, towers, encode, weights=weights_of(step))


def open_model(place: Path, size: int | None) -> Subject:
    folder = place if place.is_dir() else place.parent
    if (folder / WEIGHTS).exists():
        return _open_towers(folder, place if place.is_file() else own_file(folder, WEIGHTS), size)
    found = open_published(place, size)
    base = load("m3i.vit_b16")
    mask = Mask(patch=max(found.views.size // 2, 1))  # nothing is masked
    name = f"none, published as {place.name}" + (f": {found.note}" if found.note else "")
    run = replace(base, name=name, views=found.views, mask=replace(mask, min_block=1))
    facts = DataFacts(categories=(), vocab_size=0)
    try:
        if found.guide is None:
            raise NoTexts(NONE)
        texts = open_texts(found.guide)
    except NoTexts as reason:
        alone = EncoderAlone(found.encoder)
        return Subject(place.name, run, facts, alone, None, str(reason), ENCODER_ALONE, found.note)
    both = EncoderWithTexts(found.encoder, texts.tower)
    return Subject(place.name, run, facts, both, texts.encode, without_heads=ENCODER_ALONE)


def _open_towers(folder: Path, file: Path, size: int | None) -> Subject:
    """An export --to safetensors: all of a run's towers, and its tokenizer. ValueError for what does not fit."""
    if size is not None:
        raise ValueError(f"--image-size {size} is of published models: {folder} tells its own, leave it out")
    tensors = finite_tensors(file)
    try:
        told = read_json(own_file(folder, CONFIG))
        run, facts = (
            kind.from_json(json.dumps(told[key])) for kind, key in ((Run, "run"), (DataFacts, "facts"))
        )
        require_pixels(run.views.size, folder / CONFIG, "export it again")
        with torch.device("meta"), explained_by(tensors, folder):
            Towers(run, facts)
        with undrawn():
            towers = Towers(run, facts).requires_grad_(False).eval()
        towers.fold_norms()
        towers.load_state_dict(tensors, strict=True)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{WEIGHTS} of {folder} does not fit its {CONFIG} ({error!r}): export it again"
        ) from error
    require_same_pixels(folder, run.views)
    return Subject(folder.name, run, facts, towers, _encode_of(folder / TOKENIZER, run, facts))


def _encode_of(folder: Path, run: Run, facts: DataFacts) -> Encode | None:
    """The export's tokenizer; None without one, ValueError for another than the texts' tower was trained with."""
    if not facts.vocab_size or not folder.is_dir():
        return None
    captions = Captions(folder, run.text.length)
    known = facts.sha256.get("tokenizer", captions.sha256)
    if captions.sha256 != known or captions.vocab_size > facts.vocab_size:
        raise ValueError(
            f"{folder} has {captions.vocab_size} tokens and SHA-256 {captions.sha256}, the tower of the texts was "
            f"trained with {facts.vocab_size} and {known}: export it again"
        )
    return captions.encode


def embed_with(
    towers: nn.Module, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The text tower on its device."""

    @torch.inference_mode()
    def embed(tokens: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        return towers.embed_texts(tokens.to(device), token_mask.to(device))

    return embed
