"""How does a run become a folder that transformers loads? By the backbone's family."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from pretrain.export import huggingface_internimage, huggingface_vit
from pretrain.export.agreement import Agreement
from pretrain.export.keys import Keys
from pretrain.export.trained import Trained

FAMILIES: dict[str, ModuleType] = {"internimage": huggingface_internimage, "vit": huggingface_vit}

INSTEAD = {
    "swin": ". transformers' SwinModel chooses its windows by each image's size, other ones than were trained; the "
    "folder of --to timm loads there as it is: AutoModel.from_pretrained(FOLDER) makes a TimmWrapperModel"
}


def write(trained: Trained, folder: Path) -> dict[str, Keys]:
    return FAMILIES[trained.run.backbone.family].write(trained, folder)


def prove(trained: Trained, folder: Path) -> list[Agreement]:
    return FAMILIES[trained.run.backbone.family].prove(trained, folder)


def how_to_load(trained: Trained) -> str:
    return FAMILIES[trained.run.backbone.family].how_to_load(trained)
